"""docs/results/kernels.md: kernels and layers."""

from __future__ import annotations

import json
from typing import Any

from .common import RESULTS, grid, load, table


@table
def kernels() -> list[str]:
    rows = []
    for path in sorted((RESULTS / "kernels").glob("*/*/sparse.json")):
        d = json.loads(path.read_text())
        for t in d["totals"]:
            rows.append(
                (
                    t["net"],
                    path.parts[-3].replace("zen", "Zen "),
                    d["isa"],
                    f"{t['density']:g}",
                    f"{1e3 * t['seconds']:.2f}",
                    f"{100 * t['peak_share']:.0f} %",
                    f"{100 * t['direct_peak_share']:.0f} %" if "direct_peak_share" in t else "",
                    f"{t['onednn_seconds'] / t['seconds']:.2f}x" if "onednn_seconds" in t else "",
                )
            )
    head = "network | CPU | instruction set | density | ms | of peak | direct | against oneDNN, dense"
    return grid(head, "lllrrrrr", rows)


#: Runs whose layers are shown, by their file.
LAYERS = {
    "CRAFT 480x480": "real/zen5/craft-b1-t1",
    "VGG-16 240x240": "real/zen5/vgg16_tumor-b1-t1",
    "Inception-V3": "engine/zen5/inception_v3-b1-t1",
}


def convolutions(name: str) -> list[dict[str, Any]]:
    """The layers of a run that multiply, of the first row of actzip."""
    row = next(r for r in load(name)["rows"] if r["engine"] == "actzip")
    return [layer for layer in row["layers"] if layer["macs"]]


@table
def layer_kernels() -> list[str]:
    """By network and kernel."""
    rows = []
    for network, name in LAYERS.items():
        layers = convolutions(name)
        peak = next(r for r in load(name)["rows"] if r["engine"] == "actzip")["peak_gflops"]
        total = sum(layer["milliseconds"] for layer in layers)
        kernels: dict[str, list[dict[str, Any]]] = {}
        for layer in layers:
            kernels.setdefault(layer["kernel"], []).append(layer)
        spent = {k: sum(r["milliseconds"] for r in rs) for k, rs in kernels.items()}
        for kernel in sorted(spent, key=lambda k: -spent[k]):
            products = sum(r["products"] for r in kernels[kernel])
            rows.append(
                (
                    network,
                    kernel,
                    len(kernels[kernel]),
                    f"{spent[kernel]:.2f}",
                    f"{100 * spent[kernel] / total:.0f} %",
                    f"{sum(r['macs'] for r in kernels[kernel]) / 1e9:.2f}",
                    f"{products / 1e9:.2f}",
                    f"{100 * 2e-6 * products / (spent[kernel] * peak):.0f} %",
                )
            )
    head = "network | kernel | layers | ms | of the time | GMACs | products, G | of peak"
    return grid(head, "llrrrrrr", rows)


@table
def layer_peak() -> list[str]:
    """The convolutions that take a fiftieth of their network's time or more."""
    rows = []
    for network, name in LAYERS.items():
        layers = convolutions(name)
        total = sum(layer["milliseconds"] for layer in layers)
        for r in layers:
            if r["milliseconds"] < total / 50:
                continue
            rows.append(
                (
                    network,
                    r["name"].replace("basenet.", ""),
                    r["kernel"],
                    f"{r['density']:.2f}",
                    "" if r["tile_density"] is None else f"{r['tile_density']:.2f}",
                    f"{r['macs'] / 1e9:.2f}",
                    f"{r['products'] / 1e9:.2f}",
                    f"{r['milliseconds']:.2f}",
                    f"{100 * r['peak_share']:.0f} %",
                )
            )
    head = "network | layer | kernel | density | tiles | GMACs | products, G | ms | of peak"
    return grid(head, "lllrrrrrr", rows)
