"""Quantizers: marked maps of our own models, PyTorch's of programs that it quantized (``pt2e``), and
ONNX's QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.acts import Act
from actzip.runtime.onnx_node import OnnxNode, scale_and_zero
from actzip.runtime.ops.activation import Activation
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.registry import Ref, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder


@torch_op("quantized_map")
def torch_quantized_map(b: Builder, a: dict[str, Any]) -> Any:
    x = a["x"]
    if not isinstance(x, Ref):
        raise b.refuse("a quantized constant is not supported")
    b.graph.values[x.name].quant = (float(a["scale"]), int(a["bits"]))
    return x


def _number(b: Builder, value: Any) -> float:
    if isinstance(value, Ref):
        raise b.refuse("a scale or zero point that is computed of an input")
    return float(value)


@torch_op("quantize_per_tensor")
def torch_quantize(b: Builder, a: dict[str, Any]) -> Any:
    """Integers, held as float32 until they are dequantized."""
    zero, low, high = (_number(b, a[k]) for k in ("zero_point", "quant_min", "quant_max"))
    out = b.emit(Binary, a["input"], _number(b, a["scale"]), kind="div")
    out = b.act(out, "round")
    if zero:
        out = b.emit(Binary, out, zero, kind="add")
    kind = str(a["dtype"]).removeprefix("torch.")
    return b.emit(Activation, out, act=Act.of("clip", lo=low, hi=high), dtype=kind)


@torch_op("dequantize_per_tensor")
def torch_dequantize(b: Builder, a: dict[str, Any]) -> Any:
    x, zero = a["input"], _number(b, a["zero_point"])
    if zero:
        x = b.emit(Binary, x, zero, kind="sub")
    return b.emit(Binary, x, _number(b, a["scale"]), kind="mul")


@onnx_op("QuantizeLinear")
def onnx_quantize(imp: Importer, node: OnnxNode) -> Any:
    """clip(round_half_even(x / scale) + zero): integers, held as float32 until they are dequantized."""
    x = node.need(0)
    scale, zero, low, high = scale_and_zero(node, imp.shape(x))
    out = imp.emit(Binary, x, scale, kind="div")
    out = imp.act(out, "round")
    if np.any(zero != 0):
        out = imp.emit(Binary, out, zero, kind="add")
    return imp.act(out, "clip", lo=float(low), hi=float(high))


@onnx_op("DequantizeLinear")
def onnx_dequantize(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    scale, zero, _, _ = scale_and_zero(node, imp.shape(x))
    if np.any(zero != 0):
        x = imp.emit(Binary, x, zero, kind="sub")
    return imp.emit(Binary, x, scale, kind="mul")
