"""Interpolation of maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime.graph import Array, Node, Shape, check_integers, check_rank, same_shape, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.linear import Linear
from actzip.runtime.ops.reshape import Transpose
from actzip.runtime.ops.select import take
from actzip.runtime.ops.shapes import dims_of
from actzip.runtime.registry import lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


#: Of the matrix that interpolates an axis.
_MOST_WEIGHTS = 1 << 22


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


@torch_op("upsample_bicubic2d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")
def torch_matrices(b: Builder, a: dict[str, Any]) -> Any:
    """Bicubic and antialiased interpolation: what PyTorch makes of one non-zero along each axis."""
    import torch

    x = a["input"] if "input" in a else a["self"]
    given = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
    function = getattr(torch.ops.aten, b.node.target._schema.name.partition("::")[2]).default

    def matrix(axis: int) -> Array | None:
        size, out, factor = b.shape(x)[axis], b.out_shape[axis], given[axis - 2]
        if same_shape((size,), (out,)) and factor in (None, 1.0):
            return None
        if not isinstance(size, int) or not isinstance(out, int):
            raise b.refuse("a size that depends on the batch")
        if size * out > _MOST_WEIGHTS:
            raise b.refuse(f"interpolation from {size} to {out} by a matrix")
        ones = torch.eye(size).reshape(size, 1, 1, size)
        made = function(ones, [1, out], bool(a["align_corners"]), 1.0, factor)
        return np.ascontiguousarray(made.reshape(size, out).numpy().T)

    return _by_matrices(b, x, matrix)


def _by_matrices(to: Builder | Importer, x: Any, matrix: Callable[[int], Array | None]) -> Any:
    """``x`` with each line along width and height times a matrix (out, size); None leaves it."""
    across, down = matrix(3), matrix(2)
    turn = (0, 1, 3, 2)
    if across is not None:
        x = to.emit(Linear, x, weight=across)
    if down is not None:
        x = to.emit(Transpose, x, perm=turn)
        x = to.emit(Linear, x, weight=down)
        x = to.emit(Transpose, x, perm=turn)
    return x


def _onnx_sizes(node: OnnxNode, shape: Shape, hw: list[int]) -> tuple[list[float], list[int]]:
    """Scales and sizes of height and width, from whichever is given."""
    axes = node.ints("axes") or list(range(4))
    scales = node.floats(2, "the scales")
    sizes = dims_of(node, 3, "the sizes") if node.has(3) else []
    factors, out = [1.0, 1.0], list(hw)
    for i, axis in enumerate(a % 4 for a in axes):
        if sizes:
            if axis < 2:
                if sizes[i] != shape[axis]:
                    raise node.refuse(f"resizing dimension {axis} from {shape[axis]} to {sizes[i]}")
                continue
            wanted = static(sizes[i], "a size")
            out[axis - 2] = wanted
            factors[axis - 2] = wanted / hw[axis - 2]
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
    if mode not in ("nearest", "linear", "cubic"):
        raise node.refuse(f"mode {mode!r}")
    if coordinates not in _ONNX_SOURCE:
        raise node.refuse(f"coordinates {coordinates!r}")
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("keep_aspect_ratio_policy")
    hw = [static(d, "a size") for d in shape[2:]]
    factors, out = _onnx_sizes(node, shape, hw)
    if min(out) < 1:
        raise node.wrong(f"an output of {out[0]} x {out[1]}")
    imp.check_size((1, shape[1], *out), node.where)
    if coordinates == "align_corners" and any(
        abs(s * f - o) > 1e-6 for s, f, o in zip(hw, factors, out, strict=True)
    ):
        raise node.refuse("align_corners with a scale that does not give a whole size")
    if coordinates == "pytorch_half_pixel" and min(out) > 1:
        coordinates = "half_pixel"
    size, scale = (out[0], out[1]), (factors[0], factors[1])
    if mode == "nearest":
        return _onnx_nearest(imp, node, x, coordinates, size, scale)
    known = ("half_pixel", "align_corners", "asymmetric")
    if mode == "cubic" or node.integer("antialias", 0) or coordinates not in known:
        return _onnx_matrices(imp, node, x, coordinates, size, scale)
    return imp.emit(Resize, x, size=size, mode="bilinear", coordinates=coordinates, scale=scale)


def _half_pixel(i: Any, size: int, out: int, scale: Any) -> Any:
    return (i + np.float32(0.5)) / scale - np.float32(0.5)


# Source coordinates of outputs i, by coordinate_transformation_mode, in float32 as ONNX Runtime has
# them: (i, size, out, scale).
_ONNX_SOURCE: dict[str, Callable[[Any, int, int, Any], Any]] = {
    "half_pixel": _half_pixel,
    "pytorch_half_pixel": lambda i, size, out, scale: _half_pixel(i, size, out, scale) if out > 1 else i * 0,
    "half_pixel_symmetric": lambda i, size, out, scale: (
        np.float32(size / 2 * (1 - out / (float(scale) * size))) + _half_pixel(i, size, out, scale)
    ),
    "align_corners": lambda i, size, out, scale: (
        i * np.float32(size - 1) / np.float32(out - 1) if out > 1 else i * 0
    ),
    "asymmetric": lambda i, size, out, scale: i / scale,
}
_TIE = 1e-6  # what float32 makes of a half: ONNX Runtime takes it for one
_ONNX_ROUND: dict[str, Callable[[Any], Any]] = {
    "round_prefer_floor": lambda c: np.ceil(c.astype(np.float64) * (1 - _TIE) - 0.5),
    "round_prefer_ceil": lambda c: np.floor(c.astype(np.float64) * (1 + _TIE) + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _source(coordinates: str, size: int, out: int, scale: float) -> Array:
    at = _ONNX_SOURCE[coordinates](np.arange(out, dtype=np.float32), size, out, np.float32(scale))
    return np.asarray(at, np.float32)


def _onnx_nearest(
    imp: Importer, node: OnnxNode, x: Any, coordinates: str, size: tuple[int, int], scale: tuple[float, float]
) -> Any:
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if rounding not in _ONNX_ROUND:
        raise node.wrong(f"nearest_mode {rounding!r}")
    hw = [static(d, "a size") for d in imp.shape(x)[2:]]
    indices = [
        np.clip(_ONNX_ROUND[rounding](_source(coordinates, hw[k], size[k], scale[k])), 0, hw[k] - 1).tolist()
        for k in (0, 1)
    ]
    if coordinates == "asymmetric" and rounding == "floor":
        ours = Resize("", ("",), "", size=size, scale=scale)
        if all(_table(hw[k], size[k], ours, scale[k])[0] == indices[k] for k in (0, 1)):
            return imp.emit(Resize, x, size=size, scale=scale)
    for axis, at in zip((2, 3), indices, strict=True):
        if at != list(range(hw[axis - 2])):
            x = take(imp, node, x, axis, [int(i) for i in at])
    return x


def _onnx_matrices(
    imp: Importer, node: OnnxNode, x: Any, coordinates: str, size: tuple[int, int], scale: tuple[float, float]
) -> Any:
    """Interpolation as what it is, a linear map of each axis."""
    shape = imp.shape(x)

    def matrix(axis: int) -> Array | None:
        n, out, factor = static(shape[axis], "a size"), size[axis - 2], scale[axis - 2]
        return None if (n, factor) == (out, 1.0) else _axis_matrix(node, coordinates, n, out, factor)

    return _by_matrices(imp, x, matrix)


def _axis_matrix(node: OnnxNode, coordinates: str, size: int, out: int, scale: float) -> Array:
    """(out, size): the weights of the inputs for each output. Outside stands the border's number;
    antialiasing widens the kernel by the scale."""
    if size * out > _MOST_WEIGHTS:
        raise node.refuse(f"interpolation from {size} to {out} by a matrix")
    at = _source(coordinates, size, out, scale).astype(np.float64)
    cubic = node.attribute("mode", "nearest") == "cubic"
    smooth = bool(node.integer("antialias", 0))
    narrow = min(1.0, scale) if smooth else 1.0
    inside = bool(node.integer("exclude_outside", 0))
    reach = math.ceil((2 if cubic else 1) / narrow) + 1
    matrix = np.zeros((out, size))
    rows = np.arange(out)
    for step in range(-reach, reach + 1):
        index = np.floor(at).astype(np.int64) + step
        distance = np.abs(at - index) * narrow
        weight = (
            _cubic(distance, node.number("cubic_coeff_a", -0.75)) if cubic else np.maximum(0, 1 - distance)
        )
        if inside:
            weight = np.where((index >= 0) & (index < size), weight, 0.0)
        np.add.at(matrix, (rows, np.clip(index, 0, size - 1)), weight)
    if inside or smooth:
        matrix /= matrix.sum(1, keepdims=True)
    return matrix.astype(np.float32)


def _cubic(t: Any, a: float) -> Any:
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


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
