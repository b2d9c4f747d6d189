"""Interpolation of maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime.graph import Array, Node, Shape, Sym, check_integers, check_rank
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.select import Concat, Slice
from actzip.runtime.registry import lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Resize(Node):
    """Interpolates (N, C, H, W) to ``size``; ``mode`` nearest or bilinear.

    ``scale`` (y, x) is output/input as the front end states it (it may differ from the sizes' ratio).
    Source coordinate of output i: half_pixel (i + 0.5) / scale - 0.5; align_corners
    i * (in - 1) / (out - 1); asymmetric i / scale. Nearest takes floor of i / scale (``torch`` "nearest"):
    with ``coordinates`` "asymmetric".
    """

    size: tuple[int, int] = field(kw_only=True)
    mode: str = "nearest"
    coordinates: str = "asymmetric"
    scale: tuple[float, float] | None = None

    op = "resize"
    layout = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        check_rank(shapes[0], 4)
        check_integers("size", self.size, 2, 1)
        if self.mode not in ("nearest", "bilinear"):
            raise UnsupportedError(f"interpolation {self.mode!r}")
        if self.coordinates not in ("half_pixel", "align_corners", "asymmetric"):
            raise UnsupportedError(f"interpolation with coordinates {self.coordinates!r}")
        return (shapes[0][0], shapes[0][1], *self.size)


@torch_op("upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d")
def torch_upsample(b: Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name
    oh, ow = b.out_shape[2:]
    x = a["input"] if "input" in a else a["self"]
    scale = None
    given = a.get("scale_factors") or ([a.get("scales_h"), a.get("scales_w")] if a.get("scales_h") else None)
    if given and all(given):
        scale = (float(given[0]), float(given[1]))
    if not isinstance(oh, int) or not isinstance(ow, int):
        raise b.refuse("a size that depends on the batch")
    if "bilinear" in name:
        coordinates = "align_corners" if a["align_corners"] else "half_pixel"
        return b.emit(Resize, x, size=(oh, ow), mode="bilinear", coordinates=coordinates, scale=scale)
    if "exact" in name:
        raise b.refuse("interpolation 'nearest-exact' is not supported")
    return b.emit(Resize, x, size=(oh, ow), mode="nearest", coordinates="asymmetric", scale=scale)


def _onnx_sizes(node: OnnxNode, shape: Shape, hw: list[int]) -> tuple[list[float], list[int]]:
    """Scales and sizes of height and width, from whichever is given."""
    axes = node.ints("axes") or list(range(4))
    scales = node.floats(2, "the scales")
    sizes = node.integers(3, "the sizes")
    factors, out = [1.0, 1.0], list(hw)
    for i, axis in enumerate(a % 4 for a in axes):
        if sizes:
            if axis < 2:
                if sizes[i] != shape[axis] and not isinstance(shape[axis], Sym):
                    raise node.refuse("resizing channels")
                continue
            out[axis - 2] = sizes[i]
            factors[axis - 2] = sizes[i] / hw[axis - 2]
        elif scales is not None and scales.size:
            if axis < 2:
                if scales[i] != 1:
                    raise node.refuse("resizing channels")
                continue
            factors[axis - 2] = float(scales[i])
            # in float32, as ONNX Runtime: 11 times float32(7 / 11) is 7 there, 6.9999998 in double precision
            out[axis - 2] = math.floor(float(np.float32(hw[axis - 2]) * np.float32(scales[i])))
        else:
            raise node.wrong("neither scales nor sizes are given")
    return factors, out


@onnx_op("Resize")
def onnx_resize(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    if len(shape) != 4:
        raise node.refuse(f"an input of shape {shape} (N, C, H, W is supported)")
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear"):
        raise node.refuse(f"mode {mode!r}")
    if node.integer("antialias", 0):
        raise node.refuse("antialiasing")
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("keep_aspect_ratio_policy")
    hw = [int(d) for d in shape[2:]]  # type: ignore[arg-type]
    factors, out = _onnx_sizes(node, shape, hw)
    imp.check_size((1, shape[1], *out), node.where)
    if min(out) < 1:
        raise node.wrong(f"an output of {out[0]} x {out[1]}")
    if coordinates == "align_corners" and any(
        abs(s * f - o) > 1e-6 for s, f, o in zip(hw, factors, out, strict=True)
    ):
        raise node.refuse("align_corners with a scale that does not give a whole size")
    if coordinates == "pytorch_half_pixel":
        if min(out) == 1:
            raise node.refuse("pytorch_half_pixel to a size of 1")
        coordinates = "half_pixel"
    if mode == "nearest":
        rounding = node.attribute("nearest_mode", "round_prefer_floor")
        if coordinates == "asymmetric" and rounding == "floor":
            return imp.emit(
                Resize,
                x,
                size=(out[0], out[1]),
                mode="nearest",
                coordinates="asymmetric",
                scale=(factors[0], factors[1]),
            )
        for axis in (2, 3):
            x = _onnx_nearest(
                imp, node, x, axis, hw[axis - 2], out[axis - 2], factors[axis - 2], coordinates, rounding
            )
        return x
    if coordinates not in ("half_pixel", "align_corners", "asymmetric"):
        raise node.refuse(f"coordinates {coordinates!r}")
    return imp.emit(
        Resize,
        x,
        size=(out[0], out[1]),
        mode="bilinear",
        coordinates=coordinates,
        scale=(factors[0], factors[1]),
    )


# source coordinate of output i, by coordinate_transformation_mode: (i, size, out, scale)
_ONNX_SOURCE: dict[str, Callable[[int, int, int, float], float]] = {
    "half_pixel": lambda i, size, out, scale: (i + 0.5) / scale - 0.5,
    "half_pixel_symmetric": lambda i, size, out, scale: (
        size / 2 * (1 - out / (scale * size)) + (i + 0.5) / scale - 0.5
    ),
    "align_corners": lambda i, size, out, scale: 0.0 if out == 1 else i * (size - 1) / (out - 1),
    "asymmetric": lambda i, size, out, scale: i / scale,
}
_ONNX_ROUND: dict[str, Callable[[float], int]] = {
    "round_prefer_floor": lambda c: math.ceil(c - 0.5),
    "round_prefer_ceil": lambda c: math.floor(c + 0.5),
    "floor": math.floor,
    "ceil": math.ceil,
}


def _onnx_nearest(
    imp: Importer,
    node: OnnxNode,
    x: Any,
    axis: int,
    size: int,
    out: int,
    scale: float,
    coordinates: str,
    rounding: str,
) -> Any:
    """Nearest-neighbour along one axis as slices of runs and a concatenation (rare conventions)."""
    if coordinates not in _ONNX_SOURCE:
        raise node.refuse(f"coordinates {coordinates!r}")
    at = (_ONNX_SOURCE[coordinates](i, size, out, scale) for i in range(out))
    indices = [min(max(_ONNX_ROUND.get(rounding, math.ceil)(c), 0), size - 1) for c in at]
    if indices == list(range(size)):
        return x
    if out > 1024:
        raise node.refuse(f"nearest-neighbour with {coordinates}/{rounding} to a size of {out}")
    parts, start = [], 0
    while start < len(indices):
        stop = start + 1
        while stop < len(indices) and indices[stop] == indices[stop - 1] + 1:
            stop += 1
        parts.append(imp.emit(Slice, x, axis=axis, start=indices[start], stop=indices[stop - 1] + 1))
        start = stop
    return parts[0] if len(parts) == 1 else imp.emit(Concat, *parts, axis=axis)


def _table(size: int, out: int, n: Resize, scale: float | None) -> tuple[list[int], list[int], Array]:
    i = np.arange(out, dtype=np.float64)
    if n.coordinates == "align_corners":
        at = i * ((size - 1) / (out - 1)) if out > 1 else i * 0
    elif n.coordinates == "half_pixel":
        at = (i + 0.5) * (size / out if scale is None else 1 / scale) - 0.5
    else:
        at = i * (size / out) if scale is None else i / scale
    if n.mode == "nearest":
        low = np.floor(at + 1e-9) if n.coordinates == "asymmetric" else np.ceil(at + 0.5) - 1
        low = np.clip(low, 0, size - 1).astype(np.int64)
        return low.tolist(), low.tolist(), np.zeros(out, np.float32)
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return low.tolist(), high.tolist(), (at - low).astype(np.float32)


@lowers(Resize)
def lower_resize(low: Lowering, n: Resize) -> None:
    h, w = low.graph.shape(n.inputs[0])[2:]
    assert isinstance(h, int) and isinstance(w, int)
    sy, sx = n.scale if n.scale else (None, None)
    yl, yh, yp = _table(h, n.size[0], n, sy)
    xl, xh, xp = _table(w, n.size[1], n, sx)
    ints = {"y_low": yl, "y_high": yh, "x_low": xl, "x_high": xh}
    low.simple(n, "resize", "map", ints=ints, arrays={"y_part": yp, "x_part": xp})
