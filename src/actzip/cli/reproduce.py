"""``actzip reproduce``: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from actzip.cli.common import JSON, TRUST, errors, out, print_json, progress
from actzip.text import cell


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(
        epilog="Example:  actzip reproduce recipes/lenet5-mnist/sparsify.yaml --out out/lenet5 --seed 1"
    )
    def reproduce(
        recipe: Path = typer.Argument(..., help="A YAML file (docs/recipes.md)."),
        target: Path | None = typer.Option(None, "--out", help="Folder for results; by default runs/NAME."),
        data: Path | None = typer.Option(
            None, help="Where to look for data first (else ACTZIP_DATA, ../shared/data)."
        ),
        seed: int | None = typer.Option(None, help="Another seed than the recipe's."),
        fresh: bool = typer.Option(
            False, "--fresh", help="Start anew instead of going on with an earlier run."
        ),
        download: bool = typer.Option(True, help="Whether missing data may be downloaded."),
        strict: bool = typer.Option(
            False, "--strict", help="Leave with exit code 1 where a target is not met."
        ),
        only: str | None = typer.Option(
            None,
            "--only",
            help="Train only this stage: baseline, control or sparse. Run again without it for the rest.",
        ),
        trust: bool = TRUST,
        json: bool = JSON,
    ) -> None:
        """Repeat an experiment: train, sparsify, quantize, encode, decode; results.json and report.html.

        The same recipe and seed give the same figures on the same machine. A run that was stopped,
        even killed, goes on where it was.
        """
        from actzip.errors import RecipeError
        from actzip.experiment.recipe import load_recipe

        found = load_recipe(recipe)
        if seed is not None:
            if not 0 <= seed < 2**31:
                raise RecipeError(f"--seed: 0 to {2**31 - 1} are possible, not {seed}")
            found = found.model_copy(update={"seed": seed})
        from actzip.experiment.run import reproduce as run

        folder = target or Path("runs") / (found.name if seed is None else f"{found.name}-seed{seed}")
        with progress() as bar:
            results = run(
                found,
                folder,
                data=data,
                fresh=fresh,
                download=download,
                progress=_Display(bar),
                only=only,
                trust=trust,
            )
        if only is not None:
            return
        missed = [t for t in results["targets"] if not t["met"]]
        if json:
            print_json(results)
        else:
            _print(results, folder)
        if strict and missed:
            raise typer.Exit(1)


class _Display:
    """Turns the events of a run into progress bars, and into lines that stay."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.task: Any = None
        self.stage = ""

    def __call__(self, event: dict[str, Any]) -> None:
        stage, kind = event["stage"], event["kind"]
        if stage != self.stage and self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        self.stage = stage
        if kind == "step" and event["steps"]:
            note = f"epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.3f}"
            if event["penalty"]:
                note += f", penalty {event['penalty']:.3f}"
            if event["accuracy"] is not None:
                note += f", validation {100 * event['accuracy']:.2f} %"
            if event.get("training_accuracy") is not None:
                note += f", training {100 * event['training_accuracy']:.2f} %"
            if event.get("theoretical_speedup") is not None:
                note += f", speed-up {event['theoretical_speedup']:.2f}x"
            done = (event["epoch"] - 1) * event["steps"] + event["step"]
            self._show(stage, done, event["epochs"] * event["steps"], note)
        elif kind == "images":
            self._show(stage, event["done"], event["total"], "images encoded, decoded and compared")
        elif kind == "epoch":
            from actzip.sparsify.bar import epoch_line

            errors.print(f"{stage}: {epoch_line(event)}", style="dim")
        elif kind == "low_bits_epoch":
            line = f"epoch {event['epoch']}/{event['epochs']}: loss {event['loss']:.4f}, "
            if event["rate"]:
                line += f"estimated rate {event['rate']:.3f} bits/element, "
            line += f"training accuracy {100 * event['accuracy']:.2f} %, {event['seconds']:.0f} s, "
            line += f"{event['seconds_left'] / 60:.1f} min left"
            errors.print(f"{stage}: {line}", style="dim")
        elif kind == "cached":
            errors.print(f"{stage}: done by an earlier run", style="dim")
        elif kind == "done":
            errors.print(f"{stage}: {event['seconds']:.1f} s", style="dim")

    def _show(self, stage: str, done: int, total: int, note: str) -> None:
        if self.task is None:
            self.task = self.bar.add_task(stage, total=total, note=note)
        self.bar.update(self.task, completed=done, total=total, note=note)


def _print(results: dict[str, Any], folder: Path) -> None:
    data = results["data"]["test"]
    table = Table(
        title=f"{results['name']}: {data['images']:,} test images, {data['source']}",
        title_justify="left",
        box=box.SIMPLE,
        padding=0,
        show_edge=False,  # two codecs fit 80 columns
    )
    codecs = list(results["coding"][0]["gain_float32"]) if results["coding"] else []
    table.add_column("stage", no_wrap=True)
    for column in ("bits", "test\nacc. %", "density", "theor.\nspeed-up", "over\ncontrol"):
        table.add_column(column, justify="right", no_wrap=True)
    for codec in codecs:
        table.add_column(f"{codec}\nbits/el.", justify="right", no_wrap=True)
        table.add_column("gain on\nfloat32", justify="right", no_wrap=True)
    for row in results["stages"]:
        cells = [
            row["stage"],
            "f32" if row["bits"] == 32 else f"{row['bits']}{', trained' if row.get('trained') else ''}",
            f"{100 * row['accuracy']:.2f}",
            f"{row['density']:.4f}",
            f"{row['theoretical_speedup']:.2f}x",
            f"{row['speedup_over_control']:.2f}x",
        ]
        for codec in codecs:
            coded = row.get("gain_float32")
            cells += (
                [f"{row['bits_per_element'][codec]:.3f}", f"{coded[codec]:.1f}x"] if coded else ["32", "1x"]
            )
        table.add_row(*cells)
    out.print(table)
    if results["coding"]:
        c = results["coding"]
        blobs = sum(x["blobs"] for x in c)
        same = all(x["same_predictions"] for x in c)
        out.print(
            f"Every activation map of {c[0]['images']:,} test images encoded and decoded: "
            f"{blobs:,} blobs, all equal bit "
            "for bit; predictions of the layers run on the decoded maps: "
            f"{'all the same' if same else 'DIFFERENT'}. "
            "Sizes include every header.",
        )
    for t in results["targets"]:
        measured = "nothing to compare" if t["measured"] is None else f"{t['measured']:.3f}"
        word = Text("met", "green") if t["met"] else Text("missed", "red")
        out.print(Text.assemble(f"{t['target']}: {measured}, at least {t['required']:g} wanted: ", word))
    if "stand-in" in data["source"]:
        out.print(cell(f"The data are {data['source']}.", "yellow"))
    out.print(
        f"Report: {folder / 'report.html'}   results: {folder / 'results.json'}",
    )
