"""Reductions along dimensions, the place of the greatest, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Node, Shape, Sym, normal_axis, numel, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.arithmetic import Binary, torch_binary
from actzip.runtime.ops.reshape import Reshape
from actzip.runtime.ops.shapes import onnx_axes
from actzip.runtime.registry import Stacked, TorchHandler, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering

MOST_INDICES = 1 << 24  # the engine holds integers as float32
REDUCE_KINDS = ("mean", "sum", "max", "min", "prod", "l1", "l2", "sum_square", "log_sum_exp")


@dataclass(eq=False)
class Reduce(Node):
    """Reduces ``axes`` (never the batch)."""

    kind: str = field(kw_only=True)
    axes: tuple[int, ...] = field(kw_only=True)
    keepdims: bool = False

    op = "reduce"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if self.kind not in REDUCE_KINDS:
            raise UnsupportedError(f"reduction {self.kind!r}; these are known: {', '.join(REDUCE_KINDS)}")
        axes = {normal_axis(a, len(x)) for a in self.axes}
        for a in axes:
            static(x[a], "a reduced dimension")
        if self.keepdims:
            return tuple(1 if i in axes else d for i, d in enumerate(x))
        return tuple(d for i, d in enumerate(x) if i not in axes)


@dataclass(eq=False)
class ArgMax(Node):
    """The index of the greatest (``kind`` max) or least (min) along ``axis``, never the batch; NaN
    counts as either.

    Of equals the first, or the last with ``last``.
    """

    kind: str = "max"
    axis: int = -1
    keepdims: bool = False
    last: bool = False

    op = "argmax"
    dtype = "int64"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if self.kind not in ("max", "min"):
            raise InputError(f"kind {self.kind!r} is not 'max' or 'min'")
        axis = normal_axis(self.axis, len(x))
        if not 1 <= static(x[axis], "the dimension of an argmax") <= MOST_INDICES:
            raise UnsupportedError(f"indices of a dimension of {x[axis]}; 1 to {MOST_INDICES} are supported")
        return (*x[:axis], *((1,) if self.keepdims else ()), *x[axis + 1 :])


@dataclass(eq=False)
class Softmax(Node):
    """Softmax (or its logarithm) along ``axis``."""

    axis: int = -1
    log: bool = False

    op = "softmax"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        static(shapes[0][normal_axis(self.axis, len(shapes[0]))], "the softmax's dimension")
        return shapes[0]


def torch_axes(a: dict[str, Any], rank: int) -> tuple[int, ...]:
    dim = a.get("dim")
    if dim is None or dim == []:
        return tuple(range(rank))
    dims = [dim] if isinstance(dim, int) else dim
    return tuple(sorted(int(d) % rank for d in dims))


def torch_reduce(kind: str) -> TorchHandler:
    def handler(b: Builder, a: dict[str, Any]) -> Any:
        if "other" in a:  # max and min of two tensors
            return torch_binary(kind)(b, a)
        x = a["self"]
        axes = torch_axes(a, len(b.shape(x)))
        keep = bool(a.get("keepdim"))
        if isinstance(x, Stacked) and x.apart and axes == (0,) and kind in _FOLDS:
            return _folded(b, x, kind, keep)
        counts = kind == "sum" and b.is_bool(x)
        y = b.emit(Reduce, x, kind=kind, axes=axes, keepdims=keep, dtype="int64" if counts else "")
        if not isinstance(b.node.meta["val"], (tuple, list)):
            return y
        return y, b.emit(ArgMax, x, kind=kind, axis=axes[0], keepdims=keep)

    return handler


#: Reductions that join two results by an operator on their own.
_FOLDS = {"sum": "add", "mean": "add", "max": "max", "min": "min", "prod": "mul"}


def _folded(b: Builder, x: Stacked, kind: str, keep: bool) -> Any:
    """Stacked values reduced over themselves."""
    out: Any = x.parts[0]
    for part in x.parts[1:]:
        out = b.emit(Binary, out, part, kind=_FOLDS[kind])
    if kind == "mean":
        out = b.emit(Binary, out, 1.0 / len(x.parts), kind="mul")
    return b.reshape(out, b.out_shape) if keep else out


@torch_op("var", "std", "var_mean")
def torch_var(b: Builder, a: dict[str, Any]) -> Any:
    """As PyTorch: the squares of the distances from the mean, over the count less ``correction``."""
    x = a["self"]
    shape = b.shape(x)
    axes = torch_axes(a, len(shape))
    correction = a["correction"] if "correction" in a else int(bool(a.get("unbiased", True)))
    correction = 1 if correction is None else correction
    count = 1
    for axis in axes:
        count *= static(shape[axis], "a reduced dimension")
    if count - correction <= 0:
        raise b.refuse(f"the variance of {count} numbers with a correction of {correction}")
    mean = b.emit(Reduce, x, kind="mean", axes=axes, keepdims=True)
    distance = b.emit(Binary, x, mean, kind="sub")
    squares = b.emit(Reduce, distance, kind="sum_square", axes=axes, keepdims=bool(a.get("keepdim")))
    out = b.emit(Binary, squares, 1.0 / (count - correction), kind="mul")
    name = b.node.target._schema.name
    if name == "aten::var_mean":
        return out, b.reshape(mean, b.shape(out))
    return b.act(out, "sqrt") if name == "aten::std" else out


_TORCH = {
    "mean": "mean",
    "sum": "sum",
    "amax": "max",
    "amin": "min",
    "prod": "prod",
    "logsumexp": "log_sum_exp",
    "max": "max",
    "min": "min",
}
for _name, _kind in _TORCH.items():
    torch_op(_name)(torch_reduce(_kind))


@torch_op("argmax", "argmin")
def torch_argmax(b: Builder, a: dict[str, Any]) -> Any:
    x, axis, keep = a["self"], a["dim"], bool(a["keepdim"])
    if axis is None:  # of all elements
        count, power = numel(b.shape(x))
        if power:
            raise b.refuse("the index of the greatest of all images is not supported; give a dimension")
        x, axis, keep = b.reshape(x, (count,)), 0, False
    kind = b.node.target._schema.name.removeprefix("aten::arg")
    return b.reshape(b.emit(ArgMax, x, kind=kind, axis=int(axis), keepdims=keep), b.out_shape)


@torch_op("linalg_vector_norm")
def torch_norm(b: Builder, a: dict[str, Any]) -> Any:
    kind = {1: "l1", 2: "l2"}.get(a["ord"])
    if kind is None:
        raise b.refuse(f"norm of order {a['ord']} is not supported")
    return torch_reduce(kind)(b, a)


@torch_op("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax")
def torch_softmax(b: Builder, a: dict[str, Any]) -> Any:
    log = "log" in b.node.target._schema.name
    axis = int(a["dim"]) % len(b.out_shape)
    return b.emit(Softmax, a["self"], axis=axis, log=log)


_ONNX = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceSumSquare": "sum_square",
    "ReduceLogSumExp": "log_sum_exp",
    "ReduceLogSum": "sum",
}


@onnx_op(*_ONNX)
def onnx_reduce(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axes = onnx_axes(node, 1, len(shape))
    if not axes:
        if node.integer("noop_with_empty_axes", 0):
            return imp.emit(Reshape, x, shape=shape)
        axes = list(range(len(shape)))
    if any(isinstance(shape[a], Sym) for a in axes):
        raise node.refuse("a reduction over the batch")
    keep = bool(node.integer("keepdims", 1))
    out = imp.emit(Reduce, x, kind=_ONNX[node.op], axes=tuple(sorted(set(axes))), keepdims=keep)
    return imp.act(out, "log") if node.op == "ReduceLogSum" else out


@onnx_op("ArgMax", "ArgMin")
def onnx_argmax(imp: Importer, node: OnnxNode) -> Any:
    return imp.emit(
        ArgMax,
        node.need(0),
        kind="max" if node.op == "ArgMax" else "min",
        axis=node.integer("axis", 0),
        keepdims=bool(node.integer("keepdims", 1)),
        last=bool(node.integer("select_last_index", 0)),
    )


@onnx_op("Softmax", "LogSoftmax")
def onnx_softmax(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    log = node.op == "LogSoftmax"
    axis = node.integer("axis", -1 if imp.opset >= 13 else 1)
    if not -len(shape) <= axis < max(1, len(shape)):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis %= len(shape)
    if imp.opset >= 13 or axis == len(shape) - 1:
        return imp.emit(Softmax, x, axis=axis, log=log)
    (a, p), (b, q) = (
        numel(shape[:axis]),
        numel(shape[axis:]),
    )  # older opsets: over all dimensions from axis on
    if q:
        raise node.refuse("a softmax over the batch")
    flat = imp.reshape(x, (Sym(a) if p else a, b))
    return imp.reshape(imp.emit(Softmax, flat, axis=1, log=log), shape)


@lowers(Reduce)
def lower_reduce(low: Lowering, n: Reduce) -> None:
    rank = len(low.graph.shape(n.inputs[0]))
    axes = sorted(a % rank for a in n.axes)
    low.node(
        "reduce",
        n.name,
        [low.dense(n.inputs[0])],
        low.declare(n.output),
        n.name,
        {"axes": axes},
        strings={"kind": n.kind},
    )


@lowers(ArgMax)
def lower_argmax(low: Lowering, n: ArgMax) -> None:
    axis = n.axis % len(low.graph.shape(n.inputs[0]))
    ints, strings = {"axis": [axis], "last": [int(n.last)]}, {"kind": n.kind}
    low.node("argmax", n.name, [low.dense(n.inputs[0])], low.declare(n.output), n.name, ints, strings=strings)


@lowers(Softmax)
def lower_softmax(low: Lowering, n: Softmax) -> None:
    rank = len(low.graph.shape(n.inputs[0]))
    low.node(
        "softmax",
        n.name,
        [low.dense(n.inputs[0])],
        low.declare(n.output),
        n.name,
        {"axis": [n.axis % rank], "log": [int(n.log)]},
    )
