"""The greatest (or least) along an axis, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Node, Shape, normal_axis, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.reduce import MOST_INDICES
from actzip.runtime.registry import lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class _TopK(Node):
    """The ``k`` greatest (else least) along ``axis``, in order; of equals the first comes first,
    NaN is the greatest."""

    k: int = field(kw_only=True)
    axis: int = -1
    largest: bool = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        axis = normal_axis(self.axis, len(x))
        size = static(x[axis], "the dimension of a top-k")
        if size > MOST_INDICES:
            raise UnsupportedError(f"indices of a dimension of {size}; at most {MOST_INDICES} are supported")
        if not 1 <= self.k <= size:
            raise InputError(f"k is {self.k} for a dimension of {size}")
        return (*x[:axis], self.k, *x[axis + 1 :])


@dataclass(eq=False)
class TopKValues(_TopK):
    """The values of a top-k."""

    op = "topk_values"


@dataclass(eq=False)
class TopKIndices(_TopK):
    """The indices of a top-k."""

    op = "topk_indices"
    dtype = "int64"


@torch_op("topk")
def torch_topk(b: Builder, a: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {"k": int(a["k"]), "axis": int(a["dim"]), "largest": bool(a["largest"])}
    return b.emit(TopKValues, a["self"], **fields), b.emit(TopKIndices, a["self"], **fields)


@onnx_op("TopK")
def onnx_topk(imp: Importer, node: OnnxNode) -> Any:
    k = (node.integers(1, "k") if node.has(1) else None) or [node.integer("k", 0)]
    fields: dict[str, Any] = {
        "k": k[0],
        "axis": node.integer("axis", -1),
        "largest": bool(node.integer("largest", 1)),
    }
    return [imp.emit(cls, node.need(0), **fields) for cls in (TopKValues, TopKIndices)]


@lowers(TopKValues)
@lowers(TopKIndices)
def lower_topk(low: Lowering, n: TopKValues | TopKIndices) -> None:
    axis = n.axis % len(low.graph.shape(n.inputs[0]))
    ints = {"axis": [axis], "largest": [int(n.largest)], "indices": [int(isinstance(n, TopKIndices))]}
    low.node("topk", n.name, [low.dense(n.inputs[0])], low.declare(n.output), n.name, ints)
