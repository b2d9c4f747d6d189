"""Thresholds for the ReLUs of a trained network, found from a few unlabelled samples, without training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import (
    Selector,
    call_model,
    clear_thresholds,
    eval_mode,
    get_thresholds,
    set_thresholds,
    without_thresholds,
)
from actzip.checks import flag, number, one_of, shown, whole
from actzip.errors import ActzipWarning, DataError, InputError
from actzip.sparsify.costs import Measurement, map_costs, measure
from actzip.sparsify.judge import Judgement, agreement_of, are_scores
from actzip.sparsify.repair import Moments, distil, moments, repair, with_views
from actzip.sparsify.shifts import Shifts
from actzip.sparsify.table import LEVELS, Table
from actzip.training.batches import batches_in, check_finite, samples_of

__all__ = ["LEVELS", "Calibration", "Calibrator", "agreement", "calibrate_thresholds"]

#: Inputs that layers are repaired on, where there are fewer: views of them are added.
INPUTS = 96


@dataclass
class Calibration:
    """Thresholds and what they do to the samples.

    Attributes:
        thresholds: for :func:`actzip.activations.set_thresholds`.
        density: non-zero ReLU outputs / all, with the thresholds; ``density_before`` without.
        theoretical_speedup: MACs / effective MACs with them; ``theoretical_speedup_before``
            without.
        agreement: fraction of the calibration samples whose highest output is the same with and
            without (1 where outputs are no scores). That it is high proves nothing: see
            ``held_out``.
        met: whether the target was reached: by measurement on the calibration samples for a density
            or a theoretical speed-up, on held-out samples alone for an agreement.
        tried: every set of thresholds that was measured: density, theoretical_speedup, agreement.
        held_out: agreement on samples that chose nothing, with its interval; None where there were
            none.
        parameters: what the repair changed, by name; ``apply`` sets it.
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
    held_out: Judgement | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> nn.Module:
        """Sets thresholds and repaired parameters on ``model``, in place, and gives it.

        Raises:
            InputError: it is another network than the one that was calibrated.
        """
        put_parameters(model, self.parameters)
        return set_thresholds(model, self.thresholds)


def put_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Sets parameters and buffers by name, in place; a bias that a layer did not have is added."""
    modules = dict(model.named_modules())
    for name, value in parameters.items():
        path, _, last = name.rpartition(".")
        module = modules.get(path)
        if module is None or not hasattr(module, last):
            raise InputError(f"the model has no {name!r}: it is not the one that was calibrated")
        here = getattr(module, last)
        if here is None:
            setattr(module, last, nn.Parameter(value.clone()))
        elif here.shape != value.shape:
            raise InputError(f"{name!r} has shape {tuple(here.shape)}, the repaired one {tuple(value.shape)}")
        else:
            with torch.no_grad():
                here.copy_(value)


def changed_parameters(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """What :func:`put_parameters` takes to make ``before`` like ``after``."""
    old = before.state_dict()
    return {
        name: value.detach().clone().contiguous()
        for name, value in after.state_dict().items()
        if isinstance(value, Tensor) and (name not in old or not torch.equal(old[name], value))
    }


def collect_inputs(data: Iterable[Any], samples: int) -> list[Tensor]:
    """The first ``samples`` inputs of batches x or (x, y), as batches.

    Raises:
        InputError: a batch is no tensor, or holds values that are not finite. DataError: there is
            none.
    """
    batches: list[Tensor] = []
    count = 0
    for batch in batches_in(data):
        x = samples_of(batch)
        if not len(x):
            continue
        if batches and x.shape[1:] != batches[0].shape[1:]:
            raise InputError(
                f"calibration data has inputs of unlike shapes: {tuple(batches[0].shape[1:])} and "
                f"{tuple(x.shape[1:])}"
            )
        check_finite(x, "calibration data")
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
        reference: another model, or the indices of its highest outputs, one tensor a batch of
            ``data``.
        data: batches x or (x, y).

    Raises:
        DataError: no batch in ``data``.
    """
    same = count = 0
    with torch.no_grad(), eval_mode(model):
        for i, batch in enumerate(batches_in(data)):
            x = samples_of(batch)
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


class Trials:
    """Thresholds put to the test, at a share of the work that is left, on a copy of ``model``.

    Args:
        model: without thresholds, left as it is.
        batches: calibration inputs.
        worth: what an element of each site is worth.
        repaired: give layers their moments back (:mod:`actzip.sparsify.repair`).
        most: values of one map that a pass of the repair may hold, at most; fewer samples are taken
            for it.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        table: Table,
        worth: Mapping[str, float],
        *,
        repaired: bool,
        most: float = 2e8,
    ) -> None:
        self.model, self.batches, self.table, self.worth = model, list(batches), table, worth
        self.low, self.high = table.prices(worth)
        self.work = copy.deepcopy(model)
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.biasless = [m for m in self.work.modules() if getattr(m, "bias", 0) is None]
        self.wanted: Moments | None = None
        if repaired:
            x = torch.cat(self.batches)
            largest = max(table.elements.values(), default=1) / max(1, len(x))
            fit_in = max(1, int(most / max(largest, 1)))
            x = x[:fit_in]
            self.sample = with_views(x, min(fit_in, INPUTS))
            self.wanted = moments(model, self.sample, fitted=True, views=len(self.sample) - len(x))

    def left(self, price: float) -> float:
        """Share of the worth that a price leaves, by the table."""
        kept = total = 0.0
        for name in self.table.unit:
            gone, worth = self.table.removed[name], self.worth[name]
            best = (self.table.cost[name] - price * gone * worth).argmin(1, keepdim=True)
            total += self.table.nonzeros[name] * worth
            kept += (self.table.nonzeros[name] - float(gone.gather(1, best).sum())) * worth
        return kept / total if total else 1.0

    def thresholds(self, share: float) -> dict[str, float | Tensor]:
        """The thresholds that leave ``share`` of the non-zeros' worth, by the table."""
        low, high = self.low, self.high
        for _ in range(48):
            price = (low * high) ** 0.5
            low, high = (price, high) if self.left(price) > share else (low, price)
        return self.table.choose(high, self.worth)

    def put(self, thresholds: dict[str, float | Tensor]) -> nn.Module:
        """The working copy with these thresholds, shifted, flipped and repaired; of what is shifted it has
        other thresholds (:func:`actzip.activations.get_thresholds`)."""
        clear_thresholds(self.work)
        for m in self.biasless:
            m.bias = None  # type: ignore[assignment]
        self.work.load_state_dict(self.state)
        by = self.table.shifts(thresholds) if self.wanted is not None else {}
        shifts = Shifts.put(self.work, self.table.shiftable, by)
        moved = dict(thresholds)
        for name, shift in shifts.sites.items():
            moved[name] = shift.threshold(torch.as_tensor(thresholds[name]))
        set_thresholds(self.work, moved)
        if self.wanted is not None and thresholds:
            repair(self.work, self.wanted, self.sample, shifts)
        return self.work


def blend(
    a: Mapping[str, float | Tensor], b: Mapping[str, float | Tensor], share: float
) -> dict[str, float | Tensor]:
    """Thresholds between ``a`` (share 0) and ``b`` (share 1)."""
    out: dict[str, float | Tensor] = {}
    for name in [*a, *(n for n in b if n not in a)]:
        x, y = a.get(name, 0.0), b.get(name, 0.0)
        out[name] = x * (1 - share) + y * share
    return out


def calibrate_thresholds(
    model: nn.Module,
    data: Iterable[Any],
    *,
    density: float | None = None,
    speedup: float | None = None,
    agree: float | None = None,
    per: str = "layer",
    by: str | None = None,
    repair: bool = False,
    distil_steps: int = 0,
    samples: int = 32,
    projections: int = 2,
    steps: int = 7,
    seed: int = 0,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> Calibration:
    """Thresholds T (x if x > T else 0) for the ReLUs of ``model`` that change its outputs least for
    what they save.

    Nothing is trained and ``model`` is left as it is; ``found.apply(model)`` applies what was found
    (without ``repair``, ``set_thresholds(model, found.thresholds)`` does too). What a threshold
    does to the outputs is estimated to second order (:class:`actzip.sparsify.table.Table`). Every
    map then gets the threshold with the least push at a common price a saved element (or MAC), and
    the price is bisected until the target is met by measurement.

    Args:
        data: batches ``x`` or ``(x, y)``; labels are not used. Beyond ``samples`` as many again are
            held out, to measure on.
        density: target: largest density of all chosen ReLU outputs together; hit within 1 % from
            below.
        speedup: target: smallest theoretical speed-up (MACs / effective MACs). agree: target: the
            most zeros at which this fraction of held-out samples keeps its highest output (a third
            of the samples is held out where ``data`` has no more). Exactly one of the three.
        per: one threshold a ``layer`` or a ``channel``. Without ``repair``, channels are right for
            mild targets, and layers for strong ones, where the pushes of many channels add up; with
            it channels are better.
        by: what is saved: ``elements`` (default with ``density``) or ``macs``.
        repair: give the layers behind thresholds their mean and variance back
            (:mod:`actzip.sparsify.repair`). Channels may be shifted in front of their thresholds then
            (:mod:`actzip.sparsify.shifts`): these are right with ``found.parameters`` alone.
        distil_steps: so many steps of distillation without labels, after the repair.
        samples: how many samples are used; projections: backward passes a batch; steps: of the
            bisection.

    Raises:
        InputError: not exactly one target, or out of range; non-finite data; ``agree`` where
            outputs are no scores.
        DataError: no data. LayerError: an unknown layer name.

    Source: thresholded ReLUs: Kurtz et al., "Inducing and Exploiting Activation Sparsity", ICML
    2020 (FATReLU).
    """
    _check(density, speedup, agree, by)
    whole(steps, "steps", 1)
    whole(distil_steps, "distil_steps", 0)
    found = Calibrator(
        model,
        data,
        per=per,
        repair=repair,
        samples=samples,
        projections=projections,
        seed=seed,
        layers=layers,
        ignore=ignore,
        held=agree is not None,
    )
    return found.find(
        density=density, speedup=speedup, agree=agree, by=by, steps=steps, distil_steps=distil_steps
    )


class Calibrator:
    """What :func:`calibrate_thresholds` knows of a model and some inputs, for several targets.

    Arguments are those of that function.

    Args:
        held: hold samples out, also where ``data`` has no more than ``samples``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        per: str = "layer",
        repair: bool = False,
        samples: int = 32,
        projections: int = 2,
        seed: int = 0,
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
        held: bool = False,
    ) -> None:
        one_of(per, "per", ("layer", "channel"))
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {shown(model)}")
        whole(samples, "samples", 1)
        whole(projections, "projections", 1)
        whole(seed, "seed", 0, 2**63 - 1)
        flag(repair, "repair")
        self.model, self.repair, self.seed, self.layers = model, repair, seed, layers
        batches = collect_inputs(data, 2 * samples)
        with torch.no_grad(), eval_mode(model):
            call_model(model, (batches[0][:2],), {})
        self.batches, self.held = _hold_out(batches, samples, always=held)
        self._trials: dict[str, Trials] = {}
        with without_thresholds(model):
            self.table = Table(
                model,
                self.batches,
                per=per,
                repaired=repair,
                projections=projections,
                seed=seed,
                layers=layers,
                ignore=ignore,
            )
        if not self.table.unit:
            warnings.warn(
                "the model has no ReLU among the chosen layers: no threshold can be set",
                ActzipWarning,
                stacklevel=3,
            )

    def trials(self, by: str) -> Trials:
        """Candidates that save ``elements`` or ``macs``."""
        if by not in self._trials:
            worth = _worth(self.model, self.batches[0], self.table, by)
            self._trials[by] = Trials(self.model, self.batches, self.table, worth, repaired=self.repair)
        return self._trials[by]

    def find(
        self,
        *,
        density: float | None = None,
        speedup: float | None = None,
        agree: float | None = None,
        by: str | None = None,
        steps: int = 7,
        distil_steps: int = 0,
    ) -> Calibration:
        """Thresholds for exactly one target."""
        by = _check(density, speedup, agree, by)
        whole(steps, "steps", 1)
        whole(distil_steps, "distil_steps", 0)
        with without_thresholds(self.model):
            search = _Search(self.model, self.batches, self.held, self.layers, density, speedup, agree)
            trials = self.trials(by)
            found = search.run(trials, steps)
            if found.thresholds and distil_steps:
                search.distil(found, distil_steps, self.seed)
        if not found.met and self.table.unit:
            warnings.warn(
                f"the target is out of reach of thresholds up to {LEVELS[-1]} times the mean: density "
                f"{found.density:.3f}, theoretical speed-up {found.theoretical_speedup:.2f}, "
                f"agreement {found.agreement:.3f} is what they give",
                ActzipWarning,
                stacklevel=3,
            )
        return found


def _check(density: float | None, speedup: float | None, agree: float | None, by: str | None) -> str:
    if len([t for t in (density, speedup, agree) if t is not None]) != 1:
        raise InputError("give exactly one target: density, speedup or agree")
    if density is not None:
        number(density, "density", 0, 1, above=True)
    if speedup is not None:
        number(speedup, "speedup", 1)
    if agree is not None:
        number(agree, "agree", 0, 1, above=True)
    if by is None:
        return "elements" if density is not None else "macs"
    return one_of(by, "by", ("elements", "macs"))


def _hold_out(batches: list[Tensor], samples: int, *, always: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The first ``samples`` and the rest; with ``always`` a third is held out where nothing is left."""
    size = max(int(b.shape[0]) for b in batches)
    x = torch.cat(batches)
    if len(x) <= samples and always:
        samples = max(1, len(x) - len(x) // 3)
    return list(x[:samples].split(size)), list(x[samples:].split(size)) if len(x) > samples else []


def _worth(model: nn.Module, x: Tensor, table: Table, by: str) -> dict[str, float]:
    if by == "elements" or not table.unit:
        return dict.fromkeys(table.unit, 1.0)
    costs = map_costs(model, x[:1])
    return {name: costs[name].macs_per_element for name in table.unit}


class _Search:
    """The bisection of :func:`calibrate_thresholds`."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        held: list[Tensor],
        layers: Any,
        density: float | None,
        speedup: float | None,
        agree: float | None,
    ) -> None:
        self.model, self.batches, self.held, self.layers = model, batches, held, layers
        self.density, self.speedup, self.agree = density, speedup, agree
        self.outputs, self.held_outputs = _outputs(model, batches), _outputs(model, held)
        self.scores = all(are_scores(y) for y in self.outputs)
        if agree is not None and not self.scores:
            raise InputError("agree needs outputs (N, classes); give a density or a speedup")
        self.before = measure(model, batches, layers=layers)
        self.count = sum(int(x.shape[0]) for x in batches)
        self.tried: list[dict[str, float]] = []

    def judged(self, model: nn.Module) -> Calibration:
        """The model as it is, measured."""
        m = measure(model, self.batches, layers=self.layers)
        same = agreement_of(self.outputs, _outputs(model, self.batches)).value if self.scores else 1.0
        held = (
            agreement_of(self.held_outputs, _outputs(model, self.held)) if self.scores and self.held else None
        )
        self.tried.append(
            {"density": m.density, "theoretical_speedup": m.theoretical_speedup, "agreement": same}
        )
        before = self.before
        made = Calibration(
            get_thresholds(model),
            m.density,
            before.density,
            m.theoretical_speedup,
            before.theoretical_speedup,
            same,
            False,
            self.count,
            held_out=held,
        )
        made.parameters = changed_parameters(self.model, model)
        made.met = self.reached(m, made)
        return made

    def reached(self, m: Measurement, made: Calibration) -> bool:
        if self.density is not None:
            return m.density <= self.density
        if self.speedup is not None:
            return m.theoretical_speedup >= self.speedup
        return made.held_out is not None and made.held_out.value >= (self.agree or 0)

    def run(self, trials: Trials, steps: int) -> Calibration:
        """The mildest thresholds that reach a density or speed-up, or the strongest that keep an
        agreement."""
        untouched = self.judged(self.model)
        self.tried.clear()
        untouched.tried = self.tried
        if (untouched.met and self.agree is None) or not trials.table.unit:
            return untouched

        def attempt(share: float) -> Calibration:
            return self.judged(trials.put(trials.thresholds(share)))

        # the share of non-zeros that is left, by the table; kept: not reached, or still agreeing
        weak, strong = 1.0, 0.0
        mild: Calibration = untouched
        best: Calibration | None = None
        for _ in range(steps):
            share = self._guess(mild, best, weak, strong)
            made = attempt(share)
            if made.met == (self.agree is None):
                strong = share
                best = made if best is None or self.agree is None else best
            else:
                weak = share
                mild = made
            if self.agree is None and best is not None and self._hit(best):
                break
        if self.agree is not None:
            mild.tried = self.tried
            return mild
        if best is None:
            best = attempt(0.0)
        if best.met and (self.density is not None or trials.wanted is not None):
            best = self._refine(trials, weak, strong, best)
        best.tried = self.tried
        return best

    def _guess(self, mild: Calibration, best: Calibration | None, weak: float, strong: float) -> float:
        """Where to look next: where what is left is as the target asks, were it a line between what was
        measured last on both sides; the middle for an agreement."""
        if self.agree is not None:
            return (weak + strong) / 2
        above, wanted = self._left(mild), self._wanted()
        share = weak * wanted / max(above, 1e-12)
        if best is not None and above > (below := self._left(best)):
            share = strong + (weak - strong) * (wanted - below) / (above - below)
        return min(max(share, strong + 0.05 * (weak - strong)), weak - 0.02 * (weak - strong))

    def _left(self, made: Calibration) -> float:
        return made.density if self.density is not None else 1 / made.theoretical_speedup

    def _wanted(self) -> float:
        """A little below the target, of what :meth:`_left` gives."""
        return 0.995 * self.density if self.density is not None else 0.995 / (self.speedup or 1.0)

    def _refine(self, trials: Trials, weak: float, strong: float, best: Calibration) -> Calibration:
        """Between the share that misses the target and the one that reaches it, ``best``'s, until it is
        hit within 1 %."""
        mild = trials.thresholds(weak) if weak < 1 else {}
        hard = trials.thresholds(strong)
        low, high = 0.0, 1.0
        for _ in range(8):
            if self._hit(best):
                break
            middle = (low + high) / 2
            made = self.judged(trials.put(blend(mild, hard, middle)))
            if made.met:
                high, best = middle, made
            else:
                low = middle
        return best

    def _hit(self, made: Calibration) -> bool:
        if self.density is not None:
            return made.density >= 0.99 * self.density
        return made.theoretical_speedup <= 1.01 * (self.speedup or 1.0)

    def distil(self, found: Calibration, steps: int, seed: int) -> None:
        """Distils onto what was found, and measures again."""
        work = found.apply(copy.deepcopy(self.model))
        distil(work, self.model, self.batches, steps=steps, seed=seed)
        made = self.judged(work)
        low, high = 1.0, 1.25
        for _ in range(5 if self.agree is None and not made.met else 0):  # shifts moved the density a little
            middle = (low + high) / 2
            thresholds = {k: t * middle for k, t in found.thresholds.items()}
            other = self.judged(set_thresholds(work, thresholds))
            low, high, made = (low, middle, other) if other.met else (middle, high, made)
        for name in (
            "thresholds",
            "density",
            "theoretical_speedup",
            "agreement",
            "held_out",
            "parameters",
            "met",
        ):
            setattr(found, name, getattr(made, name))


def _outputs(model: nn.Module, batches: Sequence[Tensor]) -> list[Any]:
    with torch.no_grad(), eval_mode(model):
        return [model(x) for x in batches]
