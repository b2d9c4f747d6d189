"""Comparisons, logic and choices between two values. A mask is 1 and 0; its type is bool for who
sees it.

``where(c, a, b)`` is ``keep(c, a) + drop(c, b)``: each is 0 where the other is taken, so that
nothing of what is not taken (infinities, NaN) is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actzip.runtime.graph import same_shape
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.ops.reduce import Reduce, torch_axes
from actzip.runtime.ops.reshape import Expand
from actzip.runtime.ops.threshold import as_threshold
from actzip.runtime.registry import Compare, Ref, torch_op

if TYPE_CHECKING:
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
