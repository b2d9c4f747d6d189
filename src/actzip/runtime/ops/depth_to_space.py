"""Channels that become pixels: what is left of a transposed convolution whose windows do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from actzip.errors import InputError
from actzip.runtime.graph import Layout, Node, Shape, check_rank, static
from actzip.runtime.registry import lowers

if TYPE_CHECKING:
    from actzip.runtime.lower import Lowering

__all__ = ["DepthToSpace"]


@dataclass(eq=False)
class DepthToSpace(Node):
    """(N, BH * BW * C, H, W) -> (N, C, BH * H, BW * W): pixel (BH * y + i, BW * x + j) of channel c is
    channel (i * BW + j) * C + c of pixel (y, x), ONNX's DCR."""

    block: tuple[int, int] = (1, 1)

    op = "depth_to_space"
    layout: ClassVar[Layout] = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        (x,) = shapes
        check_rank(x, 4)
        (bh, bw), c = self.block, static(x[1], "the number of channels")
        if min(bh, bw) < 1 or c % (bh * bw):
            raise InputError(f"{c} channels are not blocks of {bh} x {bw} pixels")
        return (x[0], c // (bh * bw), bh * static(x[2], "height"), bw * static(x[3], "width"))


@lowers(DepthToSpace)
def lower_depth_to_space(low: Lowering, n: DepthToSpace) -> None:
    low.simple(n, "depth_to_space", "map", ints={"block": list(n.block)})
