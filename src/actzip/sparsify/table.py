"""What every candidate threshold of every map, or channel, removes and what that does to the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, Site, eval_mode, run_model
from actzip.sparsify.judge import are_scores
from actzip.sparsify.shifts import MOST, Shift, denser_above, shiftable
from actzip.training.batches import output_tensors

__all__ = ["LEVELS", "Table"]

#: Candidate thresholds, in units of the mean of the positive values of a map (or channel).
LEVELS = (0.0, 0.02, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.38, 0.47, 0.57, 0.7, 0.85, 1.0, 1.25, 1.6)
#: Scores count as the softmax at this temperature feels them: the likely classes most.
TEMPERATURE = 3.0
#: Behind maps with fewer values a channel, of all inputs, repair puts less right than elsewhere.
VALUES = 5000


class Table:
    """For each unit (map, or channel of one) and candidate threshold: what it removes and what that
    costs.

    What a threshold does to the outputs is estimated to second order: gradients of random
    projections of the centred outputs with respect to every map give, in one backward pass a
    projection, the push that the values below each candidate exert together. Scores are weighed as
    their divergence weighs them (Fisher's information), other outputs alike. With ``repaired`` the
    mean of what is removed counts for nothing, for :func:`actzip.sparsify.repair.repair` puts it
    back, and maps of few values count more, for it is estimated on them; and what their units cost
    is drawn to the mean over all units, for a gradient of few inputs misses what others feel. Then
    channels may be shifted too (:mod:`actzip.sparsify.shifts`), where that costs less, and flipped:
    their thresholds, and all that is told of them here, are of what is missing to the upper limit.

    Args:
        model: without thresholds.
        batches: inputs (N, ...); units are scaled by the first.
        per: ``layer`` or ``channel``.
        projections: backward passes a batch.
        on_batch: called after each batch.

    Attributes:
        unit: the mean positive value of each unit, by site.
        removed: elements that each threshold removes, by site: units x levels.
        cost: mean square of what that pushes the outputs by, likewise.
        elements, nonzeros: of each site, of all samples.
        shiftable: where channels can be shifted; flipped: which of them are flipped; shift: what
            each threshold shifts them by, units x levels.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        *,
        per: str,
        repaired: bool = False,
        projections: int = 2,
        seed: int = 0,
        layers: Any = None,
        ignore: Any = None,
        on_batch: Callable[[], None] | None = None,
    ) -> None:
        self.per, self.repaired = per, repaired
        self.unit: dict[str, Tensor] = {}
        self.elements: dict[str, int] = {}
        self._channels: dict[str, int] = {}
        self.shiftable = shiftable(model, batches[0]) if repaired and per == "channel" else {}
        self.flipped: dict[str, Tensor] = {}
        self._scale(model, batches[0], layers, ignore)
        self.shiftable = {k: v for k, v in self.shiftable.items() if k in self.unit}
        shape = {k: (u.numel(), len(LEVELS)) for k, u in self.unit.items()}
        self.removed = {k: torch.zeros(s, dtype=torch.float64) for k, s in shape.items()}
        self.nonzeros = dict.fromkeys(self.unit, 0)
        self.cost = {k: torch.zeros(s, dtype=torch.float64) for k, s in shape.items()}
        self.shift: dict[str, Tensor] = {}
        self._full = {k: torch.zeros(shape[k][0], dtype=torch.float64) for k in self.shiftable}
        self._below = {k: torch.zeros(2, *shape[k], dtype=torch.float64) for k in self.shiftable}
        self._moved = {k: torch.zeros(3, *shape[k], dtype=torch.float64) for k in self.shiftable}
        generator = torch.Generator().manual_seed(seed)
        for x in batches if self.unit else ():
            self._add(model, x, projections, generator)
            if on_batch is not None:
                on_batch()
        for name in self.shiftable:
            self._choose_shifts(name)
        for name in self.unit if repaired else ():
            few = VALUES * self._channels[name] / max(1, self.elements[name])
            self.cost[name] = (1 + few) * self._shrunk(name, few / (1 + few))

    def _scale(self, model: nn.Module, x: Tensor, layers: Any, ignore: Any) -> None:
        def see(site: Site, y: Tensor) -> None:
            if not site.sparse or y.dim() < 2:
                return
            if site.name in self.shiftable:
                self.flipped[site.name] = denser_above(y, self.shiftable[site.name])
                y = self._turned(site.name, y, self.shiftable[site.name].high)
            dims = [d for d in range(y.dim()) if d != 1 or self.per == "layer"]
            total, count = y.sum(dims), (y != 0).sum(dims)
            whole = y.sum() / (y != 0).sum().clamp(min=1)
            mean = torch.where(count > 0, total / count.clamp(min=1), whole).reshape(-1)
            self.unit[site.name], self.elements[site.name] = mean, 0
            self._channels[site.name] = int(y.shape[1])

        with ActivationTap(model, see, layers=layers, ignore=ignore), eval_mode(model), torch.no_grad():
            run_model(model, x)

    def _turned(self, name: str, y: Tensor, high: float) -> Tensor:
        """A map whose flipped channels are ``high`` less what they were; with 0, gradients of that."""
        flipped = self.flipped.get(name)
        if flipped is None or not bool(flipped.any()):
            return y
        return torch.where(flipped.reshape(1, -1, *([1] * (y.dim() - 2))), high - y, y)

    def _high(self, name: str) -> float:
        return self.shiftable[name].high if name in self.shiftable else math.inf

    def _add(self, model: nn.Module, x: Tensor, projections: int, generator: torch.Generator) -> None:
        """Counts one batch: forward, and a backward pass a projection of the outputs."""
        maps: list[tuple[str, Tensor]] = []

        def see(site: Site, y: Tensor) -> Tensor | None:
            if site.name not in self.unit:
                return None
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            maps.append((site.name, y))
            return y

        with ActivationTap(model, see), eval_mode(model), torch.enable_grad():
            outs = [(are_scores(t), t.flatten(1)) for t in output_tensors(run_model(model, x))]
            seen = [self._turned(name, y.detach(), self._high(name)) for name, y in maps]
            bins = [self._sorted(name, v) for (name, _), v in zip(maps, seen, strict=True)]
            for r in range(projections):
                value: Any = sum(_projection(t, scores, generator) for scores, t in outs)
                grads = torch.autograd.grad(
                    value, [y for _, y in maps], retain_graph=r + 1 < projections, allow_unused=True
                )
                for (name, _), v, grad, sorted_ in zip(maps, seen, grads, bins, strict=True):
                    if grad is not None:
                        cost, terms = self._pushes(name, v, self._turned(name, grad, 0.0), sorted_)
                        self.cost[name] += cost / projections
                        if terms is not None:
                            self._moved[name] += terms / projections

    def _sorted(self, name: str, v: Tensor) -> _Bins:
        """Counts what each threshold removes of ``v``; gives where its elements fall."""
        made = _Bins(v, self.unit[name])
        removed = made.up_to(None).sum(0)
        self.elements[name] += v.numel()
        self.nonzeros[name] += int(torch.count_nonzero(v))
        if name in self.shiftable:
            counts = made.up_to(None, zeros=True).sum(0)
            self._below[name] += torch.stack([counts, made.up_to(v).sum(0)])
            full = (v >= self.shiftable[name].high).transpose(0, 1).flatten(1).sum(1)
            self._full[name] += full
            flipped = self.flipped[name]  # what was 0 there is at the limit
            removed[flipped, 1:] = (counts - full[:, None])[flipped, 1:]
            self.nonzeros[name] += int((counts[:, 0] - full)[flipped].sum())
        self.removed[name] += removed
        return made

    def _pushes(self, name: str, v: Tensor, grad: Tensor, bins: _Bins) -> tuple[Tensor, Tensor | None]:
        """Units x levels: coherent and incoherent part of what everything up to a threshold pushes
        the outputs by; and of what is shifted :meth:`_terms` of the same."""
        push = (grad * v).double()
        sums, squares = bins.up_to(push), bins.up_to(push * push)
        terms = None
        if self.repaired:  # d, what is removed (0 elsewhere), becomes d - m with its mean m over the unit
            m, g2 = bins.mean(v), (grad * grad).double()
            mixed, total, total2 = bins.up_to(g2 * v), bins.total(grad), bins.total(g2)
            if name in self.shiftable:
                padded, flipped = self.shiftable[name].padding, self.flipped[name]
                border = (padded * total).square() + padded * total2
                gone, gone2 = bins.up_to(grad, zeros=True), bins.up_to(g2, zeros=True)
                terms = self._terms(sums, squares, gone, mixed, gone2 + border)
                # padding of what is flipped stands for the limit less m
                high = self._high(name) if bool(flipped.any()) else 0.0
                edge = high * border[:, flipped].sum(0)
                terms[:2, flipped] += torch.stack([high * edge, edge])
            sums = sums - m * total
            squares = squares - 2 * m * mixed + m.square() * total2
        return (sums.square() + squares.clamp(min=0)).sum(0), terms

    @staticmethod
    def _terms(sums: Tensor, squares: Tensor, gone: Tensor, mixed: Tensor, gone2: Tensor) -> Tensor:
        """The push of everything up to a threshold where it becomes m, zeros and padding too: what 1,
        -2 m and m^2 are multiplied by, 3 x units x levels."""
        return torch.stack([sums.square() + squares, sums * gone + mixed, gone.square() + gone2]).sum(1)

    def _choose_shifts(self, name: str) -> None:
        """Shifts by the mean of what goes, where that costs less than leaving the channel where it is;
        what is flipped is always shifted."""
        count, total = self._below[name]
        by, most = total / count.clamp(min=1), MOST * self._high(name)
        flipped = self.flipped[name][:, None]
        by = torch.where(flipped, by.clamp(max=most), by)
        flat, mixed, square = self._moved[name]
        cost = flat - 2 * by * mixed + by.square() * square
        better = flipped | (cost < self.cost[name]) & (by <= most)
        better[:, 0] = False
        self.cost[name] = torch.where(better, cost, self.cost[name])
        self.shift[name] = torch.where(better, by, 0.0)

    def shifts(self, thresholds: Mapping[str, float | Tensor]) -> dict[str, Shift]:
        """How channels are shifted at these thresholds, which may lie between the candidates."""
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        made = {}
        for name, t in thresholds.items():
            if name not in self.shift:
                continue
            scaled = torch.as_tensor(t, dtype=torch.float64) / self.unit[name].double().clamp(min=1e-30)
            above = torch.searchsorted(levels, scaled).clamp(1, len(levels) - 1)
            share = ((scaled - levels[above - 1]) / (levels[above] - levels[above - 1])).clamp(0, 1)
            low, high = (self.shift[name].gather(1, i[:, None])[:, 0] for i in (above - 1, above))
            by = torch.minimum(low + share * (high - low), torch.as_tensor(t, dtype=torch.float64))
            flipped = self.flipped[name] & (scaled > 0)
            if bool((flipped | (by > 0)).any()):
                full = self._full[name] * len(by) / self.elements[name]
                made[name] = self.shiftable[name].shift(by, full, flipped)
        return made

    def _shrunk(self, name: str, share: float) -> Tensor:
        """The cost of each unit, drawn by ``share`` to what removing as much costs in all units."""
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        middle = (levels + levels.roll(1)) / 2
        gone = self.removed[name]
        if name in self.flipped:  # what else it removes is zero already
            gone = torch.where(self.flipped[name][:, None], self._below[name][0], gone)
        counts = gone.diff(dim=1, prepend=gone[:, :1])  # between a threshold and the one before
        places: Tensor | float = self.elements[name] / len(gone)
        if name in self.shift:  # those that stay are as they were
            places = torch.where(self.shift[name] > 0, self._below[name][0], places).clamp(min=1)
        spread = (counts * middle.square()).cumsum(1) - (counts * middle).cumsum(1).square() / places
        spread = spread * self.unit[name].double()[:, None].square()
        cost = self.cost[name]
        return cost + share * (spread * (cost.sum(0) / spread.sum(0).clamp(min=1e-300)) - cost)

    def choose(self, price: float, worth: Mapping[str, float]) -> dict[str, float | Tensor]:
        """The thresholds that minimise cost - price * worth * removed, unit by unit; ``worth`` is
        by site, an element."""
        chosen: dict[str, float | Tensor] = {}
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        for name, unit in self.unit.items():
            best = (self.cost[name] - price * self.removed[name] * worth[name]).argmin(1)
            t = levels[best] * unit.double()
            if bool((t > 0).any()):
                chosen[name] = float(t[0]) if self.per == "layer" else t.float()
        return chosen

    def prices(self, worth: Mapping[str, float]) -> tuple[float, float]:
        """Prices at which next to nothing, and nearly everything that is worth something, is removed."""
        ratios: list[Tensor] = []
        for name in self.unit:
            saved, cost = self.removed[name][:, 1:] * worth[name], self.cost[name][:, 1:]
            usable = (saved > 0) & (cost > 0)
            ratios.append((cost[usable] / saved[usable]).flatten())
        every = torch.cat(ratios) if ratios else torch.ones(0, dtype=torch.float64)
        if every.numel() == 0:
            return 1e-12, 1.0
        return float(every.min()) + 1e-30, float(every.max()) * 2 + 1e-30


def _projection(out: Tensor, scores: bool, generator: torch.Generator) -> Tensor:
    """A random sum of centred outputs (N, values), in units of their spread.

    Its square is on average the squared change of the values; of scores it is how the change
    diverges at :data:`TEMPERATURE`, to second order.
    """
    signs = torch.randint(0, 2, out.shape, generator=generator, dtype=torch.float32) * 2 - 1
    seen, count = out.detach(), out.shape[1]
    spread = float((seen - seen.mean(1, keepdim=True) if count > 1 else seen).square().mean().sqrt())
    share = (seen / TEMPERATURE).softmax(1) if scores else torch.full_like(seen, 1 / count)
    centred = out - (share * out).sum(1, keepdim=True) if count > 1 else out
    return (signs.to(out.dtype) * (share * count).sqrt() * centred).sum() / (spread or 1.0)


class _Bins:
    """Where the elements of one map fall: sample, unit and the threshold that removes them."""

    def __init__(self, v: Tensor, unit: Tensor) -> None:
        n, units, levels = int(v.shape[0]), unit.numel(), len(LEVELS)
        shape = [1] * v.dim()
        if units > 1:
            shape[1] = units
        edges = torch.tensor(LEVELS[1:], dtype=v.dtype)
        scaled = (v / unit.reshape(shape).clamp(min=1e-30)).contiguous()
        # level 0: zero already; j: goes with threshold j and not with j - 1; the last: stays
        level = torch.where(v > 0, torch.bucketize(scaled, edges, right=False) + 1, 0)
        rows = torch.arange(n).reshape(-1, *([1] * (v.dim() - 1))) * units
        if units > 1:
            rows = rows + torch.arange(units).reshape(shape)
        self._flat = (rows * (levels + 1) + level).flatten()
        self._sizes = (n, units, levels + 1)
        self._means: Tensor | None = None

    def up_to(self, values: Tensor | None, *, zeros: bool = False) -> Tensor:
        """Sums of ``values`` (None: counts) that each threshold removes: samples x units x levels; with
        ``zeros`` also over what was zero already."""
        weights = None if values is None else values.flatten().double()
        sums = torch.bincount(self._flat, weights, minlength=math.prod(self._sizes)).reshape(self._sizes)
        sums = sums[:, :, :-1].double()
        if not zeros:
            sums[:, :, 0] = 0  # nothing goes with threshold 0
        return sums.cumsum(2)

    def total(self, values: Tensor) -> Tensor:
        """Sums of ``values`` over each unit: samples x units x 1."""
        n, units, _ = self._sizes
        return values.reshape(n, units, -1).double().sum(2, keepdim=True)

    def mean(self, v: Tensor) -> Tensor:
        """Mean over samples and positions of what each threshold removes: units x levels."""
        if self._means is None:
            units = self._sizes[1]
            self._means = self.up_to(v).sum(0) / (v.numel() // units)
        return self._means
