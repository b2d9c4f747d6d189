"""Thresholded ReLUs as the front ends see them: a comparison, then the ``where`` or product that it masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.graph import broadcast, same_shape
from actzip.runtime.onnx_node import OnnxNode, float32_of
from actzip.runtime.ops.reshape import Expand
from actzip.runtime.registry import Compare, Mask, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder


@torch_op("threshold")
def torch_threshold(b: Builder, a: dict[str, Any]) -> Any:
    if float(a["value"]) != 0.0:
        raise b.refuse("a threshold that gives another value than 0 is not supported")
    return b.act(a["self"], "threshold", param=np.array([float(a["threshold"])], np.float32))


def as_threshold(b: Builder, c: Compare, yes: Any, no: Any) -> Any:
    """``where(c, yes, no)`` as a threshold, ``where(x <= t, 0, x)``; None of others."""
    import torch

    def zero(t: Any) -> bool:
        return isinstance(t, torch.Tensor) and not bool((t != 0).any())

    if c.op in ("lt", "le"):
        yes, no = no, yes
    if not (yes == c.x and zero(no) and c.op in ("gt", "le")):
        return None
    t = c.t.to(torch.float32)
    shape = b.shape(c.x)
    if not same_shape(shape, b.out_shape):
        return None
    along = [1] * (t.ndim - len(shape) + 1) + [t.numel(), *[1] * (len(shape) - 2)]
    if t.numel() == 1 or list(t.shape) == along:
        return b.act(c.x, "threshold", param=t.reshape(-1).numpy())
    return None


@onnx_op("ThresholdedRelu")
def onnx_thresholded(imp: Importer, node: OnnxNode) -> Any:
    theta = np.array([node.number("alpha", 1.0)], dtype=np.float32)
    return imp.act(node.need(0), "threshold", param=theta)


@onnx_op("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def onnx_compare(imp: Importer, node: OnnxNode) -> Any:
    """``x > t`` of a value and a constant; ``x >= t`` is ``x >`` the next lower number."""
    x, limit, op = node.need(0), node.need(1), node.op
    if isinstance(limit, str) and not isinstance(x, str):
        x, limit = limit, x
        op = op.replace("Greater", "?").replace("Less", "Greater").replace("?", "Less")
    if not isinstance(x, str) or not isinstance(limit, np.ndarray):
        raise node.refuse(
            "a comparison of two values (of a value and a constant is supported, for a threshold)"
        )
    t = float32_of(limit, node.where)
    if op in ("GreaterOrEqual", "Less"):
        t = np.nextafter(t, np.float32(-np.inf))
    return Mask(x, t, op.startswith("Less"))


@onnx_op("Where")
def onnx_where(imp: Importer, node: OnnxNode) -> Any:
    mask, yes, no = node.need(0), node.need(1), node.need(2)
    if not isinstance(mask, Mask):
        raise node.refuse("a condition that is no comparison with a constant")
    if mask.inverse:
        yes, no = no, yes
    if not isinstance(no, np.ndarray) or no.size == 0 or bool((no != 0).any()):
        raise node.refuse("only a threshold is supported: Where(x > t, x, 0)")
    out = onnx_masked(imp, node, Mask(mask.x, mask.limit, False), yes)
    return _broadcast(imp, out, no.shape)


def _broadcast(imp: Importer, x: str, other: tuple[int, ...]) -> str:
    """``x`` in the shape that it and ``other`` broadcast to."""
    shape = broadcast([imp.shape(x), other])
    return x if same_shape(shape, imp.shape(x)) else imp.emit(Expand, x, shape=shape)


def onnx_masked(imp: Importer, node: OnnxNode, mask: Mask, x: Any) -> Any:
    """``x`` where the mask is, else 0: a thresholded ReLU."""
    shape, limit = imp.shape(x), mask.limit
    while limit.ndim > len(shape) and limit.shape[0] == 1:
        limit = limit[0]
    dims = [1] * (len(shape) - limit.ndim) + list(limit.shape)
    channels = len(dims) == len(shape) > 1 and dims == [1, limit.size, *[1] * (len(shape) - 2)]
    channels = channels and limit.size == shape[1]
    if mask.inverse or x != mask.x or not (mask.limit.size == 1 or channels):
        raise node.refuse(
            "only a threshold is supported: x where x > t (one number, or one a channel), else 0"
        )
    return _broadcast(imp, imp.act(x, "threshold", param=limit.reshape(-1)), mask.limit.shape)
