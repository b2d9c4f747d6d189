"""The report of an experiment: one self-contained HTML page (no request leaves it), light and dark,
plots as SVG."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, Site

__all__ = ["map_images", "png", "render"]

_LABELS = {
    "baseline": "baseline",
    "control": "control",
    "sparse": "sparsified",
    "thresholded": "with thresholds",
}


def render(results: Mapping[str, Any], models: Mapping[str, nn.Module], example: Tensor) -> str:
    """The HTML page of ``results`` as text.

    Args:
        models: by stage; their maps of ``example`` (1, C, H, W) are shown as pictures.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("actzip.experiment").joinpath("report.html.j2").read_text(encoding="utf-8")
    stages = list(results["layers"])
    coded = {(c["stage"], c["bits"]): {m["name"]: m for m in c["maps"]} for c in results["coding"]}
    pictures = {s: map_images(m, example) for s, m in models.items()}
    layers = []
    for name in results["layers"][stages[0]]:
        density = [
            {"label": _LABELS[s], "stage": s, "value": results["layers"][s].get(name, 1.0)} for s in stages
        ]
        rates = [
            {
                "label": f"{_LABELS[s]}, {bits} bits, {codec}",
                "stage": s,
                "value": maps[name]["bits_per_element"][codec],
                "gain": maps[name]["gain_float32"][codec],
            }
            for (s, bits), maps in coded.items()
            if name in maps
            for codec in maps[name]["bits_per_element"]
        ]
        shape = next((maps[name]["shape"] for maps in coded.values() if name in maps), None)
        layers.append(
            {
                "name": name,
                "shape": " x ".join(map(str, shape)) if shape else "",
                "density": density,
                "rates": rates,
                "top": max([r["value"] for r in rates], default=1.0),
                "pictures": [
                    {"label": _LABELS[s], "src": pictures[s][name]}
                    for s in stages
                    if name in pictures.get(s, {})
                ],
            }
        )
    return environment.from_string(source).render(
        r=results,
        labels=_LABELS,
        layers=layers,
        curves=_curves(results),
        frontier=_frontier(results),
        distortion=_rate_distortion(results),
        codecs=list(results["coding"][0]["gain_float32"]) if results["coding"] else [],
    )


def map_images(model: nn.Module, example: Tensor, *, channels: int = 16, side: int = 32) -> dict[str, str]:
    """The first channels of each activation map of ``example`` as a PNG data URI; zeros have a
    colour of their own."""
    found: dict[str, str] = {}

    def see(site: Site, y: Tensor) -> None:
        if not site.sparse:
            return
        values = y[0].detach().float().cpu().numpy()
        if values.ndim == 1:  # a vector: rows of 25
            width = 25
            padded = np.zeros(-(-len(values) // width) * width, np.float32)
            padded[: len(values)] = values
            tiles = padded.reshape(1, -1, width)
        else:
            step = max(1, -(-values.shape[-1] // side))
            tiles = values[:channels, ::step, ::step]
        found[site.name] = "data:image/png;base64," + base64.b64encode(png(_grid(tiles))).decode()

    with torch.no_grad(), ActivationTap(model, see):
        model(example)
    return found


def _grid(tiles: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Maps side by side as RGB: zeros slate, values from dark to bright yellow, borders
    transparent-looking grey."""
    count, height, width = tiles.shape
    columns = min(4, count)
    rows = -(-count // columns)
    image = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 128, np.uint8)
    peak = float(tiles.max()) or 1.0
    level = np.sqrt(np.clip(tiles / peak, 0, 1))[..., None]
    low, high = np.array([150, 60, 30.0]), np.array([255, 225, 90.0])
    colour = np.where(tiles[..., None] == 0, np.array([38, 48, 62.0]), low + (high - low) * level).astype(
        np.uint8
    )
    for i in range(count):
        y, x = i // columns * (height + 1) + 1, i % columns * (width + 1) + 1
        image[y : y + height, x : x + width] = colour[i]
    return image


def png(image: np.ndarray[Any, Any]) -> bytes:
    """An 8-bit RGB image (H, W, 3) as PNG."""
    height, width, _ = image.shape
    raw = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def _scale(values: list[float], low: float, high: float, pad: float = 0.05) -> tuple[float, float]:
    """(factor, offset) that maps the range of ``values`` onto low..high."""
    least, most = min(values), max(values)
    spread = (most - least) or abs(most) or 1.0
    least, most = least - pad * spread, most + pad * spread
    factor = (high - low) / (most - least)
    return factor, low - least * factor


_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 470.0, 14.0, 190.0


#: Dashes of the lines of one stage's codecs, the first one's drawn through.
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")


def _plot(
    series: list[tuple[str, list[tuple[float, float]]]],
    x: str,
    y: str,
    percent: bool = False,
    notes: list[str] | None = None,
) -> dict[str, Any] | None:
    """Lines by stage; ``notes``: what tells lines of one stage apart, each with a dash of its own."""
    points = [p for _, line in series for p in line]
    notes = notes or [""] * len(series)
    kinds = list(dict.fromkeys(notes))
    labels = [
        f"{_LABELS[stage]}, {note}" if note else _LABELS[stage] for (stage, _), note in zip(series, notes)
    ]
    if not points:
        return None
    fx, ox = _scale([p[0] for p in points], _LEFT, _RIGHT)
    fy, oy = _scale([p[1] for p in points], _BOTTOM, _TOP)
    ys = [min(p[1] for p in points), max(p[1] for p in points)]
    xs = [min(p[0] for p in points), max(p[0] for p in points)]

    def text(v: float, is_percent: bool) -> str:
        return f"{100 * v:.2f} %" if is_percent else f"{v:.3g}"

    return {
        "x": x,
        "y": y,
        "x_ticks": [{"at": v * fx + ox, "text": text(v, False)} for v in dict.fromkeys(xs)],
        "y_ticks": [{"at": v * fy + oy, "text": text(v, percent)} for v in dict.fromkeys(ys)],
        "series": [
            {
                "stage": stage,
                "label": label,
                "dash": _DASHES[kinds.index(note) % len(_DASHES)],
                "path": " ".join(f"{a * fx + ox:.1f},{b * fy + oy:.1f}" for a, b in line),
                "points": [
                    {
                        "x": a * fx + ox,
                        "y": b * fy + oy,
                        "text": f"{label}: {text(a, False)}, {text(b, percent)}",
                    }
                    for a, b in line
                ],
            }
            for (stage, line), label, note in zip(series, labels, notes)
        ],
    }


def _curves(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Validation accuracy and theoretical speed-up by epoch."""
    plots = []
    for key, title, percent in (
        ("accuracy", "validation accuracy", True),
        ("theoretical_speedup", "theoretical speed-up", False),
        ("density", "density", False),
    ):
        series = [
            (stage, [(float(e["epoch"]), float(e[key])) for e in h["history"] if e.get(key) is not None])
            for stage, h in results["history"].items()
        ]
        plot = _plot([s for s in series if s[1]], "epoch", title, percent)
        if plot is not None:
            plots.append(plot)
    return plots


def _frontier(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy against work: every epoch's validation figures, as points."""
    series = []
    for stage, h in results["history"].items():
        line = [
            (float(e["theoretical_speedup"]), float(e["accuracy"]))
            for e in h["history"]
            if e.get("accuracy") is not None and e.get("theoretical_speedup") is not None
        ]
        if line:
            series.append((stage, line))
    return _plot(series, "theoretical speed-up", "validation accuracy", percent=True)


def _rate_distortion(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Test accuracy against coded bits an element, a line a stage and codec, a point a width."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in results["stages"]:
        for codec, rate in row.get("bits_per_element", {}).items():
            lines.setdefault((row["stage"], codec), []).append((float(rate), float(row["accuracy"])))
    series = [(stage, sorted(line)) for (stage, _), line in lines.items()]
    return _plot(series, "bits an element, coded", "test accuracy", percent=True, notes=[c for _, c in lines])
