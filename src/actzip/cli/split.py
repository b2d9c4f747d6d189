"""``actzip split``: where to cut a network between two machines, and both sides as files."""

from __future__ import annotations

from pathlib import Path

import typer

from actzip.cli.common import JSON, MODEL, SIZE, THREADS, TRUST, WEIGHTS, errors, out, print_json, progress

_EPILOG = (
    "Example:  actzip split model.onnx --data photos/ --bandwidth 20Mbit --latency 10ms "
    "--client-slowdown 4 --out parts/\n\n"
    "Where sending the JPEG, or nothing, is quicker than every cut, the first line says so."
)


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    def split(
        model: str = MODEL,
        data: str = typer.Option(
            ..., "--data", "-d", help="Typical images: folder, parquet file, .npy, or a data set's name."
        ),
        bandwidth: str = typer.Option(..., "--bandwidth", help="Of the link: 20Mbit, 2.5MB/s."),
        latency: str = typer.Option("0ms", "--latency", help="Of a message, one way: 10ms."),
        client_slowdown: float = typer.Option(
            1.0, "--client-slowdown", help="The client is so many times slower than this machine."
        ),
        at: str | None = typer.Option(
            None, "--at", help="Only this cut: a layer's name or a number of the table."
        ),
        keep: float | None = typer.Option(
            None, help="Promise: this share of the highest outputs stays the same (0.99 if none is given)."
        ),
        max_error: float | None = typer.Option(
            None, "--max-error", help="Or: largest mean relative error of the outputs."
        ),
        labels: bool = typer.Option(False, help="--keep is of the accuracy, by the data's labels."),
        bits: str = typer.Option("8,4,2", help="Bits of the table, 1 to 8."),
        most_bits: int = typer.Option(8, "--most-bits", min=1, max=8, help="Greatest width of the search."),
        per: str = typer.Option("channel", help="One step a channel or a map."),
        finalists: int = typer.Option(3, min=1, help="Cuts for which the fewest bits are searched."),
        images: int = typer.Option(160, min=1, help="At most so many images."),
        calibrate: int = typer.Option(32, min=1, help="So many of them calibrate (half at most)."),
        predict: bool = typer.Option(False, "--predict", help="Times by the cost model, not measured."),
        weights: str | None = WEIGHTS,
        size: int | None = SIZE,
        threads: int | None = THREADS,
        output: Path | None = typer.Option(
            None, "--out", "-o", help="Write both sides into this new folder: .actzip and .onnx."
        ),
        html: Path | None = typer.Option(None, help="Write the report as one HTML page."),
        trust: bool = TRUST,
        json: bool = JSON,
    ) -> None:
        """Find where to cut a network between two machines, and prove what the cut keeps."""
        from actzip.errors import InputError
        from actzip.split import plan
        from actzip.split.result import free_folder

        if output is not None:
            free_folder(output)
        try:
            widths = [int(b) for b in bits.split(",")]
        except ValueError:
            raise InputError(f"--bits must be whole numbers with commas, as in 8,4,2, not {bits!r}") from None
        with progress(json) as bar:
            task = bar.add_task("loading", total=None, note="")
            found = plan(
                model,
                data,
                bandwidth=bandwidth,
                latency=latency,
                client_slowdown=client_slowdown,
                at=int(at) if at is not None and at.isdecimal() else at,
                keep=keep,
                max_error=max_error,
                labels=labels,
                bits=widths,
                most_bits=most_bits,
                per=per,
                finalists=finalists,
                images=images,
                calibrate=calibrate,
                predict=predict,
                weights=weights,
                size=size,
                threads=threads,
                trust=trust,
                on_step=lambda what, done, of: bar.update(task, description=what, completed=done, total=of),
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
