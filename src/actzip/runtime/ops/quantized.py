"""Quantizers: marked maps of our own models, and ONNX's QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.onnx_node import OnnxNode, scale_and_zero
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
