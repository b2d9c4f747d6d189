"""Convolution and transposed convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.acts import Act, act_fields
from actzip.runtime.graph import (
    Array,
    Node,
    Shape,
    Sym,
    check_channels,
    check_integers,
    check_rank,
    same_shape,
    static,
)
from actzip.runtime.onnx_node import OnnxNode
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
from actzip.runtime.registry import VOLUME, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Conv2d(Node):
    """Convolution. inputs: x (N, C, H, W)[, residual of the output's shape]. out = act(conv + bias
    + residual).

    ``weight`` (O, C / groups, KH, KW); ``padding`` (top, left, bottom, right), zeros. ``act`` is applied
    after the residual; ``pre_act`` (a quantizer, say) before it. ``kernel`` is the engine variant
    chosen ("" = its choice).
    """

    weight: Array = field(kw_only=True)
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: Act | None = None
    pre_act: Act | None = None
    kernel: str = ""

    op = "conv2d"
    arity = (1, 2)
    layout = "map"
    reads_packed = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 4)
        if self.weight.ndim != 4:
            raise InputError(f"weight of shape {list(self.weight.shape)} has not 4 dimensions")
        o, ci, kh, kw = self.weight.shape
        check_integers("stride", self.stride, 2, 1)
        check_integers("padding", self.padding, 4, 0)
        check_integers("dilation", self.dilation, 2, 1)
        c = static(x[1], "the number of channels")
        if self.groups < 1 or ci * self.groups != c or o % self.groups:
            raise InputError(
                f"weight {list(self.weight.shape)} in {self.groups} groups does not fit {c} channels"
            )
        check_channels("bias", self.bias, o)
        t, left, b, r = self.padding
        h = window(static(x[2], "height"), kh, self.stride[0], t, b, self.dilation[0], False)
        w = window(static(x[3], "width"), kw, self.stride[1], left, r, self.dilation[1], False)
        out = (x[0], o, h, w)
        if len(shapes) > 1 and not same_shape(shapes[1], out):
            raise InputError(f"residual of shape {shapes[1]} is not of the output's shape {out}")
        return out

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.size) * static(out[2], "height") * static(out[3], "width")

    def writes_packed(self) -> bool:
        act = self.act
        if act is None:
            return True
        late = act.kind in ("relu", "clip", "threshold", "quantize") and (
            act.kind != "threshold" or math.isinf(act.hi)
        )
        return late and (self.pre_act is None or self.pre_act.kind == "quantize")


@dataclass(eq=False)
class ConvTranspose2d(Node):
    """Transposed convolution. ``weight`` (C, O / groups, KH, KW); ``padding`` (top, left, bottom, right)
    is cut from the output, ``output_padding`` (h, w) adds to its bottom and right."""

    weight: Array = field(kw_only=True)
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: Act | None = None

    op = "conv_transpose2d"
    layout = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 4)
        c, og, kh, kw = self.weight.shape
        check_integers("stride", self.stride, 2, 1)
        check_integers("padding", self.padding, 4, 0)
        check_integers("dilation", self.dilation, 2, 1)
        check_integers("output_padding", self.output_padding, 2, 0)
        if x[1] != c or self.groups < 1 or c % self.groups:
            raise InputError(
                f"weight {list(self.weight.shape)} in {self.groups} groups does not fit {x[1]} channels"
            )
        check_channels("bias", self.bias, og * self.groups)
        dims = []
        for i, (k, n) in enumerate(((kh, "height"), (kw, "width"))):
            size = (static(x[2 + i], n) - 1) * self.stride[i] + self.dilation[i] * (k - 1) + 1
            size += self.output_padding[i] - self.padding[i] - self.padding[i + 2]
            if size < 1:
                raise InputError(f"the output's {n} would be {size}")
            dims.append(size)
        return (x[0], og * self.groups, dims[0], dims[1])

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.size) * static(shapes[0][2], "height") * static(shapes[0][3], "width")


@torch_op("convolution")
def torch_convolution(b: Builder, a: dict[str, Any]) -> Any:
    w = b.array(a["weight"])
    x = a["input"]
    bias = b.maybe(a["bias"])
    stride, padding, dilation = list(a["stride"]), list(a["padding"]), list(a["dilation"])
    if w.ndim == 5:
        stride, padding, dilation = torch_three(stride), torch_three(padding) * 2, torch_three(dilation)
        k = int(a["groups"])
        if not a["transposed"]:
            return VOLUME["conv"](b, x, w, bias, stride, padding, dilation, k)
        extra = torch_three(a["output_padding"])
        try:
            return VOLUME["conv_transpose"](b, x, w, bias, stride, padding, extra, dilation, k)
        except UnsupportedError as error:
            raise b.refuse(str(error)) from error
    one = w.ndim == 3
    if one:  # as a convolution of height 1
        n, c, length = b.shape(x)
        x = b.reshape(x, (n, c, 1, length))
        w = w.reshape(w.shape[0], w.shape[1], 1, w.shape[2])
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    if a["transposed"]:
        out = list(a["output_padding"])
        y = b.emit(
            ConvTranspose2d,
            x,
            weight=w,
            bias=bias,
            stride=torch_two(stride),
            padding=torch_four(padding),
            output_padding=torch_two([0, *out] if one else out),
            dilation=torch_two(dilation),
            groups=int(a["groups"]),
        )
    else:
        y = b.emit(
            Conv2d,
            x,
            weight=w,
            bias=bias,
            stride=torch_two(stride),
            padding=torch_four(padding),
            dilation=torch_two(dilation),
            groups=int(a["groups"]),
        )
    return b.reshape(y, b.out_shape) if one else y


@onnx_op("Conv", "ConvTranspose")
def onnx_conv(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    weight = node.floats(1, "the weight")
    bias = node.floats(2, "the bias")
    if weight is None:
        raise node.wrong("the weight (input 1) is missing")
    shape = imp.shape(x)
    n = len(shape) - 2
    if n not in (1, 2, 3):
        raise node.refuse(f"{n} spatial dimensions")
    if weight.ndim != n + 2:
        raise node.wrong(f"weight of shape {list(weight.shape)} for an input of shape {shape}")
    kernel = node.ints("kernel_shape", list(weight.shape[2:]))
    if kernel != list(weight.shape[2:]):
        raise node.wrong(f"kernel_shape {kernel} does not fit the weight's shape {list(weight.shape)}")
    strides, dilations = onnx_spatial(node, "strides", n, 1), onnx_spatial(node, "dilations", n, 1)
    groups = node.integer("group", 1)
    if n == 3:
        return _onnx_volume(imp, node, x, weight, bias)
    if n == 1:
        weight = weight.reshape(*weight.shape[:2], 1, weight.shape[2])
    x2 = as_map(imp, x, n)
    fields: dict[str, Any] = {"stride": onnx_two(strides), "dilation": onnx_two(dilations), "groups": groups}
    if node.op == "Conv":
        pads = onnx_pads(node, shape[2:], kernel, strides, dilations)
    else:
        pads, extra = _onnx_transposed_pads(node, shape[2:], kernel, strides, dilations)
        fields["output_padding"] = onnx_two(extra, 0)
    if min(pads, default=0) < 0:
        raise node.refuse("negative padding")
    cls = Conv2d if node.op == "Conv" else ConvTranspose2d
    out = imp.emit(cls, x2, weight=weight, bias=bias, padding=onnx_four(pads), **fields)
    return from_map(imp, out, n)


def _onnx_volume(imp: Importer, node: OnnxNode, x: Any, weight: Array, bias: Array | None) -> Any:
    spatial, kernel = imp.shape(x)[2:], [int(k) for k in weight.shape[2:]]
    strides, dilations = onnx_spatial(node, "strides", 3, 1), onnx_spatial(node, "dilations", 3, 1)
    groups, extra = node.integer("group", 1), [0, 0, 0]
    if node.op == "Conv":
        pads = onnx_pads(node, spatial, kernel, strides, dilations)
    else:
        pads, extra = _onnx_transposed_pads(node, spatial, kernel, strides, dilations)
    if min(pads) < 0:
        raise node.refuse("negative padding")
    if node.op == "Conv":
        return VOLUME["conv"](imp, x, weight, bias, strides, pads, dilations, groups)
    try:
        return VOLUME["conv_transpose"](imp, x, weight, bias, strides, pads, extra, dilations, groups)
    except UnsupportedError as error:
        raise node.refuse(str(error)) from error


def _onnx_transposed_pads(
    node: OnnxNode, spatial: Shape, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """Padding (begins, ends) and output padding of a ConvTranspose, for the output's size that is wanted."""
    n = len(kernel)
    extra = onnx_spatial(node, "output_padding", n, 0)
    wanted = node.ints("output_shape")[-n:]
    auto = node.attribute("auto_pad", "NOTSET")
    pads = node.ints("pads", [0] * (2 * n))
    if len(pads) != 2 * n:
        raise node.wrong(f"{len(pads)} pads for {n} spatial dimensions")
    if auto == "VALID" and not wanted:
        return [0] * (2 * n), extra
    if not wanted and auto not in ("SAME_UPPER", "SAME_LOWER"):
        return pads, extra
    for i, size in enumerate(spatial):
        if isinstance(size, Sym):
            raise node.refuse("a spatial dimension depends on the batch")
        target = wanted[i] if wanted else size * strides[i]
        total = strides[i] * (size - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - target
        if total < 0:
            extra[i] -= total
            total = 0
        small, large = total // 2, total - total // 2
        pads[i], pads[i + n] = (small, large) if auto == "SAME_UPPER" else (large, small)
    return pads, extra


def _blocks(parts: list[int]) -> list[int]:
    """Widths of the packed blocks that parts of so many channels are cut into."""
    return [min(64, c - i) for c in parts for i in range(0, c, 64)]


def _conv_fields(n: Conv2d) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The attributes of a native ``conv`` node: strings, floats, arrays, ints."""
    strings, floats, arrays = act_fields(n.act)
    if n.pre_act is not None:
        floats |= {f"pre_{k}": [getattr(n.pre_act, a)] for k, a in _PRE.items()}
    arrays["weight"] = np.ascontiguousarray(n.weight, np.float32)
    if n.bias is not None:
        arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
    ints = {
        "kernel": [int(k) for k in n.weight.shape[2:]],
        "stride": list(n.stride),
        "padding": list(n.padding),
        "dilation": list(n.dilation),
        "groups": [n.groups],
    }
    return strings, floats, arrays, ints


_PRE = {"step": "alpha", "lo": "lo", "hi": "hi"}


def _from_planes(low: Lowering, n: Conv2d) -> bool:
    """Whether the convolution reads an input of the network as it comes: kernels of few channels rearrange
    the rows that they read in any case."""
    few = n.groups == 1 and n.weight.shape[1] < 16 and n.weight.shape[3] > 1 and n.dilation[1] == 1
    return few and n.inputs[0] in low.graph.inputs


def _residuals(low: Lowering, n: Conv2d) -> list[int]:
    """What is added to a convolution's output. Packed, it has to be cut into the output's blocks."""
    found = []
    for v in n.inputs[1:]:
        packed = low.graph.values[v].storage == "packed" and low.kind[v] == "map"
        same = not packed or _blocks(low.parts(v)) == _blocks([n.weight.shape[0]])
        found.append(low.read(v, "any map" if same else "map"))
    return found


@lowers(Conv2d)
def lower_conv2d(low: Lowering, n: Conv2d) -> None:
    if low.graph.values[n.inputs[0]].storage == "band" or n.name in low.out.inside:
        return  # the convolution before it does it
    strings, floats, arrays, ints = _conv_fields(n)
    strings["weights"] = low.keeper(n)
    inputs = [low.read(n.inputs[0], "plain" if _from_planes(low, n) else "any map")]
    inputs += _residuals(low, n)
    pool = low.behind.get(n.output)
    chosen = low.variants.get(n.name) or n.kernel
    if pool is not None and low.pools_in_tiles(n, pool, chosen):
        ints["pool"], output = [2], low.declare(pool.output)
        pool = None
    else:
        output = low.declare(n.output)
    if low.want_variants:
        low.out.variants[n.name] = list(
            low.builder.variants(
                "conv",
                n.name,
                inputs,
                output,
                ints,
                floats,
                {k: v for k, v in arrays.items() if k == "act_param"},
                strings,
            )
        )
    if chosen:
        strings["variant"] = chosen
    if pool is None:
        low.node("conv", n.name, inputs, output, n.name, ints, floats, arrays, strings)
        return
    ints["band"] = [output]
    if isinstance(pool, Conv2d):
        for mine, its in zip((strings, floats, arrays, ints), _conv_fields(pool), strict=True):
            mine.update({f"next_{k}": v for k, v in its.items()})
        strings["next"] = pool.name
        low.out.inside[pool.name] = n.name
        whole = low.declare(pool.output)
        if (last := low.last.get(pool.output)) is not None:
            for mine, its in zip((strings, floats, arrays, ints), _conv_fields(last), strict=True):
                mine.update({f"last_{k}": v for k, v in its.items()})
            low.out.inside[last.name] = n.name
            strings["last"], strings["last_weights"] = last.name, low.keeper(last)
            if kernel := low.variants.get(last.name) or last.kernel:
                strings["last_variant"] = kernel
            ints["band"].append(whole)
            inputs += _residuals(low, last)
            whole = low.declare(last.output)
        low.node("conv_depthwise", n.name, inputs, whole, n.name, ints, floats, arrays, strings)
        return
    ints.update(
        pool_kernel=list(pool.kernel_size),
        pool_stride=list(pool.stride),
        pool_padding=list(pool.padding),
        pool_dilation=list(pool.dilation),
        count_include_pad=[int(pool.count_include_pad)],
        divisor=[pool.divisor],
    )
    strings["pool"] = pool.kind
    low.node("conv_pool", n.name, inputs, low.declare(pool.output), n.name, ints, floats, arrays, strings)


@lowers(ConvTranspose2d)
def lower_conv_transpose2d(low: Lowering, n: ConvTranspose2d) -> None:
    """Zeros between the pixels, then a convolution with the flipped weights."""
    x = low.graph.shape(n.inputs[0])
    batch, c, h, w = x
    assert isinstance(c, int) and isinstance(h, int) and isinstance(w, int)
    og, kh, kw = n.weight.shape[1:]
    k = n.groups
    t, left, b, r = n.padding
    eh, ew = n.dilation[0] * (kh - 1), n.dilation[1] * (kw - 1)
    ops = n.output_padding
    pads = [eh - t, ew - left, eh - b + ops[0], ew - r + ops[1]]
    hh, ww = (h - 1) * n.stride[0] + 1, (w - 1) * n.stride[1] + 1
    # negative padding of the convolution: cut from the stretched map
    cut = [max(0, -p) for p in pads]
    pads = [max(0, p) for p in pads]
    src = low.read(n.inputs[0], "map")
    if n.stride != (1, 1):
        wide = low.add_value(n.output + ":wide", (batch, c, hh, ww), "map")
        low.node(
            "dilate",
            n.name + ":wide",
            [src],
            wide,
            n.name,
            {"starts": [0] * 4, "steps": [1, 1, *n.stride]},
        )
        src = wide
    if any(cut):
        hh, ww = hh - cut[0] - cut[2], ww - cut[1] - cut[3]
        less = low.add_value(n.output + ":cut", (batch, c, hh, ww), "map")
        low.node(
            "slice",
            n.name + ":cut",
            [src],
            less,
            n.name,
            {"starts": [0, 0, cut[0], cut[1]], "steps": [1] * 4},
        )
        src = less
    weight = n.weight.reshape(k, c // k, og, kh, kw).transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
    strings, floats, arrays = act_fields(n.act)
    arrays["weight"] = np.ascontiguousarray(weight.reshape(k * og, c // k, kh, kw), np.float32)
    if n.bias is not None:
        arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
    ints = {
        "kernel": [kh, kw],
        "stride": [1, 1],
        "padding": pads,
        "dilation": list(n.dilation),
        "groups": [k],
    }
    low.node("conv", n.name, [src], low.declare(n.output), n.name, ints, floats, arrays, strings)
