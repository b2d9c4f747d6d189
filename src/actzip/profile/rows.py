"""What was counted, as rows of plain data: one dict an activation map, one a layer, and their totals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from actzip.profile.collect import Collection
from actzip.profile.stats import BINS_PER_OCTAVE, bin_edges

__all__ = ["build_layers", "build_maps", "build_totals"]


def build_maps(collection: Collection, bits: Iterable[int] = (8, 16)) -> list[dict[str, Any]]:
    """One row an activation map, in order of execution; ``bits``: the widths of the entropies."""
    rows = []
    edges = bin_edges()
    for stats in collection.maps.values():
        elements = max(1, round(stats.elements / max(1, collection.images)))  # of an image, not a window
        used = np.flatnonzero(stats.hist)
        last = int(used[-1]) + 1 if used.size else 0
        low = int(used[used > 0][0]) if (used > 0).any() else last  # bin 0 is the zeros: kept apart
        dead = stats.dead_channels
        curve = [
            (stats.threshold_for(d * stats.density), d * stats.density)
            for d in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        ]
        rows.append(
            {
                "name": stats.site.name,
                "kind": stats.site.kind,
                "module": stats.site.module,
                "module_type": stats.site.module_type,
                "can_be_sparse": stats.site.sparse,
                "shape": list(stats.shape),
                "varying_shape": stats.varying_shape,
                "dtype": stats.dtype,
                "images": stats.images,
                "elements": elements,
                "float32_bytes": 4 * elements,
                "density": stats.density,
                "density_spread": stats.density_spread(),
                "dead_channels": {
                    "count": len(dead),
                    "of": int(stats.channel_nonzeros.size),
                    "first": dead[:64],
                },
                "nonfinite": stats.nonfinite,
                "max_abs": stats.max_abs,
                "entropy": {str(b): stats.entropy(b) for b in bits},
                "coded": {key: c.summary(elements) for key, c in stats.coded.items()},
                "histogram": {
                    "bins_per_octave": BINS_PER_OCTAVE,
                    "zeros": stats.elements - stats.nonzeros,
                    "edges": [float(e) for e in edges[low : last + 1]] if last > low else [],
                    "counts": stats.hist[low:last].tolist() if last > low else [],
                },
                "zero_runs_log2": _trim(stats.zero_runs.tolist()),
                "bursts_log2": _trim(stats.bursts.tolist()),
                "thresholds": [{"threshold": t, "density": stats.density_at(t)} for t, _ in curve],
                "nonzero_places": _places(stats.position_nonzeros, stats),
                "channel_density": [
                    float(c) / max(1, stats.elements // max(1, stats.channel_nonzeros.size))
                    for c in stats.channel_nonzeros
                ],
            }
        )
        if stats.tiles is not None:
            rows[-1]["tiles"] = stats.tiles.summary()
    return rows


def _places(counts: Any, stats: Any) -> list[list[float]]:
    """Mean density at each position over channels and images, averaged down to at most 16 x 16."""
    if counts.size == 0:
        return []
    channels = max(1, stats.channel_nonzeros.size)
    rows = [r.sum(0) for r in np.array_split(counts, min(16, counts.shape[0]), axis=0)]
    heights = [r.shape[0] for r in np.array_split(counts, min(16, counts.shape[0]), axis=0)]
    out = []
    for row, height in zip(rows, heights):
        parts = np.array_split(row, min(16, row.size))
        out.append([float(p.sum()) / (p.size * height * channels * max(1, stats.images)) for p in parts])
    return out


def _trim(values: list[int]) -> list[int]:
    while values and values[-1] == 0:
        values.pop()
    return values


def build_layers(collection: Collection) -> list[dict[str, Any]]:
    """One row a convolution or linear layer, in order of execution."""
    rows = []
    n = max(1, collection.images)  # a layer's own first dimension may be windows, tokens or regions
    for stats in collection.computations.values():
        rows.append(
            {
                "name": stats.site.name,
                "kind": stats.site.kind,
                "module": stats.site.module,
                "module_type": stats.site.module_type,
                "input_shape": list(stats.input_shape),
                "weight_shape": list(stats.weight_shape),
                "output_shape": list(stats.output_shape),
                "stride": list(stats.stride),
                "padding": [list(p) for p in stats.padding],
                "dilation": list(stats.dilation),
                "groups": stats.groups,
                "read_shape": list(stats.read_shape),
                "read_nonzeros": stats.read_nonzeros / max(1, stats.images),
                "weight_density": stats.weight_density,
                "output_map": stats.output_map,
                "dtype": stats.dtype,
                "macs": stats.macs / n,
                "border_macs": stats.border_macs / n,
                "effective_macs": stats.effective_macs / n,
                "input_density": stats.input_density,
                "theoretical_speedup": stats.theoretical_speedup,
                "predicted_ms": None,
                "measured_ms": None,
                "kernel": None,
                "why": None,
            }
        )
        if stats.tiles is not None:
            rows[-1]["tiles"] = stats.tiles.summary()
    return rows


def build_totals(maps: list[dict[str, Any]], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over layers; bits/element and gains are of all maps together, not means of ratios."""
    elements = sum(m["elements"] for m in maps)
    macs = sum(r["macs"] for r in layers)
    effective = sum(r["effective_macs"] for r in layers)
    totals: dict[str, Any] = {
        "maps": len(maps),
        "layers": len(layers),
        "elements": elements,
        "density": sum(m["density"] * m["elements"] for m in maps) / elements if elements else None,
        "macs": macs,
        "border_macs": sum(r["border_macs"] for r in layers),
        "effective_macs": effective,
        "theoretical_speedup": macs / effective if effective else None,
        "float32_bytes": 4 * elements,
        "coded": {},
        "entropy": {},
    }
    for bits in sorted({b for m in maps for b in m["entropy"]}, key=int):
        totals["entropy"][bits] = (
            sum(m["entropy"][bits] * m["elements"] for m in maps) / elements if elements else None
        )
    for key in dict.fromkeys(k for m in maps for k in m["coded"]):
        have = [m for m in maps if key in m["coded"]]
        n = sum(m["elements"] for m in have)
        bits = int(key.rsplit("-", 1)[1])
        per_element = sum(m["coded"][key]["bits_per_element"] * m["elements"] for m in have) / n
        totals["coded"][key] = {
            "bits_per_element": per_element,
            "gain_float32": 32 / per_element,
            "gain_qbit": bits / per_element,
            "dram_bytes_saved_per_image": sum(m["float32_bytes"] for m in have) - per_element * n / 8,
            "buffer_bytes_worst": max(m["coded"][key]["buffer_bytes_worst"] for m in have),
            "buffer_bytes_p99": max(m["coded"][key]["buffer_bytes_p99"] for m in have),
        }
    for name in ("predicted_ms", "measured_ms"):  # of convolutions and linear layers alone
        values = [r[name] for r in layers if r[name] is not None]
        totals[name] = sum(values) if values else None
    return totals
