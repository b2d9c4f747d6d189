"""Quantizers for the least bits: steps, dead zone and clip by rate and distortion, without training.

Of every channel the moments of its values in narrow bins are kept; from them the entropy and the
squared error of any step and rounding follow. For a price of a bit, each channel (or the map) takes
the step of least ``weight * error + price * bits``, where a channel's weight is how much an error
there moves the outputs (:func:`sensitivity`). Levels are put back at their centroids.

Source: entropy-constrained scalar quantization, Chou, Lookabaugh and Gray, 1989; clipping and coarse
steps for split networks: Cohen et al., arXiv:2105.07102.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actzip.checks import one_of, whole
from actzip.errors import InputError
from actzip.split.quantizer import MapQuantizer
from actzip.training.batches import output_tensors

__all__ = ["Rates", "sensitivity"]

Doubles = NDArray[np.float64]
_BINS = 512
_ROUNDINGS = (0.5, 0.42, 0.34, 0.26, 0.18)
_AN_OCTAVE = 3  # candidates of a step in each factor of two
_COARSEST, _FINEST = 2.5, 0.25  # steps over the greatest value; least clip over it


@dataclass
class _Moments:
    """Count, sum and sum of squares of the magnitudes in each bin: (signs, C, bins)."""

    n: Doubles
    s1: Doubles
    s2: Doubles
    top: Doubles

    @property
    def mean(self) -> Doubles:
        return self.s1 / np.maximum(self.n, 1)


def _sums(place: NDArray[np.int64], values: Doubles, size: int) -> Doubles:
    return np.bincount(place, values, size).astype(np.float64, copy=False)


def _moments(maps: Sequence[NDArray[Any]], signed: bool) -> _Moments:
    flat = [np.moveaxis(m.reshape(*m.shape[:2], -1), 1, 0).reshape(m.shape[1], -1) for m in maps]
    x = np.concatenate(flat, 1).astype(np.float32)
    channels = len(x)
    top = np.abs(x).max(1).astype(np.float64)
    scale = np.where(top > 0, _BINS / np.where(top > 0, top, 1), 0)[:, None]
    magnitude = np.abs(x)
    place = np.minimum((magnitude * scale).astype(np.int64), _BINS - 1)
    place += np.arange(channels)[:, None] * _BINS
    if signed:
        place += np.where(x < 0, channels * _BINS, 0)
    size = (2 if signed else 1) * channels * _BINS
    flat_place, flat_x = place.ravel(), magnitude.ravel().astype(np.float64)
    shape = (-1, channels, _BINS)
    return _Moments(
        np.bincount(flat_place, minlength=size).astype(np.float64).reshape(shape),
        _sums(flat_place, flat_x, size).reshape(shape),
        _sums(flat_place, flat_x**2, size).reshape(shape),
        top,
    )


class Rates:
    """Bits and errors of one map's quantizers, for every candidate of a step.

    Args:
        name: of the map. maps: typical ones, (N, C, ...), float32.
        weights: how much a squared error in each channel counts; None: alike.
        bits: greatest width of an integer, 1 to 8 (2 to 8 where a value is negative).
        per: a step a ``channel``, or one a ``map``.

    Raises:
        InputError: no maps, values that are not finite, impossible bits.
    """

    def __init__(
        self,
        name: str,
        maps: Sequence[NDArray[Any]],
        weights: Doubles | None = None,
        *,
        bits: int = 8,
        per: str = "channel",
    ) -> None:
        one_of(per, "per", ("channel", "map"))
        if not maps or not all(m.size for m in maps):
            raise InputError(f"map {name!r}: there is nothing to choose a quantizer by")
        if not all(np.isfinite(m).all() for m in maps):
            raise InputError(f"map {name!r} holds values that are not finite")
        self.name, self.per, self.shape = name, per, tuple(int(d) for d in maps[0].shape[1:])
        self.signed = any(float(m.min()) < 0 for m in maps)
        self.levels = 2 ** (whole(bits, "bits", 1 + self.signed, 8) - self.signed) - 1
        self.moments = _moments(maps, self.signed)
        self.elements = float(self.moments.n.sum())
        channels = len(self.moments.top)
        self.weights = np.ones(channels) if weights is None else np.maximum(weights, 0)
        self.dropped = float(
            (self.weights * self.moments.s2.sum((0, 2))).sum()
        )  # error where nothing is sent
        self._candidates()

    def _candidates(self) -> None:
        """``steps`` (candidates, C); ``bits`` and ``errors`` (candidates, roundings, C)."""
        octaves = np.log2(_COARSEST * self.levels / _FINEST)
        ratios = _COARSEST * 2.0 ** -np.arange(0, octaves + 1 / _AN_OCTAVE, 1 / _AN_OCTAVE)
        top = (
            self.moments.top
            if self.per == "channel"
            else np.full_like(self.moments.top, self.moments.top.max())
        )
        self.steps = ratios[:, None] * np.where(top > 0, top, 1.0)
        shape = (len(ratios), len(_ROUNDINGS), self.steps.shape[1])
        self.bits, self.errors = np.zeros(shape), np.zeros(shape)
        for i, steps in enumerate(self.steps):
            for j, rounding in enumerate(_ROUNDINGS):
                n, s1, s2 = self._levels(steps, rounding)
                count = n.sum((0, 1))
                self.bits[i, j] = (n * np.log2(np.maximum(count, 1) / np.maximum(n, 1))).sum((0, 1))
                self.errors[i, j] = _error(n, s1, s2, steps, rounding)
        if self.per == "map":
            self.bits[:] = self.bits.sum(2, keepdims=True) / shape[2]
            self.errors[:] = (self.errors * self.weights).sum(2, keepdims=True) / shape[2]

    def _levels(self, steps: Doubles, rounding: float) -> tuple[Doubles, Doubles, Doubles]:
        """Moments by level: (signs, levels + 1, C); levels beyond what is met are left out."""
        m = self.moments
        level = np.minimum(self.levels, np.floor(m.mean / steps[None, :, None] + rounding)).astype(np.int64)
        most = int(level.max()) + 1
        signs, channels = level.shape[:2]
        place = (np.arange(signs)[:, None, None] * most + level) * channels + np.arange(channels)[
            None, :, None
        ]
        size = signs * most * channels

        def gather(values: Doubles) -> Doubles:
            return _sums(place.ravel(), values.ravel(), size).reshape(signs, most, channels)

        n, s1, s2 = gather(m.n), gather(m.s1), gather(m.s2)
        if signs == 2:  # one level of zero
            for a in (n, s1, s2):
                a[0, 0] += a[1, 0]
                a[1, 0] = 0
        return n, s1, s2

    def at(self, price: float) -> tuple[MapQuantizer, float]:
        """The quantizer for a price of a bit, and its bits an element by the channels' entropies."""
        weights = self.weights if self.per == "channel" else np.ones_like(self.weights)
        cost = weights * self.errors + price * self.bits  # (candidates, roundings, C)
        rounding = int(cost.min(0).sum(1).argmin())
        best = cost[:, rounding].argmin(0)
        channel = np.arange(len(best))
        steps = self.steps[best, channel]
        bits = float(self.bits[best, rounding, channel].sum()) / self.elements
        return self._quantizer(steps, _ROUNDINGS[rounding]), bits

    def _quantizer(self, steps: Doubles, rounding: float) -> MapQuantizer:
        n, s1, _ = self._levels(steps, rounding)
        weights = np.where(self.weights > 0, self.weights, self.weights.max() or 1.0)
        over = (weights * steps**2 * n).sum((0, 2))
        points = np.arange(n.shape[1], dtype=np.float64)
        points = np.where(over > 0, (weights * steps * s1).sum((0, 2)) / np.where(over > 0, over, 1), points)
        k = np.arange(len(points))
        points = np.clip(points, k - rounding, k + 1 - rounding)  # a clipped level is as wide as others
        points[0] = 0
        if len(points) == 1:
            points = np.array([0.0, 1.0])
        chosen = steps if self.per == "channel" else steps[:1]
        tiny = np.finfo(np.float32).tiny
        return MapQuantizer(
            self.name,
            self.shape,
            self.signed,
            np.maximum(chosen, tiny).astype(np.float32),
            len(points) - 1,
            rounding,
            points.astype(np.float32),
        )


def _error(n: Doubles, s1: Doubles, s2: Doubles, steps: Doubles, rounding: float) -> Doubles:
    """Squared error a channel where every level but zero is put back by the same share of a step
    further: what one table of points for all channels can do."""
    k = np.arange(n.shape[1], dtype=np.float64)[None, :, None]
    some = n[:, 1:].sum((0, 1))
    beyond = (s1 / steps - n * k)[:, 1:].sum((0, 1)) / np.maximum(some, 1)
    points = (k + np.clip(beyond, -rounding, 1 - rounding)) * steps
    points[:, 0] = 0
    error: Doubles = (s2 - 2 * s1 * points + n * points**2).sum((0, 1))
    return np.maximum(error, 0)


def sensitivity(
    tail: nn.Module, maps: Sequence[Tensor], *, projections: int = 4, seed: int = 0
) -> list[Doubles]:
    """For each map, how much a squared error in each of its channels moves the outputs: mean squares
    of gradients of random projections of the outputs, each output scaled to length 1.

    Maps of which the outputs have no gradient count alike (ones).
    """
    generator = torch.Generator().manual_seed(seed)
    sums = [torch.zeros(m.shape[1] if m.dim() > 1 else 1, dtype=torch.float64) for m in maps]
    with torch.enable_grad():
        leaves = [m.detach().clone().requires_grad_() for m in maps]
        outputs = [y for y in output_tensors(tail(*leaves)) if y.is_floating_point() and y.requires_grad]
        for _ in range(projections if outputs else 0):
            total = torch.zeros(())
            for y in outputs:
                centred = y - y.mean(1, keepdim=True) if y.dim() == 2 else y
                size = centred.detach().reshape(len(y), -1).norm(dim=1).clamp_min(1e-12)
                sign = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1
                total = total + ((centred * sign).reshape(len(y), -1).sum(1) / size).sum()
            grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            for i, grad in enumerate(grads):
                if grad is not None:
                    squares = grad.double().pow(2)
                    sums[i] += squares.mean([d for d in range(squares.dim()) if d != 1])
    return [s.numpy() if bool(s.any()) else np.ones(len(s)) for s in sums]
