"""Interpolation of maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Array, Node, Shape, check_integers, check_rank, same_shape, static
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.linear import Linear
from actzip.runtime.ops.reshape import Reshape, Transpose
from actzip.runtime.ops.select import take
from actzip.runtime.ops.shapes import dims_of
from actzip.runtime.registry import VOLUME, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


#: Of the matrix that interpolates an axis.
_MOST_WEIGHTS = 1 << 22


@dataclass(eq=False)
class Resize(Node):
    """Interpolates (N, C, H, W) to ``size``; ``mode`` nearest, nearest_exact or bilinear.

    ``scale`` (y, x) is output/input as the front end states it (it may differ from the sizes' ratio).
    Source coordinate of output i: half_pixel (i + 0.5) / scale - 0.5; align_corners
    i * (in - 1) / (out - 1); asymmetric i / scale. PyTorch's "nearest" is ``nearest`` with ``coordinates``
    asymmetric, the floor of i / scale, its "nearest-exact" ``nearest_exact`` with half_pixel, that of
    (i + 0.5) / scale; both as float32 has them there. ``nearest`` with others rounds halves down.
    With ``mode`` given the pixels are said one by one: output (y, x) is pixel (``rows[y]``, ``columns[x]``).
    """

    size: tuple[int, int] = field(kw_only=True)
    mode: str = "nearest"
    coordinates: str = "asymmetric"
    scale: tuple[float, float] | None = None
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    op = "resize"
    layout = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        check_rank(shapes[0], 4)
        check_integers("size", self.size, 2, 1)
        if self.mode == "given":
            for what, at, dim, out in zip(
                ("rows", "columns"), (self.rows, self.columns), shapes[0][2:], self.size, strict=True
            ):
                check_integers(what, at, out, 0)
                if max(at) >= static(dim, "a size"):
                    raise InputError(f"{what} {max(at)} of {dim}")
            return (shapes[0][0], shapes[0][1], *self.size)
        if self.mode not in ("nearest", "nearest_exact", "bilinear"):
            raise UnsupportedError(f"interpolation {self.mode!r}")
        known = ("half_pixel", "align_corners", "asymmetric")
        if self.coordinates not in (known[:1] if self.mode == "nearest_exact" else known):
            raise UnsupportedError(f"interpolation {self.mode!r} with coordinates {self.coordinates!r}")
        return (shapes[0][0], shapes[0][1], *self.size)


@torch_op(
    *(f"{kind}{d}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for d in (1, 2, 3)),
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
)
def torch_upsample(b: Builder, a: dict[str, Any]) -> Any:
    name = b.node.target._schema.name
    x = a["input"] if "input" in a else a["self"]
    size = [d for d in b.out_shape[2:] if isinstance(d, int)]
    if len(size) < len(b.out_shape) - 2:
        raise b.refuse("a size that depends on the batch")
    keys = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}[len(size)]
    given = a.get("scale_factors") or [a.get(k) for k in keys]
    scale = tuple(map(float, given)) if all(given) else None
    if "linear" in name:
        coordinates = "align_corners" if a["align_corners"] else "half_pixel"
        return _resized(b, x, size, scale, mode="bilinear", coordinates=coordinates)
    if "exact" in name:
        return _resized(b, x, size, scale, mode="nearest_exact", coordinates="half_pixel")
    return _resized(b, x, size, scale, mode="nearest", coordinates="asymmetric")


def _resized(
    to: Builder | Importer, x: Any, size: Sequence[int], scale: Sequence[float] | None, **how: Any
) -> Any:
    """A signal (N, C, L), a map or a volume (N, C, D, H, W), along all its axes."""
    if len(size) == 3:
        return VOLUME["resize"](to, x, size, scale, **how)
    if len(size) == 2:
        return to.emit(Resize, x, size=tuple(size), scale=None if scale is None else tuple(scale), **how)
    n, c, length = to.shape(x)
    flat = to.emit(Reshape, x, shape=(n, c, 1, length))
    y = to.emit(Resize, flat, size=(1, *size), scale=None if scale is None else (1.0, *scale), **how)
    return to.emit(Reshape, y, shape=(n, c, *size))


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


def _onnx_sizes(node: OnnxNode, shape: Shape, dims: list[int]) -> tuple[list[float], list[int]]:
    """Scales and sizes of what is behind the channels, from whichever is given."""
    rank = len(shape)
    axes = node.ints("axes") or list(range(rank))
    scales = node.floats(2, "the scales")
    sizes = dims_of(node, 3, "the sizes") if node.has(3) else []
    factors, out = [1.0] * len(dims), list(dims)
    for i, axis in enumerate(a % rank for a in axes):
        if sizes:
            if axis < 2:
                if sizes[i] != shape[axis]:
                    raise node.refuse(f"resizing dimension {axis} from {shape[axis]} to {sizes[i]}")
                continue
            wanted = static(sizes[i], "a size")
            out[axis - 2] = wanted
            factors[axis - 2] = wanted / dims[axis - 2]
        elif scales is not None and scales.size:
            if axis < 2:
                if scales[i] != 1:
                    raise node.refuse("resizing channels")
                continue
            factors[axis - 2] = float(scales[i])
            # in float32, as ONNX Runtime: 11 times float32(7 / 11) is 7 there, 6.9999998 in double precision
            out[axis - 2] = math.floor(float(np.float32(dims[axis - 2]) * np.float32(scales[i])))
        else:
            raise node.wrong("neither scales nor sizes are given")
    return factors, out


@onnx_op("Resize")
def onnx_resize(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    if len(shape) not in (3, 4, 5):
        raise node.refuse(f"an input of shape {shape} (N, C and one to three more are supported)")
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear", "cubic"):
        raise node.refuse(f"mode {mode!r}")
    if coordinates not in _ONNX_SOURCE:
        raise node.refuse(f"coordinates {coordinates!r}")
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("keep_aspect_ratio_policy")
    dims = [static(d, "a size") for d in shape[2:]]
    factors, out = _onnx_sizes(node, shape, dims)
    if min(out) < 1:
        raise node.wrong(f"an output of {' x '.join(map(str, out))}")
    imp.check_size((1, shape[1], *out), node.where)
    if coordinates == "align_corners" and any(
        abs(s * f - o) > _TIE * o for s, f, o in zip(dims, factors, out, strict=True)
    ):
        raise node.refuse("align_corners with a scale that does not give a whole size")
    if coordinates == "pytorch_half_pixel" and min(out) > 1:
        coordinates = "half_pixel"
    size, scale = tuple(out), tuple(factors)
    if mode == "nearest":
        return _onnx_nearest(imp, node, x, coordinates, size, scale)
    known = ("half_pixel", "align_corners", "asymmetric")
    if mode == "cubic" or node.integer("antialias", 0) or coordinates not in known:
        if len(shape) != 4:
            raise node.refuse(f"an input of shape {shape} (N, C, H, W is supported)")
        return _onnx_matrices(imp, node, x, coordinates, size, scale)
    return _resized(imp, x, size, scale, mode="bilinear", coordinates=coordinates)


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
    # of an older ONNX; TensorFlow's converter writes it still
    "tf_half_pixel_for_nn": lambda i, size, out, scale: (i + np.float32(0.5)) / scale,
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


#: What a Resize node computes of nearest pixels; what ONNX asks for may be one of these at its sizes.
_NEAREST = (
    ("nearest", "asymmetric"),
    ("nearest_exact", "half_pixel"),
    ("nearest", "half_pixel"),
    ("nearest", "align_corners"),
)


def _onnx_nearest(
    imp: Importer, node: OnnxNode, x: Any, coordinates: str, size: Sequence[int], scale: Sequence[float]
) -> Any:
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if rounding not in _ONNX_ROUND:
        raise node.wrong(f"nearest_mode {rounding!r}")
    dims = [static(d, "a size") for d in imp.shape(x)[2:]]
    axes = range(len(dims))
    indices = [
        np.clip(_ONNX_ROUND[rounding](_source(coordinates, dims[k], size[k], scale[k])), 0, dims[k] - 1)
        .astype(int)
        .tolist()
        for k in axes
    ]
    for mode, where in _NEAREST:
        ours = Resize("", ("",), "", size=(1, 1), mode=mode, coordinates=where)
        if all(_table(dims[k], size[k], ours, scale[k])[0] == indices[k] for k in axes):
            return _resized(imp, x, size, scale, mode=mode, coordinates=where)
    if len(size) < 3:
        rows, columns = map(tuple, indices if len(size) == 2 else ([0], *indices))
        return _resized(imp, x, size, None, mode="given", rows=rows, columns=columns)
    for axis, at in enumerate(indices, 2):
        if at != list(range(dims[axis - 2])):
            x = take(imp, node, x, axis, [int(i) for i in at])
    return x


def _onnx_matrices(
    imp: Importer, node: OnnxNode, x: Any, coordinates: str, size: Sequence[int], scale: Sequence[float]
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


def _as_torch(size: int, out: int, exact: bool, scale: float | None) -> Array:
    """The pixels that PyTorch takes for nearest ones, as its float32 rounds them."""
    i = np.arange(out)
    if not exact and out in (size, 2 * size):  # whatever the factor
        return i * size // out
    step = np.float32(size) / np.float32(out) if scale is None else np.float32(1 / scale)
    at = (i + 0.5) * np.float64(step) if exact else i.astype(np.float32) * step
    found: Array = np.floor(at.astype(np.float32))
    return found


def _table(
    size: int, out: int, n: Resize, scale: float | None, given: Sequence[int] = ()
) -> tuple[list[int], list[int], Array]:
    """For each output the two inputs, and the share of the second."""
    if n.mode == "given":
        return list(given), list(given), np.zeros(out, np.float32)
    if n.mode == "nearest_exact" or (n.mode == "nearest" and n.coordinates == "asymmetric"):
        low = np.clip(_as_torch(size, out, n.mode == "nearest_exact", scale), 0, size - 1).astype(np.int64)
        return low.tolist(), low.tolist(), np.zeros(out, np.float32)
    i = np.arange(out, dtype=np.float64)
    if n.coordinates == "align_corners":
        at = i * ((size - 1) / (out - 1)) if out > 1 else i * 0
    elif n.coordinates == "half_pixel":
        at = (i + 0.5) * (size / out if scale is None else 1 / scale) - 0.5
    else:
        at = i * (size / out) if scale is None else i / scale
    if n.mode == "nearest":
        low = np.clip(np.ceil(at + 0.5) - 1, 0, size - 1).astype(np.int64)
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
    yl, yh, yp = _table(h, n.size[0], n, sy, n.rows)
    xl, xh, xp = _table(w, n.size[1], n, sx, n.columns)
    ints = {"y_low": yl, "y_high": yh, "x_low": xl, "x_high": xh}
    low.simple(n, "resize", "map", ints=ints, arrays={"y_part": yp, "x_part": xp})
