"""ONNX's arithmetic on shapes. What depends on the batch is worked out at a few batches, by ONNX's
own reference, and read as dimensions where the engine needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime.graph import Array, Dim, Shape, Sym, concrete
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.registry import PROBES, Probed, onnx_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer

SHAPE_OPS = {"Shape", "Size"}


def probed(values: Sequence[Array]) -> Any:
    """An array where all are the same, else :class:`Probed`."""
    first = values[0]
    if all(
        v.shape == first.shape and np.array_equal(v, first, equal_nan=v.dtype.kind == "f") for v in values[1:]
    ):
        return first
    return Probed(tuple(values))


def dim_of(values: Sequence[int]) -> Dim:
    """The dimension that has these sizes at PROBES.

    Raises:
        UnsupportedError: neither a constant nor a multiple of the batch.
    """
    if all(v == values[0] for v in values):
        return values[0]
    mul = values[0] // PROBES[0]
    if mul < 1 or any(v != mul * n for v, n in zip(values, PROBES, strict=True)):
        shown = ", ".join(f"{v} at {n}" for v, n in zip(values, PROBES, strict=True))
        raise UnsupportedError(
            f"a dimension that depends on the batch in another way than its multiples ({shown})"
        )
    return Sym(mul)


def probed_shape(x: Probed) -> Shape:
    if len({v.ndim for v in x.values}) > 1:
        raise UnsupportedError("the number of dimensions depends on the batch")
    return tuple(dim_of([v.shape[i] for v in x.values]) for i in range(x.values[0].ndim))


def repeated(values: Sequence[Array], shape: Shape) -> tuple[Array, Shape] | None:
    """What arrays of ``shape`` at PROBES say again and again as the batch grows: one time, and the shape
    that it broadcasts to, dimensions of several times the batch taken apart; None where they differ by
    more than rounding."""
    parted: list[Dim] = []
    for d in shape:
        parted += [Sym(), d.mul] if isinstance(d, Sym) and d.mul > 1 else [d]
    first, *others = (v.reshape(concrete(tuple(parted), n)) for v, n in zip(values, PROBES, strict=True))
    if first.dtype.kind != "f":
        same = all(np.array_equal(np.broadcast_to(first, v.shape), v) for v in others)
    else:
        least = 1e-6 * float(np.abs(first[np.isfinite(first)]).max(initial=0))
        same = all(np.allclose(first, v, 1e-5, least, equal_nan=True) for v in others)
    return (first, tuple(parted)) if same else None


@onnx_op("Shape")
def onnx_shape(imp: Importer, node: OnnxNode) -> Any:
    dims = imp.shape(node.need(0))[slice(node.integer("start", 0), node.attribute("end"))]
    return probed([np.array(concrete(dims, n), np.int64) for n in PROBES])


@onnx_op("Size")
def onnx_size(imp: Importer, node: OnnxNode) -> Any:
    shape = imp.shape(node.need(0))
    return probed([np.asarray(np.prod(concrete(shape, n), dtype=np.int64)) for n in PROBES])


def dims_of(node: OnnxNode, i: int, what: str) -> list[Dim]:
    value = node.need(i)
    arrays = value.values if isinstance(value, Probed) else (node.required(i, what),)
    if any(a.dtype.kind not in "iu" for a in arrays):
        raise node.wrong(f"{what} is of type {arrays[0].dtype}, not integer")
    if len({a.size for a in arrays}) > 1:
        raise node.refuse(f"{what} has a length that depends on the batch")
    if len(arrays) == 1:
        return [int(v) for v in arrays[0].reshape(-1)]
    try:
        return [
            dim_of([int(v) for v in column]) for column in zip(*(a.reshape(-1) for a in arrays), strict=True)
        ]
    except UnsupportedError as error:
        raise node.refuse(f"{what}: {error}") from error


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
