"""``actzip.compile``: a network as a native plan, called with tensors or arrays."""

from __future__ import annotations

import copy
import dataclasses
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from actzip import heap
from actzip._native import _engine
from actzip.checks import flag, one_of, shown, whole
from actzip.errors import DataError, InputError, UnsupportedError, told
from actzip.progress import counted
from actzip.runtime import graph as g
from actzip.runtime.binding import (
    array_of,
    arrays_of,
    as_call,
    batch_of,
    bind,
    check_batch,
    fit,
    fits,
    front_end,
    grows,
    memory_of,
    no_memory,
    resized,
)
from actzip.runtime.cache import TuningCache
from actzip.runtime.drawn import drawn
from actzip.runtime.explain import Explanation, explain
from actzip.runtime.fallback import FallbackModel, check_fallback, quicker, untimed
from actzip.runtime.graph_data import all_to_data, from_data
from actzip.runtime.lower import Lowered, lower
from actzip.runtime.machine import advice, advise, identity, peak_gflops
from actzip.runtime.model_file import read_model_file, write_model_file
from actzip.runtime.origin import OnnxOrigin, Shapes
from actzip.runtime.parts import PartitionedModel, compile_parts
from actzip.runtime.passes import optimize
from actzip.runtime.rules import Rules, find_rules
from actzip.runtime.sizes import Resizer, Sizes, as_stored, owned, shelved, unstored
from actzip.runtime.tree import class_of, is_plain, plain_outputs, unflattener
from actzip.runtime.tune import Tuned, nonfinite_parameters, tune
from actzip.runtime.whole import file_behind

__all__ = ["CompiledModel", "advice", "compile", "compile_graph", "load", "peak_gflops"]

_FORMAT = 1
#: A size that came this often is tuned, in its next call, for so many seconds.
_OFTEN, _SECONDS = 100, 2.0
_MOST_THREADS = 1024


def compile(
    model: Any,
    example: Any = None,
    *,
    threads: int | None = None,
    calibration: Any = None,
    tune: bool | str = True,
    cache: bool = True,
    progress: bool | None = None,
    dynamic: bool = True,
    storage: str = "float32",
    pack: str = "auto",
    winograd: bool = True,
    parts: bool = True,
    fallback: bool | None = None,
) -> CompiledModel:
    """The network as one native plan that skips zeros: ``fast = compile(model, example)``, then ``fast(x)``.

    Args:
        model: an ``nn.Module`` (taken in eval mode; thresholds set by ``actzip.activations``
            count), the path of an ONNX file, or a :class:`~actzip.runtime.graph.Graph`.
        example: an input, float32, (N, ...): tensor or numpy array; a tuple of several, a dict of
            keyword arguments. For ONNX and graphs it may be left out: random numbers are then
            calibrated with.
        threads: for each call; None: ``ACTZIP_NUM_THREADS``, else ``OMP_NUM_THREADS``, else all
            CPUs of the process.
        calibration: typical inputs in the form of ``example`` (any batch), for the densities that
            decide how maps are stored and which kernels run; None: ``example``. Results do not
            depend on it, speed and memory do.
        tune: time kernels here at the example's batch, for some seconds the first time, the likely
            best first; ``"thorough"``: all that can be quickest; False: decide from densities alone.
        cache: keep what was measured in the tuning cache (:mod:`actzip.runtime.cache`).
        progress: show a bar with the layer at work; None: where standard error is a terminal.
        dynamic: any batch, height and width that the model takes (a Graph: any batch); False: the
            example's only.
        storage: ``float32`` or ``float16``: how packed maps keep their values. Maps of a model quantized by
            ``actzip.quantize`` (unsigned, one scale a map) are kept as 8- or 16-bit integers either way.
        pack: ``auto``: maps are packed where that is quicker, or where they are kept as integers;
            ``always``: wherever the engine can, for the least memory.
        winograd: 3x3 convolutions, and long ones along one axis, may be computed by Winograd's
            transforms where trials find them quicker and their error on the calibration input is at
            most 1e-5 of the layer's largest output; False: direct convolution only.
        parts: what the engine lacks of a model runs elsewhere; False: such a model is refused.
        fallback: time an ONNX file with ONNX Runtime too, by turns, for about a second, and let that
            run it where it takes less than 0.95 of the engine's time: the result is then a
            :class:`~actzip.runtime.fallback.FallbackModel`, and a warning has both times. Either way
            ``explain()`` has them. None: of quantized files, which the engine computes in float32
            and ONNX Runtime in integers; where nothing is timed (without ONNX Runtime, or with
            ``tune=False``) a warning says so. False: never.

    Raises:
        InputError: model or example of a wrong kind, type or shape.
        UnsupportedError: the engine lacks operators: all are named, with their places in the model.
            Of an ONNX file they run with ONNX Runtime where that is installed, of a module in
            PyTorch: the result is then a :class:`~actzip.runtime.parts.PartitionedModel` or
            :class:`~actzip.runtime.torch_parts.PartitionedModule`, and a warning says what runs where.
            Of a module that torch.export cannot capture (control flow that depends on numbers, as in
            detectors) the submodules that it can run on the engine:
            :class:`~actzip.runtime.torch_modules.ModuleOfParts`.
        DataError: an ONNX file that is missing or damaged.
    """
    one_of(storage, "storage", ("float32", "float16"))
    one_of(pack, "pack", ("auto", "always"))
    n_threads = _thread_count(threads)
    flags: dict[str, Any] = {
        "cache": cache,
        "dynamic": dynamic,
        "winograd": winograd,
        "parts": parts,
    }
    optional = {"progress": progress, "fallback": fallback}
    flags |= {k: v for k, v in optional.items() if v is not None}
    for name, value in flags.items():
        flag(value, name)
    advise()
    if not isinstance(tune, bool) and (not isinstance(tune, str) or tune != "thorough"):
        raise InputError(f"tune must be True, False or 'thorough', not {shown(tune)}")
    if fallback:
        check_fallback(model)
    chosen = _Chosen(n_threads, calibration, tune, cache, progress, dynamic, storage, pack, winograd)
    made: Any = _whole_or_parts(model, example, chosen, threads, parts)
    if fallback is None and made.on_engine and made.quantized and not isinstance(model, g.Graph):
        made.note = untimed(model, bool(tune))
        fallback = not made.note
        if made.note:
            told(made.note)
    if fallback and made.on_engine:
        made = quicker(made, model, example, n_threads)
    if isinstance(made, PartitionedModel) and not isinstance(made, FallbackModel):
        told(made.says())
    return cast(CompiledModel, made)


def _whole_or_parts(
    model: Any, example: Any, chosen: _Chosen, threads: int | None, parts: bool
) -> CompiledModel:
    """The network on the engine, or what the engine has of it there.

    Raises:
        InputError, UnsupportedError, DataError: as :func:`compile`.
    """
    try:
        return _whole(model, example, chosen)
    except UnsupportedError as error:
        if not parts or isinstance(model, g.Graph):
            raise
        options: dict[str, Any] = {
            "calibration": None,
            "storage": chosen.storage,
            "pack": chosen.pack,
            "winograd": chosen.winograd,
        }
        options |= {"threads": threads, "tune": chosen.tune, "cache": chosen.cache}
        source = model if isinstance(model, (str, os.PathLike)) else file_behind(model)
        if source is None:
            return cast(CompiledModel, _in_parts(model, example, options, chosen.threads, error))
        regions = Regions(options)
        return cast(CompiledModel, compile_parts(source, example, regions, chosen.threads, error))


@dataclass(frozen=True)
class _Chosen:
    """Options of :func:`compile`, checked."""

    threads: int
    calibration: Any
    tune: bool | str
    cache: bool
    progress: bool | None
    dynamic: bool
    storage: str
    pack: str
    winograd: bool


def _whole(model: Any, example: Any, chosen: _Chosen) -> CompiledModel:
    """The network on the engine alone.

    Raises:
        InputError, UnsupportedError, DataError: as :func:`compile`.
    """
    graph, inputs, origin = front_end(model, example, chosen.dynamic)
    graph.meta["storage"], graph.meta["pack"] = chosen.storage, chosen.pack
    graph.meta["winograd"] = chosen.winograd
    (graph,) = shelved(owned(optimize(graph), memory_of(model)))
    heap.give_back()
    batch = batch_of(graph, inputs)
    if chosen.calibration is not None:
        inputs = arrays_of(graph, chosen.calibration, "calibration")
    # zeros (what a tracer gives) say nothing about densities
    rng = np.random.default_rng(0)
    types = [graph.values[v].dtype for v in graph.inputs]
    inputs = [
        a if a.any() else np.asarray(drawn(rng, a.shape, t), np.float32)
        for a, t in zip(inputs, types, strict=True)
    ]
    tuned = _choose(graph, inputs, batch, chosen.threads, chosen.tune, chosen.cache, chosen.progress)
    if chosen.storage == "float16":
        tuned.graph.meta["float32_maps"] = too_great(tuned.graph, inputs)
    resizer = None if origin is None else Resizer(origin, graph, [a.shape for a in inputs])
    sample = _one_each(graph, inputs)
    made = CompiledModel(tuned.graph, tuned.variants, tuned.why, chosen.threads, sample, resizer=resizer)
    made._tunes = bool(chosen.tune)
    return made


def _in_plain_outputs(graph: g.Graph) -> g.Graph:
    """``graph``, or one whose outputs are in dicts, lists and tuples alone."""
    spec = graph.meta.get("out_spec")
    if is_plain(spec):
        return graph
    slots = graph.meta.get("out_slots", list(range(len(graph.outputs))))
    fields, order = plain_outputs(spec, len(slots))
    copied = copy.copy(graph)
    copied.meta = {**graph.meta, "out_spec": fields, "out_slots": [slots[i] for i in order]}
    return copied


def _one_each(graph: g.Graph, inputs: list[Any]) -> list[Any]:
    """One image of inputs that grow with the batch."""
    pairs = zip(graph.inputs, inputs, strict=True)
    return [np.asarray(a[:1], order="C") if grows(graph, v) else a for v, a in pairs]


def _in_parts(
    model: Any, example: Any, options: dict[str, Any], threads: int, refused: UnsupportedError
) -> Any:
    """A module that the engine does not have whole.

    Raises:
        UnsupportedError: ``refused``, where there is nothing to be had.
    """
    from torch import nn

    from actzip.runtime.torch_modules import module_by_submodules
    from actzip.runtime.torch_parts import module_in_parts
    from actzip.runtime.tracing import NotCaptured

    if not isinstance(model, nn.Module):
        raise refused
    if not isinstance(refused, NotCaptured):
        return module_in_parts(model, example, options, threads, refused)

    def compiled(part: nn.Module, given: Any) -> Any:
        try:
            return compile(part, given, **options, parts=False)
        except UnsupportedError as error:
            if isinstance(error, NotCaptured):
                raise
            return module_in_parts(part, given, options, threads, error)

    return module_by_submodules(model, example, compiled, threads, refused)


@dataclass
class Regions:
    """How the engine's parts of a model are compiled (:mod:`actzip.runtime.parts`): with
    ``options`` of :func:`compile`."""

    options: dict[str, Any]

    def __call__(self, graph: g.Graph, inputs: list[Any]) -> CompiledModel:
        """One region, calibrated on its inputs."""
        return compile(graph, tuple(inputs), **self.options)

    def without_trials(self) -> Regions:
        """The same for sizes that come while the model is in use."""
        return Regions({**self.options, "tune": False})


def too_great(graph: g.Graph, inputs: list[Any]) -> list[str]:
    """Packed maps with a value on ``inputs`` that float16 cannot hold; a warning names them."""
    import torch

    from actzip.runtime.interpret import interpret

    packed = [n.output for n in graph.nodes if graph.values[n.output].storage == "packed"]
    given = {v: torch.from_numpy(np.asarray(a)) for v, a in zip(graph.inputs, inputs, strict=True)}
    most = float(np.finfo(np.float16).max)
    maps = interpret(graph, given, packed)[1]
    found = [v for v in packed if v in maps and maps[v].numel() and float(maps[v].abs().max()) > most]
    if found:
        names = ", ".join(map(repr, found[:3]))
        told(f"{len(found)} maps hold values above {most:.0f}, float16's greatest, and stay float32: {names}")
    return found


def compile_graph(graph: g.Graph, **options: Any) -> CompiledModel:
    """:func:`compile` of a Graph without trials and cache, for one use: tests, single operators."""
    return compile(graph, **{"tune": False, "cache": False, **options})


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return int(_engine.default_threads())
    return whole(threads, "threads", 0, _MOST_THREADS) or int(_engine.default_threads())


def _choose(
    graph: g.Graph,
    inputs: list[Any],
    shown: int,
    threads: int,
    trials: bool | str | float,
    cache: bool,
    progress: bool | None = None,
) -> Tuned:
    """Storages and kernels for ``inputs``; trials are timed at the batch ``shown``."""
    keep_dense = {n.inputs[0] for n in nonfinite_parameters(graph) if n.inputs}
    store = TuningCache(identity()) if cache and trials else None
    batch = batch_of(graph, inputs)
    try:
        with counted("compiling", progress) as step:
            return tune(
                graph,
                inputs,
                batch,
                threads,
                trial_batch=shown,
                cache=store,
                keep_dense=keep_dense,
                trials=trials,
                winograd=graph.meta.get("winograd", True),
                progress=step,
            )
    except MemoryError as error:
        raise InputError(f"not enough memory to compile at batch {batch}") from error


def _fits(model: CompiledModel, shapes: Shapes) -> bool:
    return fits(model.graph, shapes)


def _has_shape(x: Any) -> bool:
    return hasattr(x, "shape")


def _size(shapes: list[g.Shape]) -> str:
    """The sizes of inputs without the batch: "3x480x640"."""
    return " and ".join("x".join(map(str, s[1:])) for s in shapes)


def _constant(x: Any, as_torch: bool) -> Any:
    """An output that is the same for every input; the caller's own."""
    if not isinstance(x, np.ndarray):
        return x
    if not as_torch:
        return x.copy()
    import torch

    return torch.from_numpy(x.copy())


class CompiledModel:
    """A compiled network. ``fast(x)`` gives what the model gives, within float rounding.

    Takes torch tensors or numpy arrays (float32, of any batch, height and width that the model
    takes) and gives the same kind; the outputs are structured as the model's. The first call at a
    new size makes a plan for it, which shares the weights; those of the last
    :data:`~actzip.runtime.sizes.MOST_SIZES` sizes are kept. May be called from several threads at
    once; pickles (the plan is rebuilt where it is loaded, kernels as they were chosen if that CPU
    has them).

    Attributes:
        graph: the optimised :class:`~actzip.runtime.graph.Graph`, densities and storages in its values.
        threads: threads of a call.
        note: what :func:`compile` measured with ONNX Runtime, or why it did not.
    """

    note = ""
    on_engine = True

    def __init__(
        self,
        graph: g.Graph,
        variants: dict[str, str],
        why: dict[str, str],
        threads: int,
        sample: list[Any],
        store: Any = None,
        *,
        resizer: Resizer | Rules | None = None,
        rests: bool = False,
    ) -> None:
        self.graph = graph
        self.threads = threads
        self._variants = variants
        self._why = why
        self._sample = sample
        self._store = _engine.WeightStore() if store is None else store
        self._resizer = resizer
        self._tunes = False
        self._calls = 0
        self._tuning = threading.Lock()
        self._ruled: tuple[Rules | None] | None = None
        self._sizes: Sizes[CompiledModel] | None = None if resizer is None else Sizes(self._resized, _fits)
        self._rests = rests
        if not rests:
            self._finish()

    def _finish(self) -> None:
        try:
            self._low: Lowered = lower(self.graph, self._variants, store=self._store)
        except UnsupportedError:
            if not self._variants:
                raise
            # chosen on a CPU with other kernels, or for another size
            there = lower(self.graph, want_variants=True, three=False).variants
            self._variants = {n: v for n, v in self._variants.items() if v in there.get(n, ())}
            self._low = lower(self.graph, self._variants, store=self._store)
        self._plan = self._low.plan
        graph = self.graph
        self._in = [graph.shape(v) for v in graph.inputs]
        self._out = [graph.shape(v) for v in graph.outputs]
        self._types = [np.dtype(graph.values[v].dtype) for v in graph.outputs]
        self._slots: list[Any] = graph.meta.get("out_slots", list(range(len(graph.outputs))))
        spec = graph.meta.get("out_spec")
        self._unflatten = None if spec is None else unflattener(spec)
        # the usual case, one input (N, ...) and one output (N, ...): no loops in the call
        one = (
            len(self._in) == 1
            and self._types == [np.float32]
            and graph.values[graph.inputs[0]].dtype == "float32"
            and self._unflatten is None
            and self._slots == [0]
            and "batches" not in graph.meta
        )
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
            InputError: another number of inputs, type or rank than the example's, or a size that does
                not fit the model.
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
                        raise no_memory(n) from error
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
                            raise no_memory(n) from error
                        raise
                    return t
        return self._general(args, kwargs)

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) == self._direct and all(hasattr(a, "dtype") for a in args):
            leaves = list(args)
        else:
            leaves = bind(self.graph, args, kwargs)
        return self._for(leaves)._called(leaves)

    def _called(self, leaves: list[Any]) -> Any:
        outputs, as_torch = self.run(leaves, _tell=True)
        if as_torch:
            import torch

            outputs = [torch.from_numpy(o) for o in outputs]
        return self.structured(outputs, as_torch)

    def structured(self, outputs: list[Any], as_torch: bool = False) -> Any:
        """What :meth:`run` gave, as the model itself gives it: dicts, lists, tuples, constants."""
        filled = [outputs[s] if isinstance(s, int) else _constant(s[0], as_torch) for s in self._slots]
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
        other = self._for(inputs)
        if other is not self:
            return other.run(inputs, _tell=_tell)
        batch = None
        for name, want, x in zip(self.graph.inputs, self._in, inputs, strict=True):
            shape = (
                x.shape if hasattr(x, "shape") else np.shape(array_of(name, x, self.graph.values[name].dtype))
            )
            batch = fit(name, want, tuple(shape), batch)
        n = 1 if batch is None else batch
        check_batch(self.graph, n)
        try:
            values = self.graph.values
            arrays = [array_of(v, x, values[v].dtype) for v, x in zip(self.graph.inputs, inputs, strict=True)]
            outputs = [np.empty(g.concrete(s, n), np.float32) for s in self._out]
            self._run(n, arrays, outputs, self.threads)
            outputs = [y.astype(t, copy=False) for y, t in zip(outputs, self._types, strict=True)]
        except MemoryError as error:
            raise no_memory(n) from error
        as_torch = any(hasattr(x, "detach") for x in inputs)
        return (outputs, as_torch) if _tell else outputs

    def _for(self, leaves: list[Any]) -> CompiledModel:
        """The model for inputs of the size of ``leaves``: itself, or one made for that size."""
        if self._sizes is None or len(leaves) != len(self._in) or not all(map(_has_shape, leaves)):
            return self
        shapes = [tuple(x.shape) for x in leaves]
        origin = getattr(self._resizer, "origin", None)
        name = resized(self.graph, shapes, isinstance(origin, OnnxOrigin))
        if not name:
            return self
        try:
            found = self._sizes.get(shapes)
            found._calls += 1
            if self._tunes and found._calls == _OFTEN and self._tuning.acquire(blocking=False):
                try:
                    found = self._tuned(found, leaves, shapes, _SECONDS, True)
                finally:
                    self._tuning.release()
            return found
        except (InputError, UnsupportedError) as error:
            at = self.graph.inputs.index(name)
            want = ", ".join(map(str, self._in[at]))
            raise InputError(
                f"input {name!r} has shape {shapes[at]}; this model was compiled for ({want}), and "
                f"another size does not fit: {error}"
            ) from error

    def _resized(self, shapes: Shapes) -> CompiledModel:
        """The model at another size: weights shared, storages and kernels as they were chosen."""
        assert self._resizer is not None
        plain = self._resizer.at(shapes)
        keep_dense = {n.inputs[0] for n in nonfinite_parameters(plain) if n.inputs}
        graph = as_stored(plain, self.graph, keep_dense)
        names = {n.name for n in graph.nodes}
        variants = {n: v for n, v in self._variants.items() if n in names}
        why = {n: f"as at {_size(self._in)}" for n in self._why if n in names}
        rng = np.random.default_rng(0)
        types = [graph.values[v].dtype for v in graph.inputs]
        arrays = [np.asarray(drawn(rng, s, t), np.float32) for s, t in zip(shapes, types, strict=True)]
        sample = _one_each(graph, arrays)
        return CompiledModel(graph, variants, why, self.threads, sample, self._store)

    def tune(self, x: Any, *, seconds: float | None = None, cache: bool = True) -> None:
        """Chooses storages and kernels for the size and the densities of ``x`` by trials, as compiling
        does for its example. Calls go on meanwhile; results change within float rounding.

        A size that came a hundred times is tuned by itself, for two seconds, in the call that comes
        next; not where the model was compiled with ``tune=False``.

        Args:
            x: an input, as of a call.
            seconds: of trials; None: some.
            cache: as of :func:`compile`.

        Raises:
            InputError: as calling.
        """
        if seconds is not None and (not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9):
            raise InputError(f"seconds must be a number of at least 0, not {shown(seconds)}")
        flag(cache, "cache")
        args, kwargs = as_call(x)
        leaves = bind(self.graph, args, kwargs)
        model = self._for(leaves)
        with self._tuning:
            self._tuned(model, leaves, [tuple(a.shape) for a in leaves], seconds, cache)

    def _tuned(
        self, model: CompiledModel, leaves: list[Any], shapes: Shapes, seconds: float | None, cache: bool
    ) -> CompiledModel:
        """``model``, itself or one for another size, after trials on ``leaves``."""
        plain, values = unstored(model.graph), model.graph.values
        arrays = [array_of(v, x, values[v].dtype) for v, x in zip(plain.inputs, leaves, strict=True)]
        trials = True if seconds is None else float(seconds)
        batch = batch_of(plain, arrays)
        found = _choose(plain, arrays, batch, self.threads, trials, cache, progress=False)
        sample = _one_each(plain, arrays)
        made = CompiledModel(found.graph, found.variants, found.why, self.threads, sample, self._store)
        if model is not self:
            assert self._sizes is not None
            made._calls = _OFTEN
            self._sizes.put(shapes, made)
            return made
        self.graph, self._variants, self._why, self._sample = made.graph, made._variants, made._why, sample
        self._low, self._plan, self._run = made._low, made._plan, made._run
        return self

    @property
    def quantized(self) -> bool:
        """Whether it is made of an ONNX file that computes in integers."""
        return bool(self.graph.meta.get("quantized"))

    def rest(self) -> None:
        """Gives the memory of packed weights and plans back; nothing runs until :meth:`wake`."""
        if self._sizes is not None:
            self._sizes = Sizes(self._resized, _fits)
        self._store = _engine.WeightStore()
        del self._low, self._plan, self._run
        self._rests = True
        heap.give_back()

    def wake(self) -> None:
        """The plan again, with the kernels that were chosen."""
        if self._rests:
            self._finish()
            self._rests = False

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x``, of any size (or on one image of the
        calibration)."""
        if x is not None:
            args, kwargs = as_call(x)
            other = self._for(bind(self.graph, args, kwargs))
            if other is not self:
                return other.explain(x, runs=runs)
        arrays = self._sample if x is None else arrays_of(self.graph, x, "x")
        found = explain(
            self.graph,
            self._low,
            self._why,
            arrays,
            batch_of(self.graph, arrays),
            self.threads,
            runs,
            advice(),
        )
        found.note = self.note
        return found

    def arena_bytes(self, batch: int = 1) -> int:
        """Bytes of activations and scratch (the arenas of one call) at this batch size."""
        return int(self._plan.arena_bytes(batch, self.threads))

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

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the model as one ``.actzip`` file of data, for :func:`actzip.runtime.load`: graph,
        weights, kernels chosen.

        Weights are in it twice: as the graph has them, for any CPU, and as this CPU's kernels read
        them, which a process maps instead of copying. Whole or not at all.

        Raises:
            DataError: the folder does not exist or cannot be written.
            UnsupportedError: outputs or arguments that are no data. Of outputs, a named tuple is saved
                as a tuple and an object of a class with fields as their dict, with a warning.
        """
        spec = self.graph.meta.get("out_spec")
        rules = self._rules()
        graphs = [
            _in_plain_outputs(x) for x in ([self.graph] if rules is None else [self.graph, rules.graph])
        ]
        (data, *more), arrays = all_to_data(graphs)
        sample = {f"sample.{i}": np.asarray(a) for i, a in enumerate(self._sample)}
        text = {
            "graph": data,
            "variants": self._variants,
            "why": self._why,
            "machine": identity(),
            "sample": list(sample),
            "sizes": None if rules is None else {**rules.to_data(), "graph": more[0]},
        }
        written = write_model_file(path, text, {**arrays, **sample}, self._store.used())
        if not is_plain(spec):
            told(
                f"{written} gives the fields of {class_of(spec)} in a dict or tuple: a file holds no classes"
            )
        return written

    def _rules(self) -> Rules | None:
        """What a file or a pickle needs for other sizes; None where that cannot be said."""
        if isinstance(self._resizer, Resizer):
            if self._ruled is None:
                heap.give_back()
                self._ruled = (find_rules(self._resizer),)
                heap.give_back()
            return self._ruled[0]
        return self._resizer

    def __getstate__(self) -> dict[str, Any]:
        sizes: Resizer | Rules | None = self._rules()
        if sizes is None and isinstance(self._resizer, Resizer) and self._resizer.origin.is_data:
            sizes = self._resizer
        return {
            "format": _FORMAT,
            "sizes": sizes,
            "tunes": self._tunes,
            "rests": self._rests,
            "note": self.note,
            "graph": self.graph,
            "variants": self._variants,
            "why": self._why,
            "threads": self.threads,
            "sample": self._sample,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("format") != _FORMAT:
            raise InputError("a compiled model pickled by another version of actzip; compile it again")
        graph, sizes = state["graph"], state.get("sizes")
        if sizes is None:
            (graph,) = shelved(graph)
        elif isinstance(sizes, Resizer):
            graph, sizes.plain = shelved(graph, sizes.plain)
        else:
            graph, other = shelved(graph, sizes.graph)
            sizes = dataclasses.replace(sizes, graph=other)
        self.__init__(  # type: ignore[misc]
            graph,
            state["variants"],
            state["why"],
            state["threads"],
            state["sample"],
            resizer=sizes,
            rests=state.get("rests", False),
        )
        self._tunes = state.get("tunes", False)
        self.note = state.get("note", "")


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, tune: bool = True, cache: bool = True
) -> CompiledModel:
    """The model that ``fast.save(path)`` wrote: mapped, not copied, where this CPU is of the kind
    it was compiled on.

    Args:
        path: an ``.actzip`` file. Nothing in it is executed.
        threads: as of :func:`compile`.
        tune: on another kind of CPU (or version of actzip) storages and kernels are chosen again:
            by trials of some seconds on the inputs kept in the file, once for the tuning cache;
            False: from densities alone.
        cache: as of :func:`compile`.

    Raises:
        DataError: missing, damaged, no ``.actzip`` file, or written by a newer actzip.
    """
    text, tensors = read_model_file(path)
    n_threads = _thread_count(threads)
    try:
        arrays = tensors.folder("graph")
        graph = from_data(text["graph"], arrays)
        sample = [arrays[k] for k in text["sample"]]
        batch = batch_of(graph, sample)
        variants = {str(k): str(v) for k, v in text["variants"].items()}
        why = {str(k): str(v) for k, v in text["why"].items()}
        here = text["machine"] == identity()
        sizes = text.get("sizes")
        rules = sizes and Rules.from_data(from_data(sizes["graph"], arrays), sizes)
    except (KeyError, TypeError, AttributeError, InputError, DataError) as error:
        raise DataError(f"{path}: the description of the model is damaged: {error}") from error
    if not here:
        found = _choose(graph, sample, batch, n_threads, tune, cache)
        return CompiledModel(found.graph, found.variants, found.why, n_threads, sample, resizer=rules)
    tensors.release("graph")  # its numbers were checked; kernels read the packed ones
    store = _engine.WeightStore()
    for key, array in tensors.folder("packed").items():
        store.lend(key, array)
    made = CompiledModel(graph, variants, why, n_threads, sample, store, resizer=rules)
    made._tunes = tune
    return made
