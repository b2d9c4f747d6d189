"""Comparisons, logic and choices between two values. A mask is 1 and 0; its type is bool for who
sees it.

``where(c, a, b)`` is ``keep(c, a) + drop(c, b)``: each is 0 where the other is taken, so that
nothing of what is not taken (infinities, NaN) is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.graph import Array, broadcast, same_shape
from actzip.runtime.onnx_node import OnnxNode, float32_of, floats_only
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.ops.reduce import Reduce, torch_axes
from actzip.runtime.ops.reshape import Expand, Reshape
from actzip.runtime.ops.threshold import as_threshold, onnx_threshold
from actzip.runtime.registry import Compare, Mask, Ref, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder

_TURNED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge", "eq": "eq", "ne": "ne"}


@torch_op(*_TURNED)
def torch_compare(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    name = b.node.target._schema.name.partition("::")[2]
    x, t = a["self"], a["other"]
    if not isinstance(x, Ref) and isinstance(t, Ref):
        x, t, name = t, x, _TURNED[name]
    t = torch.tensor(float(t)) if isinstance(t, (int, float)) else t
    if isinstance(x, Ref) and isinstance(t, torch.Tensor) and name not in ("eq", "ne"):
        return Compare(name, x, t)  # perhaps that of a threshold
    return b.emit(Binary, x, t, kind=name, dtype="bool")


@torch_op("where")
def torch_where(b: Builder, a: dict[str, Any]) -> Any:
    c, yes, no = a["condition"], a["self"], a["other"]
    found = as_threshold(b, c, yes, no) if isinstance(c, Compare) else None
    if found is not None:
        return found
    parts = [p for p in (_part(b, "keep", c, yes), _part(b, "drop", c, no)) if p is not None]
    if len(parts) == 2:
        return b.emit(Binary, *parts, kind="add")
    out = parts[0] if parts else b.emit(Binary, c, 0.0, kind="keep")
    return out if same_shape(b.shape(out), b.out_shape) else b.emit(Expand, out, shape=b.out_shape)


def _part(b: Builder, kind: str, c: Any, x: Any) -> Any:
    """What ``where`` takes of ``x``, else 0; None where that is 0 all over."""
    import torch

    if isinstance(x, torch.Tensor):
        if not bool((x != 0).any()):
            return None
        if isinstance(c, torch.Tensor):
            taken = c if kind == "keep" else ~c
            return torch.where(taken, x, torch.zeros((), dtype=x.dtype))
    if isinstance(c, torch.Tensor) and c.dtype == torch.bool:
        taken = c if kind == "keep" else ~c
        if not bool(taken.any()):
            return None
        if bool(taken.all()) and same_shape(b.shape(x), b.out_shape):
            return x
    return b.emit(Binary, c, x, kind=kind)


@torch_op("logical_and", "bitwise_and", "logical_or", "bitwise_or", "logical_xor", "bitwise_xor")
def torch_logic(b: Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name.partition("_")[2]
    x, y = (b.as_bool(v) for v in (a["self"], a["other"]))
    kind = {"and": "mul", "or": "max", "xor": "ne"}[name]
    return b.emit(Binary, x, y, kind=kind, dtype="bool")


@torch_op("logical_not", "bitwise_not")
def torch_not(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(Binary, b.as_bool(a["self"]), 0.0, kind="eq", dtype="bool")


@torch_op("isnan")
def torch_isnan(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(Binary, a["self"], a["self"], kind="ne", dtype="bool")


@torch_op("isinf")
def torch_isinf(b: Builder, a: dict[str, Any]) -> Any:
    return b.emit(Binary, b.act(a["self"], "abs"), float("inf"), kind="eq", dtype="bool")


@torch_op("any", "all")
def torch_any(b: Builder, a: dict[str, Any]) -> Any:
    kind = {"any": "max", "all": "min"}[b.node.target._schema.name.partition("::")[2]]
    x = b.as_bool(a["self"])
    axes = torch_axes(a, len(b.shape(x)))
    return b.emit(Reduce, x, kind=kind, axes=axes, keepdims=bool(a.get("keepdim")), dtype="bool")


_ONNX = {"Greater": "gt", "GreaterOrEqual": "ge", "Less": "lt", "LessOrEqual": "le", "Equal": "eq"}


@onnx_op(*_ONNX)
def onnx_compare(imp: Importer, node: OnnxNode) -> Any:
    """``x > t`` of a value and a constant is kept for a threshold; ``x >= t`` is ``x >`` the next
    lower number."""
    x, limit, kind = node.need(0), node.need(1), _ONNX[node.op]
    if isinstance(limit, str) and isinstance(x, np.ndarray):
        x, limit, kind = limit, x, _TURNED[kind]
    if kind == "eq" or not isinstance(x, str) or not isinstance(limit, np.ndarray):
        return imp.emit(Binary, _numbers(imp, x), _numbers(imp, limit), kind=kind, dtype="bool")
    t = float32_of(limit, node.where)
    if kind in ("ge", "lt"):
        t = np.nextafter(t, np.float32(-np.inf))
    return Mask(x, t, kind in ("lt", "le"))


def _numbers(imp: Importer, x: Any) -> Any:
    """A mask as float32; other values as they are."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32) if x.dtype == np.bool_ else x
    name = imp.ref(x)
    return (
        imp.emit(Reshape, name, shape=imp.shape(name), dtype="float32") if imp.dtype(name) == "bool" else name
    )


@onnx_op("And", "Or", "Xor")
def onnx_logic(imp: Importer, node: OnnxNode) -> Any:
    kind = {"And": "mul", "Or": "max", "Xor": "ne"}[node.op]
    x, y = (_numbers(imp, node.need(i)) for i in (0, 1))
    return imp.emit(Binary, x, y, kind=kind, dtype="bool")


@onnx_op("Not")
def onnx_not(imp: Importer, node: OnnxNode) -> Any:
    return imp.emit(Binary, _numbers(imp, node.need(0)), np.float32(0), kind="eq", dtype="bool")


@onnx_op("IsNaN")
def onnx_isnan(imp: Importer, node: OnnxNode) -> Any:
    return imp.emit(Binary, node.need(0), node.need(0), kind="ne", dtype="bool")


@onnx_op("Where")
def onnx_where(imp: Importer, node: OnnxNode) -> Any:
    c, yes, no = node.need(0), node.need(1), node.need(2)
    floats_only(node, yes, no)
    if isinstance(c, Mask):
        kept, other = (no, yes) if c.inverse else (yes, no)
        if isinstance(other, np.ndarray) and not (other != 0).any():
            found = onnx_threshold(imp, Mask(c.x, c.limit, False), kept, other.shape)
            if found is not None:
                return found
    shape = broadcast([imp.shape(v) for v in (c, yes, no)])
    c = _numbers(imp, c)
    parts = [p for p in (_onnx_part(imp, "keep", c, yes), _onnx_part(imp, "drop", c, no)) if p is not None]
    if len(parts) == 2:
        return imp.emit(Binary, *parts, kind="add")
    out = parts[0] if parts else imp.emit(Binary, c, np.float32(0), kind="keep")
    return out if same_shape(imp.shape(out), shape) else imp.emit(Expand, out, shape=shape)


def _onnx_part(imp: Importer, kind: str, c: str | Array, x: Any) -> Any:
    """What Where takes of ``x``, else 0; None where that is 0 all over."""
    if isinstance(x, np.ndarray):
        if not (x != 0).any():
            return None
        if isinstance(c, np.ndarray):
            return np.where((c != 0) == (kind == "keep"), x, np.zeros((), x.dtype))
    return imp.emit(Binary, c, x, kind=kind)
