"""Convolution and pooling over three dimensions, made of those over two.

A volume (N, C, D, H, W) is D images of each of N: its *frames* are the map (N * D, C, H, W). Channels
last, these lie in memory as the map (N, C, D, H * W) does, its *columns*, in which D is the height:
what goes along D alone is a convolution or pooling of columns, what goes along H and W one of frames,
and a kernel over all three is the sum over its depth of convolutions of shifted frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import (
    Array,
    Dim,
    Layout,
    Node,
    Shape,
    Sym,
    check_rank,
    numel,
    same_shape,
    static,
    times,
)
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.ops.conv import Conv2d, ConvTranspose2d
from actzip.runtime.ops.pool import AdaptivePool, Pool
from actzip.runtime.ops.reshape import Reshape, Transpose
from actzip.runtime.ops.resize import Resize
from actzip.runtime.ops.select import Concat, Pad, Slice
from actzip.runtime.registry import VOLUME, lowers

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering

    Maker: TypeAlias = Builder | Importer

__all__ = ["Regroup", "adaptive_pool3d", "conv3d", "conv_transpose3d", "pool3d", "resize3d"]

_FEW = 64  # channels, times the kernel's depth, that one convolution takes instead of a sum of several


@dataclass(eq=False)
class Regroup(Node):
    """(N, C, H, W) -> another map of the same channels: pixels follow each other as before, image after
    image, row after row."""

    shape: Shape = field(kw_only=True)

    op = "regroup"
    layout: ClassVar[Layout] = "map"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 4)
        check_rank(self.shape, 4)
        if x[1] != self.shape[1] or numel(x) != numel(self.shape):
            raise InputError(f"a map of shape {x} cannot become one of {self.shape}")
        return self.shape


def _frames(b: Maker, x: Any) -> Any:
    n, c, d, h, w = b.shape(x)
    turned = b.emit(Transpose, x, perm=(0, 2, 1, 3, 4))
    return b.emit(Reshape, turned, shape=(times(n, static(d, "the depth")), c, h, w))


def _volume(b: Maker, frames: Any, n: Dim) -> Any:
    """The volume of N whose frames these are."""
    k, c, h, w = b.shape(frames)
    split = b.emit(Reshape, frames, shape=(n, _depth(k, n), c, h, w))
    return b.emit(Transpose, split, perm=(0, 2, 1, 3, 4))


def _depth(frames: Dim, n: Dim) -> int:
    if isinstance(frames, Sym) and isinstance(n, Sym):
        return frames.mul // n.mul
    return static(frames, "the depth") // static(n, "the batch")


def _columns(b: Maker, frames: Any, n: Dim) -> Any:
    k, c, h, w = b.shape(frames)
    size = static(h, "height") * static(w, "width")
    return _regrouped(b, frames, (n, c, _depth(k, n), size))


def _of_columns(b: Maker, columns: Any, h: Dim, w: Dim) -> Any:
    """Frames of columns."""
    n, c, d, _ = b.shape(columns)
    return _regrouped(b, columns, (times(n, static(d, "the depth")), c, h, w))


def _regrouped(b: Maker, x: Any, shape: Shape) -> Any:
    return x if same_shape(b.shape(x), shape) else b.emit(Regroup, x, shape=shape)


def conv3d(
    b: Maker,
    x: Any,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """Convolution of x (N, C, D, H, W) by ``weight`` (O, C / groups, KD, KH, KW).

    ``pads``: front, top, left, back, bottom, right.
    """
    n, _, _, h, w = b.shape(x)
    front, top, left, back, bottom, right = pads
    kd, kh, kw = weight.shape[2:]
    flat: dict[str, Any] = {
        "stride": (stride[1], stride[2]),
        "padding": (top, left, bottom, right),
        "dilation": (dilation[1], dilation[2]),
        "groups": groups,
    }
    frames = _frames(b, x)
    if (kh, kw) == (1, 1) and flat["stride"] == (1, 1) and not any(flat["padding"]):
        y = b.emit(
            Conv2d,
            _columns(b, frames, n),
            weight=np.ascontiguousarray(weight[..., 0]),
            bias=bias,
            stride=(stride[0], 1),
            padding=(front, 0, back, 0),
            dilation=(dilation[0], 1),
            groups=groups,
        )
        return _volume(b, _of_columns(b, y, h, w), n)
    taps = _shifted(b, frames, n, kd, stride[0], (front, back), dilation[0])
    weights = [np.ascontiguousarray(weight[:, :, t]) for t in range(kd)]
    if kd > 1 and groups == 1 and kd * weight.shape[1] <= _FEW:
        taps, weights = [b.emit(Concat, *taps, axis=1)], [np.concatenate(weights, 1)]
    total: Any = None
    for k, (tap, part) in enumerate(zip(taps, weights, strict=True)):
        made = b.emit(Conv2d, tap, weight=part, bias=None if k else bias, **flat)
        total = made if total is None else b.emit(Binary, made, total, kind="add")
    return _volume(b, total, n)


def _shifted(
    b: Maker, frames: Any, n: Dim, taps: int, stride: int, pads: tuple[int, int], dilation: int
) -> list[Any]:
    """For each place of a kernel's depth the frames that it meets, one for each frame of the output."""
    if taps == 1 and stride == 1 and not any(pads):
        return [frames]
    h, w = b.shape(frames)[2:]
    columns = _columns(b, frames, n)
    if any(pads):
        columns = b.emit(Pad, columns, before=(0, 0, pads[0], 0), after=(0, 0, pads[1], 0))
    depth = static(b.shape(columns)[2], "the depth")
    count = (depth - dilation * (taps - 1) - 1) // stride + 1
    if count < 1:
        raise InputError(f"a kernel of depth {taps} (dilation {dilation}) does not fit {depth}")
    out = []
    for t in range(taps):
        start = t * dilation
        stop = start + (count - 1) * stride + 1
        part = b.emit(Slice, columns, axis=2, start=start, stop=stop, step=stride)
        out.append(_of_columns(b, part, h, w))
    return out


def conv_transpose3d(
    b: Maker,
    x: Any,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    pads: Sequence[int],
    extra: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Any:
    """Transposed convolution of x (N, C, D, H, W) by ``weight`` (C, O / groups, KD, KH, KW); ``pads``
    as :func:`conv3d` has them, ``extra`` the output padding.

    Raises:
        UnsupportedError: frames of the output that nothing reaches.
    """
    kd = weight.shape[2]
    apart = kd == stride[0] and not (pads[0] or pads[3] or extra[0]) and (kd == 1 or dilation[0] == 1)
    n, _, depth, _, _ = b.shape(x)
    flat: dict[str, Any] = {
        "stride": (stride[1], stride[2]),
        "padding": (pads[1], pads[2], pads[4], pads[5]),
        "output_padding": (extra[1], extra[2]),
        "dilation": (dilation[1], dilation[2]),
        "groups": groups,
    }
    frames = _frames(b, x)
    weights = [np.ascontiguousarray(weight[:, :, t]) for t in range(kd)]
    own = bias if apart else None
    made = [b.emit(ConvTranspose2d, frames, weight=w, bias=own, **flat) for w in weights]
    if not apart:
        length = (static(depth, "the depth") - 1) * stride[0] - pads[0] - pads[3] + extra[0]
        length += dilation[0] * (kd - 1) + 1
        y = _overlapping(b, made, n, stride[0], dilation[0], pads[0], length)
        return y if bias is None else b.emit(Binary, y, bias.reshape(-1, 1, 1, 1), kind="add")
    if kd == 1:
        return _volume(b, made[0], n)
    k, c, h, w = b.shape(made[0])
    above = b.emit(Concat, *made, axis=2)
    return _volume(b, _regrouped(b, above, (times(k, kd), c, h, w)), n)


def _overlapping(
    b: Maker, taps: Sequence[Any], n: Dim, stride: int, dilation: int, front: int, length: int
) -> Any:
    """The volume of ``length`` frames in which frame i of tap t is added to frame
    ``i * stride + t * dilation - front``: frames of one remainder by ``stride`` at a time."""
    _, _, h, w = b.shape(taps[0])
    columns = [_columns(b, tap, n) for tap in taps]
    depth = static(b.shape(columns[0])[2], "the depth")
    each = -(-(front + length) // stride)
    phases = []
    for phase in range(stride):
        total: Any = None
        for t, column in enumerate(columns):
            before, rest = divmod(t * dilation, stride)
            if rest != phase:
                continue
            after = each - depth - before
            part = b.emit(Pad, column, before=(0, 0, before, 0), after=(0, 0, after, 0))
            total = part if total is None else b.emit(Binary, total, part, kind="add")
        if total is None:
            raise UnsupportedError("transposed convolution with frames that no window reaches")
        phases.append(_of_columns(b, total, h, w))
    whole = phases[0]
    if stride > 1:
        k, c, _, _ = b.shape(whole)
        above = b.emit(Concat, *phases, axis=2)
        whole = _regrouped(b, above, (times(k, stride), c, h, w))
    columns = [_columns(b, whole, n)]
    cut = b.emit(Slice, columns[0], axis=2, start=front, stop=front + length)
    return _volume(b, _of_columns(b, cut, h, w), n)


def pool3d(
    b: Maker,
    x: Any,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int = 0,
) -> Any:
    """Pooling of x (N, C, D, H, W), over H and W and then over D: the greatest of the greatest, the
    average of averages. ``pads`` as :func:`conv3d` has them."""
    n = b.shape(x)[0]
    front, top, left, back, bottom, right = pads
    common: dict[str, Any] = {"kind": kind, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
    frames = _frames(b, x)
    if tuple(kernel[1:]) != (1, 1) or tuple(stride[1:]) != (1, 1) or divisor:
        frames = b.emit(
            Pool,
            frames,
            kernel_size=(kernel[1], kernel[2]),
            stride=(stride[1], stride[2]),
            padding=(top, left, bottom, right),
            dilation=(dilation[1], dilation[2]),
            divisor=1 if divisor else 0,  # the sum
            **common,
        )
    if kernel[0] != 1 or stride[0] != 1 or divisor:
        h, w = b.shape(frames)[2:]
        columns = b.emit(
            Pool,
            _columns(b, frames, n),
            kernel_size=(kernel[0], 1),
            stride=(stride[0], 1),
            padding=(front, 0, back, 0),
            dilation=(dilation[0], 1),
            divisor=divisor,
            **common,
        )
        frames = _of_columns(b, columns, h, w)
    return _volume(b, frames, n)


def adaptive_pool3d(b: Maker, x: Any, kind: str, size: Sequence[int]) -> Any:
    """Pooling of x (N, C, D, H, W) to a fixed ``size``, over H and W and then over D."""
    n, _, d, h, w = b.shape(x)
    frames = _frames(b, x)
    if (h, w) != (size[1], size[2]):
        frames = b.emit(AdaptivePool, frames, kind=kind, output_size=(size[1], size[2]))
    if d != size[0]:
        columns = _columns(b, frames, n)
        columns = b.emit(AdaptivePool, columns, kind=kind, output_size=(size[0], size[1] * size[2]))
        frames = _of_columns(b, columns, size[1], size[2])
    return _volume(b, frames, n)


def resize3d(b: Maker, x: Any, size: Sequence[int], scale: Sequence[float] | None, **how: Any) -> Any:
    """Interpolation of x (N, C, D, H, W), along H and W and then along D; ``how`` as of a Resize."""
    n, _, d, h, w = b.shape(x)
    frames = _frames(b, x)
    if (h, w) != (size[1], size[2]) or (scale is not None and tuple(scale[1:]) != (1.0, 1.0)):
        flat = None if scale is None else (scale[1], scale[2])
        frames = b.emit(Resize, frames, size=(size[1], size[2]), scale=flat, **how)
    if d != size[0] or (scale is not None and scale[0] != 1.0):
        deep = None if scale is None else (scale[0], 1.0)
        columns = _columns(b, frames, n)
        columns = b.emit(Resize, columns, size=(size[0], size[1] * size[2]), scale=deep, **how)
        frames = _of_columns(b, columns, size[1], size[2])
    return _volume(b, frames, n)


@lowers(Regroup)
def lower_regroup(low: Lowering, n: Regroup) -> None:
    """The same memory in another shape; a part of another map is copied first."""
    (x,) = n.inputs
    src = low.read(x, "map")
    if low.graph.values[x].place is not None or x in low.views:
        mid = low.add_value(n.output + ":whole", low.graph.shape(x), "map")
        low.node("copy", n.name, [src], mid, n.name)
        src = mid
    low.native[n.output] = low.add_value(n.output, n.shape, "map", parent=src)
    low.aliased.add(n.output)


VOLUME |= {
    "conv": conv3d, "conv_transpose": conv_transpose3d, "pool": pool3d, "adaptive_pool": adaptive_pool3d,
    "resize": resize3d,
}  # fmt: skip
