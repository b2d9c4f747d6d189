"""Thresholds for the ReLUs of a trained network, found from a few unlabelled samples, without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import (
    ActivationTap,
    Selector,
    Site,
    clear_thresholds,
    eval_mode,
    set_thresholds,
    without_thresholds,
)
from actzip.errors import ActzipWarning, DataError, InputError
from actzip.sparsify.costs import map_costs, measure

__all__ = ["Calibration", "agreement", "calibrate_thresholds"]

#: Candidate thresholds, in units of the mean of the positive values of a map (or channel).
LEVELS = (0.0, 0.02, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.38, 0.47, 0.57, 0.7, 0.85, 1.0, 1.25, 1.6)


@dataclass
class Calibration:
    """Thresholds and what they do to the calibration samples.

    Attributes:
        thresholds: for :func:`actzip.activations.set_thresholds`.
        density: non-zero ReLU outputs / all, with the thresholds; ``density_before`` without.
        theoretical_speedup: MACs / effective MACs with them; ``theoretical_speedup_before`` without.
        agreement: fraction of the samples whose highest output is the same with and without.
        met: whether the target was reached.
        tried: every set of thresholds that was measured: density, theoretical_speedup, agreement.
    """

    thresholds: dict[str, float | Tensor]
    density: float
    density_before: float
    theoretical_speedup: float
    theoretical_speedup_before: float
    agreement: float
    met: bool
    samples: int
    tried: list[dict[str, float]] = field(default_factory=list)


def _inputs(data: Iterable[Any], samples: int) -> list[Tensor]:
    batches: list[Tensor] = []
    count = 0
    for batch in data:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            raise InputError(f"calibration data gives batches x or (x, y) of tensors, not {type(x).__name__}")
        if not bool(torch.isfinite(x).all()):
            raise InputError("calibration data holds values that are not finite")
        x = x[: samples - count]
        batches.append(x)
        count += int(x.shape[0])
        if count >= samples:
            break
    if count == 0:
        raise DataError("there is no batch in the calibration data")
    return batches


def agreement(model: nn.Module, reference: nn.Module | Sequence[Tensor], data: Iterable[Any]) -> float:
    """Fraction of samples whose highest output is the same in ``model`` and ``reference`` (both in
    eval mode).

    Args:
        reference: another model, or the indices of its highest outputs, one tensor a batch of ``data``.
        data: batches x or (x, y).

    Raises:
        DataError: no batch in ``data``.
    """
    same = count = 0
    with torch.no_grad(), eval_mode(model):
        for i, batch in enumerate(data):
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            if isinstance(reference, nn.Module):
                with eval_mode(reference):
                    want = reference(x).argmax(1)
            else:
                want = reference[i]
            same += int((model(x).argmax(1) == want).sum())
            count += int(x.shape[0])
    if count == 0:
        raise DataError("there is no batch in the data")
    return same / count


class _Table:
    """For each unit (map, or channel of one) and candidate threshold: what it removes and what that costs."""

    def __init__(self, model: nn.Module, x: Tensor, per: str, layers: Any, ignore: Any) -> None:
        self.per = per
        self.unit: dict[str, Tensor] = {}  # mean positive value, one a unit
        costs = map_costs(model, x[:1])

        def see(site: Site, y: Tensor) -> None:
            if not site.sparse or y.dim() < 2:
                return
            dims = [d for d in range(y.dim()) if d != 1 or per == "layer"]
            total, count = y.sum(dims), (y != 0).sum(dims)
            whole = y.sum() / (y != 0).sum().clamp(min=1)
            mean = torch.where(count > 0, total / count.clamp(min=1), whole).reshape(-1)
            self.unit[site.name] = mean

        with ActivationTap(model, see, layers=layers, ignore=ignore), eval_mode(model), torch.no_grad():
            model(x)
        self.macs = {name: costs[name].macs_per_element for name in self.unit}
        n = len(LEVELS)
        # removed[u, j]: elements in (T_{j-1}, T_j]; push likewise: the square of the summed push on
        # the outputs
        self.removed = {k: torch.zeros(v.numel(), n, dtype=torch.float64) for k, v in self.unit.items()}
        self.cost = {k: torch.zeros(v.numel(), n, dtype=torch.float64) for k, v in self.unit.items()}
        self.samples = 0

    def add(self, model: nn.Module, x: Tensor, projections: int, generator: torch.Generator) -> None:
        """Counts one batch: forward, and a backward pass a projection of the outputs."""
        maps: list[tuple[str, Tensor]] = []

        def see(site: Site, y: Tensor) -> Tensor | None:
            if site.name not in self.unit:
                return None
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            maps.append((site.name, y))
            return y

        n, levels = int(x.shape[0]), len(LEVELS)
        edges = torch.tensor(LEVELS[1:], dtype=x.dtype)
        with ActivationTap(model, see), eval_mode(model), torch.enable_grad():
            out = model(x)
            out = out.flatten(1)
            out = out - out.mean(1, keepdim=True)
            spread = float(out.detach().square().mean().sqrt()) or 1.0
            index: list[Tensor] = []
            for name, y in maps:
                v = y.detach()
                unit = self.unit[name]
                shape = [1] * v.dim()
                channels = unit.numel()
                if channels > 1:
                    shape[1] = channels
                level = torch.bucketize(
                    (v / unit.reshape(shape).clamp(min=1e-30)).contiguous(), edges, right=False
                )
                level = torch.where(
                    v > 0, level + 1, 0
                )  # 0: zero already; j: goes with threshold j; n: stays
                rows = torch.arange(n).reshape(-1, *([1] * (v.dim() - 1))) * channels
                if channels > 1:
                    rows = rows + torch.arange(channels).reshape(shape)
                flat = (rows * (levels + 1) + level).flatten()
                counts = torch.bincount(flat, minlength=n * channels * (levels + 1))
                counts = counts.reshape(n, channels, levels + 1)[:, :, :levels].sum(0)
                counts[:, 0] = 0
                self.removed[name] += counts.double()
                index.append(flat)
            for r in range(projections):
                signs = torch.randint(0, 2, out.shape, generator=generator, dtype=torch.float32) * 2 - 1
                value = (out * signs.to(out.dtype)).sum() / spread
                grads = torch.autograd.grad(
                    value, [y for _, y in maps], retain_graph=r + 1 < projections, allow_unused=True
                )
                for (name, y), grad, flat in zip(maps, grads, index):
                    if grad is None:
                        continue
                    channels = self.unit[name].numel()
                    push = (grad * y.detach()).flatten().double()
                    sums = torch.bincount(flat, weights=push, minlength=n * channels * (levels + 1))
                    squares = torch.bincount(flat, weights=push * push, minlength=n * channels * (levels + 1))
                    shape3 = (n, channels, levels + 1)
                    sums, squares = (
                        sums.reshape(shape3)[:, :, :levels],
                        squares.reshape(shape3)[:, :, :levels],
                    )
                    sums[:, :, 0] = 0
                    squares[:, :, 0] = 0
                    # coherent and incoherent part of what everything up to a threshold pushes the outputs by
                    push2 = sums.cumsum(2).square() + squares.cumsum(2)
                    self.cost[name] += push2.sum(0) / projections
        self.samples += n

    def choose(self, price: float, by_macs: bool) -> dict[str, float | Tensor]:
        """The thresholds that minimise cost - price * savings, unit by unit."""
        chosen: dict[str, float | Tensor] = {}
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        for name, unit in self.unit.items():
            worth = self.macs[name] if by_macs else 1.0
            saved = self.removed[name].cumsum(1) * worth
            best = (self.cost[name] - price * saved).argmin(1)
            t = levels[best] * unit.double()
            if bool((t > 0).any()):
                chosen[name] = float(t[0]) if self.per == "layer" else t.float()
        return chosen


def calibrate_thresholds(
    model: nn.Module,
    data: Iterable[Any],
    *,
    density: float | None = None,
    speedup: float | None = None,
    agree: float | None = None,
    per: str = "layer",
    by: str | None = None,
    samples: int = 32,
    projections: int = 2,
    steps: int = 7,
    seed: int = 0,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> Calibration:
    """Thresholds T (x if x > T else 0) for the ReLUs of ``model`` that change its outputs least for
    what they save.

    Nothing is trained and ``model`` is left as it is; ``set_thresholds(model, found.thresholds)``
    applies them. What a threshold does to the outputs is estimated to second order: gradients of
    random projections of the centred outputs with respect to every map give, in one backward pass a
    projection, the push that the values below each candidate threshold exert together. Every map
    then gets the threshold with the least push at a common price a saved element (or MAC), and the
    price is bisected until the target is met by measurement on the samples.

    Args:
        data: batches ``x`` or ``(x, y)``; labels are not used.
        density: target: largest density of all chosen ReLU outputs together.
        speedup: target: smallest theoretical speed-up (MACs / effective MACs). agree: target: the
            most zeros at which this fraction of the samples keeps its highest output. Exactly one
            of the three.
        per: one threshold a ``layer`` or a ``channel``. Channels are judged one by one, which is
            right for mild targets; for strong ones, where the pushes of many channels add up,
            ``layer`` is the better choice.
        by: what is saved: ``elements`` (default with ``density``) or ``macs``.
        samples: how many samples are used; projections: backward passes a batch; steps: of the bisection.

    Raises:
        InputError: not exactly one target, or out of range; non-finite data.
        DataError: no data. LayerError: an unknown layer name.

    Source: thresholded ReLUs: Kurtz et al., "Inducing and Exploiting Activation Sparsity", ICML
    2020 (FATReLU).
    """
    targets = [t for t in (density, speedup, agree) if t is not None]
    if len(targets) != 1:
        raise InputError("give exactly one target: density, speedup or agree")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density must be in (0, 1], not {density}")
    if speedup is not None and not 1 <= speedup < float("inf"):
        raise InputError(f"speedup must be at least 1, not {speedup}")
    if agree is not None and not 0 < agree <= 1:
        raise InputError(f"agree must be in (0, 1], not {agree}")
    if per not in ("layer", "channel"):
        raise InputError(f"per must be 'layer' or 'channel', not {per!r}")
    if by is None:
        by = "elements" if density is not None else "macs"
    if by not in ("elements", "macs"):
        raise InputError(f"by must be 'elements' or 'macs', not {by!r}")
    batches = _inputs(data, samples)
    generator = torch.Generator().manual_seed(seed)
    with without_thresholds(model):
        table = _Table(model, batches[0], per, layers, ignore)
        if not table.unit:
            warnings.warn(
                "the model has no ReLU among the chosen layers: no threshold can be set",
                ActzipWarning,
                stacklevel=2,
            )
        with torch.no_grad(), eval_mode(model):
            tops = [model(x).argmax(1) for x in batches]
        before = measure(model, batches, layers=layers)
        for x in batches if table.unit else []:
            table.add(model, x, projections, generator)
        count = sum(int(x.shape[0]) for x in batches)
        found = Calibration(
            {},
            before.density,
            before.density,
            before.theoretical_speedup,
            before.theoretical_speedup,
            1.0,
            False,
            count,
        )

        def attempt(price: float) -> tuple[bool, Calibration]:
            chosen = table.choose(price, by == "macs")
            try:
                set_thresholds(model, chosen)
                m = measure(model, batches, layers=layers)
                same = agreement(model, tops, batches)
            finally:
                clear_thresholds(model)
            made = Calibration(
                chosen,
                m.density,
                before.density,
                m.theoretical_speedup,
                before.theoretical_speedup,
                same,
                False,
                count,
            )
            found.tried.append(
                {"density": m.density, "theoretical_speedup": m.theoretical_speedup, "agreement": same}
            )
            if density is not None:
                return m.density <= density, made
            if speedup is not None:
                return m.theoretical_speedup >= speedup, made
            return same < (agree or 0), made  # reached: one step too far

        low, high = _price_range(table, by == "macs")
        best: Calibration | None = None
        start_met = (density is not None and before.density <= density) or (
            speedup is not None and before.theoretical_speedup >= speedup
        )
        if start_met or not table.unit:
            found.met = start_met or agree is not None
            return found
        for _ in range(steps):
            price = (low * high) ** 0.5
            over, made = attempt(price)
            if over:
                high = price
            else:
                low = price
            if agree is None:
                if over and (best is None or made.density >= best.density):
                    best = made  # the mildest that meets the target
            elif not over and (best is None or made.density < best.density):
                best = made
        if best is None and agree is None:
            over, made = attempt(high * 1e3)
            best = made
            best.met = over
            if not over:
                warnings.warn(
                    f"the target is out of reach of thresholds up to {LEVELS[-1]} times the mean: density "
                    f"{made.density:.3f}, theoretical speed-up {made.theoretical_speedup:.2f} is "
                    "what they give",
                    ActzipWarning,
                    stacklevel=2,
                )
        elif best is None:
            best = found
            best.met = True
        else:
            best.met = True
    best.tried = found.tried
    return best


def _price_range(table: _Table, by_macs: bool) -> tuple[float, float]:
    """Prices at which next to nothing, and nearly everything, is removed."""
    ratios: list[Tensor] = []
    for name in table.unit:
        worth = table.macs[name] if by_macs else 1.0
        saved = table.removed[name].cumsum(1)[:, 1:] * worth
        cost = table.cost[name][:, 1:]
        usable = (saved > 0) & (cost > 0)
        ratios.append((cost[usable] / saved[usable]).flatten())
    every = torch.cat(ratios) if ratios else torch.ones(1, dtype=torch.float64)
    if every.numel() == 0:
        return 1e-12, 1.0
    every = every.sort().values
    return float(every[0]) + 1e-30, float(every[-1]) * 2 + 1e-30
