"""Streaming statistics of activation maps: integers only, so that two halves of a data set merge exactly.

Everything is a count, a sum of counts or a maximum. Memory is fixed by the model, not by the number
of images: magnitudes go into bins of an eighth of an octave (the upper bits of the float32
pattern), per-image densities and coded sizes into bins of a thousandth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actzip._native import _codec
from actzip.activations import ComputeCall, Site, count_macs, output_size
from actzip.profile.tiles import Tiles, TileStats

__all__ = ["BINS_PER_OCTAVE", "CodedStats", "ComputeStats", "MapStats", "bin_edges"]

BINS_PER_OCTAVE = 8
_SHIFT = 20  # a float32 pattern without its sign, shifted right by this: 8 bins an octave
_BINS = 2048
_RATIO_BINS = 1001
_RUN_BINS = 24  # runs of 2^i .. 2^(i+1)-1 elements

IntArray = npt.NDArray[np.int64]
_NONE = np.zeros(0, dtype=np.int64)


def bin_edges() -> npt.NDArray[np.float64]:
    """Lower edges of the magnitude bins (``_BINS`` of them); bin 0 holds exact zeros and the least
    subnormals."""
    patterns = (np.arange(_BINS, dtype=np.uint32) << np.uint32(_SHIFT)).astype(np.uint32)
    with np.errstate(invalid="ignore"):  # the patterns above infinity are NaN
        return np.asarray(patterns.view(np.float32), np.float64)


def quantile_of_histogram(hist: IntArray, q: float) -> int:
    """The least bin index at or below which a share ``q`` of the counts lies."""
    total = int(hist.sum())
    if total == 0:
        return 0
    return int(np.searchsorted(np.cumsum(hist), math.ceil(q * total)))


def _entropy(counts: npt.NDArray[Any]) -> float:
    total = counts.sum()
    if total == 0:
        return 0.0
    p = counts[counts > 0] / total
    return float(-(p * np.log2(p)).sum())


@dataclass
class CodedStats:
    """Coded sizes of one map with one codec at one bit width, over all images (bits, headers included)."""

    bits: int
    coded_bits: int = 0
    elements: int = 0
    worst_bits: int = 0
    ratio_hist: IntArray = field(default_factory=lambda: np.zeros(_RATIO_BINS + 200, dtype=np.int64))

    def add(self, coded_bits: int, elements: int) -> None:
        self.coded_bits += coded_bits
        self.elements += elements
        self.worst_bits = max(self.worst_bits, coded_bits)
        ratio = math.ceil(1000 * coded_bits / max(1, elements * self.bits))
        self.ratio_hist[min(ratio, self.ratio_hist.size - 1)] += 1

    def merge(self, other: CodedStats) -> None:
        self.coded_bits += other.coded_bits
        self.elements += other.elements
        self.worst_bits = max(self.worst_bits, other.worst_bits)
        self.ratio_hist += other.ratio_hist

    def summary(self, map_elements: int) -> dict[str, Any]:
        raw = map_elements * self.bits
        p99 = quantile_of_histogram(self.ratio_hist, 0.99) * raw / 1000
        return {
            "bits_per_element": self.coded_bits / self.elements if self.elements else None,
            "gain_float32": 32 * self.elements / self.coded_bits if self.coded_bits else None,
            "gain_qbit": self.bits * self.elements / self.coded_bits if self.coded_bits else None,
            "coded_bytes_per_image": self.coded_bits / 8 / max(1, self.elements // max(1, map_elements)),
            "dram_bytes_saved_per_image": 4 * map_elements
            - self.coded_bits / 8 / max(1e-9, self.elements / max(1, map_elements)),
            "buffer_bytes_worst": math.ceil(self.worst_bits / 8),
            "buffer_bytes_p99": math.ceil(min(p99, self.worst_bits) / 8),
        }


@dataclass
class MapStats:
    """Statistics of one activation map (one site) over all images seen.

    Attributes:
        shape: of the map without the batch dimension, ``C, H, W`` (or ``F``); that of the first image.
        images, elements, nonzeros: counts over all images. NaN counts as non-zero.
        channel_nonzeros: a count for each channel.
        position_nonzeros: a count for each ``H, W`` position, where all images had one shape (else empty).
        hist: counts of magnitudes (see :func:`bin_edges`).
    """

    site: Site
    shape: tuple[int, ...]
    dtype: str
    images: int = 0
    elements: int = 0
    nonzeros: int = 0
    negatives: int = 0
    nonfinite: int = 0
    density_hist: IntArray = field(default_factory=lambda: np.zeros(_RATIO_BINS, dtype=np.int64))
    density_min: float = 1.0
    density_max: float = 0.0
    max_abs: float = 0.0
    hist: IntArray = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    channel_nonzeros: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    position_nonzeros: IntArray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    zero_runs: IntArray = field(default_factory=lambda: np.zeros(_RUN_BINS, dtype=np.int64))
    bursts: IntArray = field(default_factory=lambda: np.zeros(_RUN_BINS, dtype=np.int64))
    coded: dict[str, CodedStats] = field(default_factory=dict)
    varying_shape: bool = False
    tiles: TileStats | None = None

    @classmethod
    def of(cls, site: Site, y: Tensor) -> MapStats:
        return cls(site, tuple(int(s) for s in y.shape[1:]), str(y.dtype).removeprefix("torch."))

    def add(self, y: Tensor, *, runs: bool = True, tiles: Tiles | None = None) -> None:
        """Adds a batch ``N, C, *`` (or ``N, F``); with ``tiles``, counts its tiles too."""
        if tuple(y.shape[1:]) != self.shape:
            self.varying_shape = True
        y = y.detach()
        n = int(y.shape[0])
        if n == 0 or y.numel() == 0:
            return
        array = np.ascontiguousarray(y.float().cpu().numpy())
        channels = int(y.shape[1]) if y.dim() > 1 else 1
        values = array.reshape(n, channels, -1)
        self.tiles = _tiled(self.tiles, tiles, array)
        if self.channel_nonzeros.size == 0:
            self.channel_nonzeros = np.zeros(channels, dtype=np.int64)
        same = self.channel_nonzeros.size == channels
        if y.dim() == 4 and self.position_nonzeros.size == 0 and self.images == 0:
            self.position_nonzeros = np.zeros(array.shape[2:], dtype=np.int64)
        places = self.position_nonzeros if array.shape[2:] == self.position_nonzeros.shape else _NONE
        per_image = np.zeros(n, dtype=np.int64)
        negatives, peak = _codec.count_maps(
            values,
            per_image,
            self.channel_nonzeros if same else np.zeros(channels, dtype=np.int64),
            places.reshape(-1),
            self.hist,
            self.zero_runs if runs else _NONE,
            self.bursts if runs else _NONE,
        )
        size = array.size // n
        self.images += n
        self.elements += array.size
        self.nonzeros += int(per_image.sum())
        self.negatives += negatives
        self.nonfinite = int(self.hist[0x7F800000 >> _SHIFT :].sum())
        self.max_abs = max(self.max_abs, peak)
        for count in per_image.tolist():
            density = count / size
            self.density_min = min(self.density_min, density)
            self.density_max = max(self.density_max, density)
            self.density_hist[round(1000 * density)] += 1

    def merge(self, other: MapStats) -> None:
        """Adds what another process has seen of the same site; exact, and independent of order."""
        self.varying_shape |= other.varying_shape or other.shape != self.shape
        self.images += other.images
        self.elements += other.elements
        self.nonzeros += other.nonzeros
        self.negatives += other.negatives
        self.nonfinite += other.nonfinite
        self.density_hist += other.density_hist
        self.density_min = min(self.density_min, other.density_min)
        self.density_max = max(self.density_max, other.density_max)
        self.max_abs = max(self.max_abs, other.max_abs)
        self.hist += other.hist
        for name in ("channel_nonzeros", "position_nonzeros"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.size == 0:
                setattr(self, name, theirs.copy())
            elif theirs.shape == mine.shape:
                mine += theirs
        self.zero_runs += other.zero_runs
        self.bursts += other.bursts
        self.tiles = _merged(self.tiles, other.tiles)
        for key, coded in other.coded.items():
            if key in self.coded:
                self.coded[key].merge(coded)
            else:
                self.coded[key] = coded

    def add_coded(self, key: str, bits: int, coded_bits: int, elements: int) -> None:
        """Adds one map coded whole under ``key``, say ``seg-8``."""
        self.coded.setdefault(key, CodedStats(bits)).add(coded_bits, elements)

    # -- what follows from the counts

    @property
    def density(self) -> float:
        return self.nonzeros / self.elements if self.elements else 0.0

    @property
    def dead_channels(self) -> list[int]:
        """Channels that were zero in every image."""
        return [int(c) for c in np.flatnonzero(self.channel_nonzeros == 0)]

    def density_spread(self) -> dict[str, float]:
        """Minimum, 5th, 50th and 95th percentile and maximum of the density over images."""
        q = {
            f"p{int(100 * p)}": quantile_of_histogram(self.density_hist, p) / 1000 for p in (0.05, 0.5, 0.95)
        }
        return {"min": self.density_min if self.images else 0.0, **q, "max": self.density_max}

    def density_at(self, threshold: float) -> float:
        """Density if values at or below ``threshold`` were zero too (to the resolution of a bin:
        1/8 octave)."""
        if threshold <= 0:
            return self.density
        pattern = int(np.array(threshold, dtype=np.float32).view(np.uint32)) >> _SHIFT
        return int(self.hist[pattern + 1 :].sum()) / self.elements if self.elements else 0.0

    def threshold_for(self, density: float) -> float:
        """The least threshold (a bin's edge) that brings the density to ``density`` or below."""
        if self.density <= density:
            return 0.0
        keep = np.cumsum(self.hist[::-1])[::-1]  # elements in bins >= i
        allowed = density * self.elements
        index = int(np.searchsorted(-keep, -allowed))
        return float(bin_edges()[min(index, 0x7F800000 >> _SHIFT)])

    def entropy(self, bits: int) -> float:
        """Order-0 entropy, bits/element, of the map quantized to ``bits`` by its largest magnitude
        over all images.

        Computed from the magnitude bins with values spread evenly inside a bin: an estimate, for
        choosing; the coded sizes are measured.
        """
        if self.max_abs == 0 or self.elements == 0:
            return 0.0
        levels = 2**bits - 1 if self.site.sparse or self.negatives == 0 else 2 ** (bits - 1) - 1
        step = self.max_abs / levels
        edges = bin_edges()
        counts = np.zeros(levels + 2, dtype=np.float64)
        counts[0] = self.elements - self.nonzeros
        for i in np.flatnonzero(self.hist):
            low, high = edges[i], edges[i + 1] if i + 1 < edges.size else np.inf
            number = float(self.hist[i]) - (counts[0] if i == 0 else 0.0)
            if number <= 0 or not np.isfinite(high):
                continue
            first, last = round(low / step), round(min(high, self.max_abs) / step)
            counts[min(first, levels) : min(last, levels) + 1] += number / (last - first + 1)
        sign = (self.nonzeros / self.elements) if self.negatives else 0.0
        return _entropy(counts) + sign


def _tiled(have: TileStats | None, tiles: Tiles | None, array: Any) -> TileStats | None:
    """The counts of tiles with a batch added to them; None where none are asked for."""
    if tiles is None:
        return have
    stats = TileStats.of(tiles, array) if have is None else have
    stats.add(array)
    return stats


def _merged(a: TileStats | None, b: TileStats | None) -> TileStats | None:
    if a is not None and b is not None:
        a.merge(b)
    return b if a is None else a


@dataclass
class ComputeStats:
    """MACs of one convolution or linear layer over all images; see :func:`actzip.activations.count_macs`.

    Attributes:
        output_map: the activation map that its output becomes, where one was found.
        read_elements, read_nonzeros: of the part of the input that the layer reads (a stride may
            leave out its end).
    """

    site: Site
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    dtype: str
    spatial: tuple[int, ...] = ()
    images: int = 0
    macs: int = 0
    border_macs: int = 0
    effective_macs: int = 0
    input_elements: int = 0
    input_nonzeros: int = 0
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    weight_nonzeros: int = 0
    read_elements: int = 0
    read_nonzeros: int = 0
    output_map: str | None = None
    tiles: TileStats | None = None

    @classmethod
    def of(cls, site: Site, call: ComputeCall) -> ComputeStats:
        return cls(
            site,
            tuple(int(s) for s in call.input.shape[1:]),
            tuple(int(s) for s in call.weight.shape),
            call.stride,
            call.groups,
            str(call.input.dtype).removeprefix("torch."),
            output_size(call),
            padding=call.padding,
            dilation=call.dilation,
            weight_nonzeros=int(torch.count_nonzero(call.weight)),
        )

    def add(self, call: ComputeCall, *, tiles: Tiles | None = None) -> None:
        macs, border, effective = count_macs(call)
        self.images += int(call.input.shape[0])
        self.macs += macs
        self.border_macs += border
        self.effective_macs += effective
        nonzeros, read = int(torch.count_nonzero(call.input)), read_part(call)
        self.input_elements += call.input.numel()
        self.input_nonzeros += nonzeros
        self.read_elements += read.numel()
        whole = read.numel() == call.input.numel()
        self.read_nonzeros += nonzeros if whole else int(torch.count_nonzero(read))
        if tiles is not None:
            x = call.input.movedim(-1, 1) if self.site.kind == "linear" else call.input
            self.tiles = _tiled(self.tiles, tiles, x.detach().float().cpu().numpy())

    def merge(self, other: ComputeStats) -> None:
        counts = ("images", "macs", "border_macs", "effective_macs")
        for name in (*counts, "input_elements", "input_nonzeros", "read_elements", "read_nonzeros"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.output_map = self.output_map or other.output_map
        self.tiles = _merged(self.tiles, other.tiles)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the computation, without the batch: ``OC, *spatial``, or ``..., out`` for a linear layer."""
        if self.site.kind == "linear":
            return (*self.input_shape[:-1], self.weight_shape[0])
        return (
            self.weight_shape[1] * self.groups if "transpose" in self.site.kind else self.weight_shape[0],
            *self.spatial,
        )

    @property
    def input_density(self) -> float:
        return self.input_nonzeros / self.input_elements if self.input_elements else 0.0

    @property
    def theoretical_speedup(self) -> float | None:
        """MACs / effective MACs; None where no effective MAC is left."""
        return self.macs / self.effective_macs if self.effective_macs else None

    @property
    def weight_density(self) -> float:
        return self.weight_nonzeros / max(1, math.prod(self.weight_shape))

    @property
    def read_shape(self) -> tuple[int, ...]:
        """Rows, columns ... of the box that a convolution reads, padding included."""
        if not self.stride or "transpose" in self.site.kind:
            return ()
        sizes = zip(self.spatial, self.stride, self.dilation, self.weight_shape[2:], strict=True)
        return tuple((o - 1) * s + d * (k - 1) + 1 for o, s, d, k in sizes)


def read_part(call: ComputeCall) -> Tensor:
    """The input without what no output of the convolution reads, at its far ends."""
    x = call.input
    if not call.stride or call.transposed:
        return x
    for axis, out in enumerate(output_size(call)):
        reach = call.dilation[axis] * (int(call.weight.shape[2 + axis]) - 1) + 1
        end = (out - 1) * call.stride[axis] + reach - call.padding[axis][0]
        x = x.narrow(2 + axis, 0, max(0, min(end, x.shape[2 + axis])))
    return x
