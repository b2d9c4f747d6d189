"""A PyTorch module in parts: what the engine has of it runs as compiled networks, the rest in PyTorch.

The exported program is cut by PyTorch's own partitioner (:mod:`actzip.runtime.program_parts`, as
for torch.compile). A part without a convolution or a product of matrices stays in PyTorch.
"""

from __future__ import annotations

import inspect
import operator
import os
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from actzip.activations import eval_mode
from actzip.errors import InputError, UnsupportedError, told
from actzip.runtime.binding import as_call
from actzip.runtime.blame import reasons
from actzip.runtime.drawn import drawn
from actzip.runtime.dynamo import effect_of
from actzip.runtime.explain import Explanation, elsewhere_row, together
from actzip.runtime.from_torch import refused_nodes
from actzip.runtime.program_parts import engine_parts, parts_of
from actzip.runtime.sizes import Sizes
from actzip.runtime.tracing import NotWhole, Traced, flat_inputs, plain_attention, trace

__all__ = ["PartitionedModule", "module_in_parts"]


def module_in_parts(
    model: nn.Module, example: Any, options: dict[str, Any], threads: int, refused: UnsupportedError
) -> PartitionedModule:
    """A module of which the engine lacks some operators; a warning says which, and their share of time.

    Raises:
        UnsupportedError: ``refused``, where nothing is left for the engine, or the module cannot be
            taken apart (it changes its buffers, say).
    """
    args, kwargs = flat_inputs(example)
    call = None
    if kwargs or not all(isinstance(a, Tensor) for a in args):
        call = _Call(model, args, kwargs)
    tensors = list(args) if call is None else call.tensors(args, kwargs)
    if not tensors:
        raise refused
    traced = refused.traced if isinstance(refused, NotWhole) and call is None else None
    made = PartitionedModule(model, tensors, options, threads, UnsupportedError(str(refused)), call, traced)
    told(made.says())
    return made


class _Call(nn.Module):
    """A module as one of its tensors alone; what else a call gives has to be as in the example."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.training = False
        leaves, self.tree = pytree.tree_flatten(self._bound(args, kwargs))
        self.rest = [_GAP if isinstance(v, Tensor) else v for v in leaves]

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Arguments as the module binds them, by position where it can."""
        try:
            found = inspect.signature(self.model.forward).bind(*args, **kwargs)
        except ValueError:  # a module without a signature
            return args, kwargs
        except TypeError as error:
            raise InputError(f"the model does not take these inputs: {error}") from error
        return found.args, found.kwargs

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What a call gives for the tensors of the example, in their order.

        Raises:
            InputError: arguments of another structure, or others that are no tensors.
        """
        given = pytree.tree_map_only(np.ndarray, torch.as_tensor, self._bound(args, kwargs))
        leaves, tree = pytree.tree_flatten(given)
        if tree != self.tree:
            raise InputError("inputs of another structure than the example's: other names, or another number")
        for was, now in zip(self.rest, leaves, strict=True):
            if was is not _GAP and (type(was) is not type(now) or was != now):
                raise InputError(f"argument {now!r}; this model was compiled with {was!r}")
        return [now for was, now in zip(self.rest, leaves, strict=True) if was is _GAP]

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        leaves = [next(given) if was is _GAP else was for was in self.rest]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return self.model(*args, **kwargs)


_GAP = "a tensor's place"


@dataclass
class _Cut:
    """The parts for one size of the inputs."""

    module: fx.GraphModule
    left: list[str]  # operators that PyTorch runs
    lacking: list[str]  # why the engine has not some of them
    failed: list[str]  # why parts did not compile
    shapes: list[tuple[int, ...]]
    grows: list[bool]
    batches: tuple[int, int | None]
    milliseconds: float = 0.0
    elsewhere: float = 0.0  # of these, in PyTorch

    def fits(self, shapes: list[tuple[int, ...]]) -> bool:
        least, most = self.batches
        for own, got, grows in zip(self.shapes, shapes, self.grows, strict=True):
            if own != got and not (grows and own[1:] == got[1:]):
                return False
            if grows and not (least <= got[0] and (most is None or got[0] <= most)):
                return False
        return True


class PartitionedModule:
    """A compiled module of which some operators run in PyTorch: called and explained as a
    :class:`~actzip.runtime.compiled.CompiledModel`. The module is kept; its weights should stay as
    they are.

    Attributes:
        threads: threads of a call of the engine's parts.
    """

    on_engine, quantized = True, False

    def __init__(
        self,
        model: nn.Module,
        inputs: list[Tensor],
        options: dict[str, Any],
        threads: int,
        refused: UnsupportedError,
        call: _Call | None = None,
        traced: Traced | None = None,
    ) -> None:
        self.threads = threads
        self._name = type(model).__name__
        self._model = model if call is None else call
        self._call = call
        self._options = options
        self._refused = refused
        self._sample = inputs
        self._cuts: Sizes[_Cut] = Sizes(self._of_size, _Cut.fits)
        self._first = self._cut(inputs, options, traced)
        self._cuts.put([tuple(t.shape) for t in inputs], self._first)

    def _of_size(self, shapes: Any) -> _Cut:
        rng, types = np.random.default_rng(0), [str(t.dtype)[6:] for t in self._sample]
        inputs = [torch.from_numpy(drawn(rng, s, t)) for s, t in zip(shapes, types, strict=True)]
        return self._cut(inputs, {**self._options, "tune": False})

    def _cut(self, inputs: list[Tensor], options: dict[str, Any], traced: Traced | None = None) -> _Cut:
        model, batch = self._model, inputs[0].shape[0] if inputs[0].ndim else None
        with eval_mode(model), plain_attention(), torch.no_grad():
            traced = traced or trace(model, tuple(inputs), {}, batch)
            if effect_of(traced.program):
                raise self._refused
            lacking = refused_nodes(traced.program)
            parts = parts_of(traced.program, set(lacking), tuple(inputs), options)
        failed = list(parts.failed.values())
        if not parts.built:
            raise UnsupportedError(reasons([str(self._refused), *failed]))
        module = parts.module
        left = [op for part in (module, *_torch_parts(module)) for op in _operators(part)]
        shapes = [tuple(t.shape) for t in inputs]
        batches = (traced.least, traced.most)
        cut = _Cut(module, left, list(lacking.values()), failed, shapes, parts.grows, batches)
        self._time(cut, inputs)
        return cut

    def _time(self, cut: _Cut, inputs: list[Tensor]) -> None:
        """Runs once, warm, with a clock around the engine's parts."""
        spent = 0.0

        def before(*_: Any) -> None:
            nonlocal spent
            spent -= time.perf_counter()

        def after(*_: Any) -> None:
            nonlocal spent
            spent += time.perf_counter()

        with torch.no_grad():
            cut.module(*inputs)
            handles: list[Any] = []
            for part in engine_parts(cut.module):
                handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
            start = time.perf_counter()
            cut.module(*inputs)
            cut.milliseconds = 1e3 * (time.perf_counter() - start)
            cut.elsewhere = max(0.0, cut.milliseconds - 1e3 * spent)
            for handle in handles:
                handle.remove()

    def says(self) -> str:
        """One line: which operators run in PyTorch, and their share of the time."""
        cut = self._first
        counts = ", ".join(f"{k} {op}" for op, k in Counter(map(_short, cut.left)).most_common(6))
        share = cut.elsewhere / cut.milliseconds if cut.milliseconds else 0.0
        why = reasons([str(self._refused), *cut.failed])
        return f"{len(cut.left)} operators run in PyTorch ({counts}), {100 * share:.0f} % of the time: {why}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network.

        Raises:
            InputError: another number of inputs or type than the example's, or a size that does not fit.
        """
        inputs = self._inputs(args, kwargs)
        try:
            with torch.no_grad():
                out = self._cuts.get([tuple(t.shape) for t in inputs]).module(*inputs)
        except MemoryError as error:
            raise InputError(f"not enough memory for inputs of {[tuple(t.shape) for t in inputs]}") from error
        if any(isinstance(a, Tensor) for a in pytree.tree_leaves((args, kwargs))):
            return out
        return pytree.tree_map_only(Tensor, lambda t: t.numpy(), out)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if len(args) == 1 and not kwargs and isinstance(args[0], (tuple, list, dict)):
            args, kwargs = as_call(args[0])
        if self._call is not None:
            args = tuple(self._call.tensors(args, kwargs))
        elif kwargs:
            raise InputError(f"argument {next(iter(kwargs))!r}; this model was compiled with none by name")
        if len(args) != len(self._sample):
            raise InputError(f"{len(args)} inputs given; this model was compiled for {len(self._sample)}")
        found = []
        for i, (x, like) in enumerate(zip(args, self._sample, strict=True)):
            t = torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
            if not isinstance(t, Tensor) or t.dtype != like.dtype or t.ndim != like.ndim or 0 in t.shape:
                what = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else type(x).__name__
                kind = str(like.dtype).removeprefix("torch.")
                raise InputError(
                    f"input {i} is {what}; this model takes {kind} of {like.ndim} dimensions, none of them 0"
                )
            found.append(t.detach())
        return found

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x`` (or on the example)."""
        inputs = self._sample if x is None else self._inputs((x,), {})
        cut = self._cuts.get([tuple(t.shape) for t in inputs])
        seen: list[tuple[Any, Any]] = []
        handles = [
            part.register_forward_pre_hook(lambda module, args: seen.append((module, args)))
            for part in engine_parts(cut.module)
        ]
        with torch.no_grad():
            cut.module(*inputs)
        for handle in handles:
            handle.remove()
        reports = [
            module.call.explain(tuple(args[i].numpy() for i in module.dynamic), runs=runs)
            for module, args in seen
        ]
        rows = [row for report in reports for row in report.rows]
        self._time(cut, inputs)
        counts = ", ".join(f"{k} {op}" for op, k in Counter(map(_short, cut.left)).most_common())
        why = f"not for the engine: {counts}: {reasons(cut.lacking + cut.failed, 100)}"
        rows.append(elsewhere_row("the rest", "pytorch", why, cut.elsewhere))
        batch = int(inputs[0].shape[0]) if inputs[0].ndim else 1
        shapes = {f"input {i}": list(t.shape) for i, t in enumerate(inputs)}
        return together(reports, rows, batch, self.threads, shapes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Not possible: a ``.actzip`` file holds networks of the engine alone.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{os.fspath(path)}: some operators of this model run in PyTorch, which no .actzip file "
            f"holds: {self._refused}"
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "some operators of this model run in PyTorch; pickle the module and compile it where it runs"
        )

    def __repr__(self) -> str:
        return f"PartitionedModule({self._name}: {self.says()})"


def _torch_parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """Parts that were cut out and stayed in PyTorch."""
    found = [m for n, m in module.named_children() if n.startswith("fused_")]
    return [m for m in found if isinstance(m, fx.GraphModule)]


def _operators(part: fx.GraphModule) -> list[str]:
    calls = [n.target for n in part.graph.nodes if n.op == "call_function"]
    return [str(target) for target in calls if target is not operator.getitem]


def _short(target: str) -> str:
    return target.removeprefix("aten.").removesuffix(".default")
