"""Where the zeros, the bits and the time are: per-layer statistics of activation maps, and reports of them.

``profile(model, loader)``, or ``profile("resnet18", "photos/")``, runs the model over the inputs
and counts, layer by layer: density and its spread, effective MACs (exactly, borders and strides
included), what each codec makes of each map, and what the engine gains by the clock. See
``docs/profile.md`` for every figure's definition and the JSON's schema.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from actzip._module import lazy, make_callable
from actzip.activations import Selector, get_thresholds
from actzip.errors import ActzipError, DataError, InputError
from actzip.profile.collect import Collection, collect, split_inputs
from actzip.profile.report import (
    SCHEMA,
    Comparison,
    Report,
    build_layers,
    build_maps,
    build_totals,
    compare,
    load_report,
    schema,
)
from actzip.profile.whatif import what_if

__all__ = [
    "Collection",
    "Comparison",
    "Report",
    "collect",
    "compare",
    "load_report",
    "profile",
    "schema",
    "split_inputs",
    "what_if",
]


def profile(
    model: nn.Module | str,
    loader: Iterable[Any] | str | None = None,
    *,
    name: str | None = None,
    source: str | None = None,
    codecs: Sequence[str] | Mapping[str, Sequence[int]] = ("zvc", "seg"),
    bits: Sequence[int] = (8, 16),
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    max_images: int | None = None,
    engine: bool = True,
    whatif_images: int = 8,
    runs: bool = True,
    threads: int | None = None,
    random: bool = False,
    skipped: Sequence[str] = (),
    distributed: bool = False,
    progress: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Report:
    """Counts where the zeros, the bits and the time of ``model`` are over the inputs of ``loader``.

    Args:
        model: any ``nn.Module``; it is run in eval mode, without gradient, and left as it was. Or
            what the command line takes: a torchvision or timm name, an import path, a ``.pt2`` or
            ``.onnx`` file.
        loader: batches of inputs ``N, C, H, W``; (input, label) pairs, tuples and dicts are understood
            (:func:`actzip.profile.collect.split_inputs`). Or a folder of images, a parquet file,
            WebDataset shards, an ``.npy``, a data set's name: 100 images of it, or ``max_images``.
            None, for a model given by name: random numbers, with a warning that densities mean
            nothing.
        name, source: how the model and the data are named in the report.
        codecs: names of codecs, each tried at all of ``bits``; or a mapping from name to bit
            widths; empty for none. Each map of each image is quantized by its own largest
            magnitude, coded whole, and measured with headers.
        bits: bit widths for entropies and codecs.
        layers, ignore: the activation maps to look at (:mod:`actzip.activations`); MACs are always
            counted for all.
        max_images: stop after this many images.
        engine: compile the model too and measure its layers; where it cannot be compiled the report says why.
        whatif_images: images of the first batches used for the threshold what-if (0: none).
        runs: count runs of zeros and bursts of non-zeros (N, C, H, W order within an image).
        threads: threads for codecs and engine; None for all.
        random: the inputs are random numbers: the report warns that densities mean nothing.
        skipped: inputs that could not be read, each with the reason: the report counts and names them.
        distributed: under ``torch.distributed``, each process with its part of the data: counts are
            merged exactly, and every process gets the report of all (what-if and times are of its
            own inputs).
        progress: show progress bars on standard error, where that is a terminal.
        on_batch: called with the number of images after each batch.
        on_step: called with (done, all) while the engine is calibrated, for a minute the first time
            on a machine.
        skipped: inputs that could not be read, each with the reason: the report counts and names them.
        distributed: under ``torch.distributed``, each process with its part of the data: counts are
            merged exactly and every process gets the same report.
        progress: show progress bars on standard error, where that is a terminal.
        on_batch: called with the number of images after each batch.
        on_step: called with (done, all) while the engine is calibrated, some fifty seconds the
            first time on a machine.

    Returns:
        A :class:`Report`. Units: MACs and bytes per image, bits/element, milliseconds at batch 1.

    Raises:
        DataError: the loader gives no batch; data that is missing or unreadable.
        InputError: a batch that the model cannot take, an unknown bit width, an unknown name (near
            matches are named).
        LayerError: a layer name that the model does not have.
    """
    from actzip import cpu

    if not isinstance(model, (nn.Module, str)):
        raise InputError(f"model must be a torch.nn.Module or a name, not {type(model).__name__}")
    if isinstance(loader, str) or loader is None:
        from actzip.profile.source import open_subject

        opened = open_subject(model, loader, images=max_images or 100)
        name = name or (model if isinstance(model, str) else None)
        model, loader, max_images = opened.model, opened.loader, opened.images
        source, random = source or opened.source, random or opened.random
        skipped = (*skipped, *opened.skipped)
    elif isinstance(model, str):
        from actzip.runtime.models import load_model

        name, model = name or model, load_model(model)[0]
    if progress:
        with _bars(max_images, on_batch, on_step) as (each_batch, each_step):
            return profile(
                model,
                loader,
                name=name,
                source=source,
                codecs=codecs,
                bits=bits,
                layers=layers,
                ignore=ignore,
                max_images=max_images,
                engine=engine,
                whatif_images=whatif_images,
                runs=runs,
                threads=threads,
                random=random,
                skipped=skipped,
                distributed=distributed,
                on_batch=each_batch,
                on_step=each_step,
            )
    plan = _codec_plan(codecs, bits)
    info = cpu.info()
    used = threads or int(info["threads"])
    kept: list[Any] = []

    def keeping(batches: Iterable[Any]) -> Iterable[Any]:
        held = 0
        for batch in batches:
            if held < whatif_images or not kept:
                kept.append(batch)
                held += len(batch) if hasattr(batch, "shape") else 1
            yield batch

    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        collection = collect(
            model,
            keeping(loader),
            layers=layers,
            ignore=ignore,
            codecs=plan,
            max_images=max_images,
            runs=runs,
            threads=used,
            on_batch=on_batch,
            empty_ok=distributed,
        )
        if distributed:
            collection = collection.merge_processes()
            if collection.batches == 0:
                raise DataError("the loaders of all processes gave no batch")
    for w in caught:
        if issubclass(w.category, UserWarning) and "never run" in str(w.message):
            notes.append(str(w.message))
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    if random:
        notes.insert(
            0, "the inputs are random numbers: densities, bits and speed-ups mean nothing for real data"
        )
    if skipped:
        shown = "; ".join(skipped[:5]) + (" ..." if len(skipped) > 5 else "")
        notes.append(f"{len(skipped)} inputs cannot be read and were skipped: {shown}")
    for stats in collection.maps.values():
        if stats.nonfinite:
            notes.append(f"{stats.site.name}: {stats.nonfinite} values are NaN or infinite")
        if stats.elements and stats.nonzeros == 0:
            notes.append(f"{stats.site.name}: the map is always zero")
    dense = [s.site.name for s in collection.maps.values() if not s.site.sparse]
    if dense:
        shown = ", ".join(dense[:5]) + (" ..." if len(dense) > 5 else "")
        notes.append(f"{len(dense)} activation maps have no exact zeros by design (not ReLU): {shown}")

    maps, rows = build_maps(collection, bits), build_layers(collection)
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "model": {
            "name": name or type(model).__name__,
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": getattr(model, "numbers", None) or sum(p.numel() for p in model.parameters()),
            "thresholds": len(get_thresholds(model)),
        },
        "data": {
            "images": collection.images,
            "batches": collection.batches,
            "source": source or "a loader",
            "random": random,
            "skipped": list(skipped),
        },
        "environment": info,
        "maps": maps,
        "layers": rows,
        "totals": {},
        "whatif": {},
        "engine": None,
        "warnings": notes,
    }
    if whatif_images > 0 and kept:
        data["whatif"] = what_if(model, kept, collection, max_images=whatif_images)
    if engine and kept:
        from actzip.profile.timing import measure_engine

        try:
            data["engine"] = measure_engine(model, kept[0], rows, threads=used, on_step=on_step)
        except ActzipError as error:
            data["engine"] = {"error": str(error)}
            notes.append(f"the engine cannot run this model, so no time is measured: {error}")
    data["totals"] = build_totals(maps, rows)
    return Report(data, collection)


@contextmanager
def _bars(
    total: int | None,
    on_batch: Callable[[int], None] | None,
    on_step: Callable[[int, int], None] | None,
) -> Iterator[tuple[Callable[[int], None], Callable[[int, int], None]]]:
    """Progress bars of a profile, as the two functions that move them; what was given is called too."""
    from rich.console import Console

    from actzip.progress import display

    with display(Console(stderr=True)) as bar:
        images = bar.add_task("images", total=total)
        timing = bar.add_task("calibrating the engine, once for this machine", total=None, visible=False)

        def batch(n: int) -> None:
            bar.advance(images, n)
            if on_batch is not None:
                on_batch(n)

        def step(done: int, of: int) -> None:
            bar.update(timing, completed=done, total=of, visible=True)
            if on_step is not None:
                on_step(done, of)

        yield batch, step


def _codec_plan(
    codecs: Sequence[str] | Mapping[str, Sequence[int]], bits: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    for b in bits:
        if not 1 <= int(b) <= 16:
            raise InputError(f"bits must be between 1 and 16, not {b}")
    if isinstance(codecs, str):
        codecs = [codecs]
    plan = (
        {k: tuple(int(b) for b in v) for k, v in codecs.items()}
        if isinstance(codecs, Mapping)
        else {k: tuple(int(b) for b in bits) for k in codecs}
    )
    if plan:
        import numpy as np

        from actzip.codec import encode

        for codec in plan:  # an unknown codec is said now, not after the first image
            encode(np.zeros((1, 1, 1), dtype=np.uint8), codec=codec)
    return plan


if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "profile")
