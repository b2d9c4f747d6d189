"""Runs a model over inputs and collects the statistics of its activation maps and computations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Selector, Site, call_model, eval_mode
from actzip.activations.hooks import Hooks
from actzip.errors import ActzipWarning, DataError
from actzip.profile.stats import ComputeStats, MapStats
from actzip.profile.tiles import Tiles, code_tiles
from actzip.training.batches import arguments, batch_size, batches_in

__all__ = ["Collection", "Sample", "collect", "split_inputs"]


@dataclass
class Sample:
    """A real activation map kept for the report's pictures: up to eight channels of the first image."""

    name: str
    channels: list[int]
    values: np.ndarray[Any, Any]


@dataclass
class Collection:
    """All that one pass over the data has counted; collections of two processes merge exactly."""

    maps: dict[str, MapStats] = field(default_factory=dict)
    computations: dict[str, ComputeStats] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    images: int = 0
    batches: int = 0
    never_run: list[str] = field(default_factory=list)

    def merge(self, other: Collection) -> None:
        for name, stats in other.maps.items():
            if name in self.maps:
                self.maps[name].merge(stats)
            else:
                self.maps[name] = stats
        for name, compute in other.computations.items():
            if name in self.computations:
                self.computations[name].merge(compute)
            else:
                self.computations[name] = compute
        for name, sample in other.samples.items():
            self.samples.setdefault(name, sample)
        if self.batches == 0:
            self.never_run = list(other.never_run)
        elif other.batches:
            self.never_run = [n for n in self.never_run if n in other.never_run]
        self.images += other.images
        self.batches += other.batches

    def merge_processes(self) -> Collection:
        """What all processes of ``torch.distributed`` have counted together, the same in each;
        itself where there is one.

        Every process has to call it. Counts are integers, so it is what one process would have counted.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self)
        whole = Collection()
        for part in parts:
            whole.merge(part)
        return whole


#: The name of before.
split_inputs = arguments


class _Collector:
    def __init__(
        self,
        into: Collection,
        *,
        codecs: dict[str, tuple[int, ...]],
        encode: Callable[[np.ndarray[Any, Any], str, int], list[int]] | None,
        runs: bool,
        threads: int,
        tiles: Tiles | None = None,
    ) -> None:
        self.tiles = tiles
        self.unmet: dict[str, ComputeStats] = {}  # layers whose output has not been seen again yet
        self.into = into
        self.codecs = codecs
        self.encode = encode
        self.runs = runs
        self.pool = ThreadPoolExecutor(max_workers=max(1, threads))
        self.pending: list[Any] = []

    def activation(self, site: Site, y: Tensor) -> None:
        if not y.is_floating_point() or y.dim() < 2:
            return
        stats = self.into.maps.get(site.name)
        if stats is None:
            stats = self.into.maps[site.name] = MapStats.of(site, y)
        # the map may be changed in place after this call: count now, code a copy
        stats.add(y, runs=self.runs, tiles=self.tiles)
        for layer in [k for k, c in self.unmet.items() if c.output_shape == tuple(y.shape[1:])]:
            self.unmet.pop(layer).output_map = site.name
        if site.name not in self.into.samples:
            self.into.samples[site.name] = _sample(site, y)
        if self.codecs and self.encode is not None:
            copy = y.detach().float().cpu().clone().numpy()
            for image in copy:
                self.pending.append(self.pool.submit(self._code, stats, image))
            if len(self.pending) > 64:  # bounded memory
                self._drain(32)

    def _code(self, stats: MapStats, image: np.ndarray[Any, Any]) -> list[Callable[[], None]]:
        """Codes one map, in a thread; what then has to be counted, in the main one."""
        assert self.encode is not None
        out: list[Callable[[], None]] = []
        for codec, widths in self.codecs.items():
            for bits in widths:
                key = f"{codec}-{bits}"
                for size in self.encode(image, codec, bits):
                    out.append(partial(stats.add_coded, key, bits, 8 * size, image.size))
                if stats.tiles is not None:
                    sizes = code_tiles(stats.tiles, image, codec, bits)
                    out.append(partial(stats.tiles.add_coded, key, bits, *sizes))
        return out

    def _drain(self, leave: int) -> None:
        while len(self.pending) > leave:
            for count in self.pending.pop(0).result():
                count()

    def computation(self, site: Site, call: ComputeCall) -> None:
        stats = self.into.computations.get(site.name)
        shape = tuple(int(s) for s in call.input.shape[1:])
        for layer in [k for k, c in self.unmet.items() if c.output_shape == shape]:
            del self.unmet[layer]  # its output is read as it is, without an activation function
        if stats is None:
            stats = self.into.computations[site.name] = ComputeStats.of(site, call)
            self.unmet[site.name] = stats
        stats.add(call, tiles=self.tiles)

    def close(self) -> None:
        try:
            self._drain(0)
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)


def _sample(site: Site, y: Tensor) -> Sample:
    first = y.detach()[0].float().cpu()
    if first.dim() == 1:
        first = first.reshape(1, 1, -1)
    first = first.reshape(first.shape[0], -1, first.shape[-1])
    # the channels that show most: spread over the order of their densities
    density = (first != 0).float().mean((1, 2))
    order = torch.argsort(density)
    places = torch.linspace(0, len(order) - 1, min(8, len(order))).round().long()
    channels = sorted({int(order[p]) for p in places})
    return Sample(site.name, channels, first[channels].numpy().copy())


def _quantized_sizes(image: np.ndarray[Any, Any], codec: str, bits: int) -> list[int]:
    """Size in bytes of one map, quantized by its own largest magnitude and coded, headers included."""
    from actzip.codec import encode

    return [len(encode(image, codec=codec, bits=bits))]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    codecs: dict[str, tuple[int, ...]] | None = None,
    max_images: int | None = None,
    runs: bool = True,
    threads: int = 2,
    device: str | torch.device | None = None,
    on_batch: Callable[[int], None] | None = None,
    empty_ok: bool = False,
    tiles: Tiles | None = None,
) -> Collection:
    """Counts zeros, magnitudes, MACs and coded sizes over ``loader``; the model is run in eval mode
    without gradient.

    Args:
        loader: batches as :func:`actzip.training.batches.arguments` takes them; those of no input
            are passed over.
        layers, ignore: sites to count (:mod:`actzip.activations`); computations are always all counted.
        codecs: codec name -> bit widths; each map of each image is quantized by its own maximum and
            coded whole.
        max_images: stop after this many.
        runs: count zero runs and bursts too.
        on_batch: called with the number of images after each batch (progress).
        empty_ok: a loader without a batch is no error (one process of several).
        tiles: count non-zeros in tiles of so many rows, columns and channels, and code them singly.

    Raises:
        DataError: the loader has no batch.
        LayerError: unknown layer name.
        InputError: a batch that ``model`` cannot take.
    """
    result = Collection()
    collector = _Collector(
        result,
        codecs=codecs or {},
        encode=_quantized_sizes if codecs else None,
        runs=runs,
        threads=threads,
        tiles=tiles,
    )
    ran: set[str] = set()
    tap = ActivationTap(model, collector.activation, None, layers=layers, ignore=ignore)
    compute_tap = ActivationTap(model, None, collector.computation)
    try:
        with eval_mode(model), tap, compute_tap, Hooks() as hooks, torch.no_grad():
            for path, module in model.named_modules():
                if next(module.children(), None) is None:
                    hooks.before(module, lambda _m, _a, path=path: ran.add(path))
            for args, kwargs in _batches(model, loader, max_images, device):
                call_model(model, args, kwargs)
                n = batch_size(args, kwargs)
                result.images += n
                result.batches += 1
                if on_batch is not None:
                    on_batch(n)
        collector.close()
    finally:  # what an interrupt kept from its own end too
        tap.detach()
        compute_tap.detach()
        collector.close()
    if result.batches == 0 and not empty_ok:
        raise DataError("the loader gave no batch with an input; one at least is needed to profile a model")
    result.never_run = [
        path
        for path, module in model.named_modules()
        if next(module.children(), None) is None and path not in ran and not isinstance(module, nn.Identity)
    ]
    if result.never_run and result.batches:
        names = ", ".join(result.never_run[:5]) + (" ..." if len(result.never_run) > 5 else "")
        warnings.warn(f"{len(result.never_run)} layers were never run: {names}", ActzipWarning, stacklevel=2)
    return result


def _batches(
    model: nn.Module, loader: Iterable[Any], max_images: int | None, device: str | torch.device | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    left = max_images
    for batch in batches_in(loader, "loader"):
        if left is not None and left <= 0:
            return
        args, kwargs = arguments(model, batch)
        if batch_size(args, kwargs) == 0:
            continue
        if device is not None:
            args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        n = batch_size(args, kwargs)
        if left is not None and n > left:
            args = tuple(
                a[:left] if isinstance(a, Tensor) and a.dim() and a.shape[0] == n else a for a in args
            )
            kwargs = {
                k: v[:left] if isinstance(v, Tensor) and v.dim() and v.shape[0] == n else v
                for k, v in kwargs.items()
            }
            n = left
        if left is not None:
            left -= n
        yield args, kwargs
