"""docs/engine-benchmarks.md from the results of run.py: python benchmarks/engine/report.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
PAGE = HERE.parents[1] / "docs" / "engine-benchmarks.md"
HEAD = """# Engine: measured speed

Written by `benchmarks/engine/report.py` from `benchmarks/results/engine-*.json`; `make bench-engine` measures all of it again.

Every table is one run: each engine in a process of its own with the same number of threads, rounds interleaved, median of so many *runs*
(torch: the better of its two layouts counts). `x dense` is the time of the fastest dense engine of that run over the row's. Rows of
AVX2 are compared twice: `x dense` with what the rivals do as they come, which may be AVX-512, `x AVX2` with those that were told to
use AVX2 at most: PyTorch and OpenVINO by variables of oneDNN and their own, DeepSparse by its own. ONNX Runtime (MLAS) and ncnn
take no such order. Dense engines run the plain network: their time does not depend on zeros. *Density*: share of non-zeros over all ReLU outputs of photographs that
calibration did not see; *top-1*: the share of them on which the answer is the plain network's; *error*: root mean square of the
difference of the centred outputs to the plain network's, relative to theirs. *Calibrated*: thresholds, one a layer, that
`actzip.sparsify.calibrate_thresholds` chose on 24 photographs to change the outputs least; *scaled*: a common factor times each layer's mean
positive output, which is blind to what it changes. Neither trains anything. *Sparsified*: weights that were trained for zeros. *Imposed*
densities: random weights, the same density at every ReLU; 0.56 is the mean that Albericio et al. (Cnvlutin, ISCA 2016) measured over
the convolutions of trained networks; top-1 means nothing there.
*Peak MB*: the whole process, after loading an exported model (actzip: a pickled compiled model, which needs no torch).
*Of peak*: non-zero MACs a second over the convolutions, against a loop of FMAs in registers.
*Arena*: bytes of activations against a plan that keeps every map of the same graph whole and dense.
DeepSparse gets the thresholds as `ThresholdedRelu`.
"""


def name(path: Path) -> tuple[Any, ...]:
    d = json.loads(path.read_text())
    first = ["inception_v3", "resnet18", "resnet34", "resnet50", "vgg16"]
    n = d["network"]
    return (first.index(n) if n in first else 9, n, d["batch"], d["threads"])


def table(d: dict[str, Any]) -> list[str]:
    m = d["machine"]
    lines = [
        f"### {d['network']}, batch {d['batch']}, {d['threads']} thread{'s' if d['threads'] > 1 else ''}",
        "",
        f"{m['cpu']}; float32.",
        "",
        "| engine | zeros | density | top-1 | error | median ms | runs | x dense | x AVX2 | of peak | arena | peak MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in d["rows"]:
        engine = f"{r['engine']} {r['version'] or ''}".split("+")[0].split("-")[0].strip()
        if r["engine"] == "actzip":
            engine += f", {r['isa']}"
        elif r["isa"] == "avx2":
            engine += ", at most AVX2"
        if "median_ms" not in r:
            lines.append(f"| {engine} | {r['zeros']} | | | | {r['skip']} | | | | | | |")
            continue
        density, agreement, error = (r.get(k) for k in ("density", "top1_agreement", "output_error"))
        peak = r.get("peak_share")
        arena = r["arena_bytes"] / r["dense_arena_bytes"] if r.get("dense_arena_bytes") else None
        cells = [
            engine, r["zeros"], *("" if v is None else f"{v:.3f}" for v in (density, agreement, error)),
            f"{r['median_ms']:.2f}", str(r["runs"]), *(
                f"{r[k]:.2f}" if k in r else "" for k in ("against_fastest_dense", "against_fastest_dense_avx2")
            ),
            "" if peak is None else f"{100 * peak:.0f} %", "" if arena is None else f"{arena:.2f}",
            f"{(r['peak_bytes'] or 0) / 1e6:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def scaling(results: list[dict[str, Any]]) -> list[str]:
    """Two threads over one, where both were measured."""
    times: dict[tuple[str, int, str, str], dict[int, float]] = {}
    for d in results:
        for r in d["rows"]:
            if r["engine"] == "actzip" and "median_ms" in r:
                key = (d["network"], d["batch"], r["isa"], r["zeros"])
                times.setdefault(key, {})[d["threads"]] = r["median_ms"]
    both = {k: t for k, t in times.items() if 1 in t and 2 in t}
    if not both:
        return []
    lines = [
        "## Two threads over one",
        "",
        "Runs of actzip alone, one after the other (with eleven other engines taking turns, as in the tables below, both vary by more than",
        "what is looked for): `suite.py NETWORK --batches 1 --threads T --engines actzip --results benchmarks/results/two-threads`.",
        "",
        "| network | batch | actzip on | zeros | 1 thread, ms | 2 threads, ms | ratio |",
    ]
    lines.append("|---|--:|---|---|--:|--:|--:|")
    for (n, b, isa, zeros), t in sorted(both.items()):
        lines.append(f"| {n} | {b} | {isa} | {zeros} | {t[1]:.2f} | {t[2]:.2f} | {t[1] / t[2]:.2f} |")
    return [*lines, ""]


def without_zeros(results: list[dict[str, Any]]) -> list[str]:
    """What skipping costs where there is nothing to skip."""
    rows = [
        f"| {d['network']} | {d['batch']} | {d['threads']} | {r['isa']} | {r['median_ms']:.2f} | {r['against_pytorch_and_ort']:.2f} |"
        for d in results
        for r in d["rows"]
        if "against_pytorch_and_ort" in r
    ]
    if not rows:
        return []
    return [
        "## Networks without zeros",
        "",
        "Activations that are hardly ever zero (SiLU, GELU, hardswish): time of the best of PyTorch and ONNX Runtime over actzip's.",
        "",
        "| network | batch | threads | actzip on | median ms | best of PyTorch, ORT / actzip |",
        "|---|--:|--:|---|--:|--:|",
        *rows,
        "",
    ]


def main() -> None:
    paths = sorted(RESULTS.glob("engine-*-b*-t*.json"), key=name)
    results = [json.loads(p.read_text()) for p in paths]
    lines = [HEAD]
    advice = next((d["advice"] for d in results if d.get("advice")), "")
    if advice:
        lines += [f"On the machine of these tables: {advice}.", ""]
    lines += scaling(
        [json.loads(p.read_text()) for p in sorted((RESULTS / "two-threads").glob("engine-*.json"))]
    )
    lines += without_zeros(results)
    lines += ["## Tables", ""]
    for d in results:
        lines += table(d)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(PAGE)


if __name__ == "__main__":
    main()
