"""docs/results/engine.md: the engine beside dense engines."""

from __future__ import annotations

import json
from typing import Any

from .common import MACHINES, RESULTS, grid, table


def engine_results() -> list[tuple[str, dict[str, Any]]]:
    """(machine, result) of every table, the well-known networks first."""
    first = ["inception_v3", "resnet18", "resnet34", "resnet50", "vgg16"]

    def place(item: tuple[str, dict[str, Any]]) -> tuple[Any, ...]:
        machine, d = item
        n = d["network"]
        known = first.index(n) if n in first else len(first)
        return (list(MACHINES).index(machine) != 1, machine, known, n, d["batch"], d["threads"])

    paths = (RESULTS / "engine").glob("*/*-b*-t*.json")
    return sorted(((p.parent.name, json.loads(p.read_text())) for p in paths), key=place)


def engine_name(r: dict[str, Any]) -> str:
    name = f"{r['engine']} {r['version'] or ''}".split("+")[0].split("-")[0].strip()
    if r["engine"] == "actzip":
        return f"{name}, {r['isa']}"
    return f"{name}, at most AVX2" if r["isa"] == "avx2" else name


def zeros(r: dict[str, Any], network: str) -> str:
    """What a row's zeros are; random weights have none that training made."""
    return "random weights" if r["zeros"] == "natural" and network in RANDOM else str(r["zeros"])


#: Networks that the engine's tables measure on random weights.
RANDOM = frozenset(
    {
        "resnet18",
        "resnet34",
        "resnet50",
        "vgg16",
        "convnext_tiny",
        "efficientnet_b0",
        "mobilenet_v2",
        "mobilenet_v3_large",
    }
)


def engine_row(r: dict[str, Any], network: str) -> list[str]:
    if "median_ms" not in r:
        return [engine_name(r), zeros(r, network), "", "", "", r["skip"], *[""] * 6]

    def number(key: str, digits: int = 3) -> str:
        return "" if r.get(key) is None else f"{r[key]:.{digits}f}"

    dense = r.get("dense_arena_bytes")
    peak = r.get("peak_share")
    random = network in RANDOM and r["zeros"] != "dense"
    return [
        engine_name(r),
        zeros(r, network),
        number("density"),
        "" if random else number("top1_agreement"),
        "" if random else number("output_error"),
        f"{r['median_ms']:.2f}",
        str(r["runs"]),
        number("against_fastest_dense", 2),
        number("against_fastest_dense_avx2", 2),
        "" if peak is None else f"{100 * peak:.0f} %",
        f"{r['arena_bytes'] / dense:.2f}" if dense else "",
        f"{(r['peak_bytes'] or 0) / 1e6:.0f}",
    ]


@table
def engine_tables() -> list[str]:
    head = (
        "engine | zeros | density | top-1 | error | median ms | runs | x dense | x AVX2 | of "
        "peak | arena | peak MB"
    )
    lines = []
    for machine, d in engine_results():
        threads = f"{d['threads']} thread{'s' if d['threads'] > 1 else ''}"
        where = "" if machine == "zen4" else f", {MACHINES.get(machine, machine)}"
        lines += [f"### {d['network']}, batch {d['batch']}, {threads}{where}", ""]
        lines += [f"{MACHINES.get(machine, d['machine']['cpu'])}; float32.", ""]
        lines += [*grid(head, "llrrrrrrrrrr", (engine_row(r, d["network"]) for r in d["rows"])), ""]
    return lines[:-1]


@table
def engine_threads() -> list[str]:
    times: dict[tuple[str, str, int, str, str], dict[int, float]] = {}
    for path in sorted((RESULTS / "engine").glob("*/alone/*.json")):
        d, cpu = json.loads(path.read_text()), MACHINES[path.parents[1].name]
        for r in d["rows"]:
            key = (d["network"], cpu, d["batch"], r["isa"], r["zeros"])
            times.setdefault(key, {})[d["threads"]] = r["median_ms"]
    rows = [
        (*key, f"{t[1]:.2f}", f"{t[2]:.2f}", f"{t[1] / t[2]:.2f}")
        for key, t in sorted(times.items())
        if {1, 2} <= t.keys()
    ]
    head = "network | machine | batch | actzip on | zeros | 1 thread, ms | 2 threads, ms | ratio"
    return grid(head, "llrllrrr", rows)


@table
def engine_memory() -> list[str]:
    rows = []
    for path in sorted((RESULTS / "engine").glob("*/memory/*.json")):
        d, cpu = json.loads(path.read_text()), MACHINES[path.parents[1].name]
        for r in d["rows"]:
            size = (f"{r[k] / 1e6:.0f}" for k in ("peak_bytes", "compile_peak_bytes"))
            arena = f"{r['arena_bytes'] / 1e6:.1f} of {r['dense_arena_bytes'] / 1e6:.1f}"
            rows.append((d["network"], cpu, zeros(r, d["network"]), f"{r['median_ms']:.2f}", *size, arena))
    head = "network | machine | zeros | median ms | loaded, MB | compiling, MB | arena, MB of dense"
    return grid(head, "lllrrrr", rows)


@table
def engine_no_zeros() -> list[str]:
    rows = [
        (
            d["network"],
            d["batch"],
            d["threads"],
            r["isa"],
            f"{r['median_ms']:.2f}",
            f"{r['against_pytorch_and_ort']:.2f}",
        )
        for _, d in engine_results()
        for r in d["rows"]
        if "against_pytorch_and_ort" in r
    ]
    head = "network | batch | threads | actzip on | median ms | best of PyTorch, ORT / actzip"
    return grid(head, "lrrlrr", rows)
