"""``actzip bench``: the engine against the others that are installed, each in a process of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli._workers import DENSE, Worker, export_ncnn, export_onnx, take_turns
from actzip.cli.common import (
    FALLBACK,
    IMAGES,
    JSON,
    MODEL,
    SIZE,
    THREADS,
    TRUST,
    WEIGHTS,
    errors,
    model_and_input,
    out,
    print_json,
    progress,
)

if TYPE_CHECKING:
    from actzip.data.form import Form

_PERCENTILES = (50, 90, 95, 99)
_SHORT = {"ort": "onnxruntime"}
_EPILOG = (
    "Example:  actzip bench resnet18 --data photos/ --threads 1\n\n"
    "ACTZIP_DEEPSPARSE_PYTHON may name a Python that has DeepSparse. The tables of the "
    "documentation come from "
    "benchmarks/engine, which also sets thresholds."
)


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    @takes_inputs
    def bench(
        model: str = MODEL,
        data: str | None = IMAGES,
        weights: str | None = WEIGHTS,
        batch: int = typer.Option(1, "--batch-size", "--batch", min=1, help="Images a run."),
        size: int | None = SIZE,
        threads: int | None = THREADS,
        engines: str = typer.Option(
            ",".join((*DENSE, "deepsparse")),
            "--against",
            "--engines",
            help="The others, with commas (ort is onnxruntime); those not installed are left out.",
        ),
        rounds: int = typer.Option(6, min=1, help="Rounds; engines take turns in each."),
        runs: int = typer.Option(5, min=1, help="Runs of each engine a round."),
        seconds: float = typer.Option(
            120.0, min=0.0, help="No other round begins once the rounds took so long."
        ),
        fallback: bool | None = FALLBACK,
        trust: bool = TRUST,
        json: bool = JSON,
        *,
        inputs: Form,
    ) -> None:
        """Time a model here against PyTorch, ONNX Runtime, OpenVINO, ncnn and DeepSparse, as far as
        they are installed."""
        names = [e.strip() for e in engines.split(",") if e.strip()]
        result = run(
            model,
            data,
            weights,
            batch,
            size,
            threads,
            names,
            rounds,
            runs,
            seconds,
            trust,
            json,
            inputs,
            fallback,
        )
        if json:
            print_json(result)
            return
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(
        title=f"{result['model']}, batch {result['batch']}, {result['threads']} thread(s)",
        box=None,
        pad_edge=False,
    )
    for head in ("engine", "version"):
        table.add_column(head, no_wrap=True)
    for head in ("ms", "p95 ms", "images/s", "runs", "dense", "MB", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in result["engines"]:
        if "skip" not in r:
            ratio = r["against_best_dense"]
            table.add_row(
                r["engine"],
                r["version"].split("-")[0].split("+")[0],
                f"{r['median_ms']:.3f}",
                f"{r['percentiles_ms']['95']:.3f}",
                f"{r['images_per_second']:.1f}",
                str(r["runs"]),
                "-" if ratio is None else f"{ratio:.2f}x",
                f"{r['peak_bytes'] / 1e6:.0f}",
                f"{r['error']:.0e}",
            )
    out.print(table)
    out.print(
        "ms: median; dense: speed against the quickest engine that does not skip zeros; MB: peak.",
    )
    sets = ", ".join([*result["isas"], *result["extras"]])
    out.print(f"{result['cpu']}: {result['isa']} of {sets}")
    if result["advice"]:
        out.print(result["advice"])
    for r in result["engines"]:
        if r.get("note"):
            out.print(f"{r['engine']}: {r['note']}")
        if "skip" in r:
            errors.print(f"{r['engine']} left out: {r['skip']}")


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
    trust: bool,
    quiet: bool,
    form: Form | None = None,
    fallback: bool | None = None,
) -> dict[str, Any]:
    """Times of every engine in interleaved rounds, as a dict of plain values; the first engine is actzip."""
    import numpy as np
    import torch

    from actzip import cpu
    from actzip.cli._engines import first_output
    from actzip.runtime.compiled import advice

    engines = _ordered(engines)
    info = cpu.info()
    n_threads = threads or int(info["threads"])
    found, net, x = model_and_input(model, weights, data, batch, size, trust, form)
    xs = [x] if isinstance(x, torch.Tensor) else list(x)
    batch = len(xs[0]) if xs[0].ndim else 1
    with tempfile.TemporaryDirectory(prefix="actzip-bench-") as name, progress(quiet) as bar:
        folder = Path(name)
        file = folder / ("x.npy" if len(xs) == 1 else "x.npz")
        if len(xs) == 1:
            np.save(file, xs[0].numpy())
        else:
            np.savez(file, *(t.numpy() for t in xs))
        spec: dict[str, Any] = {
            "model": model,
            "input": str(file),
            "threads": n_threads,
            "trust": trust,
            "fallback": fallback,
        }
        lacks = _written(spec, found, net, x, folder, "ncnn" in engines)
        with torch.no_grad():
            want = first_output(net(*xs))
        workers = []
        task = bar.add_task("starting", total=len(engines) + rounds, note="")
        for i, engine in enumerate(engines):
            bar.update(task, note=engine)
            own = {**spec, "output": str(folder / f"{i}.npy")}
            workers.append(Worker(engine, own, skip=lacks.get(engine, "")))
            bar.advance(task)
        bar.update(task, description="timing")
        take_turns(workers, rounds, runs, seconds, lambda: bar.advance(task))
        rows = [_row(w, want.numpy(), batch) for w in workers]
    dense = [r["median_ms"] for r in rows if r["engine"] in DENSE and "skip" not in r]
    for r in rows:
        if "skip" not in r:
            r["against_best_dense"] = min(dense) / r["median_ms"] if dense else None
    return {
        "model": model,
        "batch": batch,
        "threads": n_threads,
        "input": "random numbers" if data is None else data,
        "cpu": info["cpu"],
        "isa": info["isa"],
        "isas": info["isas"],
        "extras": info["extras"],
        "advice": advice(),
        "engines": rows,
    }


def _ordered(engines: list[str]) -> list[str]:
    """Known engines by their whole names, actzip first."""
    from actzip.cli._engines import ENGINES
    from actzip.errors import InputError

    engines = [_SHORT.get(e, e) for e in engines]
    known = [e for e in ENGINES if e != "actzip compile"]
    unknown = [e for e in engines if e not in known]
    if unknown:
        raise InputError(f"no engine is called {unknown[0]!r}; known are {', '.join(known)}")
    return ["actzip", *(e for e in engines if e != "actzip")]


def _written(spec: dict[str, Any], found: Any, net: Any, x: Any, folder: Path, ncnn: bool) -> dict[str, str]:
    """The model in the forms that engines read, named in ``spec``; by engine, why it cannot load it."""
    import torch

    from actzip.cli._engines import ENGINES

    if isinstance(found, Path):
        spec["onnx"] = str(found)
        others = [e for e in ENGINES if e.startswith("torch") or e == "ncnn"]
        return dict.fromkeys(others, "the model is an ONNX file")
    torch.save(net.state_dict(), folder / "state.pt")
    spec.update(state=str(folder / "state.pt"), onnx=str(folder / "model.onnx"))
    why = export_onnx(net, x, folder / "model.onnx")
    lacks = dict.fromkeys(("onnxruntime", "openvino", "deepsparse"), why)
    if ncnn:
        spec["ncnn"], lacks["ncnn"] = export_ncnn(net, x, folder)
    return lacks


def _row(worker: Worker, want: Any, batch: int) -> dict[str, Any]:
    """An engine's times and error; the engine is stopped."""
    import statistics

    import numpy as np

    worker.stop()
    if "skip" in worker.info:
        return {"engine": worker.engine, "skip": worker.info["skip"]}
    y, ms = np.load(worker.output).reshape(want.shape), worker.ms
    return {
        "engine": worker.engine,
        "version": worker.info["version"],
        "note": worker.info.get("note", ""),
        "ready_seconds": worker.info["seconds"],
        "median_ms": statistics.median(ms),
        "fastest_ms": min(ms),
        "mean_ms": statistics.fmean(ms),
        "stdev_ms": statistics.pstdev(ms),
        "percentiles_ms": {str(p): float(np.percentile(ms, p)) for p in _PERCENTILES},
        "images_per_second": 1e3 * batch / statistics.fmean(ms),
        "runs": len(ms),
        "peak_bytes": worker.peak,
        "error": float(np.abs(y - want).max() / max(float(np.abs(want).max()), 1e-30)),
    }
