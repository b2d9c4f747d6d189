"""Zeros tile by tile: how many non-zeros the tiles of a map hold, what each tile costs coded, and
how far that is from zeros that fell at random.

A tile is a box of rows x columns x channels, written ``8x8x16``, cut to the map where the map is
smaller. Histograms are of whole tiles; those that the border cuts off are counted apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actzip.checks import shown, whole
from actzip.errors import InputError

__all__ = ["CodedTiles", "TileStats", "Tiles", "code_tiles", "hypergeometric", "parse_tiles"]

#: Rows, columns, channels of a tile.
Tiles = tuple[int, int, int]
IntArray = npt.NDArray[np.int64]
_MOST = 1 << 20  # elements of a tile: those of a chunk


def parse_tiles(value: Any) -> Tiles:
    """``"8x8x16"``, or three whole numbers, as (rows, columns, channels).

    >>> parse_tiles("8x8x16")
    (8, 8, 16)

    Raises:
        InputError: anything else, or more than 2**20 elements.
    """
    sides: Any = value
    if isinstance(value, str):
        if not re.fullmatch(r"\d{1,7}x\d{1,7}x\d{1,7}", value):
            raise InputError(f"tiles must be rows x columns x channels, say 8x8x16, not {shown(value)}")
        sides = [int(s) for s in value.split("x")]
    if not isinstance(sides, (list, tuple)) or len(sides) != 3:
        raise InputError(f"tiles must be rows, columns and channels, not {shown(value)}")
    h, w, c = (whole(s, "a side of a tile", 1) for s in sides)
    if h * w * c > _MOST:
        raise InputError(f"a tile of {h}x{w}x{c} has {h * w * c} elements; at most {_MOST} can be")
    return h, w, c


def as_planes(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A batch of maps as (N, C, H, W): vectors have one row and column, sequences (N, C, L) one
    row; further dimensions are rows."""
    n = values.shape[0]
    c = values.shape[1] if values.ndim > 1 else 1
    w = values.shape[-1] if values.ndim > 2 else 1
    return values.reshape(n, c, -1, w)


def hypergeometric(elements: int, nonzeros: int, tile: int) -> npt.NDArray[np.float64]:
    """Probabilities of 0, 1, ... ``tile`` non-zeros in a tile, if ``nonzeros`` of ``elements`` lay
    anywhere with the same chance (what Sparseloop's ``hypergeometric`` assumes).

    >>> hypergeometric(4, 2, 2).round(3)
    array([0.167, 0.667, 0.167])
    """
    low, high = max(0, tile + nonzeros - elements), min(tile, nonzeros)
    k = np.arange(low, high, dtype=np.float64)
    step = np.log(nonzeros - k) + np.log(tile - k) - np.log(k + 1)
    step -= np.log(elements - nonzeros - tile + k + 1)
    logs = np.concatenate([[0.0], np.cumsum(step)])
    p = np.zeros(tile + 1)
    p[low : high + 1] = np.exp(logs - logs.max())
    return np.asarray(p / p.sum())


@dataclass
class CodedTiles:
    """Sizes of tiles that were coded each for itself, at one bit width, with one codec.

    ``index_bits`` are those of headers and of the table that says where each tile begins; they are
    in ``coded_bits`` too.
    """

    bits: int
    coded_bits: int = 0
    index_bits: int = 0
    elements: int = 0
    by_bytes: IntArray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, index_bytes: int, tile_bytes: list[int], elements: int) -> None:
        self.coded_bits += 8 * (index_bytes + sum(tile_bytes))
        self.index_bits += 8 * index_bytes
        self.elements += elements
        self.by_bytes = _sum(self.by_bytes, np.bincount(tile_bytes))

    def merge(self, other: CodedTiles) -> None:
        self.coded_bits += other.coded_bits
        self.index_bits += other.index_bits
        self.elements += other.elements
        self.by_bytes = _sum(self.by_bytes, other.by_bytes)

    def summary(self) -> dict[str, Any]:
        n = max(1, self.elements)
        return {
            "bits_per_element": self.coded_bits / n,
            "index_bits_per_element": self.index_bits / n,
            "gain_float32": 32 * n / max(1, self.coded_bits),
            "tile_bytes_p99": _quantile(self.by_bytes, 0.99),
            "tile_bytes_worst": _quantile(self.by_bytes, 1.0),
        }


@dataclass
class TileStats:
    """Non-zeros in the tiles of one map, over all images: counts only, so that parts merge exactly.

    Attributes:
        tile: rows, columns, channels, cut to the map.
        counts: whole tiles by their number of non-zeros.
        edges: tiles that the border cuts off, their elements and their non-zeros.
        images, elements, nonzeros: all that was seen.
    """

    tile: Tiles
    counts: IntArray
    edges: IntArray = field(default_factory=lambda: np.zeros(3, np.int64))
    images: int = 0
    elements: int = 0
    nonzeros: int = 0
    coded: dict[str, CodedTiles] = field(default_factory=dict)

    @classmethod
    def of(cls, tiles: Tiles, values: npt.NDArray[Any]) -> TileStats:
        """For a batch of maps, (N, C, ...)."""
        _, c, h, w = as_planes(values).shape
        tile = (min(tiles[0], h), min(tiles[1], w), min(tiles[2], c))
        return cls(tile, np.zeros(tile[0] * tile[1] * tile[2] + 1, np.int64))

    def add(self, values: npt.NDArray[Any]) -> None:
        """Counts a batch of maps, (N, C, ...); NaN is no zero."""
        mask = as_planes(values) != 0
        n, c, h, w = mask.shape
        th, tw, tc = self.tile
        gh, gw, gc = h // th, w // tw, c // tc
        inner = mask[:, : gc * tc, : gh * th, : gw * tw]
        boxes = inner.reshape(n, gc, tc, gh, th, gw, tw)
        held = boxes.sum((2, 4, 6), dtype=np.int64).reshape(-1)
        self.counts += np.bincount(held, minlength=self.counts.size)
        nonzeros = int(np.count_nonzero(mask))
        every = -(-h // th) * -(-w // tw) * -(-c // tc)
        self.edges += (
            n * (every - gh * gw * gc), mask.size - inner.size, nonzeros - int(held.sum())
        )  # fmt: skip
        self.images += n
        self.elements += mask.size
        self.nonzeros += nonzeros

    def merge(self, other: TileStats) -> None:
        """Adds what another process has seen of the same map."""
        if other.tile != self.tile:  # maps that differ in size between the parts
            return
        self.counts += other.counts
        self.edges += other.edges
        self.images += other.images
        self.elements += other.elements
        self.nonzeros += other.nonzeros
        for key, coded in other.coded.items():
            if key in self.coded:
                self.coded[key].merge(coded)
            else:
                self.coded[key] = coded

    def blocks(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One map (C, ...) as (tiles, channels, rows, columns); those at the border are filled up
        with zeros."""
        planes = as_planes(image[None])[0]
        th, tw, tc = self.tile
        c, h, w = planes.shape
        planes = np.pad(planes, ((0, -c % tc), (0, -h % th), (0, -w % tw)))
        c, h, w = planes.shape
        boxes = planes.reshape(c // tc, tc, h // th, th, w // tw, tw)
        return np.ascontiguousarray(boxes.transpose(0, 2, 4, 1, 3, 5).reshape(-1, tc, th, tw))

    def add_coded(self, key: str, bits: int, index_bytes: int, tile_bytes: list[int], elements: int) -> None:
        """Adds what :func:`code_tiles` gave for one map under ``key``, say ``seg-8``."""
        self.coded.setdefault(key, CodedTiles(bits)).add(index_bytes, tile_bytes, elements)

    def summary(self) -> dict[str, Any]:
        """Histogram, what it says, and its distance from chance: that of Kolmogorov and Smirnov, the
        largest difference of the two shares of tiles with at most so many non-zeros."""
        measured = self.counts / max(1, int(self.counts.sum()))
        assumed = self.assumed()
        return {
            "tile": list(self.tile),
            "tiles": int(self.counts.sum()),
            "edges": dict(zip(("tiles", "elements", "nonzeros"), self.edges.tolist(), strict=True)),
            "histogram": self.counts.tolist(),
            "mean": _mean(measured),
            "deviation": _deviation(measured),
            "empty": float(measured[0]),
            "p99": _quantile(self.counts, 0.99),
            "most": _quantile(self.counts, 1.0),
            "hypergeometric": {
                "distance": float(np.abs(np.cumsum(measured - assumed)).max()),
                "deviation": _deviation(assumed),
                "empty": float(assumed[0]),
                "p99": int(np.searchsorted(np.cumsum(assumed), 0.99)),
            },
            "coded": {key: c.summary() for key, c in self.coded.items()},
        }

    def assumed(self) -> npt.NDArray[np.float64]:
        """:func:`hypergeometric` at the map's mean density."""
        elements = max(1, self.elements // max(1, self.images))
        nonzeros = round(elements * self.nonzeros / max(1, self.elements))
        return hypergeometric(elements, nonzeros, self.counts.size - 1)


def code_tiles(
    stats: TileStats, image: npt.NDArray[Any], codec: str, bits: int
) -> tuple[int, list[int], int]:
    """Bytes of header and index, bytes of every tile, and elements of one map whose tiles are coded
    each for itself; it is quantized by its own largest magnitude."""
    from actzip.codec import encode, inspect

    blocks = stats.blocks(image)
    blob = encode(blocks, codec=codec, bits=bits, chunk_elements=stats.counts.size - 1, threads=1)
    header = inspect(blob)
    return header.header_bytes, list(header.chunk_bytes), image.size


def _sum(a: IntArray, b: IntArray) -> IntArray:
    """Two histograms of different lengths."""
    out = np.zeros(max(a.size, b.size), np.int64)
    out[: a.size] += a
    out[: b.size] += b
    return out


def _mean(p: npt.NDArray[np.float64]) -> float:
    return float((p * np.arange(p.size)).sum())


def _deviation(p: npt.NDArray[np.float64]) -> float:
    """Standard deviation of a number that is 0, 1, ... with probabilities ``p``."""
    return float(np.sqrt((p * (np.arange(p.size) - _mean(p)) ** 2).sum()))


def _quantile(counts: IntArray, q: float) -> int:
    """The least index at or below which a share ``q`` of the counts lies."""
    total = int(counts.sum())
    return int(np.searchsorted(np.cumsum(counts), q * total)) if total else 0
