"""ONNX's arithmetic on shapes, followed symbolically where they depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.graph import Dim, Sym, numel
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.registry import Dims, onnx_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer

SHAPE_OPS = {"Shape", "Size"}


@onnx_op("Shape")
def onnx_shape(imp: Importer, node: OnnxNode) -> Any:
    shape = imp.shape(node.need(0))
    start = node.integer("start", 0)
    end = node.attribute("end")
    dims = shape[slice(start, end)]
    if any(isinstance(d, Sym) for d in dims):
        return Dims(dims)
    return np.array(dims, dtype=np.int64)


@onnx_op("Size")
def onnx_size(imp: Importer, node: OnnxNode) -> Any:
    count, power = numel(imp.shape(node.need(0)))
    if power == 0:
        return np.array(count, dtype=np.int64)
    raise node.refuse("the number of elements depends on the batch")


def dims_of(node: OnnxNode, i: int, what: str) -> list[Dim]:
    value = node.need(i)
    if isinstance(value, Dims):
        return list(value)
    array = node.required(i, what)
    if array.dtype.kind not in "iuf":
        raise node.wrong(f"{what} is of type {array.dtype}, not a number")
    return [int(v) for v in array.reshape(-1)]


def dims_result(values: Sequence[Dim], like: Any = None) -> Any:
    return Dims(values) if any(isinstance(v, Sym) for v in values) else np.array(values, dtype=np.int64)


def _times(a: Dim, b: Dim, node: OnnxNode) -> Dim:
    if isinstance(a, Sym) and isinstance(b, Sym):
        raise node.refuse("a dimension would grow with the square of the batch")
    if isinstance(a, Sym):
        return Sym(a.mul * int(b)) if int(b) else 0  # type: ignore[arg-type]
    if isinstance(b, Sym):
        return _times(b, a, node)
    return a * b


def shape_arithmetic(imp: Importer, node: OnnxNode) -> Any:
    a, b = (dims_of(node, i, "an operand") for i in (0, 1))
    n = max(len(a), len(b))
    if len(a) not in (1, n) or len(b) not in (1, n):
        raise node.wrong(f"shapes of {len(a)} and {len(b)} dimensions do not broadcast")
    a, b = a * (n // len(a)), b * (n // len(b))
    out: list[Dim] = []
    for x, y in zip(a, b, strict=True):
        if node.op == "Mul":
            out.append(_times(x, y, node))
        elif node.op == "Div" and isinstance(x, Sym) and isinstance(y, int) and y and x.mul % y == 0:
            out.append(Sym(x.mul // y))
        elif node.op in ("Add", "Sub") and y == 0:
            out.append(x)
        elif node.op == "Div" and isinstance(x, Sym) and isinstance(y, Sym) and x.mul % y.mul == 0:
            out.append(x.mul // y.mul)
        else:
            raise node.refuse("this arithmetic on a dimension that depends on the batch")
    return dims_result(out)


def onnx_axes(node: OnnxNode, i: int, rank: int, *, name: str = "axes") -> list[int] | None:
    """Axes from an input (newer opsets) or an attribute (older), normalised; None where none are given."""
    axes = (
        node.integers(i, "the axes")
        if node.has(i)
        else (node.ints(name) if name in node.attributes else None)
    )
    if axes is None:
        return None
    for a in axes:
        if not -rank <= a < rank:
            raise node.wrong(f"axis {a} of a tensor of {rank} dimensions")
    return [a % rank for a in axes]
