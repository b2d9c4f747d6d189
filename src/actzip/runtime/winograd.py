"""Winograd kernels (``winograd-2x2``, ``winograd-4x4``): whether exact enough, what they multiply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actzip._native import _engine
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.lower import Lowered

__all__ = ["TOLERANCE", "errors", "is_winograd", "products", "tile_density", "tile_size"]

#: The greatest error of a kernel that may be chosen, as a share of the layer's largest output.
TOLERANCE = 1e-5


def is_winograd(kernel: str) -> bool:
    return kernel.startswith("winograd-")


def tile_size(kernel: str) -> int:
    """Output pixels along a tile's side."""
    return int(kernel.removeprefix("winograd-").split("x")[0])


def errors(
    graph: g.Graph,
    low: Lowered,
    wanted: dict[str, set[str]],
    inputs: Sequence[g.Array],
    batch: int,
    threads: int,
) -> dict[str, dict[str, float]]:
    """How far each of the ``wanted`` kernels of a convolution is from direct convolution on ``inputs``.

    Returns:
        By node and kernel, the largest difference as a share of the layer's largest output, both
        before residual and activation. Infinite where either is not finite.
    """
    nodes = [n for n in graph.nodes if isinstance(n, ops.Conv2d) and wanted.get(n.name)]
    if not nodes:
        return {}
    outputs = [np.empty(g.concrete(graph.shape(v), batch), np.float32) for v in graph.outputs]
    values = sorted({low.values[n.inputs[0]] for n in nodes})
    maps = dict(zip(values, low.plan.capture(batch, list(inputs), outputs, threads, values), strict=True))
    found: dict[str, dict[str, float]] = {}
    for n in nodes:
        x = maps[low.values[n.inputs[0]]]
        found[n.name] = {kernel: _error(n, kernel, x, threads) for kernel in sorted(wanted[n.name])}
    return found


def _error(n: ops.Conv2d, kernel: str, x: g.Array, threads: int) -> float:
    p: Any = _engine.kernels.Problem()
    p.oc, p.ic, p.kh, p.kw = n.weight.shape
    p.pad_top, p.pad_left, p.pad_bottom, p.pad_right = n.padding
    weight = np.ascontiguousarray(n.weight, np.float32)
    bias = None if n.bias is None else np.ascontiguousarray(n.bias, np.float32)
    direct = next(v for v in _engine.kernels.variants(p) if not is_winograd(v))
    want, got = (_engine.kernels.conv(p, v, x, weight, bias, threads=threads)[0] for v in (direct, kernel))
    largest = float(np.abs(want).max(initial=0.0))
    worst = float(np.abs(got - want).max(initial=0.0))
    if not (np.isfinite(largest) and np.isfinite(worst)):
        return float("inf")
    return worst / largest if largest else worst


def tile_density(x: g.Array, n: ops.Conv2d, m: int) -> float:
    """Share of (tile, channel) pairs of input ``x`` (N, C, H, W) that are not all
    zero, for output tiles of m x m."""
    top, left, bottom, right = n.padding
    high, across = -(-(x.shape[2] + top + bottom - 2) // m), -(-(x.shape[3] + left + right - 2) // m)
    some = np.zeros((*x.shape[:2], high * m + 2, across * m + 2), bool)
    h, w = min(x.shape[2], some.shape[2] - top), min(x.shape[3], some.shape[3] - left)
    some[:, :, top : top + h, left : left + w] = x[:, :, :h, :w] != 0
    rows = np.logical_or.reduce([some[:, :, i : i + high * m : m] for i in range(m + 2)])
    tiles = np.logical_or.reduce([rows[..., i : i + across * m : m] for i in range(m + 2)])
    return float(tiles.mean()) if tiles.size else 0.0


def products(x: g.Array, n: ops.Conv2d, m: int) -> int:
    """Products of the transformed tiles of ``x`` (N, C, H, W) that are not skipped."""
    top, left, bottom, right = n.padding
    high, across = -(-(x.shape[2] + top + bottom - 2) // m), -(-(x.shape[3] + left + right - 2) // m)
    tiles = int(x.shape[0] * high * across)
    each = (m + 2) ** 2 * int(n.weight.shape[0]) * int(n.weight.shape[1])
    return round(tile_density(x, n, m) * tiles * each)
