"""``actzip split``: where to cut a network between two machines, and both sides as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import (
    IMAGES,
    JSON,
    MODEL,
    SIZE,
    THREADS,
    TRUST,
    WEIGHTS,
    errors,
    out,
    print_json,
    progress,
)
from actzip.errors import InputError

if TYPE_CHECKING:
    from actzip.data.form import Form

_EPILOG = (
    "Example:  actzip split model.onnx --data photos/ --bandwidth 20Mbit --latency 10ms "
    "--client-slowdown 4 --out parts/\n\n"
    "Where sending the JPEG, or nothing, is quicker than every cut, the first line says so."
)


_LATENCY: str = typer.Option("0ms", "--latency", help="Of a message, one way: 10ms.")
_SLOWDOWN: float = typer.Option(
    1.0, "--client-slowdown", help="The client is so many times slower than this machine."
)
_AT: str | None = typer.Option(None, "--at", help="Only this cut: a layer's name or a number of the table.")
_KEEP: float | None = typer.Option(
    None, help="Promise: this share of the highest outputs stays the same (0.99 if none is given)."
)
_MAX_ERROR: float | None = typer.Option(
    None, "--max-error", help="Or: largest mean relative error of the outputs."
)
_MOST_BITS: int = typer.Option(8, "--most-bits", min=1, max=8, help="Greatest width of the search.")
_FINALISTS: int = typer.Option(3, min=1, help="Cuts for which the fewest bits are searched.")
_CALIBRATE: int = typer.Option(32, min=1, help="So many of them calibrate (half at most).")
_PREDICT: bool = typer.Option(False, "--predict", help="Times by the cost model, not measured.")
_OUTPUT: Path | None = typer.Option(
    None, "--out", "-o", help="Write both sides into this new folder: .actzip and .onnx."
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=_EPILOG)(takes_inputs(split))


def split(
    model: str = MODEL,
    data: str | None = IMAGES,
    bandwidth: str = typer.Option(..., "--bandwidth", help="Of the link: 20Mbit, 2.5MB/s."),
    latency: str = _LATENCY,
    client_slowdown: float = _SLOWDOWN,
    at: str | None = _AT,
    keep: float | None = _KEEP,
    max_error: float | None = _MAX_ERROR,
    labels: bool = typer.Option(False, help="--keep is of the accuracy, by the data's labels."),
    bits: str = typer.Option("8,4,2", help="Bits of the table, 1 to 8."),
    most_bits: int = _MOST_BITS,
    per: str = typer.Option("channel", help="One step a channel or a map."),
    finalists: int = _FINALISTS,
    images: int = typer.Option(160, min=1, help="At most so many images."),
    calibrate: int = _CALIBRATE,
    predict: bool = _PREDICT,
    weights: str | None = WEIGHTS,
    size: int | None = SIZE,
    threads: int | None = THREADS,
    output: Path | None = _OUTPUT,
    html: Path | None = typer.Option(None, help="Write the report as one HTML page."),
    trust: bool = TRUST,
    json: bool = JSON,
    *,
    inputs: Form,
) -> None:
    """Find where to cut a network between two machines, and prove what the cut keeps."""
    from actzip.split import plan
    from actzip.split.result import free_folder

    if output is not None:
        free_folder(output)
    link: dict[str, Any] = {"bandwidth": bandwidth, "latency": latency, "client_slowdown": client_slowdown}
    promise: dict[str, Any] = {"keep": keep, "max_error": max_error, "labels": labels}
    given: dict[str, Any] = {
        "images": images,
        "calibrate": calibrate,
        "size": size,
        "weights": weights,
        "trust": trust,
    }
    search: dict[str, Any] = {
        "bits": widths_of(bits),
        "most_bits": most_bits,
        "per": per,
        "finalists": finalists,
    }
    with progress(json) as bar:
        task = bar.add_task("loading", total=None, note="")
        found = plan(
            model,
            data,
            at=int(at) if at is not None and at.isdecimal() else at,
            predict=predict,
            threads=threads,
            form=inputs,
            on_step=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
            **link,
            **promise,
            **given,
            **search,
        )
        bar.update(task, description="writing", total=None)
        written = [found.save(output)] if output is not None else []
        written += [found.to_html(html)] if html is not None else []
    if json:
        print_json(found.to_dict())
        return
    for line in found.lines():
        out.print(line)
    for path in written:
        errors.print(f"written: {path}")


def widths_of(bits: str) -> list[int]:
    """``--bits``."""
    try:
        return [int(b) for b in bits.split(",")]
    except ValueError:
        raise InputError(f"--bits must be whole numbers with commas, as in 8,4,2, not {bits!r}") from None
