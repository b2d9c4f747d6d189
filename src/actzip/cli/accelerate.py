"""``actzip accelerate``: a model file to a faster one, without training, with the proof of what it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import JSON, MODEL, SIZE, THREADS, TRUST, WEIGHTS, errors, print_json, progress
from actzip.text import counted

if TYPE_CHECKING:
    from actzip.data.form import Form

_EPILOG = (
    "Example:  actzip accelerate model.onnx --data photos/ --keep 0.99 --out fast.actzip "
    "--onnx fast.onnx --html report.html\n\n"
    "Where nothing keeps the promise the network stays unchanged, and the first line says so."
)


_DATA: str | None = typer.Option(
    None,
    "--data",
    "-d",
    help="A few dozen typical images: folder, parquet file, .npy, or a data set's name.",
)
_KEEP: float | None = typer.Option(
    None, help="Promise: this share of the highest outputs stays the same (0.99 if none is given)."
)
_MAX_ERROR: float | None = typer.Option(
    None, "--max-error", help="Or: largest mean relative error of the outputs, where they are no scores."
)
_CALIBRATE: int = typer.Option(32, min=1, help="So many of them calibrate (half at most); the rest prove.")
_DISTIL: int = typer.Option(0, "--distil-steps", min=0, help="Steps of distillation a candidate.")
_CLOCK: bool = typer.Option(True, help="Time before and after, against the engines installed here.")
_OUTPUT: Path | None = typer.Option(
    None, "--out", "-o", help="Write the compiled network here, for actzip.runtime.load."
)
_ONNX: Path | None = typer.Option(None, help="Write the network as ONNX, for other engines too.")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=_EPILOG)(takes_inputs(accelerate))


def accelerate(
    model: str = MODEL,
    data: str | None = _DATA,
    weights: str | None = WEIGHTS,
    keep: float | None = _KEEP,
    max_error: float | None = _MAX_ERROR,
    labels: bool = typer.Option(False, help="--keep is of the accuracy, by the data's labels."),
    images: int = typer.Option(160, min=1, help="At most so many images."),
    calibrate: int = _CALIBRATE,
    size: int | None = SIZE,
    per: str = typer.Option("channel", help="One threshold a channel or a layer."),
    by: str = typer.Option("time", help="Save predicted time, or macs."),
    distil_steps: int = _DISTIL,
    attempts: int = typer.Option(5, min=1, help="Candidates that are tried."),
    threads: int | None = THREADS,
    seed: int = typer.Option(0, help="Of everything random."),
    clock: bool = _CLOCK,
    output: Path | None = _OUTPUT,
    onnx: Path | None = _ONNX,
    html: Path | None = typer.Option(None, help="Write the report as one HTML page."),
    trust: bool = TRUST,
    json: bool = JSON,
    *,
    inputs: Form,
) -> None:
    """Make a network faster with thresholds that a few images calibrate, and prove what it
    keeps on others."""
    from actzip import accelerate as accelerate_model

    promise: dict[str, Any] = {"keep": keep, "max_error": max_error, "labels": labels}
    given: dict[str, Any] = {
        "images": images,
        "calibrate": calibrate,
        "size": size,
        "weights": weights,
        "trust": trust,
    }
    search: dict[str, Any] = {
        "per": per,
        "by": by,
        "distil_steps": distil_steps,
        "attempts": attempts,
        "seed": seed,
    }
    with progress(json) as bar:
        task = bar.add_task("loading", total=None, note="")
        found = accelerate_model(
            model,
            data,
            threads=threads,
            form=inputs,
            on_step=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
            **promise,
            **given,
            **search,
        )
        if clock:
            bar.update(task, description="timing", total=None)
            found.time()
    written = write(found, output, onnx, html)
    if json:
        print_json(found.to_dict())
        return
    for line in [*found.lines(), *clock_lines(found.clock)]:
        typer.echo(line)
    for path in written:
        errors.print(f"written: {path}", highlight=False)


def write(found: Any, output: Path | None, onnx: Path | None, html: Path | None) -> list[Path]:
    """Writes what is asked for; what was written."""
    made = []
    if output is not None:
        made.append(found.save(output))
    if onnx is not None:
        made.append(found.export(onnx))
    if html is not None:
        made.append(found.to_html(html))
    return made


def clock_lines(clock: dict[str, Any]) -> list[str]:
    """A line an engine."""
    if not clock:
        return []
    rows = clock["engines"]
    width = max(map(len, rows))
    threads = counted(clock["threads"], "thread")
    head = f"one input, {threads}, {clock['cpu']} ({clock['isa']}), median (fastest) ms:"
    lines = [f"  {n:{width}}  {r['median_ms']:8.2f} ({r['fastest_ms']:.2f})" for n, r in rows.items()]
    if clock["against_fastest_dense"]:
        lines.append(
            f"  {clock['against_fastest_dense']:.2f}x the fastest dense engine ({clock['fastest_dense']})"
        )
    return [head, *lines, *(f"  {n} left out: {why}" for n, why in clock["left_out"].items())]
