"""``actzip compile``: a model on the engine, and what runs where and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from actzip.cli._inputs import takes_inputs
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
    other_than,
    print_json,
)
from actzip.text import visible

if TYPE_CHECKING:
    from actzip.data.form import Form

_EPILOG = "Example:  actzip compile resnet18 --data photos/ --threads 2 --out resnet18.actzip"


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    @takes_inputs
    def compile(
        model: str = MODEL,
        data: str | None = IMAGES,
        weights: str | None = WEIGHTS,
        batch: int = typer.Option(1, min=1, help="Images that densities are measured and kernels timed on."),
        size: int | None = SIZE,
        threads: int | None = THREADS,
        storage: str = typer.Option("float32", help="How packed maps keep values: float32 or float16."),
        tune: bool = typer.Option(True, help="Time kernels on this machine, else choose by density."),
        thorough: bool = typer.Option(
            False, "--thorough", help="Time every kernel, not the likely best alone."
        ),
        cache: bool = typer.Option(True, help="Keep what was timed for the next time."),
        fallback: bool | None = FALLBACK,
        runs: int = typer.Option(10, min=1, help="Runs that the table's times are medians of."),
        output: Path | None = typer.Option(
            None,
            "--out",
            "-o",
            help="Write the compiled model here, for actzip.runtime.load (.pickle: for pickle.load).",
        ),
        trust: bool = TRUST,
        json: bool = JSON,
        *,
        inputs: Form,
    ) -> None:
        """Compile a model and print, layer by layer, kernel, reason, density, effective MACs, time
        and share of peak."""
        import pickle

        from actzip import compile as compile_model
        from actzip.files import write_bytes

        if output is not None:
            other_than(Path(model), output)
        found, _, x = model_and_input(model, weights, data, batch, size, trust, inputs)
        fast = compile_model(
            found,
            x,
            threads=threads,
            tune="thorough" if thorough else tune,
            cache=cache,
            storage=storage,
            fallback=fallback,
        )
        explanation = fast.explain(x, runs=runs)
        if output is not None and output.suffix in (".pickle", ".pkl"):
            write_bytes(output, pickle.dumps(fast, protocol=5))
        elif output is not None:
            fast.save(output)
        if json:
            print_json(explanation.to_dict())
        else:
            typer.echo(visible(explanation.table(), keep="\n"))
        if output is not None:
            errors.print(f"written: {output}")
