"""How an ``nn.Module`` becomes a program of torch.export, and a :class:`~actzip.runtime.graph.Graph`.

The model is exported in eval mode with a symbolic batch and decomposed to a small set of aten
operators; those with a node of their own (hard-swish, layer norm, attention ...) are kept whole.
What cannot be exported, or would not do again what it did, is refused with the reason;
:mod:`actzip.runtime.from_torch` makes the graph of the program.
"""

from __future__ import annotations

import inspect
import io
import itertools
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from actzip.activations import eval_mode
from actzip.errors import InputError, UnsupportedError, told
from actzip.quantize.model import marked
from actzip.runtime import graph as g
from actzip.runtime.effects import (
    State,
    calls_at,
    changes_that_count,
    same_calls,
    untouched,
)
from actzip.runtime.from_torch import from_exported
from actzip.runtime.registry import TORCH

__all__ = ["NotWhole", "Traced", "capture", "flat_inputs", "graph_of", "plain_attention", "symbolic", "trace"]


#: Types of tensors that a model may be given: float32, and those whose every number it can hold.
INPUT_TYPES = (torch.float32, torch.float16, torch.uint8, torch.int8, torch.int16, torch.bool)


_TAKEN = "the engine takes float32, float16, uint8, int8, int16 and bool"


_WHOLE = (torch.int32, torch.int64)  # which float32 does not hold: what reads them runs elsewhere


def flat_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example`` as positional and keyword arguments: a tuple or list is several inputs, a dict keywords.

    numpy arrays become tensors.
    """
    example = pytree.tree_map_only(np.ndarray, _tensor, example)
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _tensor(a: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(a, order="C"))  # a copy: the array may be read-only
    except (TypeError, ValueError) as error:
        raise InputError(f"example of type {a.dtype}; {_TAKEN}") from error


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention modules are traced as their parts inside the block, not as one fused call."""
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def capture(model: nn.Module, example: Any, *, dynamic: bool = True) -> g.Graph:
    """Exports ``model`` on ``example`` and builds its Graph (eval mode). The model, its buffers,
    hooks and the random generators are afterwards as before.

    Args:
        example: a tensor or array (N, ...) of :data:`INPUT_TYPES`; a tuple of several; a dict of
            keyword arguments.
        dynamic: keep the batch symbolic. Where the model itself fixes it (a reshape to a constant,
            say) the graph is made for the example's batch.

    Raises:
        InputError: ``model`` or ``example`` is of another kind, or the model does not run on it.
        UnsupportedError: an operator or type that the engine does not have, with its place in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    seen: set[int] = set()

    def distinct(t: Tensor) -> Tensor:  # torch.export takes one tensor given twice for one input
        again = id(t) in seen
        seen.add(id(t))
        return t.clone() if again else t

    args, kwargs = pytree.tree_map_only(Tensor, distinct, flat_inputs(example))
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors:
        raise InputError("example holds no tensor")
    for t in tensors:
        if t.dtype not in (*INPUT_TYPES, *_WHOLE):
            hint = "; give float32, and the model as model.float()" if t.is_floating_point() else ""
            raise InputError(f"example of type {t.dtype}; {_TAKEN}{hint}")
        if t.device.type != "cpu":
            raise InputError(f"example on {t.device}; the engine runs on the CPU")
    for name, p in model.named_parameters():
        if p.device.type != "cpu":
            raise InputError(f"parameter {name!r} is on {p.device}; the engine runs on the CPU")
    whole = next((t.dtype for t in tensors if t.dtype in _WHOLE), None)
    if whole is not None:
        with eval_mode(model), torch.no_grad():
            _check_runs(model, args, kwargs)
        raise NotWhole(f"an input of type {whole}; {_TAKEN}")
    batch = tensors[0].shape[0] if tensors[0].ndim else None
    if batch is not None and batch < 1:
        raise InputError(f"example of shape {tuple(tensors[0].shape)} has no image")
    with eval_mode(model), plain_attention(), torch.no_grad(), marked(model):
        traced = trace(model, args, kwargs, batch, dynamic=dynamic)
        if traced.left:
            told(f"the model writes into {', '.join(traced.left)} as it runs; compiled it does not")
        try:
            return graph_of(model, traced)  # reads the parameters
        except UnsupportedError as error:
            raise NotWhole(str(error) + _other_floats(model), traced) from error


def _other_floats(model: nn.Module) -> str:
    """What to do about parameters that are no float32."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and p.dtype != torch.float32:
            return f"; parameter {name!r} is {p.dtype}: give model.float()"
    return ""


@dataclass(frozen=True)
class Traced:
    """An exported program in few operators, the example's batch, the batches that it holds for, and
    what else the model does."""

    program: Any
    batch: int | None
    least: int = 1
    most: int | None = None
    left: tuple[str, ...] = ()  # inputs and buffers that the model writes into, the program does not


class NotWhole(UnsupportedError):
    """The engine lacks operators of what was ``traced``, which need not be traced again to run in parts."""

    def __init__(self, message: str, traced: Traced | None = None) -> None:
        super().__init__(message)
        self.traced = traced


class NotCaptured(UnsupportedError):
    """torch.export cannot capture the model, whose submodules it might."""


def graph_of(model: nn.Module, traced: Traced) -> g.Graph:
    """The Graph of ``model`` from :func:`trace`.

    Raises:
        UnsupportedError: as :func:`capture`.
    """
    graph = from_exported(traced.program, name=type(model).__name__)
    graph.meta["call"] = _call(model, traced.program, graph)
    graph.meta["example_batch"] = traced.batch
    if (traced.least, traced.most) != (1, None):
        graph.meta["batches"] = (traced.least, traced.most)
    return graph


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int | None,
    *,
    dynamic: bool = True,
    known: bool = False,
    effects: bool = False,
) -> Traced:
    """Exports a model that is in eval mode.

    Args:
        batch: the first dimension of inputs that grow.
        dynamic: keep it symbolic where the model does not fix it.
        known: the model is known to run on this example.
        effects: keep what it writes into its inputs, and into buffers that no output reads.

    Raises:
        InputError: the model does not run on the example.
        UnsupportedError: it cannot be exported, or changes what is not a tensor as it runs.
    """
    ready = getattr(model, "_actzip_sizes", None)  # of a file's module: it makes a graph for the size
    if ready is not None:
        ready([tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
    with untouched(model) as state:
        try:
            traced = _traced(model, args, kwargs, batch, dynamic, known)
        except UnsupportedError:  # what a first run keeps would be torch.export's own tensors
            state.restore()
            with suppress(Exception):
                _run(model, args, kwargs)
            if not state.changes():
                raise
            traced = _traced(model, args, kwargs, batch, dynamic, known)
        changed, drew = state.changes(), state.drew()
    if drew:
        raise UnsupportedError("the model draws random numbers of Python or numpy as it runs")
    if changed:
        changed = _changes_each_time(model, args, kwargs, batch, changed)
    if changed:
        names = ", ".join(map(repr, changed[:3]))
        raise UnsupportedError(
            f"the model changes its attribute {names} as it runs; what one call hands on to the next "
            "has to be an input and an output"
        )
    return traced if effects else replace(traced, left=_leave(traced.program))


def _leave(program: Any) -> tuple[str, ...]:
    """Takes from a program what it writes into its inputs, and into buffers if no output reads one of
    those: what it gives does not depend on that. The names of what it no longer writes into."""
    from torch.export.graph_signature import OutputKind

    signature = program.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    output = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    specs = signature.output_specs
    kept = [(n, s) for n, s in zip(output.args[0], specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]
    if not written or len(kept) + len(written) != len(specs):
        return ()
    stack, behind = [n for n, _ in kept if isinstance(n, torch.fx.Node)], set()
    while stack:
        node = stack.pop()
        if node.name not in behind:
            behind.add(node.name)
            stack.extend(node.all_input_nodes)
    changed = set(signature.buffers_to_mutate.values())
    if any(b in changed and arg in behind for arg, b in signature.inputs_to_buffers.items()):
        return ()
    output.args = (tuple(n for n, _ in kept),)
    specs[:] = [s for _, s in kept]
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return tuple(written)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float = 1) -> Any:
    """Runs the model on copies of its inputs, those of floating point times ``scale``."""

    def copy(t: Tensor) -> Tensor:
        return t * scale if t.is_floating_point() else t.clone()

    copies = pytree.tree_map_only(Tensor, copy, (args, kwargs))
    return model(*copies[0], **copies[1])


def _traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int | None,
    dynamic: bool,
    known: bool,
) -> Traced:
    """One try at :func:`trace`, with a symbolic batch where that can be."""
    if dynamic and batch is not None:
        program = _export(model, args, kwargs, batch, dynamic=True, known=known)
        traced = None if program is None else _for_batches(model, args, kwargs, batch, program)
        if traced is not None:
            return traced
    return Traced(_export(model, args, kwargs, batch, dynamic=False, known=known), batch)


def _for_batches(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, program: Any
) -> Traced | None:
    """The program with the batches that it holds for; None where that of the example is not among them.

    torch.export takes a batch of one for a case of its own and says nothing about it: what the
    model calls there is compared with what it calls at two and three.
    """
    from torch.export.graph_signature import InputKind

    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    vals = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    sizes = [v.shape[0] for v in vals if isinstance(v, Tensor) and v.ndim]
    symbols: list[Any] = [d for d in sizes if isinstance(d, torch.SymInt)]
    free = {s for d in symbols for s in d.node.expr.free_symbols}
    if not free:
        return None
    least, most = 1, None
    for symbol in free:
        found = program.range_constraints.get(symbol)
        if found is not None:
            least = max(least, int(found.lower))
            most = int(found.upper) if found.upper < 1 << 31 else most
    first = max(2, least)
    if most is None or most >= first + 2:
        one, two, three, four = [calls_at(model, args, kwargs, batch, first + k) for k in range(-1, 3)]
        if two is None or three is None or four is None:
            least = 1 if least <= 2 else least
        elif not same_calls(two, three, four):
            return None  # a branch that no range says: even batches, say
        elif least <= 2:
            least = 1 if one is not None and same_calls(one, two, three) else 2
    within = least <= batch and (most is None or batch <= most)
    return Traced(program, batch, least, most) if within else None


def _changes_each_time(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None, changed: list[str]
) -> list[str]:
    """Those of the attributes that a second run on the same example changes again: not caches."""
    with untouched(model):
        if calls_at(model, args, kwargs, batch, batch or 1) is not None:
            again = State(model)
            calls_at(model, args, kwargs, batch, batch or 1)
            changed = again.changes()
    try:
        return changed and changes_that_count(
            model, lambda itself: _run(model, args, kwargs, 1.0 if itself else 0.5)
        )
    except Exception:
        return changed


@contextmanager
def _without_logs() -> Iterator[None]:
    """What torch.export cannot work out about sizes comes as an exception or not at all, not as pages
    of tracebacks in its log, nor as the program so far on standard error."""
    logs = [
        logging.getLogger(f"torch.{n}") for n in ("fx.experimental.symbolic_shapes", "_subclasses", "export")
    ]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.CRITICAL)
        held, program = io.StringIO(), ""
        try:
            with redirect_stderr(held):
                yield
        except Exception as error:
            program = f"{getattr(error, 'partial_fx_graph', '')}\n"
            raise
        finally:
            sys.stderr.write(held.getvalue().replace(program, "") if program else held.getvalue())
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _free(name: str) -> Any:
    """A dimension as symbolic as the model lets it be; before PyTorch 2.5 one that has to be symbolic."""
    return getattr(torch.export.Dim, "AUTO", None) or torch.export.Dim(name)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: int | None,
    *,
    dynamic: bool,
    known: bool,
    sizes: bool = False,
) -> Any:
    """The exported program; ``sizes``: with every dimension symbolic that the model does not fix."""

    def grown(t: Any) -> Any:  # a batch of one would be taken for a constant
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch and batch == 1:
            return torch.cat([t, t])
        return t

    grows = [
        t
        for t in pytree.tree_leaves((args, kwargs))
        if isinstance(t, Tensor) and t.ndim and t.shape[0] == batch
    ]
    # several inputs have one batch in common, whether the model brings them together or not
    dimension = _free("batch") if len(grows) == 1 else torch.export.Dim("batch")
    names = (f"size{k}" for k in itertools.count())

    def spec(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        free = [i for i in range(1, t.ndim) if t.shape[i] != 1] if sizes else []  # torch fixes a 1
        rest = {i: _free(next(names)) for i in free}
        return {0: dimension, **rest} if t.ndim and t.shape[0] == batch else rest

    shapes = None
    if dynamic:
        # torch.export wants dynamic_shapes by parameter, *args and **kwargs nested
        try:
            bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            shapes = {k: pytree.tree_map(spec, v) for k, v in bound.items()}
        except TypeError as error:
            raise InputError(f"the model does not take this example: {error}") from error
        except ValueError:  # a module without a signature
            return None
        args, kwargs = pytree.tree_map(grown, args), pytree.tree_map(grown, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _without_logs():
                exported = torch.export.export(
                    model, args, kwargs or None, dynamic_shapes=shapes, strict=False
                )
                return exported.run_decompositions(decompositions())
        except Exception as error:
            if dynamic:
                return None
            if not known:
                _check_runs(model, args, kwargs)
            raise _export_error(error) from error


def _check_runs(model: nn.Module, args: Any, kwargs: Any) -> None:
    try:
        with untouched(model, own=True):
            _run(model, args, kwargs)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the model does not run on this example: {type(error).__name__}: {first}"
        ) from error


@dataclass(frozen=True)
class Symbolic:
    """An exported program whose inputs' sizes are symbols, and what it takes to hold for some sizes."""

    program: Any
    inputs: list[tuple[Any, ...]]  # of every input: sizes as numbers or expressions of symbols
    guards: list[Any]
    ranges: dict[Any, Any]
    batch: Any  # the batch's symbol, or None

    def sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[Any, int] | None:
        """Numbers for the symbols but the batch's; None where the program does not hold for ``shapes``."""
        found: dict[Any, int] = {}
        for dims, shape in zip(self.inputs, shapes, strict=True):
            for d, n in zip(dims, shape, strict=True):
                if isinstance(d, int):
                    if d != n:
                        return None
                elif d != self.batch and (not d.is_Symbol or found.setdefault(d, n) != n):
                    return None
        for symbol, n in found.items():
            if symbol in self.ranges and not self.ranges[symbol].lower <= n <= self.ranges[symbol].upper:
                return None
        fixed = {s: int(r.lower) for s, r in self.ranges.items() if r.lower == r.upper}
        for n in (2, 3, 7, 64):
            numbers = {**fixed, **found, **({} if self.batch is None else {self.batch: n})}
            if any(guard.subs(numbers) != True for guard in self.guards):  # noqa: E712
                return None
        return found


def symbolic(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None
) -> Symbolic | None:
    """A model in eval mode exported for any sizes; None where torch.export cannot."""
    from torch.export.graph_signature import InputKind

    with untouched(model):
        program = _export(model, args, kwargs, batch, dynamic=True, known=True, sizes=True)
    if program is None:
        return None
    _leave(program)
    names = {s.arg.name for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    vals = [n.meta["val"] for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    inputs = [tuple(d.node.expr if isinstance(d, torch.SymInt) else int(d) for d in v.shape) for v in vals]
    inputs = [tuple(int(d) if getattr(d, "is_Integer", False) else d for d in dims) for dims in inputs]
    env = next((d.node.shape_env for v in vals for d in v.shape if isinstance(d, torch.SymInt)), None)
    if env is None:
        return None
    guards = [guard.expr for guard in env.guards]
    guards += [a.expr for asserts in env.deferred_runtime_asserts.values() for a in asserts]
    guards = [env.replace(guard) for guard in guards]  # symbols that were found to be equal are one
    grows = [dims[0] for dims, t in zip(inputs, vals, strict=True) if t.ndim and not isinstance(dims[0], int)]
    if len(set(grows)) > 1 or any(not d.is_Symbol for d in grows):
        return None
    return Symbolic(program, inputs, guards, dict(env.var_to_range), grows[0] if grows else None)


@dataclass(frozen=True)
class _Fixed:
    """An argument that is no tensor."""

    value: Any


def _call(model: nn.Module, exported: Any, graph: g.Graph) -> dict[str, Any]:
    """How calls are bound: names of the positional parameters, the place (a path in the bound
    arguments) of every graph input, and what else was given, or is the default, and therefore
    fixed."""
    from torch.export.graph_signature import ConstantArgument, InputKind

    specs = [s.arg for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]
    leaves = [_Fixed(a.value) if isinstance(a, ConstantArgument) else a.name for a in specs]
    args, kwargs = pytree.tree_unflatten(leaves, exported.call_spec.in_spec)
    try:
        signature = inspect.signature(model.forward)
        bound = dict(signature.bind(*args, **kwargs).arguments)
        parameters = list(signature.parameters.values())
    except (TypeError, ValueError):  # a module without a signature
        parameters, bound = [], {}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    var = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    for p in parameters:
        if p.kind == p.VAR_KEYWORD:
            bound.update(bound.pop(p.name, {}))
    if not bound:
        bound = {v: v for v in graph.inputs}
        names = list(graph.inputs)
    places, constants = {}, {}
    for path, leaf in pytree.tree_flatten_with_path(bound)[0]:
        if isinstance(leaf, _Fixed):
            constants[pytree.keystr(path)] = leaf.value
        else:
            places[pytree.keystr(path)] = leaf
    plain = (bool, int, float, str, type(None))
    defaults = {
        f"[{p.name!r}]": p.default
        for p in parameters
        if p.default is not p.empty and isinstance(p.default, plain)
    }
    return {"names": names, "var": var, "places": places, "constants": constants, "defaults": defaults}


_MOST_SAID = 200  # letters of what torch.export says


def _export_error(error: Exception) -> Exception:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first = first if len(first) <= _MOST_SAID else f"{first[:_MOST_SAID]} ..."
    text = f"torch.export cannot capture this model: {type(error).__name__}: {first}"
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and f.filename != __file__
    ]
    if frames:  # the model's own line
        f = frames[-1]
        text += f" (at {f.filename.rsplit('/', 1)[-1]}:{f.lineno} in {f.name}: {f.line})"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        text += "; control flow that depends on the numbers in a tensor has no graph"
    if "ScriptModule" in str(error):
        text = (
            "the model is a ScriptModule, which hides what it computes: give the nn.Module that it was "
            "made of, or the ONNX file that torch.onnx.export(model, example, path, dynamo=False) writes"
        )
    if "torch.classes.quantized" in str(error):
        text = (
            "the model was converted to PyTorch's quantized kernels, whose weights have no graph: give the "
            "float32 module that it was made of, and quantize that (actzip.quantize), or an ONNX file"
        )
    return NotCaptured(text)


#: Not supported, and not taken apart either: the message then names what the model says.
_KEPT = {"upsample_linear1d", "upsample_trilinear3d"}


#: Computed here where it is a constant; taken apart it may count in uint16, which the CPU has no kernel for.
_CONSTANT = {"eye"}


#: Taken apart, a recurrent layer is some twenty operators a step: minutes of export for what PyTorch runs as
#: one.
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def decompositions() -> Any:
    """torch's core decompositions but for the operators that have a handler here, and recurrent layers."""
    try:
        table = torch.export.default_decompositions()
    except AttributeError:  # torch < 2.6
        from torch._decomp import core_aten_decompositions

        table = core_aten_decompositions()
    for op in list(table.keys()):  # type: ignore[no-untyped-call]
        name = str(getattr(op, "_schema", op)).partition("(")[0].partition(".")[0]
        name = name.removeprefix("aten::")
        if name in TORCH or name in _KEPT | _CONSTANT | _RECURRENT:
            table.pop(op)  # type: ignore[no-untyped-call]
    return table
