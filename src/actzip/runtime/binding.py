"""Models and examples as graphs and arrays; calls bound to a graph's inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.drawn import drawn
from actzip.runtime.origin import OnnxOrigin, Origin, TorchOrigin


def no_memory(batch: int) -> InputError:
    return InputError(f"not enough memory for batch {batch}")


def grows(graph: g.Graph, value: str) -> bool:
    shape = graph.shape(value)
    return bool(shape) and shape[0] == g.Sym()


def front_end(model: Any, example: Any, dynamic: bool) -> tuple[g.Graph, list[Any], Origin | None]:
    """The graph of what :func:`actzip.compile` is given, inputs for it, and what makes it for other sizes."""
    origin: Origin | None = None
    if isinstance(model, (str, os.PathLike)):
        from actzip.runtime.from_onnx import at_least_opset, from_onnx
        from actzip.runtime.onnx_file import load_onnx
        from actzip.runtime.open_sizes import settled

        proto = at_least_opset(load_onnx(Path(model)))
        graph = settled(proto, str(model), _shapes(example), lambda shapes: from_onnx(proto, shapes))
        shapes = [g.concrete(graph.shape(v), 1) for v in graph.inputs]
        origin = OnnxOrigin(proto, str(model), shapes) if dynamic else None
    elif isinstance(model, g.Graph):
        graph = model
        graph.validate()
    else:
        from torch import nn

        from actzip.runtime.tracing import capture

        if not isinstance(model, nn.Module):
            raise InputError(
                f"model must be an nn.Module, the path of an ONNX file or a Graph, not {type(model).__name__}"
            )
        if example is None:
            raise InputError("an nn.Module needs an example input: compile(model, example)")
        own = _own_graph(model, example)
        if own is None:
            graph = capture(model, example, dynamic=dynamic)
            origin = TorchOrigin(model, example, dynamic) if dynamic else None
        else:
            graph, origin = own if dynamic else (own[0], None)
    if example is not None:
        return graph, arrays_of(graph, example, "example"), origin
    rng = np.random.default_rng(0)
    values = [graph.values[v] for v in graph.inputs]
    arrays = [drawn(rng, g.concrete(v.shape, 1), v.dtype) for v in values]
    return graph, [np.asarray(a, np.float32) for a in arrays], origin


def _shapes(example: Any) -> Any:
    """Shapes of an example's tensors, by name or in order; None without one."""
    if example is None:
        return None
    from actzip.runtime.tracing import flat_inputs

    args, kwargs = flat_inputs(example)
    return {k: tuple(v.shape) for k, v in kwargs.items()} if kwargs else [tuple(a.shape) for a in args]


def _own_graph(model: Any, example: Any) -> tuple[g.Graph, Origin | None] | None:
    """The Graph that a module was made from (:func:`actzip.load`), with its parameters and
    thresholds of now, for the sizes of the example, and what makes it for others."""
    from actzip.runtime.to_torch import GraphNet, NetOrigin

    if isinstance(model, GraphNet) and (names := model.elsewhere()):
        raise UnsupportedError(f"{len(names)} nodes run with ONNX Runtime: {', '.join(names[:6])}")
    if not isinstance(model, GraphNet) or "_actzip_quantization" in model.__dict__:
        return None
    if model.origin is None:
        return model.to_graph(), None
    shapes = _shapes(example)
    if isinstance(shapes, dict):
        shapes = [shapes[v] for v in model.graph.inputs if v in shapes]
    fit = len(shapes) == model.arity  # else the binding says what is wrong
    return model.to_graph(shapes if fit else None), NetOrigin(model)


def memory_of(model: Any) -> list[tuple[int, int]]:
    """Where the parameters and buffers of a module lie: first byte and bytes of each."""
    if isinstance(model, (str, os.PathLike, g.Graph)):
        return []
    own = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return [(s.data_ptr(), s.nbytes()) for s in own]


def bind(graph: g.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What a call gives for the graph's inputs, in their order. Arguments are bound as the model
    binds them; those that are no tensors must be as they were when it was captured.

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
            what = f"{_shown(key)} is {_short(leaf)}"
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


def _shown(key: str) -> str:
    """The place ``['x'][0]`` of an argument as people write it: ``'x'``, ``'x[0]'``."""
    name, _, rest = key.removeprefix("['").partition("']")
    return f"'{name}{rest}'"


class _Nothing:
    """Equal to no argument."""


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if hasattr(value, "shape") else repr(value)


def array_of(name: str, x: Any, dtype: str = "float32") -> Any:
    """A float32 array in row-major order of a tensor or array of ``dtype``, without a copy where it
    is one already.

    Raises:
        InputError: of another kind or type, or not on the CPU.
    """
    if hasattr(x, "detach"):
        if x.device.type != "cpu":
            raise InputError(f"input {name!r} is on {x.device}; the engine runs on the CPU: give x.cpu()")
        if str(x.dtype) != f"torch.{dtype}":
            raise InputError(
                f"input {name!r} is {x.dtype}; the model takes {dtype}: give x.to(torch.{dtype})"
            )
        try:
            x = x.detach().resolve_neg().numpy()
        except (RuntimeError, TypeError) as error:
            layout = str(getattr(x, "layout", "")).removeprefix("torch.")
            raise InputError(
                f"input {name!r} ({type(x).__name__}, {layout}) is no dense tensor: {error}"
            ) from error
    elif not isinstance(x, np.ndarray):
        raise InputError(f"input {name!r} is of type {type(x).__name__}, not a tensor or array")
    if x.dtype != dtype:
        raise InputError(f"input {name!r} is {x.dtype}; the model takes {dtype}: give x.astype({dtype!r})")
    return np.asarray(x, np.float32, order="C")


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments."""
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def arrays_of(graph: g.Graph, example: Any, what: str) -> list[Any]:
    """``example`` as float32 arrays in the order of the graph's inputs."""
    try:
        args, kwargs = as_call(example)
        given = zip(graph.inputs, bind(graph, args, kwargs), strict=True)
        out = [array_of(v, a, graph.values[v].dtype) for v, a in given]
        check_batch(graph, batch_of(graph, out))
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    return out


def check_batch(graph: g.Graph, n: int) -> None:
    """
    Raises:
        InputError: the model does something else at this batch than what was captured.
    """
    least, most = graph.meta.get("batches", (1, None))
    if n < least or (most is not None and n > most):
        held = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(
            f"a batch of {n}: the model does something else there than at {held}, which it was "
            f"compiled for; compile it with an example of batch {n}"
        )


def batch_of(graph: g.Graph, arrays: list[Any]) -> int:
    batch: int | None = None
    for v, a in zip(graph.inputs, arrays, strict=True):
        batch = fit(v, graph.shape(v), tuple(a.shape), batch)
    return 1 if batch is None else batch


def fits(graph: g.Graph, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the graph takes inputs of these shapes, at a batch of its own."""
    batch: int | None = None
    try:
        for v, s in zip(graph.inputs, shapes, strict=True):
            batch = fit(v, graph.shape(v), s, batch)
        check_batch(graph, 1 if batch is None else batch)
    except InputError:
        return False
    return True


def resized(graph: g.Graph, shapes: Sequence[tuple[int, ...]], batch: bool = False) -> str:
    """The first input that has as many dimensions as the graph's and one but the first of another size,
    with ``batch`` the first too where it is no symbol; '' where there is none."""
    for v, got in zip(graph.inputs, shapes, strict=True):
        want = graph.shape(v)
        if len(want) != len(got) or 0 in got:
            continue
        first = 0 if batch else 1
        if any(w != d for w, d in list(zip(want, got, strict=True))[first:] if not isinstance(w, g.Sym)):
            return v
    return ""


def fit(name: str, want: g.Shape, got: tuple[int, ...], batch: int | None) -> int | None:
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
