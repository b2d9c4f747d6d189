"""``actzip.profile``: one pass over the inputs, what it counted, what the engine takes, and a
report of it all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from actzip import cpu
from actzip.activations import Selector, get_thresholds
from actzip.checks import flag, function, shown, text, texts, whole
from actzip.errors import ActzipError, ActzipWarning, DataError, InputError
from actzip.models import RANDOM_WEIGHTS, has_random_weights
from actzip.profile.collect import Collection, collect
from actzip.profile.cost import CostModel
from actzip.profile.report import SCHEMA, Report
from actzip.profile.rows import build_layers, build_maps, build_totals
from actzip.profile.source import Subject, open_subject
from actzip.profile.tiles import parse_tiles
from actzip.profile.timing import measure_engine
from actzip.profile.whatif import what_if
from actzip.runtime.models import load_model
from actzip.training.batches import batches_in

__all__ = ["profile"]

#: A prediction that is off by this factor is told.
_FAR = 2.0


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
    tiles: str | Sequence[int] | None = None,
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
            (:func:`actzip.training.batches.arguments`). Or a folder of images, a parquet file,
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
        tiles: ``"8x8x16"`` or (rows, columns, channels): count the non-zeros of every map and of
            every layer's input in tiles of that shape too, and code maps tile by tile.
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

    Returns:
        A :class:`Report`. Units: MACs and bytes per image, bits/element, milliseconds at batch 1.

    Raises:
        DataError: the loader gives no batch; data that is missing or unreadable.
        InputError: a batch that the model cannot take, an unknown bit width, an unknown name (near
            matches are named).
        LayerError: a layer name that the model does not have.
    """
    _check_counts(max_images=max_images, threads=threads, whatif_images=whatif_images)
    _check_flags(engine=engine, runs=runs, random=random, distributed=distributed, progress=progress)
    for what, words in (("name", name), ("source", source)):
        if words is not None:
            text(words, what)
    function(on_batch, "on_batch")
    function(on_step, "on_step")
    plan = _codec_plan(codecs, bits)
    shape = None if tiles is None else parse_tiles(tiles)
    skipped = texts(skipped, "skipped")
    subject, name = _subject(model, loader, name, max_images)
    random, skipped = random or subject.random, (*skipped, *subject.skipped)
    info = cpu.info()
    used = threads or int(info["threads"])
    kept: list[Any] = []
    notes: list[str] = []
    bars = _bars(subject.images, on_batch, on_step) if progress else nullcontext((on_batch, on_step))
    with bars as (each_batch, each_step):
        with _warnings_as(notes):
            collection = collect(
                subject.model,
                _keeping(subject.loader, kept, whatif_images),
                layers=layers,
                ignore=ignore,
                codecs=plan,
                max_images=subject.images,
                runs=runs,
                threads=used,
                on_batch=each_batch,
                empty_ok=distributed,
                tiles=shape,
            )
        if distributed:
            collection = _merged(collection)
        named = source or subject.source or "a loader"
        data = _head(subject.model, name, collection, named, random, skipped)
        data["environment"] = info
        data["maps"], data["layers"] = build_maps(collection, bits), build_layers(collection)
        data["totals"], data["whatif"], data["engine"] = {}, {}, None  # in the order of the schema
        notes += _uncounted(subject.model)
        data["warnings"] = [*_warnings_of(collection, notes, random, skipped)]
        if data["model"]["random_weights"]:
            data["warnings"].insert(0, RANDOM_WEIGHTS)
            warnings.warn(RANDOM_WEIGHTS, ActzipWarning, stacklevel=2)
        if whatif_images > 0 and kept:
            data["whatif"] = what_if(subject.model, kept, collection, max_images=whatif_images)
        if engine and kept:
            _time(data, subject.model, kept[0], used, each_step)
        data["totals"] = build_totals(data["maps"], data["layers"])
    return Report(data, collection)


def _check_counts(*, whatif_images: int, **counts: int | None) -> None:
    for what, count in counts.items():
        if count is not None:
            whole(count, what, 1, 2**31 - 1)
    whole(whatif_images, "whatif_images", 0)


def _check_flags(**flags: bool) -> None:
    for what, given in flags.items():
        flag(given, what)


def _merged(collection: Collection) -> Collection:
    """What all processes counted."""
    collection = collection.merge_processes()
    if collection.batches == 0:
        raise DataError("the loaders of all processes gave no batch")
    return collection


def _time(
    data: dict[str, Any],
    model: nn.Module,
    batch: Any,
    threads: int,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """The engine's times into ``data``; where it cannot run the model or is far from its prediction, why."""
    try:
        run = data["engine"] = measure_engine(model, batch, data["layers"], threads=threads, on_step=on_step)
        if not 1 / _FAR <= run["predicted_ms"] / run["latency_ms"] <= _FAR:
            data["warnings"].append(
                f"{run['latency_ms']:.2f} ms were measured and {run['predicted_ms']:.2f} ms predicted: other "
                "programs ran beside this profile or beside the cost model's calibration, which is made "
                f"again without {CostModel.kept_in(threads)}"
            )
    except (ActzipError, NotImplementedError) as error:
        data["engine"] = {"error": str(error)}
        data["warnings"].append(f"the engine cannot run this model, so no time is measured: {error}")


def _subject(model: Any, loader: Any, name: str | None, max_images: int | None) -> tuple[Subject, str | None]:
    """The model and its batches, and how the model is named."""
    if not isinstance(model, (nn.Module, str)):
        raise InputError(f"model must be a torch.nn.Module or a name, not {type(model).__name__}")
    if isinstance(model, str):
        name = name or model
    if isinstance(loader, str) or loader is None:
        return open_subject(model, loader, images=max_images or 100), name
    module = load_model(model, parts=True)[0] if isinstance(model, str) else model
    return Subject(module, batches_in(loader, "loader"), max_images, ""), name


def _keeping(batches: Iterable[Any], kept: list[Any], images: int) -> Iterator[Any]:
    """``batches``; the first ones, of ``images`` and at least one, are put into ``kept`` too."""
    held = 0
    for batch in batches:
        if held < images or not kept:
            kept.append(batch)
            held += len(batch) if hasattr(batch, "shape") else 1
        yield batch


@contextmanager
def _warnings_as(notes: list[str]) -> Iterator[None]:
    """Warnings that layers never run become notes; others are passed on after the block."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for w in caught:
        if issubclass(w.category, UserWarning) and "never run" in str(w.message):
            notes.append(str(w.message))
        else:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


def _uncounted(model: nn.Module) -> Iterator[str]:
    """Recurrent layers, whose products are no layer of the report."""
    found = [path for path, m in model.named_modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]
    graph = getattr(model, "graph", None)
    found += [n.name for n in getattr(graph, "nodes", ()) if getattr(n, "op", "") == "recurrent"]
    if found:
        yield f"the MACs of {len(found)} recurrent layers are not counted: {_first(found, ', ')}"


def _warnings_of(
    collection: Collection, notes: Sequence[str], random: bool, skipped: Sequence[str]
) -> Iterator[str]:
    """What a reader of the report has to know."""
    if random:
        yield "the inputs are random numbers: densities, bits and speed-ups mean nothing for real data"
    yield from notes
    if skipped:
        yield f"{len(skipped)} inputs cannot be read and were skipped: {_first(skipped, '; ')}"
    for stats in collection.maps.values():
        if stats.nonfinite:
            yield f"{stats.site.name}: {stats.nonfinite} values are NaN or infinite"
        if stats.elements and stats.nonzeros == 0:
            yield f"{stats.site.name}: the map is always zero"
    dense = [s.site.name for s in collection.maps.values() if not s.site.sparse]
    if dense:
        shown = _first(dense, ", ")
        yield f"{len(dense)} activation maps have no exact zeros by design (not ReLU): {shown}"


def _first(values: Sequence[str], between: str) -> str:
    return between.join(values[:5]) + (" ..." if len(values) > 5 else "")


def _head(
    model: nn.Module,
    name: str | None,
    collection: Collection,
    source: str,
    random: bool,
    skipped: Sequence[str],
) -> dict[str, Any]:
    """The report's first entries: what was profiled, on what."""
    return {
        "schema": SCHEMA,
        "model": {
            "name": name or type(model).__name__,
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "parameters": getattr(model, "numbers", None) or sum(p.numel() for p in model.parameters()),
            "thresholds": len(get_thresholds(model)),
            "random_weights": has_random_weights(model),
        },
        "data": {
            "images": collection.images,
            "batches": collection.batches,
            "source": source,
            "random": random,
            "skipped": list(skipped),
        },
    }


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


def _widths(bits: Sequence[int], name: str) -> tuple[int, ...]:
    if not isinstance(bits, (list, tuple, range, set, frozenset)):
        raise InputError(f"{name} must be a list of whole numbers from 1 to 16, not {shown(bits)}")
    return tuple(whole(b, name, 1, 16) for b in bits)


def _codec_plan(
    codecs: Sequence[str] | Mapping[str, Sequence[int]], bits: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    widths = _widths(bits, "bits")
    if isinstance(codecs, Mapping):
        plan = {text(k, "a codec"): _widths(v, f"codecs[{k!r}]") for k, v in codecs.items()}
    else:
        plan = dict.fromkeys(texts([codecs] if isinstance(codecs, str) else codecs, "codecs"), widths)
    if plan:
        import numpy as np

        from actzip.codec import encode

        for codec in plan:  # an unknown codec is said now, not after the first image
            encode(np.zeros((1, 1, 1), dtype=np.uint8), codec=codec)
    return plan
