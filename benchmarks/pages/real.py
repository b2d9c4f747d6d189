"""docs/results/real.md: model files of packages."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from .common import MACHINES, RESULTS, grid, table

REAL_RIVALS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "ncnn": "ncnn", "torch.compile": ""}


#: Files whose activations are ReLU or ReLU6 (of crepe before BatchNorm, which leaves no zeros).
REAL_RELU = (
    "vgg16_tumor", "craft", "centerface", "mobilenet_v2", "efficientnet_lite0", "basic_pitch",
    "crepe_tiny", "crepe_full",
)  # fmt: skip


def real_results() -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(machine and network, its rows by engine) of benchmarks/real, largest speed-up first."""
    found = []
    for path in (RESULTS / "real").glob("*/*.json"):
        d = json.loads(path.read_text())
        cpu = MACHINES.get(path.parent.name, d["machine"]["cpu"])
        found.append((f"{d['network']}, {cpu}", {r["engine"]: r for r in d["rows"]}))
    return sorted(found, key=lambda f: (-f[1]["actzip"].get("against_fastest_dense", 0), f[0]))


def _relu_speedups() -> dict[str, list[float]]:
    """Speed-ups of the files with ReLU or ReLU6, by machine."""
    found: dict[str, list[float]] = {}
    for name, engines in real_results():
        file, _, cpu = name.partition(", ")
        if file in REAL_RELU and "against_fastest_dense" in engines["actzip"]:
            found.setdefault(cpu, []).append(engines["actzip"]["against_fastest_dense"])
    return found


@table
def real() -> list[str]:
    def time(r: dict[str, Any] | None) -> str:
        return f"{r['median_ms']:.2f} ({r['min_ms']:.2f})" if r and "median_ms" in r else ""

    rows = []
    for name, engines in real_results():
        own = engines["actzip"]
        cells = [name, *(time(engines.get(e)) for e in REAL_RIVALS), time(own) or "left out"]
        if "median_ms" in own:
            rivals = [r["min_ms"] for e, r in engines.items() if e in REAL_RIVALS and "min_ms" in r]
            cells += [
                f"{own['against_fastest_dense']:.2f}x",
                f"{min(rivals) / own['min_ms']:.2f}x",
                f"{own['theoretical_speedup']:.2f}x" if own["theoretical_speedup"] < math.inf else "",
                f"{own['error']:.1e}",
                f"{own['compile_seconds']:.0f}",
            ]
        rows.append([*cells, *[""] * (11 - len(cells))])
    rows += [
        [f"median of the {len(found)} with ReLU, {cpu}", *[""] * 5, f"{statistics.median(found):.2f}x"]
        + [""] * 4
        for cpu, found in _relu_speedups().items()
    ]
    rivals = " | ".join(title or engine for engine, title in REAL_RIVALS.items())
    head = f"file | {rivals} | actzip | speed-up | by minima | theoretical | error | compiling, s"
    return grid(head, "l" + "r" * 10, rows)


@table
def timm() -> list[str]:
    rows = []
    for path in (RESULTS / "timm").glob("*/*.json"):
        d = json.loads(path.read_text())
        found = {r["engine"]: r for r in d["rows"] if "median_ms" in r}
        own = found.get("actzip")
        if own is None or len(found) < 2:
            continue
        least = min(r["min_ms"] for e, r in found.items() if e != "actzip")
        times = [f"{found[e]['median_ms']:.2f} ({found[e]['min_ms']:.2f})" if e in found else ""
                 for e in ("onnxruntime", "openvino", "actzip")]  # fmt: skip
        name = f"{d['network']}, {MACHINES.get(path.parent.name, d['machine']['cpu'])}"
        speedups = [f"{own['against_fastest_dense']:.2f}x", f"{least / own['min_ms']:.2f}x"]
        rows.append([name, *times, *speedups, f"{own['error']:.1e}"])
    rows.sort(key=lambda r: (-float(r[4][:-1]), r[0]))
    return grid("network | ONNX Runtime | OpenVINO | actzip | speed-up | by minima | error", "lrrrrrr", rows)


@table
def real_avx2() -> list[str]:
    """Files of benchmarks/real on engines that were told to stay at AVX2."""
    lines = []
    for path in (RESULTS / "real").glob("*/avx2/*.json"):
        d = json.loads(path.read_text())
        timed = {r["engine"]: r for r in d["rows"] if "median_ms" in r}
        own, int8 = timed["actzip"], timed.get("openvino int8")
        faster = int8["median_ms"] / own["median_ms"] if int8 else 0.0
        cells = [
            *(f"{timed[e]['median_ms']:.2f}" if e in timed else "" for e in ("openvino", "torch.compile")),
            f"{int8['median_ms']:.2f}" if int8 else "",
            f"{own['median_ms']:.2f}",
            f"{own['against_fastest_dense']:.2f}x",
            f"{faster:.2f}x" if int8 else "",
            f"{int8['error']:.1e}" if int8 else "",
            f"{own['error']:.1e}",
        ]
        cpu = MACHINES.get(path.parents[1].name, d["machine"]["cpu"])
        lines.append((own["against_fastest_dense"], [f"{d['network']}, {cpu}", *cells]))
    head = (
        "file | OpenVINO | torch.compile | OpenVINO int8 | actzip | over float32 | over int8 | "
        "error of int8 | error of actzip"
    )
    return grid(head, "l" + "r" * 8, [cells for _, cells in sorted(lines, key=lambda r: -r[0])])


@table
def real_left_out() -> list[str]:
    rows = [
        (name, engine, r["skip"].replace("|", "/"))
        for name, engines in real_results()
        for engine, r in engines.items()
        if r["skip"] and r["skip"] != "the model is an ONNX file"
    ]
    return grid("file | engine | why", "lll", rows)
