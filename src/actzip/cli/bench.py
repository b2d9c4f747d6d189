"""``actzip bench``: the engine against the others that are installed, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, errors, model_and_input, out, print_json, progress

_EPILOG = (
    "Example:  actzip bench resnet18 --data photos/ --threads 1\n\n"
    "ACTZIP_DEEPSPARSE_PYTHON may name a Python that has DeepSparse. The tables of the documentation come from "
    "benchmarks/engine, which also sets thresholds."
)
DENSE = ("torch", "torch channels_last", "torch.compile", "onnxruntime", "openvino")


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    def bench(
        model: str = typer.Argument(
            ...,
            help="A torchvision or timm name, one of ours, package.module:attribute, a .pt2 or an .onnx file.",
        ),
        data: str | None = typer.Option(
            None, "--data", "-d", help="Images: folder, parquet file, .npy, or a data set's name."
        ),
        weights: str | None = typer.Option(None, help="A safetensors file for the model."),
        batch: int = typer.Option(1, min=1, help="Images a run."),
        size: int | None = typer.Option(None, min=1, help="Images are resized and cropped to this square."),
        threads: int | None = typer.Option(
            None, min=1, help="Threads of every engine; all CPUs where not given."
        ),
        engines: str = typer.Option(
            ",".join((*DENSE, "deepsparse")),
            help="The others, with commas; those not installed are left out.",
        ),
        rounds: int = typer.Option(6, min=1, help="Rounds; engines take turns in each."),
        runs: int = typer.Option(5, min=1, help="Runs of each engine a round."),
        seconds: float = typer.Option(20.0, min=0.0, help="At most so long for one engine in a round."),
        json: bool = JSON,
    ) -> None:
        """Time a model here against PyTorch, ONNX Runtime, OpenVINO and DeepSparse, as far as they are installed."""
        names = [e.strip() for e in engines.split(",") if e.strip()]
        result = run(model, data, weights, batch, size, threads, names, rounds, runs, seconds, json)
        if json:
            print_json(result)
            return
        from rich.table import Table

        table = Table(title=f"{model}, batch {batch}, {result['threads']} thread(s)")
        for head in ("engine", "version"):
            table.add_column(head)
        for head in ("median ms", "fastest ms", "runs", "against best dense", "memory MB", "error"):
            table.add_column(head, justify="right")
        for r in result["engines"]:
            if "skip" not in r:
                ratio = r["against_best_dense"]
                table.add_row(
                    r["engine"], r["version"], f"{r['median_ms']:.3f}", f"{r['fastest_ms']:.3f}", str(r["runs"]),
                    "-" if ratio is None else f"{ratio:.2f}x", f"{r['peak_bytes'] / 1e6:.0f}", f"{r['error']:.1e}",
                )  # fmt: skip
        out.print(table)
        out.print(f"{result['cpu']} ({result['isa']})", highlight=False)
        if result["advice"]:
            out.print(result["advice"], highlight=False)
        for r in result["engines"]:
            if "skip" in r:
                errors.print(f"{r['engine']} left out: {r['skip']}", highlight=False, markup=False)


class _Worker:
    """One engine's process."""

    def __init__(self, engine: str, spec: dict[str, Any]) -> None:
        import json

        self.engine, self.output = engine, spec["output"]
        self.ms: list[float] = []
        self.peak = 0
        self.info: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        python = sys.executable
        if engine == "deepsparse":
            python = os.environ.get("ACTZIP_DEEPSPARSE_PYTHON", "")
            if not python:
                self.info = {"skip": "ACTZIP_DEEPSPARSE_PYTHON names no Python that has it"}
                return
        count = str(spec["threads"])
        script = str(Path(__file__).with_name("_engines.py"))
        try:
            self.process = subprocess.Popen(
                [python, "-W", "ignore", script, engine, json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "OMP_NUM_THREADS": count, "ACTZIP_NUM_THREADS": count},
            )  # fmt: skip
        except OSError as error:
            self.info = {"skip": f"{python}: {error.strerror or error}"}
            return
        self.info = self._answer()

    def _answer(self) -> dict[str, Any]:
        import json

        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"skip": f"its process ended with code {self.process.wait()}"}
        return dict(json.loads(line))

    def time(self, runs: int, seconds: float) -> None:
        if "skip" in self.info:
            return
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(f"{runs} {seconds}\n")
            self.process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = {"skip": "its process ended while it ran"}
        if "skip" in answer:
            self.info = answer
            return
        self.ms += answer["ms"]
        self.peak = max(self.peak, int(answer["peak_bytes"]))

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def run(
    model: str,
    data: str | None,
    weights: str | None,
    batch: int,
    size: int | None,
    threads: int | None,
    engines: list[str],
    rounds: int,
    runs: int,
    seconds: float,
    quiet: bool,
) -> dict[str, Any]:
    """Times of every engine in interleaved rounds, as a dict of plain values; the first engine is actzip."""
    import statistics

    import numpy as np
    import torch

    from actzip import cpu
    from actzip.cli._engines import ENGINES
    from actzip.errors import InputError
    from actzip.runtime.compiled import advice

    unknown = [e for e in engines if e not in ENGINES]
    if unknown:
        raise InputError(f"no engine is called {unknown[0]!r}; known are {', '.join(ENGINES)}")
    engines = ["actzip", *(e for e in engines if e != "actzip")]
    info = cpu.info()
    n_threads = threads or int(info["threads"])
    found, net, x = model_and_input(model, weights, data, batch, size)
    with tempfile.TemporaryDirectory(prefix="actzip-bench-") as name, progress(quiet) as bar:
        folder = Path(name)
        np.save(folder / "x.npy", x.numpy())
        spec: dict[str, Any] = {"model": model, "input": str(folder / "x.npy"), "threads": n_threads}
        why_no_onnx = ""
        if isinstance(found, Path):
            spec["onnx"] = str(found)
        else:
            torch.save(net.state_dict(), folder / "state.pt")
            spec["state"] = str(folder / "state.pt")
            why_no_onnx = _export(net, x, folder / "model.onnx")
            spec["onnx"] = str(folder / "model.onnx")
        with torch.no_grad():
            want = net(x)
        if not isinstance(want, torch.Tensor):
            raise InputError(f"bench takes models with one output; {model} gives a {type(want).__name__}")
        workers = []
        task = bar.add_task("starting", total=len(engines) + rounds, note="")
        for i, engine in enumerate(engines):
            bar.update(task, note=engine)
            one = {**spec, "output": str(folder / f"{i}.npy")}
            if isinstance(found, Path) and engine.startswith("torch"):
                workers.append(_skipped(engine, "the model is an ONNX file"))
            elif why_no_onnx and engine in ("onnxruntime", "openvino", "deepsparse"):
                workers.append(_skipped(engine, why_no_onnx))
            else:
                workers.append(_Worker(engine, one))
            bar.advance(task)
        bar.update(task, description="timing")
        for _ in range(rounds):
            for w in workers:
                w.time(runs, seconds)
            bar.advance(task)
        rows: list[dict[str, Any]] = []
        for w in workers:
            w.stop()
            row: dict[str, Any] = {"engine": w.engine}
            if "skip" in w.info:
                rows.append({**row, "skip": w.info["skip"]})
                continue
            y = np.load(w.output)
            error = float(np.abs(y - want.numpy()).max() / max(float(want.abs().max()), 1e-30))
            rows.append({
                **row, "version": w.info["version"], "ready_seconds": w.info["seconds"], "median_ms": statistics.median(w.ms),
                "fastest_ms": min(w.ms), "runs": len(w.ms), "peak_bytes": w.peak, "error": error,
            })  # fmt: skip
    dense = [r["median_ms"] for r in rows if r["engine"] in DENSE and "skip" not in r]
    for r in rows:
        if "skip" not in r:
            r["against_best_dense"] = min(dense) / r["median_ms"] if dense else None
    return {
        "model": model, "batch": batch, "threads": n_threads, "input": "random numbers" if data is None else data,
        "cpu": info["cpu"], "isa": info["isa"], "advice": advice(), "engines": rows,
    }  # fmt: skip


def _skipped(engine: str, why: str) -> _Worker:
    worker = _Worker.__new__(_Worker)
    worker.engine, worker.output, worker.ms, worker.peak, worker.process = engine, "", [], 0, None
    worker.info = {"skip": why}
    return worker


def _export(net: Any, x: Any, path: Path) -> str:
    """Writes the model as ONNX; why not, else ''."""
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (x,), str(path), dynamo=False, opset_version=17)
    except Exception as error:
        return f"no ONNX export: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""
