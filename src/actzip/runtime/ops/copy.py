"""A map stored twice: as others need it, and packed for the convolutions that skip its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from actzip.runtime.graph import Layout, Node, Shape
from actzip.runtime.registry import lowers

if TYPE_CHECKING:
    from actzip.runtime.lower import Lowering

__all__ = ["Copy"]


@dataclass(eq=False)
class Copy(Node):
    """The input's values, stored otherwise (:mod:`actzip.runtime.passes.copies` puts it in)."""

    op = "copy"
    layout: ClassVar[Layout] = "either"
    dtype: ClassVar[str] = ""

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def writes_packed(self) -> bool:
        return True


@lowers(Copy)
def lower_copy(low: Lowering, n: Copy) -> None:
    """Nothing where both are dense and lie alike: the same memory under another name."""
    (x,) = n.inputs
    if low.graph.values[n.output].storage == "dense":
        low.native[n.output] = low.read(x, low.kind[n.output])
        low.aliased.add(n.output)
        return
    low.node("copy", n.name, [low.read(x, "map")], low.declare(n.output), n.name)
