"""Thresholded ReLUs as the front ends see them: a comparison, then the ``where`` or product that it masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.graph import broadcast, same_shape
from actzip.runtime.onnx_node import OnnxNode
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


def onnx_threshold(imp: Importer, mask: Mask, x: Any, other: tuple[int, ...]) -> str | None:
    """``x`` where the mask is, else 0, as a thresholded ReLU of the shape that these and ``other``
    broadcast to; None where it is none."""
    if mask.inverse or x != mask.x:
        return None
    shape, limit = imp.shape(x), mask.limit
    while limit.ndim > len(shape) and limit.shape[0] == 1:
        limit = limit[0]
    dims = [1] * (len(shape) - limit.ndim) + list(limit.shape)
    channels = len(dims) == len(shape) > 1 and dims == [1, limit.size, *[1] * (len(shape) - 2)]
    channels = channels and limit.size == shape[1]
    if not (limit.size == 1 or channels):
        return None
    out = imp.act(x, "threshold", param=limit.reshape(-1))
    whole = broadcast([shape, tuple(mask.limit.shape), other])
    return out if same_shape(whole, shape) else imp.emit(Expand, out, shape=whole)
