"""Winograd kernels (``winograd-2x2``, ``-4x4``, ``-6x6``) and those of long one-dimensional
convolutions (``cook-toom-4``): whether exact enough, what they multiply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip._native import _engine
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.mapped import give_back

if TYPE_CHECKING:
    from actzip.runtime.lower import Lowered

__all__ = [
    "TOLERANCE",
    "errors",
    "fits",
    "is_winograd",
    "likely_cost",
    "long_products",
    "places",
    "products",
    "read_maps",
    "tile_density",
    "tile_size",
    "transforms",
    "weights_share",
]

#: The greatest error of a kernel that may be chosen, as a share of the layer's largest output.
TOLERANCE = 1e-5


def is_winograd(kernel: str) -> bool:
    return kernel.startswith("winograd-")


def transforms(kernel: str) -> bool:
    """Whether it multiplies what is transformed, with an error of its own."""
    return kernel.startswith(("winograd-", "cook-toom-"))


def fits(n: ops.Conv2d) -> bool:
    """Whether Winograd kernels can compute ``n``; few input channels they are never quick for."""
    return n.weight.shape[1] >= 16 and n.weight.shape[2:] == (3, 3) and n.stride == (1, 1) and n.groups == 1


def tile_size(kernel: str) -> int:
    """Output pixels along a tile's side."""
    return int(kernel.removeprefix("winograd-").split("x")[0])


def weights_share(kernel: str) -> float:
    """A kernel's weights over those of the layer."""
    if is_winograd(kernel):
        return (tile_size(kernel) + 2) ** 2 / 9
    return 7 / 4 if transforms(kernel) else 1.0


#: Multiplications in the time that a weight takes to come from memory.
_A_WEIGHT = 28


def likely_cost(n: ops.Conv2d, height: int, width: int, kernel: str) -> int:
    """What says which tiles are likely the quickest for an output of this size: products and weights,
    for a pair of channels. On maps of 14x14 the weights of large tiles cost more than they spare."""
    if not is_winograd(kernel):
        return 0
    m = tile_size(kernel)
    return places(n, height, width, m) + _A_WEIGHT * (m + 2) ** 2


def places(n: ops.Conv2d, height: int, width: int, m: int) -> int:
    """Transformed pixels of an output of this size, in tiles of m x m: what a dense input costs
    for each pair of channels."""
    down, along = n.dilation
    high, across = -(-height // down), -(-width // along)  # of a phase: pixels a dilation apart
    return down * along * -(-high // m) * -(-across // m) * (m + 2) ** 2


def read_maps(
    graph: g.Graph,
    low: Lowered,
    wanted: Mapping[str, set[str]],
    inputs: Sequence[g.Array],
    batch: int,
    threads: int,
) -> dict[str, g.Array]:
    """What the convolutions with kernels ``wanted`` read in one run, (N, H, W, C), by name."""
    nodes = [n for n in graph.nodes if isinstance(n, ops.Conv2d) and wanted.get(n.name)]
    if not nodes:
        return {}
    outputs = [np.empty(g.concrete(graph.shape(v), batch), np.float32) for v in graph.outputs]
    values = sorted({low.values[n.inputs[0]] for n in nodes})
    maps = dict(zip(values, low.plan.capture(batch, list(inputs), outputs, threads, values), strict=True))
    return {n.name: maps[low.values[n.inputs[0]]] for n in nodes}


def errors(
    graph: g.Graph, wanted: Mapping[str, set[str]], maps: Mapping[str, g.Array], threads: int
) -> dict[str, dict[str, float]]:
    """How far each of the ``wanted`` kernels of a convolution is from direct convolution of ``maps``
    (:func:`read_maps`).

    Returns:
        By node and kernel, the largest difference as a share of the layer's largest output, both
        before residual and activation. Infinite where either is not finite.
    """
    found: dict[str, dict[str, float]] = {}
    for n in graph.nodes:
        if isinstance(n, ops.Conv2d) and n.name in maps:
            found[n.name] = _errors(n, sorted(wanted[n.name]), maps[n.name], threads)
            give_back(n.weight)
    return found


def _errors(n: ops.Conv2d, kernels: Iterable[str], x: g.Array, threads: int) -> dict[str, float]:
    p: Any = _engine.kernels.Problem()
    p.oc, p.ic, p.kh, p.kw = n.weight.shape
    p.pad_top, p.pad_left, p.pad_bottom, p.pad_right = n.padding
    p.dh, p.dw = n.dilation
    weight = np.ascontiguousarray(n.weight, np.float32)
    bias = None if n.bias is None else np.ascontiguousarray(n.bias, np.float32)
    direct = next(v for v in _engine.kernels.variants(p) if not transforms(v))
    want = _engine.kernels.conv(p, direct, x, weight, bias, threads=threads)[0]
    largest = float(np.abs(want).max(initial=0.0))
    found = {}
    for kernel in kernels:
        got = _engine.kernels.conv(p, kernel, x, weight, bias, threads=threads)[0]
        worst = float(np.abs(got - want).max(initial=0.0))
        finite = np.isfinite(largest) and np.isfinite(worst)
        found[kernel] = float("inf") if not finite else worst / largest if largest else worst
    return found


def _kinds(x: g.Array, m: int, axis: int) -> list[tuple[int, g.Array]]:
    """Along ``axis``, tiles of ``x``'s pixels: how many of a tile's m + 2 places are of one kind, and
    whether a pixel that they depend on is not zero. The first depends on even pixels, the last on odd
    ones, the others on all but the tile's first and last."""
    count = (x.shape[axis] - 2) // m
    pixels = [np.take(x, range(i, i + count * m, m), axis) for i in range(m + 2)]
    kinds = ((1, pixels[::2]), (m, pixels[1:-1]), (1, pixels[1::2]))
    return [(places, np.logical_or.reduce(some)) for places, some in kinds]


def _tiles(x: g.Array, n: ops.Conv2d, m: int) -> tuple[int, int]:
    """(Place, channel) pairs of the transformed tiles of input ``x`` (N, C, H, W) that may be non-zero,
    and all of them."""
    top, left, bottom, right = n.padding
    down, along = n.dilation
    padded = np.pad(x != 0, ((0, 0), (0, 0), (top, bottom), (left, right)))
    some = total = 0
    for phase in np.ndindex(down, along):  # pixels a dilation apart are a map of their own
        part = padded[:, :, phase[0] :: down, phase[1] :: along]
        high, across = (max(0, -(-(size - 2) // m)) for size in part.shape[2:])
        grid = np.pad(
            part, ((0, 0), (0, 0), (0, high * m + 2 - part.shape[2]), (0, across * m + 2 - part.shape[3]))
        )
        for rows, found in _kinds(grid, m, 2):
            some += sum(rows * columns * int(np.count_nonzero(t)) for columns, t in _kinds(found, m, 3))
        total += grid.shape[0] * grid.shape[1] * high * across * (m + 2) ** 2
    return some, total


def tile_density(x: g.Array, n: ops.Conv2d, m: int) -> float:
    """Share of the products of transformed tiles that are not skipped: of (place, channel) pairs that
    depend on a non-zero of input ``x`` (N, C, H, W), for output tiles of m x m."""
    some, total = _tiles(x, n, m)
    return some / total if total else 0.0


def products(x: g.Array, n: ops.Conv2d, m: int) -> int:
    """Products of the transformed tiles of ``x`` (N, C, H, W) that are not skipped."""
    return _tiles(x, n, m)[0] * int(n.weight.shape[0])


def long_products(images: int, n: ops.Conv2d, height: int, width: int) -> int:
    """Products of ``cook-toom-4`` for outputs of ``height`` x ``width``: seven for four outputs by
    four taps."""
    oc, ic, kh, kw = n.weight.shape
    lines, along = (width, height) if kw == 1 else (height, width)
    return int(images * lines * -(-along // 4) * -(-max(kh, kw) // 4) * 7 * oc * ic)
