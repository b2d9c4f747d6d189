"""``actzip.compile``: a network as a native plan, called with tensors or arrays."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actzip import _engine, cpu
from actzip.errors import ActzipWarning, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.cache import TuningCache
from actzip.runtime.explain import Explanation, explain
from actzip.runtime.lower import Lowered, lower
from actzip.runtime.passes import nonfinite_parameters, optimize
from actzip.runtime.tune import tune

__all__ = ["CompiledModel", "advice", "compile", "compile_graph", "peak_gflops"]

_FORMAT = 1
_MOST_THREADS = 1024
_advised = False


def compile(
    model: Any,
    example: Any = None,
    *,
    threads: int | None = None,
    calibration: Any = None,
    tune: bool = True,
    cache: bool = True,
    dynamic: bool = True,
    storage: str = "float32",
    pack: str = "auto",
) -> CompiledModel:
    """The network as one native plan that skips zeros: ``fast = compile(model, example)``, then ``fast(x)``.

    Args:
        model: an ``nn.Module`` (taken in eval mode; thresholds set by ``actzip.activations`` count), the path of an ONNX
            file, or a :class:`~actzip.runtime.graph.Graph`.
        example: an input, float32, (N, ...): tensor or numpy array; a tuple of several, a dict of keyword arguments. For
            ONNX and graphs it may be left out: random numbers are then calibrated with.
        threads: for each call; None: ``ACTZIP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else all CPUs of the process.
        calibration: typical inputs in the form of ``example`` (any batch), for the densities that decide how maps are
            stored and which kernels run; None: ``example``. Results do not depend on it, speed and memory do.
        tune: time kernels here at the example's batch, for some seconds the first time; False: decide from densities alone.
        cache: keep what was measured in the tuning cache (:mod:`actzip.runtime.cache`).
        dynamic: any batch size; False: the example's only.
        storage: ``float32`` or ``float16``: how packed maps keep their values. Maps of a model quantized by
            ``actzip.quantize`` (unsigned, one scale a map) are kept as 8- or 16-bit integers either way.
        pack: ``auto``: maps are packed where that is quicker, or where they are kept as integers; ``always``: wherever the
            engine can, for the least memory.

    Raises:
        InputError: model or example of a wrong kind, type or shape.
        UnsupportedError: the engine lacks an operator: named, with its place in the model.
        DataError: an ONNX file that is missing or damaged.
    """
    _advise()
    if storage not in ("float32", "float16"):
        raise InputError(f"storage must be 'float32' or 'float16', not {storage!r}")
    if pack not in ("auto", "always"):
        raise InputError(f"pack must be 'auto' or 'always', not {pack!r}")
    graph, inputs = _front_end(model, example, dynamic)
    graph.meta["storage"], graph.meta["pack"] = storage, pack
    graph = optimize(graph)
    shown = _batch(graph, inputs)
    if calibration is not None:
        inputs = _arrays(graph, calibration, "calibration")
    # zeros (what a tracer gives) say nothing about densities
    rng = np.random.default_rng(0)
    inputs = [a if a.any() else rng.standard_normal(a.shape, np.float32) for a in inputs]
    batch = _batch(graph, inputs)
    n_threads = _engine.default_threads() if threads is None or threads == 0 else threads
    if not isinstance(n_threads, int) or not 1 <= n_threads <= _MOST_THREADS:
        raise InputError(f"threads is {threads!r}; it must be a number from 1 to {_MOST_THREADS}, or None")
    keep_dense = {n.inputs[0] for n in nonfinite_parameters(graph) if n.inputs}
    store = TuningCache(_identity()) if cache and tune else None
    tuned = _tune(graph, inputs, batch, shown, n_threads, store, keep_dense, tune)
    sample = [
        np.asarray(a[:1], order="C") if _grows(graph, v) else a
        for v, a in zip(graph.inputs, inputs, strict=True)
    ]
    return CompiledModel(tuned.graph, tuned.variants, tuned.why, n_threads, sample)


def compile_graph(graph: g.Graph, **options: Any) -> CompiledModel:
    """:func:`compile` of a Graph without trials and cache, for one use: tests, single operators."""
    return compile(graph, **{"tune": False, "cache": False, **options})


def _tune(
    graph: g.Graph,
    inputs: list[Any],
    batch: int,
    shown: int,
    threads: int,
    store: Any,
    dense: set[str],
    trials: bool,
) -> Any:
    try:
        return tune(
            graph, inputs, batch, threads, trial_batch=shown, cache=store, keep_dense=dense, trials=trials
        )
    except MemoryError as error:
        raise InputError(f"not enough memory to compile at batch {batch}") from error


def _identity() -> dict[str, str]:
    from actzip import __version__

    info = {"cpu": str(_engine.cpu_model()), "isa": str(_engine.isa()), "version": __version__}
    kernels = getattr(_engine, "kernels", None)
    if kernels is not None:  # another set of kernels makes old winners meaningless
        info["kernels"] = ",".join(row["name"] for row in kernels.table(info["isa"]))
    return info


def _advise() -> None:
    """Once a process: on CPUs with matrix units dense low-precision engines are quicker than any float32 (a warning), with
    dot-product instructions they may be (a line in the log)."""
    global _advised
    if _advised:
        return
    _advised = True
    text = advice()
    if text and any(e.startswith("amx") for e in cpu.info()["extras"]):
        warnings.warn(text, ActzipWarning, stacklevel=3)
    elif text:
        logging.getLogger("actzip").info(text)


def advice() -> str:
    """Where this CPU has units that make dense bfloat16 or int8 quicker than float32: which, else ''."""
    extras = [
        e
        for e in _engine.cpu_extras()
        if e.startswith("amx") or e in ("avx512_bf16", "avx512_vnni", "avx_vnni")
    ]
    if not extras:
        return ""
    strong = [e for e in extras if e.startswith("amx")]
    kinds = []
    if any("bf16" in e for e in extras):
        kinds.append("bfloat16")
    if any("vnni" in e or "int8" in e for e in extras):
        kinds.append("int8")
    how = (
        "is quicker than any float32 path"
        if strong
        else "may be quicker than float32, at its loss of accuracy"
    )
    return f"this CPU has {', '.join(strong or extras)}: dense {' or '.join(kinds)} (OpenVINO, ONNX Runtime) {how}"


def _no_memory(batch: int) -> InputError:
    return InputError(f"not enough memory for batch {batch}")


def _grows(graph: g.Graph, value: str) -> bool:
    shape = graph.shape(value)
    return bool(shape) and shape[0] == g.Sym()


def _front_end(model: Any, example: Any, dynamic: bool) -> tuple[g.Graph, list[Any]]:
    if isinstance(model, (str, os.PathLike)):
        from actzip.runtime.onnx_import import from_onnx

        shapes = None
        if example is not None:
            from actzip.runtime.capture import flat_inputs

            args, kwargs = flat_inputs(example)
            shapes = (
                {k: tuple(v.shape) for k, v in kwargs.items()} if kwargs else [tuple(a.shape) for a in args]
            )
        graph = from_onnx(Path(model), shapes)
    elif isinstance(model, g.Graph):
        graph = model
        graph.validate()
    else:
        from torch import nn

        from actzip.runtime.capture import capture

        if not isinstance(model, nn.Module):
            raise InputError(
                f"model must be an nn.Module, the path of an ONNX file or a Graph, not {type(model).__name__}"
            )
        if example is None:
            raise InputError("an nn.Module needs an example input: compile(model, example)")
        graph = _own_graph(model) or capture(model, example, dynamic=dynamic)
    if example is not None:
        return graph, _arrays(graph, example, "example")
    rng = np.random.default_rng(0)
    return graph, [
        np.asarray(rng.standard_normal(g.concrete(graph.shape(v), 1), np.float32)) for v in graph.inputs
    ]


def _own_graph(model: Any) -> g.Graph | None:
    """The Graph that a module was made from (:func:`actzip.load`), with its parameters and thresholds of now."""
    from actzip.runtime.to_torch import GraphNet

    plain = isinstance(model, GraphNet) and "_actzip_quantization" not in model.__dict__
    return model.to_graph() if plain else None


def _bind(graph: g.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call gives for the graph's inputs, in their order. Arguments are bound as the model binds them; those that are
    no tensors must be as they were when it was captured.

    Raises:
        InputError: an argument too many, missing, unknown or changed.
    """
    from torch.utils import _pytree as pytree

    call = graph.meta.get("call")
    if call is None:  # an ONNX file, a Graph: the inputs in order, or by their names
        call = {"names": list(graph.inputs), "places": {f"[{v!r}]": v for v in graph.inputs}}
    names, var, places = call["names"], call.get("var"), call["places"]
    if len(args) == 1 and not kwargs and names and f"[{names[0]!r}]" in places:
        # as in `example`: a tuple or list is several inputs, a dict inputs by name
        only = args[0]
        if isinstance(only, dict):
            args, kwargs = (), dict(only)
        elif isinstance(only, (tuple, list)):
            args = tuple(only)
    given: dict[str, Any] = dict(zip(names, args, strict=False))
    rest = args[len(names) :]
    if var is not None:
        given[var] = tuple(rest)
    elif rest:
        raise InputError(f"{len(args)} inputs given; this model was compiled for {len(graph.inputs)}")
    for k, v in kwargs.items():
        if k in given:
            raise InputError(f"input {k!r} is given twice")
        given[k] = v
    found: dict[str, Any] = {}
    constants = call.get("constants", {})
    defaults = call.get("defaults", {})
    for path, leaf in pytree.tree_flatten_with_path(given)[0]:
        key = pytree.keystr(path)
        if key in places:
            found[places[key]] = leaf
        elif not (
            _same(leaf, constants[key]) if key in constants else _same(leaf, defaults.get(key, _Nothing))
        ):
            what = f"{key.strip('[]')} is {_short(leaf)}"
            if key in constants:
                raise InputError(f"argument {what}; this model was compiled with {constants[key]!r}")
            known = ", ".join(map(repr, graph.inputs))
            raise InputError(f"{what}: this model was compiled without it; its inputs are {known}")
    missing = [v for v in graph.inputs if v not in found]
    if missing:
        raise InputError(
            f"{len(found)} inputs given; this model was compiled for {len(graph.inputs)}: "
            f"{', '.join(map(repr, missing))} missing"
        )
    for key, value in constants.items():
        name = key.split("'")[1]
        if name not in given and not _same(defaults.get(key, _Nothing), value):
            raise InputError(f"argument {name!r} is missing; this model was compiled with {value!r}")
    return [found[v] for v in graph.inputs]


class _Nothing:
    """Equal to no argument."""


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if hasattr(value, "shape") else repr(value)


def _array(name: str, x: Any) -> Any:
    """A float32 array in row-major order of a tensor or array, without a copy where it is one already.

    Raises:
        InputError: of another kind or type, or not on the CPU.
    """
    if hasattr(x, "detach"):
        if x.device.type != "cpu":
            raise InputError(f"input {name!r} is on {x.device}; the engine runs on the CPU")
        try:
            x = x.detach().resolve_neg().numpy()
        except (RuntimeError, TypeError) as error:
            layout = str(getattr(x, "layout", "")).removeprefix("torch.")
            raise InputError(
                f"input {name!r} ({type(x).__name__}, {layout}) is no dense tensor: {error}"
            ) from error
    elif not isinstance(x, np.ndarray):
        raise InputError(f"input {name!r} is of type {type(x).__name__}, not a tensor or array")
    if x.dtype != np.float32:
        raise InputError(f"input {name!r} is {x.dtype}; the model takes float32")
    return np.asarray(x, order="C")


def _arrays(graph: g.Graph, example: Any, what: str) -> list[Any]:
    """``example`` as float32 arrays in the order of the graph's inputs."""
    try:
        args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
        if isinstance(example, (tuple, list)):
            args = tuple(example)
        out = [_array(v, a) for v, a in zip(graph.inputs, _bind(graph, args, kwargs), strict=True)]
        _batch(graph, out)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return out


def _batch(graph: g.Graph, arrays: list[Any]) -> int:
    batch: int | None = None
    for v, a in zip(graph.inputs, arrays, strict=True):
        batch = _fit(v, graph.shape(v), tuple(a.shape), batch)
    return 1 if batch is None else batch


def _fit(name: str, want: g.Shape, got: tuple[int, ...], batch: int | None) -> int | None:
    """The batch after checking one input's shape."""
    ok = len(want) == len(got)
    for w, d in zip(want, got, strict=False):
        if isinstance(w, g.Sym):
            ok = ok and d > 0 and d % w.mul == 0 and batch in (None, d // w.mul)
            batch = d // w.mul if d > 0 else batch
        else:
            ok = ok and w == d
    if not ok:
        expected = "(" + ", ".join(map(str, want)) + ")"
        least = ", N at least 1" if 0 in got else ""
        raise InputError(f"input {name!r} has shape {got}; this model was compiled for {expected}{least}")
    return batch


class CompiledModel:
    """A compiled network. ``fast(x)`` gives what the model gives, within float rounding.

    Takes torch tensors or numpy arrays (float32, the shapes of the example but for the batch) and gives the same kind; the
    outputs are structured as the model's. May be called from several threads at once; pickles (the plan is rebuilt
    where it is loaded, kernels as they were chosen if that CPU has them).

    Attributes:
        graph: the optimised :class:`~actzip.runtime.graph.Graph`, densities and storages in its values.
        threads: threads of a call.
    """

    def __init__(
        self, graph: g.Graph, variants: dict[str, str], why: dict[str, str], threads: int, sample: list[Any]
    ) -> None:
        self.graph = graph
        self.threads = threads
        self._variants = variants
        self._why = why
        self._sample = sample
        self._finish()

    def _finish(self) -> None:
        try:
            self._low: Lowered = lower(self.graph, self._variants)
        except UnsupportedError:
            if not self._variants:
                raise
            self._variants = {}  # chosen on a CPU with other kernels
            self._low = lower(self.graph)
        self._plan = self._low.plan
        graph = self.graph
        self._in = [graph.shape(v) for v in graph.inputs]
        self._out = [graph.shape(v) for v in graph.outputs]
        self._slots: list[Any] = graph.meta.get("out_slots", list(range(len(graph.outputs))))
        spec = graph.meta.get("out_spec")
        self._unflatten: Callable[[list[Any]], Any] | None = None
        if spec is not None:
            from torch.utils import _pytree as pytree

            tree = pytree.treespec_loads(spec)
            self._unflatten = lambda leaves: pytree.tree_unflatten(leaves, tree)
        # the usual case, one input (N, ...) and one output (N, ...): no loops in the call
        one = len(self._in) == 1 and len(self._out) == 1 and self._unflatten is None and self._slots == [0]
        self._tail: tuple[int, ...] | None = None
        if (
            one
            and self._in[0]
            and self._in[0][0] == g.Sym()
            and all(isinstance(d, int) for d in self._in[0][1:])
        ):
            self._tail = tuple(int(d) for d in self._in[0][1:])  # type: ignore[arg-type]
        self._run = self._plan.run
        # so many tensors by position are the inputs in order (-1: more is to be said about a call)
        call = graph.meta.get("call")
        k, order = len(graph.inputs), list(graph.inputs)
        if call is not None:
            names, var, places = call["names"], call["var"], call["places"]
            keys = [f"[{n!r}]" for n in names[:k]] + [f"[{var!r}][{i}]" for i in range(k - len(names))]
            order = [places.get(key) for key in keys] if not call["constants"] else []
        self._direct = k if order == graph.inputs else -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network.

        Raises:
            InputError: another number of inputs, type or shape than the example's (the batch may differ).
        """
        tail = self._tail
        if tail is not None and len(args) == 1 and not kwargs:
            x = args[0]
            if type(x) is np.ndarray:
                if x.dtype == np.float32 and x.shape[1:] == tail and x.shape[0] > 0:
                    n = x.shape[0]
                    try:
                        y = np.empty(g.concrete(self._out[0], n), np.float32)
                        self._run(
                            n, [x if x.flags.c_contiguous else np.ascontiguousarray(x)], [y], self.threads
                        )
                    except MemoryError as error:
                        raise _no_memory(n) from error
                    return y
            elif hasattr(x, "detach"):
                import torch

                if (
                    x.dtype is torch.float32
                    and x.shape[1:] == tail
                    and x.shape[0] > 0
                    and x.device.type == "cpu"
                    and x.layout is torch.strided
                    and not x.is_neg()
                ):
                    n = x.shape[0]
                    try:
                        t = torch.from_numpy(np.empty(g.concrete(self._out[0], n), np.float32))
                        self._run(n, [x.detach().contiguous().numpy()], [t.numpy()], self.threads)
                    except (MemoryError, RuntimeError) as error:
                        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's
                            raise _no_memory(n) from error
                        raise
                    return t
        return self._general(args, kwargs)

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) == self._direct and all(hasattr(a, "dtype") for a in args):
            leaves = list(args)
        else:
            leaves = _bind(self.graph, args, kwargs)
        outputs, as_torch = self.run(leaves, _tell=True)
        if as_torch:
            import torch

            outputs = [torch.from_numpy(o) for o in outputs]
        filled = [outputs[s] if isinstance(s, int) else s[0] for s in self._slots]
        if self._unflatten is not None:
            return self._unflatten(filled)
        return filled[0] if len(filled) == 1 else filled

    def run(self, inputs: list[Any], *, _tell: bool = False) -> Any:
        """Outputs as a flat list of arrays, for a flat list of inputs.

        Raises:
            InputError: as calling.
        """
        if len(inputs) != len(self._in):
            raise InputError(f"{len(inputs)} inputs given; this model was compiled for {len(self._in)}")
        batch = None
        for name, want, x in zip(self.graph.inputs, self._in, inputs, strict=True):
            shape = x.shape if hasattr(x, "shape") else np.shape(_array(name, x))
            batch = _fit(name, want, tuple(shape), batch)
        n = 1 if batch is None else batch
        try:
            arrays = [_array(name, x) for name, x in zip(self.graph.inputs, inputs, strict=True)]
            outputs = [np.empty(g.concrete(s, n), np.float32) for s in self._out]
            self._run(n, arrays, outputs, self.threads)
        except MemoryError as error:
            raise _no_memory(n) from error
        as_torch = any(hasattr(x, "detach") for x in inputs)
        return (outputs, as_torch) if _tell else outputs

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x`` (or on one image of the calibration)."""
        arrays = self._sample if x is None else _arrays(self.graph, x, "x")
        return explain(
            self.graph, self._low, self._why, arrays, _batch(self.graph, arrays), self.threads, runs, advice()
        )

    def arena_bytes(self, batch: int = 1) -> int:
        """Bytes of activations (the arena of one call) at this batch size."""
        return int(self._plan.arena_bytes(batch))

    def weight_bytes(self) -> int:
        """Bytes of packed weights and constants."""
        return int(self._plan.weight_bytes())

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{v}: ({', '.join(map(str, s))})" for v, s in zip(self.graph.inputs, self._in, strict=True)
        )
        packed = sum(v.storage == "packed" for v in self.graph.values.values())
        return (
            f"CompiledModel({self.graph.name}, {shapes}, {len(self.graph.nodes)} nodes, {packed} packed maps)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "graph": self.graph,
            "variants": self._variants,
            "why": self._why,
            "threads": self.threads,
            "sample": self._sample,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("format") != _FORMAT:
            raise InputError("a compiled model pickled by another version of actzip; compile it again")
        self.__init__(  # type: ignore[misc]
            state["graph"], state["variants"], state["why"], state["threads"], state["sample"]
        )


_peak_lock = threading.Lock()
_peaks: dict[str, float] = {}


def peak_gflops() -> float:
    """GFLOP/s of one core on the instruction set in use, measured once a process."""
    with _peak_lock:
        isa = str(_engine.isa())
        if isa not in _peaks:
            _peaks[isa] = float(_engine.peak_gflops(0.1))
        return _peaks[isa] if _peaks[isa] > 0 else math.nan
