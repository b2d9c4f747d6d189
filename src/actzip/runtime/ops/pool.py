"""Pooling over windows, and to a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.acts import Act, act_fields
from actzip.runtime.graph import Array, Node, Shape, check_channels, check_integers, check_rank, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.reduce import Reduce
from actzip.runtime.ops.windows import (
    as_map,
    from_map,
    onnx_four,
    onnx_pads,
    onnx_spatial,
    onnx_two,
    torch_four,
    torch_three,
    torch_two,
    window,
)
from actzip.runtime.registry import VOLUME, Absent, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Pool(Node):
    """Max or average pooling. ``padding`` (top, left, bottom, right): -inf for max, zeros for average.

    Then ``bias`` (C) is added and ``act`` applied. ``ceil_mode`` is PyTorch's; an average divides
    by the window's size, by what of it is inside when ``count_include_pad`` is false, or by
    ``divisor`` when that is not 0.
    """

    kind: str = field(kw_only=True)
    kernel_size: tuple[int, int] = field(kw_only=True)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0
    bias: Array | None = None
    act: Act | None = None

    op = "pool"
    layout = "map"
    reads_packed = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 4)
        if self.kind not in ("max", "avg"):
            raise InputError(f"pooling kind {self.kind!r} is not 'max' or 'avg'")
        check_integers("kernel_size", self.kernel_size, 2, 1)
        check_integers("stride", self.stride, 2, 1)
        check_integers("padding", self.padding, 4, 0)
        check_integers("dilation", self.dilation, 2, 1)
        if self.kind == "avg" and self.dilation != (1, 1):
            raise UnsupportedError("average pooling with dilation")
        check_channels("bias", self.bias, static(x[1], "the number of channels"))
        t, left, b, r = self.padding
        k, s, d = self.kernel_size, self.stride, self.dilation
        h = window(static(x[2], "height"), k[0], s[0], t, b, d[0], self.ceil_mode)
        w = window(static(x[3], "width"), k[1], s[1], left, r, d[1], self.ceil_mode)
        return (x[0], x[1], h, w)

    def writes_packed(self) -> bool:
        return True


@dataclass(eq=False)
class AdaptivePool(Node):
    """Pools to a fixed ``output_size``; window i is [floor(i * H / O), ceil((i + 1) * H / O))."""

    kind: str = field(kw_only=True)
    output_size: tuple[int, int] = (1, 1)

    op = "adaptive_pool"
    layout = "map"
    reads_packed = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 4)
        if self.kind not in ("max", "avg"):
            raise InputError(f"pooling kind {self.kind!r} is not 'max' or 'avg'")
        check_integers("output_size", self.output_size, 2, 1)
        return (x[0], x[1], *self.output_size)


@torch_op("max_pool2d", "max_pool2d_with_indices")
def torch_max_pool(b: Builder, a: dict[str, Any]) -> Any:
    k = torch_two(a["kernel_size"])
    y = b.emit(
        Pool,
        a["self"],
        kind="max",
        kernel_size=k,
        stride=torch_two(a["stride"]) if a["stride"] else k,
        padding=torch_four(a["padding"]),
        dilation=torch_two(a["dilation"]),
        ceil_mode=bool(a["ceil_mode"]),
    )
    many = isinstance(b.node.meta["val"], (tuple, list))
    return (y, Absent("the indices of a max pooling")) if many else y


@torch_op("avg_pool2d")
def torch_avg_pool(b: Builder, a: dict[str, Any]) -> Any:
    k = torch_two(a["kernel_size"])
    return b.emit(
        Pool,
        a["self"],
        kind="avg",
        kernel_size=k,
        stride=torch_two(a["stride"]) if a["stride"] else k,
        padding=torch_four(a["padding"]),
        ceil_mode=bool(a["ceil_mode"]),
        count_include_pad=bool(a["count_include_pad"]),
        divisor=int(a["divisor_override"] or 0),
    )


@torch_op("max_pool3d", "max_pool3d_with_indices")
def torch_max_pool3d(b: Builder, a: dict[str, Any]) -> Any:
    k, p, d = [torch_three(a[n]) for n in ("kernel_size", "padding", "dilation")]
    s = torch_three(a["stride"]) if a["stride"] else k
    y = VOLUME["pool"](b, a["self"], "max", k, s, p * 2, d, ceil_mode=bool(a["ceil_mode"]))
    many = isinstance(b.node.meta["val"], (tuple, list))
    return (y, Absent("the indices of a max pooling")) if many else y


@torch_op("avg_pool3d")
def torch_avg_pool3d(b: Builder, a: dict[str, Any]) -> Any:
    """Windows along the first of the three dimensions alone are what local response norm is made of."""
    k, p = [torch_three(a[n]) for n in ("kernel_size", "padding")]
    s = torch_three(a["stride"]) if a["stride"] else k
    n, c, d, h, w = b.shape(a["self"])
    if k[1:] != [1, 1] or set(s) != {1} or any(p[1:]) or not isinstance(h, int) or not isinstance(w, int):
        return VOLUME["pool"](
            b,
            a["self"],
            "avg",
            k,
            s,
            p * 2,
            [1, 1, 1],
            ceil_mode=bool(a["ceil_mode"]),
            count_include_pad=bool(a["count_include_pad"]),
            divisor=int(a["divisor_override"] or 0),
        )
    x = b.reshape(a["self"], (n, c, d, h * w))
    y = b.emit(
        Pool,
        x,
        kind="avg",
        kernel_size=(k[0], 1),
        padding=(p[0], 0, p[0], 0),
        count_include_pad=bool(a["count_include_pad"]),
        divisor=int(a["divisor_override"] or 0),
    )
    return b.reshape(y, b.out_shape)


@torch_op("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
def torch_adaptive_pool(b: Builder, a: dict[str, Any]) -> Any:
    is_max = "max" in b.node.target._schema.name
    h, w = b.shape(a["self"])[2:]
    size = [int(o if o is not None else d) for o, d in zip(a["output_size"], (h, w), strict=True)]  # type: ignore[arg-type]
    y: Any = a["self"]
    if (h, w) != tuple(size):
        y = b.emit(AdaptivePool, y, kind="max" if is_max else "avg", output_size=torch_two(size))
    return (y, Absent("the indices of a max pooling")) if is_max else y


@torch_op("adaptive_avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d")
def torch_adaptive_pool3d(b: Builder, a: dict[str, Any]) -> Any:
    is_max = "max" in b.node.target._schema.name
    dims = b.shape(a["self"])[2:]
    size = [int(o if o is not None else d) for o, d in zip(a["output_size"], dims, strict=True)]  # type: ignore[arg-type]
    y = VOLUME["adaptive_pool"](b, a["self"], "max" if is_max else "avg", size)
    return (y, Absent("the indices of a max pooling")) if is_max else y


@onnx_op("MaxPool", "AveragePool")
def onnx_pool(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    n = len(shape) - 2
    if n not in (1, 2, 3):
        raise node.refuse(f"{n} spatial dimensions")
    kernel = node.ints("kernel_shape")
    if len(kernel) != n:
        raise node.wrong(f"kernel_shape {kernel} for {n} spatial dimensions")
    strides, dilations = onnx_spatial(node, "strides", n, 1), onnx_spatial(node, "dilations", n, 1)
    pads = onnx_pads(node, shape[2:], kernel, strides, dilations)
    if any(p < 0 for p in pads):
        raise node.refuse("negative padding")
    if len(node.proto.output) > 1 and node.proto.output[1] and imp.is_read(node.proto.output[1]):
        raise node.refuse("the indices of the maxima")
    kind = "max" if node.op == "MaxPool" else "avg"
    include = bool(node.integer("count_include_pad", 0)) or kind == "max"
    ceil = bool(node.integer("ceil_mode", 0)) and node.attribute("auto_pad", "NOTSET") in ("NOTSET", "")
    if kind == "avg" and any(d != 1 for d in dilations):
        raise node.refuse("average pooling with dilation")
    if n == 3:
        how: dict[str, Any] = {"ceil_mode": ceil, "count_include_pad": include}
        return VOLUME["pool"](imp, x, kind, kernel, strides, pads, dilations, **how)
    out = imp.emit(
        Pool,
        as_map(imp, x, n),
        kind=kind,
        kernel_size=onnx_two(kernel),
        stride=onnx_two(strides),
        padding=onnx_four(pads),
        dilation=onnx_two(dilations),
        ceil_mode=ceil,
        count_include_pad=include,
    )
    return from_map(imp, out, n)


@onnx_op("GlobalAveragePool", "GlobalMaxPool")
def onnx_global_pool(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    if len(shape) == 4:
        kind = "avg" if node.op == "GlobalAveragePool" else "max"
        return imp.emit(AdaptivePool, x, kind=kind, output_size=(1, 1))
    axes = tuple(range(2, len(shape)))
    if not axes:
        raise node.wrong(f"an input of shape {shape} has no spatial dimension")
    return imp.emit(
        Reduce, x, kind="mean" if node.op == "GlobalAveragePool" else "max", axes=axes, keepdims=True
    )


@lowers(Pool)
def lower_pool(low: Lowering, n: Pool) -> None:
    if low.graph.values[n.inputs[0]].storage == "band":
        return  # its convolution does it
    strings, floats, arrays = act_fields(n.act)
    strings["kind"] = n.kind
    if n.bias is not None:
        arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
    ints = {
        "kernel": list(n.kernel_size), "stride": list(n.stride), "padding": list(n.padding),
        "dilation": list(n.dilation), "count_include_pad": [int(n.count_include_pad)], "divisor": [n.divisor],
    }  # fmt: skip
    low.simple(n, "pool", "any map", ints=ints, floats=floats, arrays=arrays, strings=strings)


@lowers(AdaptivePool)
def lower_adaptive_pool(low: Lowering, n: AdaptivePool) -> None:
    low.simple(n, "adaptive_pool", "any map", strings={"kind": n.kind})
