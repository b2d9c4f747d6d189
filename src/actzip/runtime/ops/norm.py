"""Normalisation: batch, layer, group, instance, local response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError
from actzip.runtime.acts import Act, act_fields
from actzip.runtime.graph import Array, Layout, Node, Shape, Sym, check_channels, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.ops.reduce import Reduce
from actzip.runtime.registry import Absent, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class BatchNorm(Node):
    """x (N, C, ...) -> x * scale + shift, per channel (statistics and eps already in them)."""

    scale: Array = field(kw_only=True)
    shift: Array = field(kw_only=True)
    act: Act | None = None

    op = "batch_norm"
    layout = "either"
    reads_packed = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if len(x) < 2:
            raise InputError(f"input of shape {x} has no channels")
        c = static(x[1], "the number of channels")
        check_channels("scale", self.scale, c)
        check_channels("shift", self.shift, c)
        return x

    def writes_packed(self) -> bool:
        return True


@dataclass(eq=False)
class LayerNorm(Node):
    """Normalises over the last dimensions, those of ``shape``, or over dimension 1 with ``channels``;
    population variance."""

    shape: tuple[int, ...] = field(kw_only=True)
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    channels: bool = False

    op = "layer_norm"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        n = len(self.shape)
        if self.channels:
            if n != 1 or len(x) < 2 or x[1] != self.shape[0]:
                raise InputError(f"normalised shape {self.shape} is not dimension 1 of {x}")
        elif n < 1 or len(x) < n or tuple(x[-n:]) != tuple(self.shape):
            raise InputError(f"normalised shape {self.shape} is not the tail of {x}")
        for name, a in (("weight", self.weight), ("bias", self.bias)):
            if a is not None and a.shape != tuple(self.shape):
                raise InputError(f"{name} has shape {list(a.shape)}, not {list(self.shape)}")
        return x

    def works_on(self) -> Layout:
        return "map" if self.channels else "plain"


@dataclass(eq=False)
class GroupNorm(Node):
    """Normalises each of ``groups`` channel groups over its channels and all further dimensions."""

    groups: int = field(kw_only=True)
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5

    op = "group_norm"
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        c = static(x[1], "the number of channels") if len(x) > 1 else 0
        if self.groups < 1 or not c or c % self.groups:
            raise InputError(f"{c} channels do not divide into {self.groups} groups")
        check_channels("weight", self.weight, c)
        check_channels("bias", self.bias, c)
        return x


@dataclass(eq=False)
class LocalResponseNorm(Node):
    """x / (k + alpha / size * sum over ``size`` neighbouring channels of x^2) ^ beta.

    Of an even ``size`` one neighbour more is in front (``torch.nn.LocalResponseNorm``), or behind
    with ``behind`` (ONNX).
    """

    size: int = field(kw_only=True)
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    behind: bool = False

    op = "lrn"
    layout = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if self.size < 1 or len(shapes[0]) < 2:
            raise InputError(f"size {self.size} on a tensor of shape {shapes[0]}")
        return shapes[0]


@torch_op("_native_batch_norm_legit_no_training", "batch_norm", "native_batch_norm")
def torch_batch_norm(b: Builder, a: dict[str, Any]) -> Any:
    mean, var = a["running_mean"], a["running_var"]
    if a.get("training") or mean is None or var is None:
        raise b.refuse("batch norm with the batch's own statistics is not supported")
    m, v = b.array(mean).astype(np.float64), b.array(var).astype(np.float64)
    scale = 1.0 / np.sqrt(v + float(a["eps"]))
    if a["weight"] is not None:
        scale = scale * b.array(a["weight"])
    shift = -m * scale
    if a["bias"] is not None:
        shift = shift + b.array(a["bias"])
    y = b.emit(BatchNorm, a["input"], scale=scale.astype(np.float32), shift=shift.astype(np.float32))
    rest = Absent("the statistics of a batch norm")
    return y if "cudnn_enabled" in a else (y, rest, rest)


@torch_op("layer_norm", "native_layer_norm")
def torch_layer_norm(b: Builder, a: dict[str, Any]) -> Any:
    shape = tuple(int(d) for d in a["normalized_shape"])
    y = b.emit(
        LayerNorm,
        a["input"],
        shape=shape,
        weight=b.maybe(a["weight"]),
        bias=b.maybe(a["bias"]),
        eps=float(a["eps"]),
    )
    rest = Absent("the statistics of a layer norm")
    return y if "cudnn_enable" in a else (y, rest, rest)


@torch_op("group_norm")
def torch_group_norm(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(
        GroupNorm,
        a["input"],
        groups=int(a["num_groups"]),
        weight=b.maybe(a["weight"]),
        bias=b.maybe(a["bias"]),
        eps=float(a["eps"]),
    )


@torch_op("instance_norm")
def torch_instance_norm(b: Builder, a: dict[str, Any]) -> Any:
    if not a["use_input_stats"]:
        raise b.refuse("instance norm with running statistics is not supported")
    c = b.shape(a["input"])[1]
    assert isinstance(c, int)
    return b.emit(
        GroupNorm,
        a["input"],
        groups=c,
        weight=b.maybe(a["weight"]),
        bias=b.maybe(a["bias"]),
        eps=float(a["eps"]),
    )


@onnx_op("BatchNormalization")
def onnx_batch_norm(imp: Importer, node: OnnxNode) -> Any:
    if node.integer("training_mode", 0):
        raise node.refuse("training mode")
    x = node.need(0)
    values = [
        node.floats(i, w)
        for i, w in ((1, "the scale"), (2, "the bias"), (3, "the mean"), (4, "the variance"))
    ]
    if any(v is None for v in values):
        raise node.wrong("it needs scale, bias, mean and variance")
    weight, bias, mean, variance = (v.astype(np.float64) for v in values if v is not None)
    scale = weight / np.sqrt(variance + node.number("epsilon", 1e-5))
    shift = bias - mean * scale
    return imp.emit(BatchNorm, x, scale=scale.astype(np.float32), shift=shift.astype(np.float32))


@onnx_op("InstanceNormalization", "GroupNormalization")
def onnx_group_norm(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    channels = imp.shape(x)[1]
    weight, bias = node.floats(1, "the scale"), node.floats(2, "the bias")
    groups = int(channels) if node.op == "InstanceNormalization" else node.integer("num_groups", 1)  # type: ignore[arg-type]
    if node.op == "GroupNormalization" and imp.opset < 21 and weight is not None and bias is not None:
        if groups < 1 or int(channels) % groups:  # type: ignore[arg-type]
            raise node.wrong(f"{channels} channels do not divide into {groups} groups")
        per = int(channels) // groups  # type: ignore[arg-type]
        weight, bias = np.repeat(weight, per), np.repeat(bias, per)
    return imp.emit(GroupNorm, x, groups=groups, weight=weight, bias=bias, eps=node.number("epsilon", 1e-5))


@onnx_op("LayerNormalization")
def onnx_layer_norm(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axis = node.integer("axis", -1) % max(1, len(shape))
    tail = shape[axis:]
    if any(isinstance(d, Sym) for d in tail):
        raise node.refuse("the normalised dimensions depend on the batch")
    sizes = tuple(int(d) for d in tail)  # type: ignore[arg-type]
    parts = [node.floats(1, "the scale"), node.floats(2, "the bias")]
    weight, bias = (None if p is None else np.ascontiguousarray(np.broadcast_to(p, sizes)) for p in parts)
    eps = node.number("epsilon", 1e-5)
    out = imp.emit(LayerNorm, x, shape=sizes, weight=weight, bias=bias, eps=eps)
    if not any(o and imp.is_read(o) for o in node.proto.output[1:]):
        return out
    axes = tuple(range(axis, len(shape)))
    mean = imp.emit(Reduce, x, kind="mean", axes=axes, keepdims=True)
    off = imp.emit(Binary, x, mean, kind="sub")
    square = imp.emit(Binary, off, off, kind="mul")
    variance = imp.emit(Reduce, square, kind="mean", axes=axes, keepdims=True)
    shifted = imp.emit(Binary, variance, np.array(eps, dtype=np.float32), kind="add")
    root = imp.act(shifted, "sqrt")
    return [out, mean, imp.act(root, "reciprocal")]


@onnx_op("LRN")
def onnx_lrn(imp: Importer, node: OnnxNode) -> Any:
    size = node.integer("size", 0)
    return imp.emit(
        LocalResponseNorm,
        node.need(0),
        size=size,
        alpha=node.number("alpha", 1e-4),
        beta=node.number("beta", 0.75),
        k=node.number("bias", 1.0),
        behind=size % 2 == 0,
    )


@lowers(BatchNorm)
def lower_batch_norm(low: Lowering, n: BatchNorm) -> None:
    strings, floats, arrays = act_fields(n.act)
    if low.kind[n.output] == "map":
        arrays.update(scale=np.ascontiguousarray(n.scale), shift=np.ascontiguousarray(n.shift))
        low.simple(n, "batch_norm", "any map", floats=floats, arrays=arrays, strings=strings)
        return
    # plain: as multiplication and addition
    rank = len(low.graph.shape(n.output))
    shape: Shape = (1, int(n.scale.size), *([1] * (rank - 2)))
    s = low.add_value(n.output + ":s", shape, "plain", data=n.scale.reshape([int(d) for d in shape]))  # type: ignore[arg-type]
    t = low.add_value(n.output + ":t", shape, "plain", data=n.shift.reshape([int(d) for d in shape]))  # type: ignore[arg-type]
    mid = low.add_value(n.output + ":mul", low.graph.shape(n.output), "plain")
    low.node(
        "binary",
        n.name + ":mul",
        [low.read(n.inputs[0], "plain"), s],
        mid,
        n.name,
        strings={"kind": "mul"},
    )
    out = low.declare(n.output)
    if n.act is not None and n.act.param is not None and n.act.param.size > 1:
        summed = low.add_value(n.output + ":add", low.graph.shape(n.output), "plain")
        low.node("binary", n.name + ":add", [mid, t], summed, n.name, strings={"kind": "add"})
        low.node("activation", n.name, [summed], out, n.name, floats=floats, arrays=arrays, strings=strings)
    else:
        low.node("binary", n.name, [mid, t], out, n.name, None, floats, arrays, {**strings, "kind": "add"})


@lowers(LayerNorm)
def lower_layer_norm(low: Lowering, n: LayerNorm) -> None:
    arrays = {
        k: np.ascontiguousarray(a.reshape(-1), np.float32)
        for k, a in (("weight", n.weight), ("bias", n.bias))
        if a is not None
    }
    ints = {"tail": [len(n.shape)], "channels": [int(n.channels)]}
    low.simple(
        n,
        "layer_norm",
        "map" if n.channels else "plain",
        ints=ints,
        floats={"eps": [n.eps]},
        arrays=arrays,
    )


@lowers(GroupNorm)
def lower_group_norm(low: Lowering, n: GroupNorm) -> None:
    arrays = {
        k: np.ascontiguousarray(a, np.float32)
        for k, a in (("weight", n.weight), ("bias", n.bias))
        if a is not None
    }
    low.simple(
        n,
        "group_norm",
        low.layout_of(n.output),
        ints={"groups": [n.groups]},
        floats={"eps": [n.eps]},
        arrays=arrays,
    )


@lowers(LocalResponseNorm)
def lower_lrn(low: Lowering, n: LocalResponseNorm) -> None:
    low.simple(
        n,
        "lrn",
        "map",
        ints={"size": [n.size], "before": [(n.size - 1) // 2 if n.behind else n.size // 2]},
        floats={"alpha": [n.alpha], "beta": [n.beta], "k": [n.k]},
    )
