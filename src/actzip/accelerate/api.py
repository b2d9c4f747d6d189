"""``actzip.accelerate``: thresholds, repair, distillation, a search for the fastest point that
keeps a promise, and its proof."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actzip.accelerate.inputs import Inputs, gather, open_model
from actzip.accelerate.promise import Metric, Promise, Reference
from actzip.accelerate.result import Acceleration, Attempt
from actzip.activations import find_sites, get_thresholds, without_thresholds
from actzip.checks import flag, function, one_of, shown, whole
from actzip.data.form import Form
from actzip.errors import InputError, TrainingError
from actzip.profile.cost import CostModel
from actzip.profile.work import Work, measure_work, worth_of_zeros
from actzip.sparsify.repair import distil
from actzip.sparsify.table import Table
from actzip.sparsify.thresholds import Trials, changed_parameters

__all__ = ["accelerate"]

#: A point has to be predicted to save this share of the time, or of the MACs, to be worth a change
#: of the network.
_WORTH_IT = 0.02
#: Shares of the zeros' worth that are left: the search stays between them.
_LEAST, _MOST = 0.05, 1.0
#: Milder candidates, where all that were kept fail in the proof.
_MILDER = 3

Step = Callable[[str, int, int], None]


def accelerate(
    model: nn.Module | str | os.PathLike[str],
    data: Iterable[Any] | str | None,
    *,
    keep: float | None = None,
    max_error: float | None = None,
    labels: bool = False,
    metric: Metric | None = None,
    calibrate: int = 32,
    images: int = 160,
    per: str = "channel",
    by: str = "time",
    distil_steps: int = 0,
    attempts: int = 5,
    threads: int | None = None,
    compile: bool = True,
    weights: str | None = None,
    size: int | None = None,
    batch: int = 16,
    seed: int = 0,
    trust: bool = False,
    form: Form | None = None,
    progress: bool = False,
    on_step: Step | None = None,
) -> Acceleration:
    """A faster network without training: the fastest thresholds whose outputs keep a promise on
    inputs held out for it.

    Calibrates one threshold a channel for least time by the cost model of this machine, gives every
    layer back what it gave, by a fit or by mean and variance, and bisects how far to go.
    ``model`` is left as it is.

    Args:
        model: any ``nn.Module``; or a name, an import path, a ``.pt2`` or an ``.onnx`` file, as
            :func:`actzip.load` takes.
        data: batches ``x`` or ``(x, y)``, float32 (N, C, H, W); or a folder of images, a parquet
            file, an ``.npy``, a data set's name. A few dozen inputs, unlabelled, as the network
            will meet them.
        keep: promise: at least this share of held-out inputs keeps its highest output (0.99 where
            nothing is promised). With ``labels``: of the accuracy; with ``metric``: of
            ``metric(model, batches)``, higher is better.
        max_error: or: the mean of |y - y0| / |y0| over held-out inputs stays below. For outputs
            that are no scores.
        calibrate: inputs for thresholds and repair, at most half of all; images: inputs in all, at
            most. What is left is dealt to the choice among candidates and to the proof.
        per: one threshold a ``channel`` or a ``layer``.
        by: ``time`` by the cost model (calibrated for about a minute, the first time on a machine),
            or ``macs``.
        distil_steps: of distillation without labels for each candidate, after the fits. They cost
            most of the time then and seldom help.
        attempts: candidates that are tried; up to three milder ones follow where all that were kept
            fail in the proof.
        threads: of the compiled network; None: all CPUs.
        compile: compile the result (and the original, for the comparison).
        weights: a safetensors file for the model. size: images are resized and cropped to this
            square.
        batch: inputs a pass. seed: of everything random.
        trust: whether an exported program may be read (:func:`actzip.load`).
        form: shapes, normalisation and layout of the inputs of a name or file, or arrays (``data``
            is None then).
        progress: show a progress bar on standard error, where that is a terminal.
        on_step: called with (what, steps done, steps in all).

    Returns:
        An :class:`Acceleration`: the changed module, the compiled network, what was promised,
        whether it is met, and the measurements. Where no point keeps the promise, or none is
        faster, the network unchanged, and ``note`` says so.

    Raises:
        InputError: an impossible promise, inputs or outputs that are not finite, a metric that
            raises.
        DataError: too few inputs, or all alike; a missing file.

    Source: thresholds: Kurtz et al., ICML 2020; mean and variance put back: as BatchNorm
    re-estimation after pruning.
    """
    promise = Promise(0.99 if keep is None and max_error is None else keep, max_error, labels, metric)
    promise.check()
    one_of(per, "per", ("channel", "layer"))
    one_of(by, "by", ("time", "macs"))
    for what, count in (
        ("calibrate", calibrate),
        ("images", images),
        ("attempts", attempts),
        ("batch", batch),
    ):
        whole(count, what, 1)
    whole(distil_steps, "distil_steps", 0)
    whole(seed, "seed", 0, 2**63 - 1)
    for what, some in (("threads", threads), ("size", size)):
        if some is not None:
            whole(some, what, 1, 2**20)
    for what, given in (("compile", compile), ("trust", trust), ("progress", progress)):
        flag(given, what)
    function(on_step, "on_step")
    if not isinstance(weights, (str, os.PathLike, type(None))):
        raise InputError(f"weights must be the path of a safetensors file, not {shown(weights)}")
    if not isinstance(model, (nn.Module, str, os.PathLike)):
        raise InputError(f"model must be a torch.nn.Module, a name or a path, not {shown(model)}")
    module, batches, name = open_model(
        model, data, weights=weights, size=size, images=images, batch=batch, trust=trust, form=form
    )
    fixed = getattr(module, "batch", None)
    inputs = gather(batches, calibrate=calibrate, images=images, batch=fixed or batch)
    options = _Options(per, by, distil_steps if fixed is None else 0, attempts, threads, seed)
    if progress:
        from actzip.accelerate.result import bars

        with bars(on_step) as step:
            found = _Run(module, inputs, promise, options, step).result(name)
            return found.compiled_by(threads, step) if compile else found
    found = _Run(module, inputs, promise, options, on_step or _silent).result(name)
    return found.compiled_by(threads, on_step or _silent) if compile else found


def _silent(what: str, done: int, of: int) -> None:
    return None


@dataclass(frozen=True)
class _Options:
    per: str
    by: str
    distil_steps: int
    attempts: int
    threads: int | None
    seed: int


@dataclass
class _Candidate:
    """Thresholds at one share of the zeros' worth, with everything that was changed for them."""

    attempt: Attempt
    thresholds: dict[str, float | Tensor]
    parameters: dict[str, Tensor]
    work: Work


class _Run:
    """One search; all work is done on copies."""

    def __init__(
        self, module: nn.Module, inputs: Inputs, promise: Promise, options: _Options, step: Step
    ) -> None:
        self.module, self.inputs, self.promise, self.options, self.step = (
            module,
            inputs,
            promise,
            options,
            step,
        )
        self.candidates: list[_Candidate] = []

    def result(self, name: str) -> Acceleration:
        """Searches, proves, and falls back where nothing keeps the promise."""
        o, inputs = self.options, self.inputs
        self.step("measuring the original", 0, 1)
        model = _working_copy(self.module)
        example = inputs.calibrate[0]
        with without_thresholds(model):
            sparse = [s for s in find_sites(model, example[:1])[0] if s.sparse]
        cost = self._cost()
        before = measure_work(model, inputs.calibrate, cost)
        base = Acceleration(name, self.module, self.promise, before, before, example[:1].clone(), o.threads)
        prove = Reference(model, inputs.prove, self.promise, True)
        base.judged = prove.judge(model)
        base.images = {
            "calibrate": sum(map(len, inputs.calibrate)),
            "choose": sum(len(x) for x, _ in inputs.choose),
            "prove": prove.samples,
        }
        if not sparse:
            return base.unchanged(
                "the model has no ReLU, so it has no zeros to skip, and thresholds can make none"
            )
        if get_thresholds(model):
            raise InputError("the model has thresholds already; clear_thresholds(model) takes them off")
        worth = worth_of_zeros(model, example, cost)
        if not any(worth.values()):
            return base.unchanged("zeros save nothing in this network on this machine, by the cost model")
        choose = Reference(model, inputs.choose, self.promise)
        trials = self._trials(model, worth)
        self._search(trials, choose, cost)
        found = self._proven(base, prove, before)
        for i in range(_MILDER):
            if found is not None or not self._milder(trials, choose, cost, i):
                break
            found = self._proven(base, prove, before)
        found = found or self._unproven(base)
        found.tried = [c.attempt for c in self.candidates]
        return found

    def _cost(self) -> CostModel | None:
        if self.options.by == "macs":
            return None
        from actzip import cpu

        threads = self.options.threads or int(cpu.info()["threads"])
        return CostModel.of_this_machine(
            threads, on_step=lambda done, of: self.step("timing this machine, once", done, of)
        )

    def _trials(self, model: nn.Module, worth: dict[str, float]) -> Trials:
        total = len(self.inputs.calibrate)
        done = [0]

        def count() -> None:
            done[0] += 1
            self.step("weighing thresholds", done[0], total)

        self.step("weighing thresholds", 0, total)
        table = Table(
            model,
            self.inputs.calibrate,
            per=self.options.per,
            repaired=True,
            projections=4,
            seed=self.options.seed,
            on_batch=count,
        )
        every = {name: worth.get(name, 0.0) for name in table.unit}
        return Trials(model, self.inputs.calibrate, table, every, repaired=True)

    def _search(self, trials: Trials, choose: Reference, cost: CostModel | None) -> None:
        """Bisects the share of the zeros' worth that is left."""
        low, high = _LEAST, _MOST
        each = 1 + self.options.distil_steps
        total = self.options.attempts * each
        for i in range(self.options.attempts):
            share = 0.65 if i == 0 else (low + high) / 2
            done = i * each

            def tick(steps: int, done: int = done) -> None:
                self.step("trying thresholds", done + steps, total)

            tick(0)
            made = self._attempt(trials, share, choose, cost, tick)
            if made is None:
                low = share
                continue
            self.candidates.append(made)
            low, high = (low, share) if made.attempt.kept else (share, high)
        self.step("trying thresholds", total, total)

    def _milder(self, trials: Trials, choose: Reference, cost: CostModel | None, done: int) -> bool:
        """Tries milder thresholds than any that were kept, and by luck, where they were chosen."""
        kept = [c.attempt.share for c in self.candidates if c.attempt.kept]
        if not kept:
            return False
        each = 1 + self.options.distil_steps

        def tick(steps: int) -> None:
            self.step("trying milder thresholds", done * each + steps, _MILDER * each)

        tick(0)
        made = self._attempt(trials, (max(kept) + _MOST) / 2, choose, cost, tick)
        self.candidates += [made] if made is not None else []
        return made is not None and made.attempt.kept

    def _attempt(
        self,
        trials: Trials,
        share: float,
        choose: Reference,
        cost: CostModel | None,
        tick: Callable[[int], None],
    ) -> _Candidate | None:
        thresholds = trials.thresholds(share)
        if not thresholds:
            return None
        work = trials.put(thresholds)
        steps = [0]

        def count() -> None:
            steps[0] += 1
            tick(steps[0])

        try:
            distil(
                work,
                trials.model,
                self.inputs.calibrate,
                steps=self.options.distil_steps,
                seed=self.options.seed,
                batch=min(16, len(trials.sample)),
                on_step=count,
            )
        except TrainingError:
            return None
        judged = choose.judge(work)["promised"]
        after = measure_work(work, self.inputs.calibrate, cost)
        attempt = Attempt(
            share, after.density, after.theoretical_speedup, after.ms, judged, self.promise.kept(judged)
        )
        return _Candidate(attempt, get_thresholds(work), changed_parameters(trials.model, work), after)

    def _proven(self, base: Acceleration, prove: Reference, before: Work) -> Acceleration | None:
        """The fastest candidate that keeps the promise on inputs that chose nothing; None for none."""
        for c in sorted((c for c in self.candidates if c.attempt.kept), key=lambda c: _time(c.work)):
            if _time(c.work) > (1 - _WORTH_IT) * _time(before):
                break
            if c.attempt.proof is not None:  # it failed
                continue
            made = base.with_point(c.thresholds, c.parameters, c.work)
            made.judged = prove.judge(made.model)
            promised = made.judged["promised"]
            c.attempt.proof = promised
            if self.promise.kept(promised):
                made.met, made.proven = True, self.promise.proven(promised)
                return made
        return None

    def _unproven(self, base: Acceleration) -> Acceleration:
        """The network unchanged, and why."""
        kept = [c for c in self.candidates if c.attempt.kept]
        tried = f"{len(self.candidates)} points were tried"
        if not kept:
            return base.unchanged(f"no thresholds keep the promise ({self.promise}): {tried}")
        if any(c.attempt.proof is not None for c in kept):
            return base.unchanged(f"no thresholds keep the promise on the inputs of the proof: {tried}")
        return base.unchanged(f"nothing that keeps the promise is predicted to be faster: {tried}")


def _time(work: Work) -> float:
    return work.effective_macs if work.ms is None else work.ms


def _working_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that convolutions run faster on."""
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        raise InputError(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    for m in made.modules():
        m.training = False
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
