"""Streaming observers: one pass over the calibration data, memory that does not grow with it.

An observer keeps a histogram of |x| over logarithmic bins (the exponent and the first mantissa bits
of the float32 pattern), the exact maximum, and counts of elements, zeros and negatives; one row a
map or one a channel. Logarithmic bins need no range beforehand, so an outlier costs no resolution,
and histograms of several batches or processes add up. Scales for any number of bits, expected
errors, entropies and saturation are then computed from the histogram.

How a scale is chosen (``choose_scale``), with clip = scale * qmax:

``minmax``       clip = the largest |x|: nothing saturates.
``percentile``   clip = the given percentile of the non-zero |x|.
``mse``          clip minimises the expected squared error of the quantized map.
``entropy`` clip minimises the Kullback-Leibler divergence between the histogram and its quantized
form (the method
                 of TensorRT's calibrator: 2048 linear bins, tail folded into the last). At or above
                 2048 levels it is ``minmax``, since then the quantized form is the histogram
                 itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actzip.errors import InputError
from actzip.quantize.linear import QuantRange

__all__ = ["OBSERVERS", "MapObserver", "choose_scale"]

OBSERVERS = ("minmax", "percentile", "mse", "entropy")

_F64 = NDArray[np.float64]
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class _Row:
    """One histogram, empty bins left out: lower edges, upper edges, counts of the non-zero values;
    and totals."""

    low: _F64
    high: _F64
    count: _F64
    maximum: float
    zeros: int
    total: int

    @property
    def nonzero(self) -> int:
        return self.total - self.zeros


class MapObserver:
    """Statistics of one activation map over any number of batches.

    Args:
        per: ``tensor`` (one histogram of 16384 bins, resolution 1/64 to 1/128) or ``channel`` (2048
            bins each, resolution 1/8 to 1/16; channels are dimension 1).

    Attributes:
        negative: how many elements were below zero; ``elements``, ``images``: how many were seen.
        positions: elements of one image's map.
    """

    def __init__(self, per: str = "tensor") -> None:
        if per not in ("tensor", "channel"):
            raise InputError(f"per must be 'tensor' or 'channel', not {per!r}")
        self.per = per
        self.mantissa = 6 if per == "tensor" else 3
        self.bins = 256 << self.mantissa
        self.counts: Tensor | None = None  # rows, bins
        self.maximum: Tensor | None = None  # rows
        self.zeros: Tensor | None = None
        self.negative = 0
        self.elements = 0
        self.images = 0
        self.channels = 0

    @property
    def positions(self) -> int:
        return self.elements // self.images if self.images else 0

    def update(self, x: Tensor, where: str = "the map") -> None:
        """Adds one batch ``N, C, *``.

        Raises:
            InputError: infinite values or NaN, or a number of channels that differs from the batches before.
        """
        x = x.detach().to(torch.float32)
        if x.numel() == 0:
            return
        rows = 1
        if self.per == "channel":
            if x.dim() < 2:
                raise InputError(
                    f"{where}: a map of shape {tuple(x.shape)} has no channels; use per='tensor'"
                )
            rows = int(x.shape[1])
        if self.counts is not None and rows != self.counts.shape[0]:
            raise InputError(f"{where}: {rows} channels, but {self.counts.shape[0]} in the batches before")
        a = x.abs()
        flat = a.reshape(1, -1) if rows == 1 else a.transpose(0, 1).reshape(rows, -1)
        top = flat.amax(1)
        if not bool(torch.isfinite(top).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise InputError(
                f"{where}: {bad} of {x.numel()} values are infinite or NaN in the calibration data; "
                "a scale needs finite values"
            )
        index = flat.contiguous().view(torch.int32) >> (23 - self.mantissa)
        if rows > 1:
            index = index + (torch.arange(rows, device=x.device, dtype=torch.int32) * self.bins).unsqueeze(1)
        counts = torch.bincount(index.reshape(-1), minlength=rows * self.bins).reshape(rows, self.bins)
        zeros = (flat == 0).sum(1)
        counts[:, 0] -= zeros
        if self.counts is None:
            self.counts, self.maximum, self.zeros = counts, top, zeros
        else:
            assert self.maximum is not None and self.zeros is not None
            self.counts += counts
            self.maximum = torch.maximum(self.maximum, top)
            self.zeros = self.zeros + zeros
        self.negative += int((x < 0).sum())
        self.elements += x.numel()
        self.images += int(x.shape[0]) if x.dim() > 1 else 1

    def merge(self, other: MapObserver) -> None:
        """Adds what another observer of the same map saw (another process, say).

        Raises:
            InputError: they differ in kind or in the number of channels.
        """
        if other.per != self.per:
            raise InputError(f"cannot merge observers per {self.per} and per {other.per}")
        if other.counts is None or other.maximum is None or other.zeros is None:
            return
        if self.counts is None:
            self.counts, self.maximum, self.zeros = (
                other.counts.clone(),
                other.maximum.clone(),
                other.zeros.clone(),
            )
        else:
            assert self.maximum is not None and self.zeros is not None
            if other.counts.shape != self.counts.shape:
                raise InputError(
                    f"cannot merge maps of {self.counts.shape[0]} and {other.counts.shape[0]} channels"
                )
            self.counts += other.counts
            self.maximum = torch.maximum(self.maximum, other.maximum)
            self.zeros = self.zeros + other.zeros
        self.negative += other.negative
        self.elements += other.elements
        self.images += other.images

    # -- reading

    @property
    def rows(self) -> int:
        return 0 if self.counts is None else int(self.counts.shape[0])

    @property
    def dead(self) -> bool:
        """True where no element was ever non-zero."""
        return self.maximum is None or not bool((self.maximum > 0).any())

    @property
    def density(self) -> float:
        """Fraction of non-zero elements, 0 to 1."""
        if self.zeros is None or not self.elements:
            return 0.0
        return 1.0 - float(self.zeros.sum()) / self.elements

    def edges(self) -> _F64:
        """The bins' edges, ``bins + 1``; the first is 0."""
        bits = (np.arange(self.bins + 1, dtype=np.int64) << (23 - self.mantissa)).astype(np.uint32)
        edges = np.empty(self.bins + 1)
        finite = bits < 0x7F800000
        edges[finite] = bits[finite].view(np.float32)
        edges[~finite] = 2.0**128
        return edges

    def row(self, index: int) -> _Row:
        """The histogram of one channel (or of the map, index 0)."""
        assert self.counts is not None and self.maximum is not None and self.zeros is not None
        counts = self.counts[index].cpu().numpy()
        used = np.flatnonzero(counts)
        edges = self.edges()
        maximum = float(self.maximum[index])
        high = edges[used + 1].copy()
        if len(high):
            high[-1] = max(min(high[-1], maximum), edges[used[-1]] * (1 + 1e-9))
        return _Row(
            edges[used],
            high,
            counts[used].astype(np.float64),
            maximum,
            int(self.zeros[index]),
            self.elements // self.rows,
        )

    def scales(self, r: QuantRange, observer: str, percentile: float = 99.99) -> Tensor:
        """float32 scales, one a row; channels without a non-zero value get the map's largest (1.0
        if all are dead)."""
        rows = [self.row(i) for i in range(self.rows)]
        values = np.array(
            [choose_scale(row, r, observer, percentile) if row.nonzero else np.nan for row in rows]
        )
        if np.isnan(values).all():
            values[:] = 1.0
        else:
            values[np.isnan(values)] = np.nanmax(values)
        return torch.from_numpy(values.astype(np.float32))

    def quality(self, r: QuantRange, scale: Tensor) -> dict[str, float]:
        """What quantizing with ``scale`` does to the map, from the histogram.

        Returns:
            ``mse`` (mean squared error an element), ``signal`` (mean square an element), ``saturated`` and
            ``vanished`` (shares of the non-zero elements that are clipped by more than half a step,
                and that become
            zero), ``entropy`` (bits an element of the integers, order 0, signs included).
        """
        error = signal = saturated = vanished = entropy = nonzero = 0.0
        for i in range(self.rows):
            row = self.row(i)
            s = float(scale[i if scale.numel() > 1 else 0])
            if row.nonzero:
                error += float(_errors(row, np.array([s]), r.qmax)[0])
                signal += float((row.count * _second_moment(row)).sum())
                nonzero += row.nonzero
                saturated += _above(row, s * (r.qmax + 0.5))
                vanished += row.nonzero - _above(row, s * 0.5)
            entropy += _entropy(row, s, r) * row.total
        n = max(1, self.elements)
        return {
            "mse": error / n,
            "signal": signal / n,
            "saturated": saturated / nonzero if nonzero else 0.0,
            "vanished": vanished / nonzero if nonzero else 0.0,
            "entropy": entropy / n,
        }


def _second_moment(row: _Row) -> _F64:
    a, b = row.low, row.high
    moment: _F64 = (a * a + a * b + b * b) / 3
    return moment


def _cumulative(row: _Row) -> tuple[_F64, _F64]:
    """Points (x, number of non-zero |values| <= x) of a piecewise linear distribution."""
    x = np.stack([row.low, row.high], 1).reshape(-1)
    c = np.cumsum(row.count)
    y = np.stack([c - row.count, c], 1).reshape(-1)
    return x, y


def _above(row: _Row, x: float) -> float:
    """How many non-zero |values| are larger than x."""
    if not len(row.count) or x >= row.maximum:
        return 0.0
    points, below = _cumulative(row)
    return float(row.nonzero - np.interp(x, points, below, left=0.0, right=float(row.nonzero)))


def _entropy(row: _Row, scale: float, r: QuantRange) -> float:
    """Order-0 entropy of the integers of one row, bits an element; signs of signed maps are taken as even."""
    if not row.total:
        return 0.0
    levels = np.arange(r.qmax, dtype=np.float64)
    points, below = _cumulative(row) if len(row.count) else (np.zeros(1), np.zeros(1))
    cuts = np.interp((levels + 0.5) * scale, points, below, left=0.0, right=float(row.nonzero))
    zero = row.zeros + cuts[0]
    counts = np.concatenate([[zero], np.diff(cuts), [row.nonzero - cuts[-1]]])
    p = counts[counts > 0] / row.total
    h = float(-(p * np.log2(p)).sum())
    return h + ((row.total - zero) / row.total if r.signed else 0.0)


def _errors(row: _Row, scales: _F64, qmax: int) -> _F64:
    """Expected squared error summed over the non-zero values, for each scale.

    A bin narrower than the step counts at its middle; within a wider one the error is even: step^2 / 12.
    """
    s = scales[:, None]
    middle = (row.low + row.high) / 2
    width = row.high - row.low
    q = np.minimum(np.rint(middle / s), qmax)
    at_middle = np.square(middle - q * s)
    clip = s * qmax
    even = np.where(middle <= clip, s * s / 12, at_middle)
    total: _F64 = (np.where(width >= s, even, at_middle) * row.count).sum(1)
    return total


def _candidates(row: _Row, most: int) -> _F64:
    """Clip values to try: upper edges of the used bins in the top half of the sorted values, the
    maximum last."""
    below = np.cumsum(row.count) / row.count.sum()
    edges: _F64 = row.high[below >= 0.5]
    if len(edges) > most:
        edges = edges[np.unique(np.linspace(0, len(edges) - 1, most).round().astype(int))]
    return edges


def _percentile_clip(row: _Row, percentile: float) -> float:
    points, below = _cumulative(row)
    return min(float(np.interp(percentile / 100 * row.nonzero, below, points)), row.maximum)


def _entropy_clip(row: _Row, r: QuantRange, bins: int = 2048) -> float:
    levels = r.qmax + 1
    if levels >= bins:
        return row.maximum
    # a lone outlier must not take all the resolution of the linear bins
    top = max(min(row.maximum, 8 * _percentile_clip(row, 99.0)), _TINY * r.qmax)
    points, below = _cumulative(row)
    grid = np.linspace(0, top, bins + 1)
    reference = np.diff(np.interp(grid, points, below, left=0.0, right=float(row.nonzero)))
    reference[-1] += row.nonzero - reference.sum()
    best, best_clip = np.inf, row.maximum
    steps = np.unique(np.linspace(max(levels, bins // 32), bins, 128).astype(int))
    for n in steps:
        p = reference[:n].copy()
        body = p.copy()
        p[-1] += reference[n:].sum()
        group = (np.arange(n) * levels) // n
        used = body > 0
        sums = np.bincount(group, body, levels)
        counts = np.bincount(group, used, levels)
        q = np.where(used, (sums / np.maximum(counts, 1))[group], 0.0)
        # a little mass everywhere, so that folded outliers in an empty bin do not make the
        # divergence infinite
        p, q = p / p.sum() + 1e-9, q / max(q.sum(), 1e-30) + 1e-9
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, best_clip = divergence, float(grid[n])
    return best_clip


def choose_scale(row: Any, r: QuantRange, observer: str, percentile: float = 99.99) -> float:
    """The scale of one histogram (see the module's documentation), at least the smallest normal float32.

    Raises:
        InputError: an unknown observer, or a percentile outside (0, 100].
    """
    if observer == "minmax":
        clip = row.maximum
    elif observer == "percentile":
        if not 0 < percentile <= 100:
            raise InputError(f"percentile must be above 0 and at most 100, not {percentile}")
        clip = _percentile_clip(row, percentile)
    elif observer == "mse":
        candidates = _candidates(row, 384)
        errors = _errors(row, np.maximum(candidates / r.qmax, _TINY), r.qmax)
        clip = float(candidates[int(np.argmin(errors))])
    elif observer == "entropy":
        clip = _entropy_clip(row, r)
    else:
        raise InputError(f"observer must be one of {', '.join(OBSERVERS)}, not {observer!r}")
    return max(float(np.float32(clip / r.qmax)), _TINY)
