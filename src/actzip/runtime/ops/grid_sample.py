"""Sampling a map at places that another tensor gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Node, Shape, check_rank, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.registry import lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering

MODES = ("bilinear", "nearest")
PADDINGS = ("zeros", "border", "reflection")


@dataclass(eq=False)
class GridSample(Node):
    """inputs: x (N, C, H, W), grid (N, H', W', 2) of (x, y) in [-1, 1] -> (N, C, H', W'), as
    ``torch.nn.functional.grid_sample``."""

    mode: str = "bilinear"
    padding: str = "zeros"
    align_corners: bool = False

    op = "grid_sample"
    arity = (2, 2)
    layout = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x, grid = shapes
        check_rank(x, 4)
        check_rank(grid, 4)
        if self.mode not in MODES:
            raise UnsupportedError(f"interpolation {self.mode!r}; these are known: {', '.join(MODES)}")
        if self.padding not in PADDINGS:
            raise UnsupportedError(f"padding mode {self.padding!r}; these are known: {', '.join(PADDINGS)}")
        if grid[0] != x[0] or grid[3] != 2:
            raise InputError(f"grid of shape {grid} for an input of shape {x}")
        return (x[0], x[1], static(grid[1], "the height of a grid"), static(grid[2], "the width of a grid"))


@torch_op("grid_sampler", "grid_sampler_2d")
def torch_grid_sample(b: Builder, a: dict[str, Any]) -> Any:
    mode, padding = int(a["interpolation_mode"]), int(a["padding_mode"])
    if mode >= len(MODES) or len(b.shape(a["input"])) != 4:
        raise b.refuse("grid_sample is supported of (N, C, H, W), bilinear and nearest")
    return b.emit(
        GridSample,
        a["input"],
        a["grid"],
        mode=MODES[mode],
        padding=PADDINGS[padding],
        align_corners=bool(a["align_corners"]),
    )


@onnx_op("GridSample")
def onnx_grid_sample(imp: Importer, node: OnnxNode) -> Any:
    if len(imp.shape(node.need(0))) != 4:
        raise node.refuse(f"an input of shape {imp.shape(node.need(0))} (N, C, H, W is supported)")
    mode = node.attribute("mode", "bilinear")
    return imp.emit(
        GridSample,
        node.need(0),
        node.need(1),
        mode={"linear": "bilinear"}.get(mode, mode),
        padding=node.attribute("padding_mode", "zeros"),
        align_corners=bool(node.integer("align_corners", 0)),
    )


@lowers(GridSample)
def lower_grid_sample(low: Lowering, n: GridSample) -> None:
    inputs = [low.read(n.inputs[0], "map"), low.read(n.inputs[1], "plain")]
    strings = {"mode": n.mode, "padding": n.padding}
    ints = {"align_corners": [int(n.align_corners)]}
    low.node("grid_sample", n.name, inputs, low.declare(n.output), n.name, ints, strings=strings)
