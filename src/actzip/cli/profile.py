"""``actzip profile``: where the zeros, the bits and the time of a model are."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import JSON, TRUST, errors, out, print_json, progress
from actzip.files import write_text

if TYPE_CHECKING:
    from actzip.data.form import Form
    from actzip.profile.report import Report
    from actzip.profile.training import TrainingMemory
    from actzip.profile.verdict import Verdict

_EPILOG = (
    "Example:  actzip profile resnet18 --data photos/ --html report.html --codecs seg,zvc,rans\n\n"
    "          actzip profile resnet18 --data photos/ --export timeloop problems/ --tiles 8x8x16\n\n"
    "          actzip profile --compare before.json after.json"
)


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    @takes_inputs
    def profile(
        model: str | None = typer.Argument(
            None,
            help="A torchvision or timm name, one of ours, package.module:attribute, a .pt2 or an "
            ".onnx file.",
        ),
        data: str | None = typer.Option(
            None,
            "--data",
            "-d",
            help="Folder of images, parquet file, WebDataset shards, .npy, or a data set's name.",
        ),
        weights: str | None = typer.Option(None, help="A safetensors file for the model."),
        images: int = typer.Option(100, min=1, help="At most this many images."),
        batch: int = typer.Option(4, min=1, help="Images a batch."),
        size: int | None = typer.Option(None, help="Images are resized and cropped to this square."),
        codecs: str = typer.Option(
            "zvc,seg", help="Codecs to try, with commas; 'all' for all, 'none' for none."
        ),
        bits: str = typer.Option("8,16", help="Bit widths, with commas."),
        layers: list[str] | None = typer.Option(None, help="Only these maps: name, glob, re:... or type:..."),
        ignore: list[str] | None = typer.Option(None, help="Not these maps."),
        engine: bool = typer.Option(True, help="Compile the model too and measure its layers."),
        html: Path | None = typer.Option(None, help="Write the report as one HTML page."),
        output: Path | None = typer.Option(None, "--output", "-o", help="Write the report as JSON."),
        csv: Path | None = typer.Option(None, help="Write CSV files into this folder."),
        parquet: Path | None = typer.Option(None, help="Write Parquet files into this folder."),
        tiles: str | None = typer.Option(
            None, help="Count non-zeros in tiles of rows x columns x channels too, say 8x8x16."
        ),
        export: tuple[str, Path] | None = typer.Option(
            None,
            metavar="KIND DIR",
            help="Write the layers for a simulator (timeloop, scalesim or stonne) into a new folder.",
        ),
        threads: int | None = typer.Option(None, min=1, help="Threads; all CPUs where not given."),
        compare: tuple[Path, Path] | None = typer.Option(None, help="Two JSON reports, before and after."),
        training: bool = typer.Option(
            False, "--training", help="Instead: what a training step saves for backward, packed or not."
        ),
        quick: bool = typer.Option(
            False, "--quick", help="Only whether there is anything to gain, from eight images, in seconds."
        ),
        trust: bool = TRUST,
        json: bool = JSON,
        *,
        inputs: Form,
    ) -> None:
        """Count zeros, effective MACs, bits and milliseconds, layer by layer."""
        from actzip.errors import InputError

        if compare is not None:
            from actzip.profile import compare as compare_reports
            from actzip.profile import load_report

            comparison = compare_reports(load_report(compare[0]), load_report(compare[1]))
            if json:
                print_json(comparison.to_dict())
            else:
                out.print(comparison.table())
            return
        if model is None:
            raise InputError("a MODEL is needed (or --compare A.json B.json)")
        if training:
            memory = run_training(model, data, weights, batch, size, trust, json, inputs)
            if output is not None:
                write_text(output, dumps(memory.to_dict(), indent=1) + "\n")
            if json:
                print_json(memory.to_dict())
            else:
                out.print(memory.table())
            return
        if quick:
            verdict = look(model, data, weights, size, threads, trust, inputs)
            if json:
                print_json(verdict.as_dict())
            else:
                typer.echo(verdict.line)
            return
        try:
            widths = [int(b) for b in bits.split(",") if b]
        except ValueError:
            raise InputError(f"--bits takes numbers with commas between them, not {bits!r}") from None
        report = run(
            model,
            data,
            weights,
            images,
            batch,
            size,
            codecs,
            widths,
            layers,
            ignore,
            engine,
            threads,
            trust,
            json,
            tiles,
            export,
            inputs,
        )
        if output is not None:
            report.to_json(output)
        if html is not None:
            report.to_html(html)
        if csv is not None:
            report.to_csv(csv)
        if parquet is not None:
            report.to_parquet(parquet)
        if json:
            print_json(report.to_dict())
            return
        out.print(report.table())
        for written in (output, html, csv, parquet):
            if written is not None:
                errors.print(f"written: {written}")


def look(
    model: str,
    data: str | None,
    weights: str | None,
    size: int | None,
    threads: int | None,
    trust: bool,
    form: Form | None = None,
) -> Verdict:
    """The verdict of ``--quick``."""
    from actzip import cpu
    from actzip.profile.source import open_subject
    from actzip.profile.verdict import quick_look

    found = open_subject(model, data, weights=weights, images=8, batch=8, size=size, trust=trust, form=form)
    batches = [b[0] if isinstance(b, (tuple, list)) else b for b in found.loader]
    return quick_look(found.model, batches, threads or int(cpu.info()["threads"]))


def run(
    model: str,
    data: str | None,
    weights: str | None,
    images: int,
    batch: int,
    size: int | None,
    codecs: str,
    bits: list[int],
    layers: list[str] | None,
    ignore: list[str] | None,
    engine: bool,
    threads: int | None,
    trust: bool,
    quiet: bool,
    tiles: str | None = None,
    export: tuple[str, Path] | None = None,
    form: Form | None = None,
) -> Report:
    """The report for the command line's options; what ``--export`` asks for is written."""
    from actzip.profile import profile as profile_model
    from actzip.profile.source import open_subject

    if export is not None:
        from actzip.profile.export import check_folder, check_kind

        check_kind(export[0])
        check_folder(export[1])
        tiles = tiles or ("8x8x16" if export[0] == "timeloop" else None)

    with progress(quiet) as bar:
        task = bar.add_task("loading", total=None, note="")
        found = open_subject(
            model, data, weights=weights, images=images, batch=batch, size=size, trust=trust, form=form
        )
        bar.update(task, description="profiling", total=found.images)
        timing = bar.add_task(
            "calibrating the engine, once for this machine", total=None, note="", visible=False
        )
        names = available_codecs() if codecs == "all" else [] if codecs in ("", "none") else codecs.split(",")
        report = profile_model(
            found.model,
            found.loader,
            name=model,
            source=found.source,
            codecs=names,
            bits=bits,
            layers=layers,
            ignore=ignore,
            max_images=found.images,
            engine=engine,
            threads=threads,
            tiles=tiles,
            random=found.random,
            skipped=found.skipped,
            on_batch=lambda n: bar.advance(task, n),
            on_step=lambda done, of: bar.update(timing, completed=done, total=of, visible=True),
        )
    if export is not None:
        first = next(iter(found.loader)) if export[0] == "stonne" else None
        said = report.export(*export, model=found.model, batch=first)
        errors.print(f"written: {said}")
    return report


def run_training(
    model: str,
    data: str | None,
    weights: str | None,
    batch: int,
    size: int | None,
    trust: bool,
    quiet: bool,
    form: Form | None = None,
) -> TrainingMemory:
    """What ``--training`` shows: one batch of the data, forward and loss."""
    from actzip.profile.source import open_subject
    from actzip.profile.training import training_memory

    with progress(quiet) as bar:
        bar.add_task("forward", total=None, note="")
        found = open_subject(
            model, data, weights=weights, images=batch, batch=batch, size=size, trust=trust, form=form
        )
        first = next(iter(found.loader))
        x, y = first if isinstance(first, (tuple, list)) and len(first) == 2 else (first, None)
        return training_memory(found.model, x, y)


def available_codecs() -> list[str]:
    """Names of the codecs that code integers, ``auto`` left out (it is one of the others)."""
    from actzip.codec import registry

    return [c for c in registry.available() if c != "auto"]
