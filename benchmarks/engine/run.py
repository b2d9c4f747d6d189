"""Every engine on the same networks in the same run: python benchmarks/engine/run.py [--network
inception_v3 ...]

Each engine runs in its own process (actzip.cli._workers) with the same number of threads; rounds
are interleaved, so that what else the machine does hits all alike. Dense rivals get the plain
network, whose speed does not depend on zeros (thresholds would only cost them); actzip and
DeepSparse get the thresholded one. What is prepared beforehand is prepared in a process of its own
for all: ONNX Runtime, OpenVINO and DeepSparse load an ONNX file, actzip an .actzip file.
ACTZIP_DEEPSPARSE_PYTHON names a Python that has DeepSparse. --isa avx2 (repeatable) runs actzip on
that instruction set too; rivals then run as they come (they may use AVX-512) and, in rows of their
own, told to use AVX2 at most by the variables that they know for it (AVX2_AT_MOST in
actzip.cli._workers). ONNX Runtime and ncnn know none, so that they are in the table as they come
only. Writes benchmarks/results/engine/<machine>/<network>-b<batch>-t<threads>.json and prints the
table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import models  # noqa: E402

from actzip import cpu  # noqa: E402
from actzip.cli._workers import (  # noqa: E402
    AVX2_AT_MOST,
    DENSE,
    NO_AVX2_CAP,
    Worker,
    export_ncnn,
    export_onnx,
    take_turns,
)
from actzip.files import write_text  # noqa: E402
from actzip.runtime.compiled import advice  # noqa: E402

RESULTS = HERE.parent / "results" / "engine"
# Largest difference to PyTorch's answer, relative to the largest output, that counts as the same answer.
WRONG = 1e-2
# With thresholds a value within rounding of its threshold is passed by one engine and not by
# another, a step as high as the threshold: engines differ the more, the higher the thresholds
# (Inception-V3 at density 0.25: 2 to 4 %). At least this counts as wrong, and twice as much as
# PyTorch's own answer moves by where its input does by a millionth: random weights with imposed
# thresholds make 15 % of it (VGG-16).
WRONG_WITH_THRESHOLDS = 1e-1
# Of what computes in int8: how wrong it is stands in its row.
WRONG_IN_INT8 = 1.0
# These get the thresholded network; the dense ones would only pay for thresholds.
SKIPS_ZEROS = ("actzip", "deepsparse")
PYTORCH_AND_ORT = ("torch", "torch channels_last", "torch.compile", "onnxruntime")
# What a row takes of ``explain()``, beside its layers.
EXPLAINED = (
    "peak_share", "peak_gflops", "arena_bytes", "dense_arena_bytes", "theoretical_speedup"
)  # fmt: skip


def machine_folder(cpuinfo: str | None = None) -> str:
    """A folder's name for this machine: the CPU's core by name where it is known, else by its numbers.

    ``cpuinfo``: the text of ``/proc/cpuinfo``, by default that of this machine.
    """
    if cpuinfo is None:
        with contextlib.suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text()
    found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (\S+)$", cpuinfo or "", re.M))
    if found.get("vendor_id") == "AuthenticAMD":
        family, model = int(found["cpu family"]), int(found["model"])
        if family == 0x1A:
            return "zen5"
        if family == 0x19:
            return "zen4" if 0x10 <= model < 0x20 or model >= 0x60 else "zen3"
    name = f"{platform.machine()}-{found.get('cpu family', '')}-{found.get('model', '')}"
    return name.strip("-").lower()


def variants(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The network as it is, with other weights, and with thresholds: label, thresholds, weights,
    and on unseen images density, top-1 agreement with the plain network and the outputs' error
    against its."""
    name = args.network
    unseen = models.loader(name, "unseen", args.unseen, min(args.unseen, 8))
    calibration = models.loader(name, "calibration", args.photos, min(args.photos, 8))
    rows: list[dict[str, Any]] = []

    def add(
        label: str, thresholds: dict[str, Any] | None, weights: str | None = None, alike: bool = True
    ) -> None:
        nonlocal plain
        density, sites, y = models.measure(models.build(name, thresholds, weights), unseen)
        unknown = sorted(set(thresholds or {}) - set(sites))
        if unknown:
            raise SystemExit(f"{name} has no ReLU {unknown[0]!r}, which has a threshold in {label!r}")
        plain = y if plain is None else plain
        rows.append(
            {
                "label": label,
                "thresholds": thresholds,
                "weights": weights,
                "density": density,
                "unseen": len(y),
                "agreement": float((y.argmax(1) == plain.argmax(1)).double().mean()) if alike else None,
                "output_error": models.output_error(plain, y) if alike else None,
            }
        )

    plain: torch.Tensor | None = None
    add("natural", None)
    for weights in args.weights:
        beside = weights.with_suffix(".thresholds.json")
        add(
            "sparsified" if len(args.weights) == 1 else f"sparsified {weights.stem}",
            json.loads(beside.read_text()) if beside.exists() else None,
            str(weights),
        )
    for target in args.calibrate:
        add(f"calibrated {target}", models.calibrated_thresholds(name, target))
    for target in args.density:
        add(f"scaled {target}", models.scaled_thresholds(name, target, calibration))
    for density in args.impose:
        x = models.images(name, "calibration", args.photos)
        add(f"imposed {density}", models.impose_density(name, x, density), alike=False)
    return rows


def prepare(args: argparse.Namespace, engines: list[str]) -> dict[str, Any]:
    """What the engines load, for every one of :func:`variants`; what lies in the folder already is
    used, if it was made for the same. Inputs are images that calibration did not see."""
    name = args.network
    shared = args.folder / name
    folder = shared / f"b{args.batch}"
    wanted = {
        "calibrate": args.calibrate,
        "density": args.density,
        "impose": args.impose,
        "photos": args.photos,
        "unseen": args.unseen,
        "weights": [[str(w), w.stat().st_mtime_ns] for w in args.weights],
    }
    known = shared / "variants.json"
    if known.exists() and json.loads(known.read_text())["made_for"] != wanted:
        shutil.rmtree(shared)
    folder.mkdir(parents=True, exist_ok=True)
    if not known.exists():
        write_text(known, json.dumps({"made_for": wanted, "rows": variants(args)}))
    rows = json.loads(known.read_text())["rows"]
    made: dict[str, Any] = {
        "model": models.reference(name), "rows": rows, "lacks": {}, "folder": folder,
        "input": str(folder / "x.npy"), "calibration": str(shared / "calibration.npy"),
    }  # fmt: skip
    x = models.images(name, "unseen", args.batch)
    np.save(made["input"], x.numpy())
    np.save(made["calibration"], models.images(name, "calibration", 2).numpy())
    for row in rows:
        slug = row["label"].replace(" ", "-")
        onnx, state, answer = folder / f"{slug}.onnx", shared / f"{slug}.pt", folder / f"{slug}.npy"
        net = models.build(name, row["thresholds"], row["weights"])
        if name in models.TRAINED or row["weights"]:
            if not state.exists():
                torch.save(net.state_dict(), state)
            row["state"] = str(state)
        if not answer.exists():
            with torch.no_grad():
                np.save(answer, net(x).numpy())
        if row["thresholds"]:
            row["moves"] = moves(net, x, np.load(answer))
        row.update(slug=slug, onnx=str(onnx), answer=str(answer))
        if onnx.exists() or (row is not rows[0] and "deepsparse" not in engines):
            continue
        why = export_onnx(net, x, onnx, 13)
        if why:
            onnx.unlink(missing_ok=True)
            made["lacks"] |= dict.fromkeys(("onnxruntime", "openvino", "deepsparse"), why)
        elif row["thresholds"]:
            fuse_thresholds(onnx)
    if "ncnn" in engines:
        if (folder / "net.ncnn.param").exists():
            made["ncnn"] = str((folder / "net.ncnn").resolve())
        else:
            made["ncnn"], made["lacks"]["ncnn"] = export_ncnn(models.build(name), x, folder)
    return made


def moves(net: torch.nn.Module, x: torch.Tensor, answer: Any) -> float:
    """How far the answer moves, relative to its largest value, where the input does by a millionth."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = net(x * (1 + 1e-6 * noise)).numpy()
    return float(np.abs(moved - answer).max() / np.abs(answer).max())


def fuse_thresholds(path: Path) -> None:
    """ONNX file ``path``: Relu, LessOrEqual, Where of a thresholded ReLU as ONNX's one operator for
    it, ThresholdedRelu, which is the form that an engine can be expected to know."""
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
            maker.get(n.input[2]) if len(n.input) > 2 else None,
        )
        if (
            n.op_type == "Where"
            and test is not None
            and test.op_type == "LessOrEqual"
            and relu is not None
            and relu.op_type == "Relu"
            and list(test.input)[:1] == list(n.input)[2:3]
            and constants.get(test.input[1], np.empty(0)).size == 1
            and n.input[1] in constants
            and not constants[n.input[1]].any()
        ):
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


def number(x: float | None, digits: int = 2) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def close_gate(command: str | None) -> subprocess.Popen[str] | None:
    """Starts ``command`` and waits for its first line."""
    if not command:
        return None
    gate = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert gate.stdout is not None
    gate.stdout.readline()
    return gate


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="inception_v3")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--weights",
        type=Path,
        action="append",
        default=[],
        help="also with these sparsified weights (safetensors; NAME.thresholds.json beside it counts)",
    )
    parser.add_argument(
        "--calibrate",
        type=float,
        action="append",
        help="thresholds calibrated to this density of all ReLU outputs",
    )
    parser.add_argument(
        "--density",
        type=float,
        action="append",
        help="thresholds that are one factor times each layer's mean positive output, to this "
        "density: without a care for the answers",
    )
    parser.add_argument(
        "--impose",
        type=float,
        action="append",
        default=[],
        help="this density on every ReLU, for networks whose weights are random (top-1 means nothing then)",
    )
    parser.add_argument(
        "--isa", action="append", default=[], help="instruction sets for actzip besides the best"
    )
    parser.add_argument(
        "--no-zeros",
        action="store_true",
        help="the network has none to skip: actzip is compared with the best of PyTorch and ONNX Runtime",
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
    parser.add_argument(
        "--unseen", type=int, help="others, for density, top-1 agreement and the outputs' error"
    )
    parser.add_argument("--folder", type=Path, help="keep prepared models here, and use those that are there")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument(
        "--gate",
        help="shell command that answers a line when the machine is free and keeps it so until its "
        "input closes; asked for before actzip's trials and the timed rounds",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / machine_folder(),
        help="folder of the JSON file; by default that of this machine",
    )
    args = parser.parse_args()
    args.weights = [w.resolve() for w in args.weights]
    inception = args.network == "inception_v3"
    for option, usual in (
        ("calibrate", [0.33] if inception else []),
        ("density", [0.25] if inception else []),
    ):
        if getattr(args, option) is None:
            setattr(args, option, usual)
    args.unseen = args.unseen or (300 if args.network in models.TRAINED else 32)
    return args


def main() -> None:
    args = options()
    engines = [e for e in args.engines.split(",") if e]
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        made = prepare(args, engines)
        if not args.prepare_only:
            measure(args, engines, made)


@dataclass
class Timed:
    """An engine in its process, the variant that it runs, and what compiling it took."""

    worker: Worker
    of: dict[str, Any]
    isa: str
    compiling: dict[str, Any]


def measure(args: argparse.Namespace, engines: list[str], made: dict[str, Any]) -> None:
    timed, gate = start_all(args, engines, made)
    workers = [t.worker for t in timed]
    take_turns(workers, args.rounds, args.runs, args.seconds)
    explanations = [w.explain() for w in workers]
    for w in workers:
        w.stop()
    if gate is not None:
        gate.communicate()
    rows = [row_of(t, explained) for t, explained in zip(timed, explanations, strict=True)]
    compare(rows, args.no_zeros)
    write_report(args, rows)
    print_table(args, rows)


def start_all(
    args: argparse.Namespace, engines: list[str], made: dict[str, Any]
) -> tuple[list[Timed], subprocess.Popen[str] | None]:
    """Every engine ready to be timed, and the gate. actzip comes last, behind the gate: its trials
    want the machine for themselves."""
    best = cpu.info()["isa"]
    timed: list[Timed] = []
    gate: subprocess.Popen[str] | None = None
    for engine in sorted(engines, key=lambda e: e == "actzip"):
        if engine == "actzip":
            gate = close_gate(args.gate)
        for row in made["rows"] if engine in SKIPS_ZEROS else made["rows"][:1]:
            others = [i for i in args.isa if i != best and (engine == "actzip" or i == "avx2")]
            for isa in ["", *others]:
                timed.append(start(engine, row, isa, args.threads, made, len(timed)))
    return timed, gate or close_gate(args.gate)


def start(
    engine: str, row: dict[str, Any], isa: str, threads: int, made: dict[str, Any], number: int
) -> Timed:
    folder = made["folder"]
    spec = {
        **{k: made.get(k) for k in ("model", "input", "calibration", "ncnn", "int8")},
        "threads": threads, "thresholds": row["thresholds"], "state": row.get("state"),
        "onnx": row["onnx"], "output": str(folder / f"y-{number}.npy"),
    }  # fmt: skip
    env = {} if not isa else {"ACTZIP_ISA": isa} if engine == "actzip" else AVX2_AT_MOST.get(engine, {})
    compiling: dict[str, Any] = {}
    if engine == "actzip":
        spec["compiled"] = str(folder / f"actzip-{number}.actzip")
        maker = Worker("actzip compile", spec, env)
        compiling = {**maker.info, "peak_bytes": maker.peak}
        maker.stop()
    why_not = made["lacks"].get(engine) or compiling.get("skip") or (NO_AVX2_CAP.get(engine) if isa else None)
    worker = Worker(engine, spec, env, skip=why_not or "")
    zeros = row["label"] if engine in SKIPS_ZEROS else "dense"
    print(f"{engine} {isa} ({zeros}): {worker.info.get('skip') or 'ready'}", file=sys.stderr)
    return Timed(worker, row, isa, compiling)


def wrong_by(t: Timed) -> tuple[float, str | None]:
    """The answer's error relative to the largest output, and the words if that is too much."""
    want, got = np.load(t.of["answer"]), np.load(t.worker.output)
    error = float("inf")
    if got.size == want.size:
        error = float(np.abs(got.reshape(want.shape) - want).max() / np.abs(want).max())
    limit = max(WRONG_WITH_THRESHOLDS, 2 * t.of["moves"]) if t.of.get("thresholds") else WRONG
    if t.worker.engine.endswith("int8"):
        limit = WRONG_IN_INT8
    return error, None if error < limit else f"its answer is wrong (error {error:.1e})"


def row_of(t: Timed, explained: dict[str, Any] | None) -> dict[str, Any]:
    """What was measured of one engine: the row of the results."""
    w = t.worker
    row: dict[str, Any] = {
        "engine": w.engine,
        "isa": t.isa or (cpu.info()["isa"] if w.engine == "actzip" else "any"),
        "zeros": t.of["label"] if w.engine in SKIPS_ZEROS else "dense",
        "skip": w.info.get("skip"),
        "version": w.info.get("version"),
    }
    if not row["skip"]:
        error, row["skip"] = wrong_by(t)
    if not row["skip"]:
        row.update(
            median_ms=statistics.median(w.ms),
            min_ms=min(w.ms),
            runs=len(w.ms),
            peak_bytes=w.peak,
            density=t.of["density"],
            top1_agreement=t.of["agreement"],
            output_error=t.of["output_error"],
            unseen=t.of["unseen"],
            seconds_to_ready=w.info["seconds"],
            error=error,
        )
    if explained:
        row["compile_seconds"] = t.compiling.get("seconds")
        row["compile_peak_bytes"] = t.compiling.get("peak_bytes")
        row |= {k: explained[k] for k in EXPLAINED}
        row["layers"] = explained["rows"]
    return row


def compare(rows: list[dict[str, Any]], no_zeros: bool) -> None:
    """Into each row: how many times as fast as the fastest of its rivals it is."""

    def fastest(engines: Sequence[str], isa: str) -> float | None:
        found = [r for r in rows if r["engine"] in engines and r["isa"] == isa and "median_ms" in r]
        return min((r["median_ms"] for r in found), default=None)

    any_isa, avx2 = fastest(DENSE, "any"), fastest(DENSE, "avx2")
    peers = fastest(PYTORCH_AND_ORT, "any") if no_zeros else None
    for r in (r for r in rows if "median_ms" in r):
        if any_isa:
            r["against_fastest_dense"] = any_isa / r["median_ms"]
        if avx2 and r["isa"] == "avx2":
            r["against_fastest_dense_avx2"] = avx2 / r["median_ms"]
        if peers and r["engine"] == "actzip":
            r["against_pytorch_and_ort"] = peers / r["median_ms"]


def write_report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    report = {
        "network": args.network,
        "batch": args.batch,
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": cpu.info(),
        "advice": advice(),
        "rows": [],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{args.network}-b{args.batch}-t{args.threads}.json"
    lines = ",\n".join("  " + json.dumps(r) for r in rows)  # a row a line
    head = json.dumps(report, indent=1)
    write_text(path, head.replace('"rows": []', f'"rows": [\n{lines}\n ]') + "\n")


def print_table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(f"{args.network}, batch {args.batch}, {args.threads} thread(s), {cpu.info()['cpu']}, float32")
    heads = ("min", "runs", "x dense", "x AVX2", "MB")
    print(
        f"{'engine':34} {'version':12} {'zeros':15} {'density':>7} {'top-1':>6} {'error':>6} "
        f"{'median ms':>9} " + " ".join(f"{h:>8}" for h in heads)
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
            f"{name:34} {str(r['version'])[:12]:12} {r['zeros']:15} {number(r['density'], 3):>7} "
            f"{number(r['top1_agreement'], 3):>6} {number(r['output_error'], 3):>6} "
            f"{r['median_ms']:9.2f} " + " ".join(f"{c:>8}" for c in cells)
        )
    for r in rows:
        if "against_pytorch_and_ort" in r:
            print(
                f"without zeros: {label(r)} at {r['against_pytorch_and_ort']:.2f} of the best of "
                "PyTorch and ONNX Runtime"
            )
    if said := advice():
        print(said)


if __name__ == "__main__":
    main()
