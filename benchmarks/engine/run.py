"""Every engine on the same networks in the same run: python benchmarks/engine/run.py [--network inception_v3 ...]

Each engine runs in its own process (actzip.cli._workers) with the same number of threads; rounds are interleaved, so that what else the
machine does hits all alike. Dense rivals get the plain network, whose speed does not depend on zeros (thresholds would only
cost them); actzip and DeepSparse get the thresholded one. What is prepared beforehand is prepared in a process of its own for
all: ONNX Runtime, OpenVINO and DeepSparse load an ONNX file, actzip a pickled compiled model. ACTZIP_DEEPSPARSE_PYTHON names a
Python that has DeepSparse. --isa avx2 (repeatable) runs actzip on that instruction set too; rivals then run as they come (they may use AVX-512) and, in rows of
their own, told to use AVX2 at most by the variables that they know for it (AVX2_AT_MOST in actzip.cli._workers). ONNX Runtime
and ncnn know none, so that they are in the table as they come only. Writes
benchmarks/results/engine-<network>-b<batch>-t<threads>.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import models  # noqa: E402

from actzip.cli._workers import (  # noqa: E402
    AVX2_AT_MOST,
    DENSE,
    NO_AVX2_CAP,
    Worker,
    export_ncnn,
    export_onnx,
    take_turns,
)

RESULTS = HERE.parent / "results"
# Largest difference to PyTorch's answer, relative to the largest output, that counts as the same answer.
WRONG = 1e-2


def thresholded(
    name: str, targets: list[float], imposed: list[float], calibration: torch.Tensor, test: torch.Tensor
) -> list[dict[str, Any]]:
    """The network as it is, then with thresholds: their density and top-1 agreement on ``test``."""
    base, reference = models.measure(models.build(name), test)
    rows = [{"label": "natural", "thresholds": None, "density": base.nonzero / base.total, "agreement": 1.0}]
    for target in targets:
        thresholds = models.thresholds_for_density(name, target, calibration)
        meter, y = models.measure(models.build(name, thresholds), test)
        agreement = float((y.argmax(1) == reference.argmax(1)).float().mean())
        density = meter.nonzero / meter.total
        rows.append(
            {
                "label": f"density {target}",
                "thresholds": thresholds,
                "density": density,
                "agreement": agreement,
            }
        )
    for density in imposed:
        thresholds = models.impose_densities(name, calibration, density)
        meter, _ = models.measure(models.build(name, thresholds), test)
        rows.append(
            {
                "label": f"imposed {density}",
                "thresholds": thresholds,
                "density": meter.nonzero / meter.total,
                "agreement": None,
            }
        )
    return rows


def prepare(
    name: str, batch: int, targets: list[float], imposed: list[float], photos: int, unseen: int, folder: Path
) -> dict[str, Any]:
    """ONNX files and inputs of every row of :func:`thresholded`, on images that calibration did not see."""
    x = models.images(name, "unseen", batch)
    calibration = models.images(name, "calibration", photos)
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "calibration.npy", calibration[:2].numpy())
    known = folder.parent / f"{name}-thresholds.json"  # for every batch
    if known.exists():
        rows = json.loads(known.read_text())
    else:
        rows = thresholded(name, targets, imposed, calibration, models.images(name, "unseen", unseen))
        known.write_text(json.dumps(rows))
    made: dict[str, Any] = {"model": models.reference(name), "rows": rows, "lacks": {}}
    for row in rows:
        path = folder / f"{row['label'].replace(' ', '-')}.onnx"
        net = models.build(name, row["thresholds"])
        why = export_onnx(net, x, path, 13)
        if row["thresholds"] and not why:
            fuse_thresholds(path)
        made["lacks"] |= dict.fromkeys(("onnxruntime", "openvino", "deepsparse"), why) if why else {}
        row["onnx"] = str(path)
    if name in models.TRAINED:
        torch.save(models.build(name).state_dict(), folder / "state.pt")
        made["state"] = str(folder / "state.pt")
    return {**made, "input": str(folder / "x.npy"), "calibration": str(folder / "calibration.npy")}


def fuse_thresholds(path: Path) -> None:
    """ONNX file ``path``: Relu, Greater, Where of a thresholded ReLU as ONNX's one operator for it, ThresholdedRelu, which is the
    form that an engine can be expected to know."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    maker = {o: n for n in graph.node for o in n.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants.update(
        {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    )
    for n in graph.node:
        test, relu = (
            maker.get(n.input[0]) if n.input else None,
            maker.get(n.input[1]) if len(n.input) > 1 else None,
        )
        if (
            n.op_type == "Where" and test is not None and test.op_type == "Greater" and relu is not None
            and relu.op_type == "Relu" and list(test.input)[:1] == list(n.input)[1:2]
            and constants.get(test.input[1], np.empty(0)).size == 1
            and n.input[2] in constants and not constants[n.input[2]].any()
        ):  # fmt: skip
            alpha = float(constants[test.input[1]].reshape(-1)[0])
            n.CopyFrom(
                helper.make_node("ThresholdedRelu", [relu.input[0]], list(n.output), name=n.name, alpha=alpha)
            )
    needed, kept = {o.name for o in graph.output}, []
    for n in reversed(graph.node):
        if needed & set(n.output):
            needed |= set(n.input)
            kept.append(n)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def label(r: dict[str, Any]) -> str:
    """What the row of a table is of."""
    if r["engine"] == "actzip":
        return f"actzip, {r['isa']}"
    return f"{r['engine']}, at most AVX2" if r["isa"] == "avx2" else str(r["engine"])


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def close_gate(command: str | None) -> subprocess.Popen[str] | None:
    """Starts ``command`` and waits for its first line."""
    if not command:
        return None
    gate = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert gate.stdout is not None
    gate.stdout.readline()
    return gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="inception_v3")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--density", type=float, action="append", help="thresholds to these densities of all ReLU outputs"
    )
    parser.add_argument(
        "--impose", type=float, action="append", default=[],
        help="this density on every ReLU, for networks whose weights are random (top-1 means nothing then)",
    )  # fmt: skip
    parser.add_argument(
        "--isa", action="append", default=[], help="instruction sets for actzip besides the best"
    )
    parser.add_argument("--engines", default=",".join([*DENSE, "deepsparse", "actzip"]))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5, help="runs of each engine a round")
    parser.add_argument(
        "--seconds", type=float, default=90, help="no other round begins once the rounds took so long"
    )
    parser.add_argument(
        "--photos", type=int, default=16, help="photographs that thresholds are calibrated on"
    )
    parser.add_argument("--unseen", type=int, default=32, help="others, for density and top-1 agreement")
    parser.add_argument("--folder", type=Path, help="keep prepared models here, and use those that are there")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument(
        "--gate",
        help="shell command that answers a line when the machine is free and keeps it so until its input closes; "
        "asked for before actzip's trials and the timed rounds",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    engines = [e for e in args.engines.split(",") if e]
    targets = (
        args.density if args.density is not None else ([0.34, 0.25] if args.network == "inception_v3" else [])
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / f"{args.network}-b{args.batch}.json"
        if described.exists():
            made = json.loads(described.read_text())
        else:
            made = prepare(args.network, args.batch, targets, args.impose, args.photos, args.unseen, folder)
            if "ncnn" in engines:
                x = torch.from_numpy(np.load(made["input"]))
                made["ncnn"], made["lacks"]["ncnn"] = export_ncnn(models.build(args.network), x, folder)
            described.write_text(json.dumps(made))
        if not args.prepare_only:
            measure(args, engines, made, folder)


def measure(args: argparse.Namespace, engines: list[str], made: dict[str, Any], folder: Path) -> None:
    from actzip import cpu

    common = {k: made.get(k) for k in ("model", "state", "input", "calibration", "ncnn")}
    common["threads"] = args.threads
    machine = cpu.info()
    timed: list[
        tuple[Worker, dict[str, Any], str, dict[str, Any]]
    ] = []  # with row, isa, what compiling it took

    def start(engine: str, row: dict[str, Any], isa: str = "") -> None:
        zeros = engine in ("actzip", "deepsparse")
        spec = {
            **common, "thresholds": row["thresholds"] if zeros else None,
            "onnx": (row if zeros else made["rows"][0])["onnx"], "output": str(folder / f"y-{len(timed)}.npy"),
        }  # fmt: skip
        env = {} if not isa else {"ACTZIP_ISA": isa} if engine == "actzip" else AVX2_AT_MOST.get(engine, {})
        taken: dict[str, Any] = {}
        if engine == "actzip":
            spec["compiled"] = str(folder / f"actzip-{len(timed)}.pickle")
            maker = Worker("actzip compile", spec, env)
            taken = {**maker.info, "peak_bytes": maker.peak}
            maker.stop()
        why_not = made["lacks"].get(engine) or taken.get("skip") or (NO_AVX2_CAP.get(engine) if isa else None)
        w = Worker(engine, spec, env, skip=why_not or "")
        timed.append((w, row, isa, taken))
        print(
            f"{engine} {isa} ({row['label'] if zeros else 'dense'}): {w.info.get('skip') or 'ready'}",
            file=sys.stderr,
        )

    gate: subprocess.Popen[str] | None = None
    # actzip last: its trials want the machine for themselves
    for engine in sorted(engines, key=lambda e: e == "actzip"):
        if engine == "actzip":
            gate = close_gate(args.gate)
        for row in made["rows"] if engine in ("actzip", "deepsparse") else made["rows"][:1]:
            start(engine, row)
            for isa in args.isa:
                if isa != machine["isa"] and (engine == "actzip" or isa == "avx2"):
                    start(engine, row, isa)
    if gate is None:
        gate = close_gate(args.gate)
    take_turns([w for w, *_ in timed], args.rounds, args.runs, args.seconds)
    explanations = [w.explain() for w, *_ in timed]
    for w, *_ in timed:
        w.stop()
    if gate is not None:
        gate.communicate()
    rows = []
    for (w, of, isa, taken), explained in zip(timed, explanations, strict=True):
        row: dict[str, Any] = {
            "engine": w.engine,
            "isa": isa or (machine["isa"] if w.engine == "actzip" else "any"),
            "zeros": of["label"] if w.engine in ("actzip", "deepsparse") else "dense",
            "skip": w.info.get("skip"),
            "version": w.info.get("version"),
        }
        if not row["skip"]:
            thresholds = of["thresholds"] if w.engine in ("actzip", "deepsparse") else None
            with torch.no_grad():
                want = models.build(args.network, thresholds)(
                    torch.from_numpy(np.load(made["input"]))
                ).numpy()
            got = np.load(w.output).reshape(want.shape)
            error = float(np.abs(got - want).max() / np.abs(want).max())
            if not error < WRONG:
                row["skip"] = f"its answer is wrong (error {error:.1e})"
        if not row["skip"]:
            row.update(
                median_ms=statistics.median(w.ms), min_ms=min(w.ms), runs=len(w.ms), peak_bytes=w.peak,
                density=of["density"], top1_agreement=of["agreement"], seconds_to_ready=w.info["seconds"], error=error,
            )  # fmt: skip
        if explained:
            row["compile_seconds"] = taken.get("seconds")
            row["compile_peak_bytes"] = taken.get("peak_bytes")
            row["peak_share"] = explained["peak_share"]
            row["peak_gflops"] = explained["peak_gflops"]
            row["arena_bytes"] = explained["arena_bytes"]
            row["dense_arena_bytes"] = explained["dense_arena_bytes"]
            row["theoretical_speedup"] = explained["theoretical_speedup"]
            row["layers"] = explained["rows"]
        rows.append(row)
    for key, isa in (("against_fastest_dense", "any"), ("against_fastest_dense_avx2", "avx2")):
        dense = [
            r["median_ms"] for r in rows if r["engine"] in DENSE and r["isa"] == isa and "median_ms" in r
        ]
        for r in rows:
            if dense and "median_ms" in r and isa in ("any", r["isa"]):
                r[key] = min(dense) / r["median_ms"]
    from actzip.runtime.compiled import advice

    report = {
        "network": args.network, "batch": args.batch, "threads": args.threads, "rounds": args.rounds, "machine": machine,
        "advice": advice(), "rows": rows,
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"engine-{args.network}-b{args.batch}-t{args.threads}.json"
    temporary = path.with_suffix(".tmp")
    head = json.dumps({**report, "rows": []}, indent=1)
    lines = ",\n".join("  " + json.dumps(r) for r in rows)  # a row a line
    temporary.write_text(head.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")
    temporary.replace(path)
    print(f"{args.network}, batch {args.batch}, {args.threads} thread(s), {machine['cpu']}, float32")
    heads = ("min", "runs", "x dense", "x AVX2", "MB")
    print(
        f"{'engine':34} {'version':12} {'zeros':14} {'density':>7} {'top-1':>6} {'median ms':>9} "
        + " ".join(f"{h:>8}" for h in heads)
    )
    for r in rows:
        name = label(r)
        if "median_ms" not in r:
            print(f"{name:34} skipped: {r['skip']}")
            continue
        cells = [
            f"{r['min_ms']:.2f}", str(r["runs"]), number(r.get("against_fastest_dense")),
            number(r.get("against_fastest_dense_avx2")), f"{(r['peak_bytes'] or 0) / 1e6:.0f}",
        ]  # fmt: skip
        print(
            f"{name:34} {str(r['version'])[:12]:12} {r['zeros']:14} {r['density']:7.3f} {number(r['top1_agreement']):>6} "
            f"{r['median_ms']:9.2f} " + " ".join(f"{c:>8}" for c in cells)
        )
    if report["advice"]:
        print(report["advice"])


if __name__ == "__main__":
    main()
