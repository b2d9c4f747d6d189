"""``actzip profile``: where the zeros, the bits and the time of a model are."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import JSON, TRUST, errors, out, print_json, progress
from actzip.errors import InputError
from actzip.files import write_text

if TYPE_CHECKING:
    from actzip.data.form import Form
    from actzip.profile.report import Report
    from actzip.profile.source import Subject
    from actzip.profile.training import TrainingMemory
    from actzip.profile.verdict import Verdict

_EPILOG = (
    "Example:  actzip profile resnet18 --data photos/ --html report.html --codecs seg,zvc,rans\n\n"
    "          actzip profile resnet18 --data photos/ --export timeloop problems/ --tiles 8x8x16\n\n"
    "          actzip profile --compare before.json after.json"
)


_MODEL: str | None = typer.Argument(
    None,
    help="A torchvision or timm name, one of ours, package.module:attribute, a .pt2 or an .onnx file.",
)
_DATA: str | None = typer.Option(
    None,
    "--data",
    "-d",
    help="Folder of images, parquet file, WebDataset shards, .npy, or a data set's name.",
)
_WEIGHTS: str | None = typer.Option(None, help="A safetensors file for the model.")
_SIZE: int | None = typer.Option(None, help="Images are resized and cropped to this square.")
_CODECS: str = typer.Option("zvc,seg", help="Codecs to try, with commas; 'all' for all, 'none' for none.")
_LAYERS: list[str] | None = typer.Option(None, help="Only these maps: name, glob, re:... or type:...")
_ENGINE: bool = typer.Option(True, help="Compile the model too and measure its layers.")
_OUTPUT: Path | None = typer.Option(None, "--output", "-o", help="Write the report as JSON.")
_TILES: str | None = typer.Option(
    None, help="Count non-zeros in tiles of rows x columns x channels too, say 8x8x16."
)
_EXPORT: tuple[str, Path] | None = typer.Option(
    None,
    metavar="KIND DIR",
    help="Write the layers for a simulator (timeloop, scalesim or stonne) into a new folder.",
)
_THREADS: int | None = typer.Option(None, min=1, help="Threads; all CPUs where not given.")
_COMPARE: tuple[Path, Path] | None = typer.Option(None, help="Two JSON reports, before and after.")
_TRAINING: bool = typer.Option(
    False, "--training", help="Instead: what a training step saves for backward, packed or not."
)
_QUICK: bool = typer.Option(
    False, "--quick", help="Only whether there is anything to gain, from eight images, in seconds."
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=_EPILOG)(takes_inputs(profile))


def profile(
    model: str | None = _MODEL,
    data: str | None = _DATA,
    weights: str | None = _WEIGHTS,
    images: int = typer.Option(100, min=1, help="At most this many images."),
    batch: int = typer.Option(4, min=1, help="Images a batch."),
    size: int | None = _SIZE,
    codecs: str = _CODECS,
    bits: str = typer.Option("8,16", help="Bit widths, with commas."),
    layers: list[str] | None = _LAYERS,
    ignore: list[str] | None = typer.Option(None, help="Not these maps."),
    engine: bool = _ENGINE,
    html: Path | None = typer.Option(None, help="Write the report as one HTML page."),
    output: Path | None = _OUTPUT,
    csv: Path | None = typer.Option(None, help="Write CSV files into this folder."),
    parquet: Path | None = typer.Option(None, help="Write Parquet files into this folder."),
    tiles: str | None = _TILES,
    export: tuple[str, Path] | None = _EXPORT,
    threads: int | None = _THREADS,
    compare: tuple[Path, Path] | None = _COMPARE,
    training: bool = _TRAINING,
    quick: bool = _QUICK,
    trust: bool = TRUST,
    json: bool = JSON,
    *,
    inputs: Form,
) -> None:
    """Count zeros, effective MACs, bits and milliseconds, layer by layer."""
    if compare is not None:
        show_comparison(*compare, json)
        return
    if model is None:
        raise InputError("a MODEL is needed (or --compare A.json B.json)")
    subject = Asked(model, data, weights, size, trust, inputs)
    if training:
        show_training(subject, batch, output, json)
    elif quick:
        verdict = look(subject, threads)
        print_json(verdict.as_dict()) if json else typer.echo(verdict.line)
    else:
        names = available_codecs() if codecs == "all" else [] if codecs in ("", "none") else codecs.split(",")
        how: dict[str, Any] = {"codecs": names, "bits": widths_of(bits), "layers": layers, "ignore": ignore}
        how |= {"engine": engine, "threads": threads, "tiles": tiles}
        report = run(subject, images, batch, how, export, json)
        show_report(report, {"json": output, "html": html, "csv": csv, "parquet": parquet}, json)


@dataclass(frozen=True)
class Asked:
    """The model and data that the command line names."""

    model: str
    data: str | None
    weights: str | None
    size: int | None
    trust: bool
    form: Form | None = None

    def open(self, images: int, batch: int) -> Subject:
        """Loaded, at most so many ``images``."""
        from actzip.profile.source import open_subject

        return open_subject(
            self.model,
            self.data,
            weights=self.weights,
            images=images,
            batch=batch,
            size=self.size,
            trust=self.trust,
            form=self.form,
        )


def widths_of(bits: str) -> list[int]:
    """``--bits``."""
    try:
        return [int(b) for b in bits.split(",") if b]
    except ValueError:
        raise InputError(f"--bits takes numbers with commas between them, not {bits!r}") from None


def show_comparison(before: Path, after: Path, json: bool) -> None:
    """``--compare``."""
    from actzip.profile import compare, load_report

    found = compare(load_report(before), load_report(after))
    print_json(found.to_dict()) if json else out.print(found.table())


def show_training(subject: Asked, batch: int, output: Path | None, json: bool) -> None:
    """``--training``."""
    memory = run_training(subject, batch, json)
    if output is not None:
        write_text(output, dumps(memory.to_dict(), indent=1) + "\n")
    print_json(memory.to_dict()) if json else out.print(memory.table())


def show_report(report: Report, files: dict[str, Path | None], json: bool) -> None:
    """The report on standard output, and in ``files`` by their kind."""
    asked = {kind: path for kind, path in files.items() if path is not None}
    for kind, path in asked.items():
        getattr(report, f"to_{kind}")(path)
    if json:
        print_json(report.to_dict())
        return
    out.print(report.table())
    for path in asked.values():
        errors.print(f"written: {path}")


def look(subject: Asked, threads: int | None) -> Verdict:
    """The verdict of ``--quick``."""
    from actzip import cpu
    from actzip.profile.verdict import quick_look
    from actzip.training.batches import arguments

    found = subject.open(8, 8)
    given = [arguments(found.model, b)[0] for b in found.loader]
    batches = [args[0] if len(args) == 1 else args for args in given]
    return quick_look(found.model, batches, threads or int(cpu.info()["threads"]))


def run(
    subject: Asked,
    images: int,
    batch: int,
    how: dict[str, Any],
    export: tuple[str, Path] | None,
    quiet: bool,
) -> Report:
    """The report, ``how`` being options of :func:`actzip.profile.profile`; what ``--export`` asks
    for is written."""
    from actzip.profile import profile as profile_model

    if export is not None:
        from actzip.profile.export import check_folder, check_kind

        check_kind(export[0])
        check_folder(export[1])
        how["tiles"] = how["tiles"] or ("8x8x16" if export[0] == "timeloop" else None)
    with progress(quiet) as bar:
        task = bar.add_task("loading", total=None, note="")
        found = subject.open(images, batch)
        bar.update(task, description="profiling", total=found.images)
        what = "calibrating the engine, once for this machine"
        timing = bar.add_task(what, total=None, note="", visible=False)
        report = profile_model(
            found.model,
            found.loader,
            name=subject.model,
            source=found.source,
            max_images=found.images,
            random=found.random,
            skipped=found.skipped,
            on_batch=lambda n: bar.advance(task, n),
            on_step=lambda done, of: bar.update(timing, completed=done, total=of, visible=True),
            **how,
        )
    if export is not None:
        first = next(iter(found.loader)) if export[0] == "stonne" else None
        said = report.export(*export, model=found.model, batch=first)
        errors.print(f"written: {said}")
    return report


def run_training(subject: Asked, batch: int, quiet: bool) -> TrainingMemory:
    """What ``--training`` shows: one batch of the data, forward and loss."""
    from actzip.profile.training import training_memory

    with progress(quiet) as bar:
        bar.add_task("forward", total=None, note="")
        found = subject.open(batch, batch)
        first = next(iter(found.loader))
        x, y = first if isinstance(first, (tuple, list)) and len(first) == 2 else (first, None)
        return training_memory(found.model, x, y)


def available_codecs() -> list[str]:
    """Names of the codecs that code integers, ``auto`` left out (it is one of the others)."""
    from actzip.codec import registry

    return [c for c in registry.available() if c != "auto"]
