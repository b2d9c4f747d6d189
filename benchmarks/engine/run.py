"""Every engine on the same networks in the same run: python benchmarks/engine/run.py [--network inception_v3 ...]

Each engine runs in its own process (worker.py) with the same number of threads; rounds are interleaved, so that what else the
machine does hits all alike. Dense rivals get the plain network, whose speed does not depend on zeros (thresholds would only
cost them); actzip and DeepSparse get the thresholded one. ACTZIP_DEEPSPARSE_PYTHON names a Python that has DeepSparse.
Writes benchmarks/results/engine-<network>-b<batch>-t<threads>.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import models  # noqa: E402

RESULTS = HERE.parent / "results"
DENSE = ["torch", "torch channels_last", "torch.compile", "onnxruntime", "openvino", "ncnn"]


class Worker:
    def __init__(self, engine: str, label: str, spec: dict[str, Any]) -> None:
        self.engine, self.label = engine, label
        python = sys.executable
        self.info: dict[str, Any] = {}
        self.ms: list[float] = []
        if engine == "deepsparse":
            python = os.environ.get("ACTZIP_DEEPSPARSE_PYTHON", "")
            if not python:
                self.info = {"skip": "ACTZIP_DEEPSPARSE_PYTHON names no Python with DeepSparse"}
                return
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(spec["threads"]),
            "ACTZIP_NUM_THREADS": str(spec["threads"]),
        }
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(HERE / "worker.py"), engine, json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        line = self.process.stdout.readline()
        self.info = json.loads(line) if line else {"skip": "the process died"}

    def ask(self, line: str) -> dict[str, Any]:
        if "skip" in self.info:
            return {}
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.info = {"skip": "the process died while it ran"}
            return {}
        return json.loads(answer)

    def stop(self) -> None:
        if hasattr(self, "process"):
            self.process.stdin.close()
            self.process.wait()


def prepare(
    name: str, batch: int, targets: list[float], photos: int, unseen: int, folder: Path
) -> dict[str, Any]:
    """ONNX files, inputs, thresholds with their density and agreement on photographs that calibration did not see."""
    calibration = models.photographs(name, photos)
    test = models.photographs(name, unseen, first=7)
    x = models.photographs(name, batch, first=3)
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "calibration.npy", calibration[:2].numpy())
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
    for row in rows:
        path = folder / f"{row['label'].replace(' ', '-')}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = models.build(name, row["thresholds"])
            torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=13)
        row["onnx"] = str(path)
    return {"rows": rows, "input": str(folder / "x.npy"), "calibration": str(folder / "calibration.npy")}


def ncnn_model(name: str, folder: Path, batch: int) -> str:
    net, x = models.build(name), torch.from_numpy(np.load(folder / "x.npy")[:1])
    torch.jit.trace(net, x).save(str(folder / "net.pt"))
    shape = ",".join(map(str, x.shape))
    subprocess.run(
        ["pnnx", str(folder / "net.pt"), f"inputshape=[{shape}]", "fp16=0"], cwd=folder, capture_output=True
    )
    return str(folder / "net.ncnn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="inception_v3")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--density", type=float, action="append", help="thresholds to these densities of all ReLU outputs"
    )
    parser.add_argument("--engines", default=",".join([*DENSE, "deepsparse", "actzip"]))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5, help="runs of each engine a round")
    parser.add_argument(
        "--photos", type=int, default=16, help="photographs that thresholds are calibrated on"
    )
    parser.add_argument("--unseen", type=int, default=32, help="others, for density and top-1 agreement")
    parser.add_argument("--folder", type=Path, help="keep prepared models here, and use those that are there")
    parser.add_argument("--prepare-only", action="store_true")
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
            made = prepare(args.network, args.batch, targets, args.photos, args.unseen, folder)
            made["ncnn"] = ncnn_model(args.network, folder, args.batch) if "ncnn" in engines else ""
            described.write_text(json.dumps(made))
        if not args.prepare_only:
            measure(args, engines, made, folder)


def measure(args: argparse.Namespace, engines: list[str], made: dict[str, Any], folder: Path) -> None:
    from actzip import cpu

    common = {
        "torch": args.network, "input": made["input"], "calibration": made["calibration"], "threads": args.threads,
        "ncnn": made["ncnn"], "onnx": made["rows"][0]["onnx"],
    }  # fmt: skip
    workers = []
    for engine in engines:
        each = made["rows"] if engine in ("actzip", "deepsparse") else made["rows"][:1]
        for row in each:
            label = row["label"] if engine in ("actzip", "deepsparse") else "dense"
            output = str(folder / f"y-{len(workers)}.npy")
            spec = {
                **common,
                "thresholds": row["thresholds"],
                "onnx_thresholded": row["onnx"],
                "output": output,
            }
            w = Worker(engine, label, spec)
            w.output, w.row = output, row
            workers.append(w)
            print(f"{engine} ({label}): {w.info.get('skip') or 'ready'}", file=sys.stderr, flush=True)
    for _ in range(args.rounds):
        for w in workers:
            w.ms += w.ask(f"run {args.runs} 30").get("ms", [])
    rows = []
    for w in workers:
        memory = w.ask("memory").get("peak_bytes")
        explained = w.ask("explain").get("explain") if w.engine == "actzip" else None
        w.stop()
        row: dict[str, Any] = {
            "engine": w.engine,
            "zeros": w.label,
            "skip": w.info.get("skip"),
            "version": w.info.get("version"),
        }
        if w.ms:
            with torch.no_grad():
                want = models.build(args.network, w.row["thresholds"])(
                    torch.from_numpy(np.load(made["input"]))
                ).numpy()
            got = np.load(w.output).reshape(want.shape)
            row.update(
                median_ms=statistics.median(w.ms), min_ms=min(w.ms), runs=len(w.ms), peak_bytes=memory,
                density=w.row["density"], top1_agreement=w.row["agreement"], seconds_to_ready=w.info["seconds"],
                error=float(np.abs(got - want).max() / np.abs(want).max()),
            )  # fmt: skip
        if explained:
            row["peak_share"] = explained["peak_share"]
            row["arena_bytes"] = explained["arena_bytes"]
            row["theoretical_speedup"] = explained["theoretical_speedup"]
            row["layers"] = explained["rows"]
        rows.append(row)
    fastest = min((r["median_ms"] for r in rows if r["engine"] in DENSE and "median_ms" in r), default=None)
    for r in rows:
        if fastest and "median_ms" in r:
            r["against_fastest_dense"] = fastest / r["median_ms"]
    from actzip.runtime.compiled import advice

    machine = cpu.info()
    report = {
        "network": args.network, "batch": args.batch, "threads": args.threads, "rounds": args.rounds, "machine": machine,
        "advice": advice(), "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"engine-{args.network}-b{args.batch}-t{args.threads}-{machine['isa']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1))
    temporary.replace(path)
    print(
        f"{args.network}, batch {args.batch}, {args.threads} thread(s), {machine['cpu']}, {machine['isa']}, float32"
    )
    print(
        f"{'engine':20} {'version':12} {'zeros':14} {'density':>7} {'top-1':>6} {'median ms':>9} {'min':>8} {'x dense':>7} {'MB':>6}"
    )
    for r in rows:
        if "median_ms" not in r:
            print(f"{r['engine']:20} skipped: {r['skip']}")
            continue
        memory_mb = (r["peak_bytes"] or 0) / 1e6
        print(
            f"{r['engine']:20} {str(r['version'])[:12]:12} {r['zeros']:14} {r['density']:7.3f} {r['top1_agreement']:6.2f} "
            f"{r['median_ms']:9.2f} {r['min_ms']:8.2f} {r.get('against_fastest_dense', 0):7.2f} {memory_mb:6.0f}"
        )
    if report["advice"]:
        print(report["advice"])


if __name__ == "__main__":
    main()
