"""Where a compiled network came from, without its weights: what makes its graph for other sizes.

A network at another size has the same weights and other shapes. An origin keeps the model that
:func:`actzip.compile` was given with *patterns* in the place of its large weights: views of a few
numbers that take no memory, other ones for every weight and every ``seed``. The graph that it
gives is right but for the numbers that come of them, which :mod:`actzip.runtime.sizes` puts in.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.graph import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["OnnxOrigin", "Origin", "Shapes", "TorchOrigin", "is_large", "pattern"]

#: Shapes of a graph's inputs in their order, the batch included.
Shapes = Sequence[tuple[int, ...]]

_LARGE = 4096  # elements of a weight that is not kept


class Origin(Protocol):
    """A model without its large weights. ``is_data``: it is pickled with a compiled model for which no
    rules of sizes are found."""

    @property
    def is_data(self) -> bool: ...

    def graph(self, shapes: Shapes, seed: int = 0, *, quick: bool = False) -> g.Graph:
        """The graph for these inputs, with patterns of ``seed``; not optimised. ``quick``: only if it
        is made in a moment.

        Raises:
            InputError, UnsupportedError: the size does not fit the model.
        """

    def simpler(self) -> bool:
        """Makes graphs in a slower and plainer way from now on; False where there is none."""


def _layout(shape: Sequence[int]) -> tuple[list[int], int]:
    """Strides, another one in every dimension, and how many numbers they reach."""
    strides = [2 * i + 1 for i in range(len(shape))]
    return strides, 1 + sum((d - 1) * s for d, s in zip(shape, strides, strict=True))


def pattern(name: str, shape: Sequence[int], seed: int) -> Array:
    """Numbers between 0.5 and 1.5 in the shape of the weight ``name``, overlapping in memory."""
    strides, count = _layout(shape)
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    numbers = rng.uniform(0.5, 1.5, count).astype(np.float32)
    return np.lib.stride_tricks.as_strided(numbers, shape, [4 * s for s in strides])


# -- ONNX


class OnnxOrigin:
    """An ONNX model: read again for every size."""

    is_data = True

    def __init__(self, model: Any, label: str, compiled: Shapes) -> None:
        """Takes ``model`` (a ``ModelProto``) over: its large weights are cut out. ``compiled``: the
        shapes that it was compiled for."""
        self.model = model
        self.label = label
        self.compiled = list(compiled)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._cut()
        known = {t.name for t in model.graph.initializer} | set(self.shapes)
        inputs = [v for v in model.graph.input if v.name not in known]
        self.names = [v.name for v in inputs]
        self.declared = [
            [d.dim_value if d.dim_value > 0 else None for d in v.type.tensor_type.shape.dim] for v in inputs
        ]

    def _cut(self) -> None:
        floats = {1, 10, 11}  # FLOAT, FLOAT16, DOUBLE
        graph = self.model.graph
        for tensors in (graph.initializer,):
            for tensor in [t for t in tensors if t.data_type in floats and is_large(t.dims)]:
                self.shapes[tensor.name] = tuple(int(d) for d in tensor.dims)
                tensors.remove(tensor)
        for node in [n for n in graph.node if n.op_type == "Constant"]:
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if tensor is not None and tensor.data_type in floats and is_large(tensor.dims):
                self.shapes[node.output[0]] = tuple(int(d) for d in tensor.dims)
                graph.node.remove(node)

    def graph(self, shapes: Shapes, seed: int = 0, *, quick: bool = False) -> g.Graph:
        from actzip.runtime.from_onnx import from_onnx

        for name, shape, was, declared in zip(self.names, shapes, self.compiled, self.declared, strict=True):
            self._check(name, shape[1:], was[1:], declared[1:], 1)
        weights = {n: pattern(n, s, seed) for n, s in self.shapes.items()}
        made = from_onnx(self.model, list(shapes), constants=weights)
        for name, value, shape, was, declared in zip(
            self.names, made.inputs, shapes, self.compiled, self.declared, strict=True
        ):
            if shape and not isinstance(made.shape(value)[0], g.Sym):
                self._check(name, shape[:1], was, declared)
        return made

    def simpler(self) -> bool:
        return False

    def _check(
        self, name: str, shape: Sequence[int], was: Sequence[int], declared: list[Any], start: int = 0
    ) -> None:
        for i, (d, new, old) in enumerate(zip(declared, shape, was, strict=False), start):
            if d is not None and new not in (old, d):
                raise InputError(
                    f"{self.label} fixes dimension {i} of {name!r} at {d}; export it with that "
                    "dimension dynamic (dynamic_axes), or compile it with an example of this size"
                )


def is_large(dims: Sequence[int]) -> bool:
    """Whether a weight of this shape is not kept."""
    return len(dims) >= 2 and int(np.prod([int(d) for d in dims], dtype=np.int64)) >= _LARGE


# -- PyTorch


@dataclass(frozen=True)
class _Gap:
    """Stands for a tensor of the example, of its type."""

    kind: str


class TorchOrigin:
    """An ``nn.Module``: exported once with symbolic sizes where torch.export can, else for every size.

    The module is copied without its large weights; one that cannot be copied, or that carries
    hooks, is kept as it is.
    """

    is_data = False

    def __init__(self, model: nn.Module, example: Any, dynamic: bool) -> None:
        from torch import Tensor
        from torch.utils import _pytree as pytree

        from actzip.runtime.tracing import flat_inputs

        self.name = type(model).__name__
        self.model = _hollow(model)
        self.dynamic = dynamic
        args, kwargs = flat_inputs(example)
        self.tree = pytree.tree_map_only(
            Tensor, lambda t: _Gap(str(t.dtype).removeprefix("torch.")), (args, kwargs)
        )
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.shapes = [tuple(t.shape) for t in leaves]
        self._symbols: Any = None  # False: not to be had
        self._seed = -1

    def graph(self, shapes: Shapes, seed: int = 0, *, quick: bool = False) -> g.Graph:
        import torch

        from actzip.activations import eval_mode
        from actzip.quantize.model import marked
        from actzip.runtime.from_torch import from_exported
        from actzip.runtime.tracing import graph_of, plain_attention, symbolic, trace

        batch = shapes[0][0] if shapes[0] else None
        with eval_mode(self.model), plain_attention(), torch.no_grad(), marked(self.model):
            if self._symbols is None:
                args, kwargs = self._inputs(self.shapes)
                own = self.shapes[0][0] if self.shapes[0] else None
                self._symbols = symbolic(self.model, args, kwargs, own) or False
            sizes = self._symbols.sizes(shapes) if self._symbols else None
            if sizes is not None:
                if self._seed != seed:
                    self._patch(self._symbols.program, seed)
                    self._seed = seed
                return from_exported(self._symbols.program, self.name, sizes)
            if quick:
                raise UnsupportedError("this size has to be exported by itself")
            args, kwargs = self._inputs(shapes)
            traced = trace(self.model, args, kwargs, batch, dynamic=self.dynamic)
            self._patch(traced.program, seed)
            return graph_of(self.model, traced)

    def simpler(self) -> bool:
        if not self._symbols:
            return False
        self._symbols = False
        return True

    def _inputs(self, shapes: Shapes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        import torch
        from torch.utils import _pytree as pytree

        rest = iter(shapes)

        def zeros(gap: _Gap) -> Tensor:
            return torch.zeros(next(rest), dtype=getattr(torch, gap.kind))

        return pytree.tree_map_only(_Gap, zeros, self.tree)  # type: ignore[no-any-return]

    def _patch(self, program: Any, seed: int) -> None:
        """Patterns in the place of the program's large weights."""
        import torch

        state = program.state_dict
        for name, t in list(state.items()):
            if _is_weight(t):
                state[name] = torch.from_numpy(pattern(name, tuple(t.shape), seed))


def _is_weight(t: Tensor) -> bool:
    return t.is_floating_point() and str(t.dtype) == "torch.float32" and is_large(t.shape)


def _hollow(model: nn.Module) -> nn.Module:
    """A copy with zeros that take no memory in the place of large weights; ``model`` itself where
    a copy might do something else."""
    import torch
    from torch import nn

    kept = {"_actzip_quantization", "_actzip_threshold_tap"}  # which know the module that they are in
    if any(m._forward_hooks or m._forward_pre_hooks or kept & set(m.__dict__) for m in model.modules()):
        return model
    memo: dict[int, Any] = {id(v): None for k, v in model.__dict__.items() if k == "_actzip_sparsify"}
    for t in (*model.parameters(), *model.buffers()):
        if _is_weight(t.detach()):
            empty = torch.from_numpy(np.zeros(tuple(t.shape), np.float32))  # pages that nobody writes
            memo[id(t)] = nn.Parameter(empty, False) if isinstance(t, nn.Parameter) else empty
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # locks, files, whatever a module may hold
        return model
