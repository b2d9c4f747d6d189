"""Writing to a part of a tensor: what stays of it, joined with what is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime.graph import Array, Shape, Sym, same_shape
from actzip.runtime.onnx_node import OnnxNode, floats_only
from actzip.runtime.ops.select import Concat, Slice
from actzip.runtime.registry import onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder

#: First and last + 1 along each of the first dimensions.
Box = Sequence[tuple[int, int]]


def _written(to: Builder | Importer, x: Any, src: Any, shape: Shape, box: Box, axis: int = 0) -> Any:
    """``x`` of ``shape`` with ``src`` at ``box``, whose first bound is that of ``axis``."""
    if not box:
        return src
    (start, stop), size = box[0], shape[axis]
    if (start, stop) == (0, size):
        return _written(to, x, src, shape, box[1:], axis + 1)

    def part(first: int, last: int) -> Any:
        return to.emit(Slice, x, axis=axis, start=first, stop=last)

    inside = (*shape[:axis], stop - start, *shape[axis + 1 :])
    rest = box[1:]
    covered = all(b == (0, shape[axis + 1 + i]) for i, b in enumerate(rest))
    middle = src if covered else _written(to, part(start, stop), src, inside, rest, axis + 1)
    parts = [part(0, start)] if start else []
    parts += [middle] if stop > start else []
    parts += [part(stop, int(size))] if stop < size else []  # type: ignore[operator, arg-type]
    return parts[0] if len(parts) == 1 else to.emit(Concat, *parts, axis=axis)


@torch_op("slice_scatter", "select_scatter")
def torch_scatter(b: Builder, a: dict[str, Any]) -> Any:
    """What in-place operators on ``x[:, i:j]`` and ``x[:, i]`` become."""
    x, src = a["self"], a["src"]
    shape = b.shape(x)
    axis = int(a["dim"]) % len(shape)
    size = shape[axis]
    one = "index" in a
    if not one and same_shape(b.shape(src), shape):
        return src
    if not isinstance(size, int):
        raise b.refuse("writing to a part of the batch is not supported")
    if one:
        start = int(a["index"]) % size
        src = b.reshape(src, (*shape[:axis], 1, *shape[axis + 1 :]))
        return _written(b, x, src, shape, [(start, start + 1)], axis)
    if isinstance(a["start"], Sym) or isinstance(a["end"], Sym):
        raise b.refuse("a slice whose bounds depend on the batch is not supported")
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(size)
    if step != 1:
        raise b.refuse("writing to every other element is not supported")
    return _written(b, x, src, shape, [(start, max(start, stop))], axis)


@onnx_op("ScatterND")
def onnx_scatter_nd(imp: Importer, node: OnnxNode) -> Any:
    return _onnx_scatter(imp, node, _box)


@onnx_op("ScatterElements", "Scatter")
def onnx_scatter_elements(imp: Importer, node: OnnxNode) -> Any:
    return _onnx_scatter(imp, node, partial(_box_along, axis=node.integer("axis", 0)))


def _onnx_scatter(
    imp: Importer, node: OnnxNode, box_of: Callable[[Array, Shape], list[tuple[int, int]] | None]
) -> Any:
    x, updates = node.need(0), node.need(2)
    floats_only(node, x, updates)
    if node.attribute("reduction", b"none") not in (b"none", "none"):
        raise node.refuse("a reduction")
    shape = imp.shape(x)
    box = box_of(node.required(1, "the indices"), shape)
    if box is None:
        raise node.refuse("indices that are not those of one block")
    return _written(imp, x, updates, shape, box)


def _box_along(indices: Array, shape: Shape, axis: int) -> list[tuple[int, int]] | None:
    """Bounds of the block that ``indices``, those along ``axis`` for each update, list in order."""
    rank = len(shape)
    if indices.ndim != rank or not -rank <= axis < rank or indices.dtype.kind not in "iu":
        return None
    full = np.moveaxis(np.indices(indices.shape), 0, -1)
    full[..., axis % rank] = indices
    return _box(full, shape)


def _box(indices: Array, shape: Shape) -> list[tuple[int, int]] | None:
    """Bounds of the block that ``indices`` (..., k) list in order; None where they list no block.

    [[2], [3], [4]] is the block 2:5 of the first dimension.
    """
    k = indices.shape[-1] if indices.ndim else 0
    if indices.ndim != k + 1 or not 1 <= k <= len(shape) or 0 in indices.shape:
        return None
    sizes = shape[:k]
    if not all(isinstance(d, int) for d in sizes):
        return None
    at = np.where(indices < 0, indices + np.array(sizes, np.int64), indices)
    first = at[(0,) * k]
    block = np.moveaxis(np.indices(indices.shape[:-1]), 0, -1) + first
    if not np.array_equal(at, block) or (first < 0).any() or (at[(-1,) * k] >= np.array(sizes)).any():
        return None
    return [(int(f), int(f) + n) for f, n in zip(first, indices.shape[:-1], strict=True)]
