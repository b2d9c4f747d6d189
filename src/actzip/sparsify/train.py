"""Fine-tuning with a penalty on activation maps: one loop, its order a function of seed and epoch,
resumable."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import call_model, eval_mode, get_thresholds, set_thresholds, without_thresholds
from actzip.checks import function, shown
from actzip.errors import DataError, InputError, TrainingError
from actzip.files import write_torch
from actzip.sparsify.config import SparsifyConfig
from actzip.sparsify.costs import Measurement, measure
from actzip.sparsify.distill import Objective
from actzip.sparsify.learned import LearnedThresholds
from actzip.sparsify.penalties import ActivationPenalty
from actzip.sparsify.strength import AccuracyFloor, Place, Steered, Strength
from actzip.sparsify.thresholds import calibrate_thresholds, put_parameters
from actzip.training import packed_activations
from actzip.training.batches import batches_of, check_labels, check_loader, epoch_batches, logits, unpack
from actzip.training.devices import Devices
from actzip.training.loop import Pace, WeightAverage, read_checkpoint, train_mode
from actzip.training.mixup import mixed

__all__ = ["EpochResult", "SparsifyResult", "sparsify", "sparsify_result"]

Progress = Callable[[dict[str, Any]], None]


@dataclass
class EpochResult:
    """One epoch: means over its batches, and validation figures (None without validation data)."""

    epoch: int
    loss: float
    penalty: float
    alpha: float
    seconds: float
    accuracy: float | None = None
    validation_loss: float | None = None
    density: float | None = None
    theoretical_speedup: float | None = None


@dataclass
class SparsifyResult:
    """What a sparsification did.

    Attributes:
        history: one entry an epoch.
        checks: ``alpha="auto"``: one entry a check: step, alpha, accuracy, theoretical_speedup.
        alpha: the last strength.
        floor: the lowest validation accuracy allowed (``auto``), and ``floor_met``.
        dead: maps that died.
        unsuitable: activations that cannot become sparse, by name, with their kind.
    """

    history: list[EpochResult] = field(default_factory=list)
    checks: list[dict[str, float]] = field(default_factory=list)
    alpha: float = 0.0
    floor: float | None = None
    floor_met: bool = True
    dead: list[str] = field(default_factory=list)
    unsuitable: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def sparsify_result(model: nn.Module) -> SparsifyResult:
    """What :func:`sparsify` recorded of a model that it returned.

    Raises:
        InputError: the model does not come from :func:`sparsify`.
    """
    result = model.__dict__.get("_actzip_sparsify")
    if not isinstance(result, SparsifyResult):
        raise InputError("this model does not come from actzip.sparsify")
    return result


def sparsify(
    model: nn.Module,
    train: Any,
    val: Iterable[Any] | None = None,
    recipe: SparsifyConfig | Mapping[str, Any] | None = None,
    *,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    accelerator: Any = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """A copy of ``model``, fine-tuned so that its activation maps are sparser: same class, same
    ``state_dict`` keys.

    Args:
        model: a trained classifier, ``(N, ...) -> (N, classes)``; it is not changed.
        train: batches ``(x, y)`` (``x`` alone where ``distill=1``): an :class:`actzip.data.Loader`,
            a ``DataLoader``, or anything that can be iterated once an epoch. Where it has
            ``at(epoch, start)`` or a sampler with ``set_epoch``, order follows the epoch, so that a
            resumed run sees what it would have seen.
        val: labelled batches, looked at after each epoch, and by ``alpha="auto"``.
        recipe: :class:`SparsifyConfig`, or a mapping of its fields.
        checkpoint_dir: a folder; ``last.pt`` in it is written after each epoch, whole or not at
            all, and a run that finds it goes on from there.
        progress: called with a dict at every step (``kind="step"``) and epoch (``kind="epoch"``):
            epoch, epochs, step, steps, loss, penalty, alpha, density, accuracy,
            theoretical_speedup, seconds_left; True: a bar on the terminal.
        accelerator: an ``accelerate.Accelerator``; made by itself under ``torchrun`` or
            ``accelerate launch``.
        teacher: what ``distill`` learns from; ``model`` as it is where not given. So a model with
            thresholds learns to give what it gave without them.

    Returns:
        The sparse model in eval mode; :func:`sparsify_result` gives its history, and learned or
            calibrated thresholds are set on it.

    Raises:
        TrainingError: the loss is not finite: says at which step; the last checkpoint stays.
        DataError: an empty loader.
        InputError: labels outside the classes, a wrong setting, ``alpha="auto"`` without validation data.
        LayerError: an unknown layer name.

    Source: Georgiadis, CVPR 2019, section 3.1 (task loss + sum over layers of alpha_l times the
    norm of map l).
    """
    config = SparsifyConfig.of(recipe)
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameter to train")
    if config.alpha == "auto" and not config.speedup and val is None:
        raise InputError("alpha='auto' needs validation data (or speedup=, a theoretical speed-up to reach)")
    if not isinstance(checkpoint_dir, (str, os.PathLike, type(None))):
        raise InputError(f"checkpoint_dir must be the path of a folder, not {shown(checkpoint_dir)}")
    if not isinstance(progress, bool):
        function(progress, "progress")
    if not isinstance(teacher, (nn.Module, type(None))):
        raise InputError(f"teacher must be a torch.nn.Module, not {shown(teacher)}")
    if accelerator is not None and not (hasattr(accelerator, "prepare") and hasattr(accelerator, "device")):
        raise InputError(f"accelerator must be an accelerate.Accelerator, not {shown(accelerator)}")
    if progress is True:
        from actzip.sparsify.bar import Bar

        with Bar() as bar:
            return _Run(model, train, val, config, checkpoint_dir, bar, accelerator, teacher).run()
    return _Run(model, train, val, config, checkpoint_dir, progress or None, accelerator, teacher).run()


@dataclass
class _Loop:
    """What the loop turns."""

    network: nn.Module
    optimizer: Any
    penalty: ActivationPenalty
    learned: LearnedThresholds | None
    strength: Strength


@dataclass
class _Sums:
    """Over the batches of an epoch so far."""

    loss: float = 0.0
    penalty: float = 0.0
    batches: int = 0
    began: float = field(default_factory=time.perf_counter)

    def add(self, loss: float, penalty: float) -> None:
        self.loss += loss
        self.penalty += penalty
        self.batches += 1

    def result(self, epoch: int, alpha: float) -> EpochResult:
        """Of epoch ``epoch``, from 0."""
        n, seconds = self.batches, time.perf_counter() - self.began
        return EpochResult(epoch + 1, self.loss / n, self.penalty / n, alpha, seconds)


class _Run:
    """One sparsification."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        val: Iterable[Any] | None,
        config: SparsifyConfig,
        checkpoint_dir: str | os.PathLike[str] | None,
        progress: Progress | None,
        accelerator: Any,
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = config
        check_loader(train, "train")
        self.val = None if val is None else check_loader(val, "val")
        self.devices = Devices(model, config.precision, accelerator)
        self.device = self.devices.device
        self.progress = progress if self.devices.main else None
        self.checkpoint = None if checkpoint_dir is None else _folder(checkpoint_dir) / "last.pt"
        self.student = _copy(model).to(self.device)
        original: nn.Module | None = None
        if config.distill > 0 or config.distill_maps > 0:
            original = _copy(model if teacher is None else teacher).to(self.device)
            original.eval().requires_grad_(requires_grad=False)
        self.objective = Objective(self.student, original, config)
        if config.channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train = self.devices.shard(train)
        self.average = WeightAverage(self.student, config.ema)
        self.result = SparsifyResult()

    def run(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        example = self._example()
        kept = read_checkpoint(self.checkpoint)
        if self.config.thresholds == "calibrated":
            self._calibrate((kept or {}).get("thresholds"))
        try:
            with _out_of_place(self.student), self._loop(example) as loop:
                self._train(loop, kept)
        finally:
            self.objective.detach()
        return self._finish(loop)

    # -- before the first epoch

    def _example(self) -> Tensor:
        """Two samples of the first batch, after checking that they go through the model and fit
        their labels."""
        first = next(iter(self._batches(0)), None)
        if first is None:
            raise DataError("the training data has no batch")
        x, y = unpack(first)
        x = x[:2].to(self.device)
        with torch.no_grad(), eval_mode(self.student):
            out = logits(call_model(self.student, (x,), {}))
        if y is not None and self.objective.uses_labels:
            check_labels(out, y[:2].to(self.device))
        return x

    def _calibrate(self, found: dict[str, Any] | None) -> None:
        """Sets thresholds on the student: those found before, else new ones, with what is behind them
        repaired (those of the main process, where there are several)."""
        c = self.config
        if found is not None:  # the repair is in the weights that were kept with them
            set_thresholds(self.student, found)
            return
        calibration = calibrate_thresholds(
            self.student,
            ((unpack(batch)[0].to(self.device),) for batch in self._batches(0)),
            speedup=c.threshold_speedup or None,
            density=c.threshold_density or None,
            per=c.learned_per,
            repair=True,
            samples=c.threshold_samples,
            seed=c.seed,
            layers=c.layers,
            ignore=c.ignore,
        )
        # a bias that a layer did not have would not be in the weights that are handed back
        own = self.student.state_dict()
        repaired = {k: v for k, v in calibration.parameters.items() if k in own}
        put_parameters(self.student, self.devices.agreed(repaired))
        set_thresholds(self.student, self.devices.agreed(calibration.thresholds))

    @contextmanager
    def _loop(self, example: Tensor) -> Iterator[_Loop]:
        """The parts of the loop, attached to the student inside the block."""
        c = self.config
        penalty = ActivationPenalty(
            self.student,
            c.penalty,
            alpha=0.0 if c.alpha in (0, "auto") else c.alpha,  # type: ignore[arg-type]
            weighting=c.weighting,
            elements_share=c.elements_share,
            every=c.penalty_every,
            beta=c.beta,
            normalise=c.normalise,
            example=example,
            layers=c.layers,
            ignore=c.ignore,
        )
        learned = None
        try:
            if c.thresholds == "learned":
                learned = LearnedThresholds(
                    self.student, example, per=c.learned_per, layers=c.layers, ignore=c.ignore
                )
            optimizer = _optimizer(c, self.student, learned)
            network, optimizer = self.devices.prepare(self.student, optimizer)
            yield _Loop(network, optimizer, penalty, learned, self._strength(penalty, learned))
        finally:
            penalty.detach()
            if learned is not None:
                learned.detach()

    def _strength(self, penalty: ActivationPenalty, learned: LearnedThresholds | None) -> Strength:
        c = self.config
        if c.alpha != "auto":
            return Strength(c)
        if c.speedup:
            return Steered(c, penalty)

        def state() -> dict[str, Any]:
            return {"model": self.average.weights(), "learned": learned.state() if learned else {}}

        return AccuracyFloor(c, self._look, state)

    # -- the epochs

    def _train(self, loop: _Loop, kept: dict[str, Any] | None) -> None:
        epochs = self.config.epochs
        start = 0 if kept is None else self._resume(loop, kept)
        if start == 0:
            loop.strength.begin()
        self.average.start()
        pace = Pace()
        for epoch in range(start, epochs):
            entry = self._epoch(loop, epoch, pace, done=start)
            self._validate(entry)
            self.result.history.append(entry)
            self.result.alpha = loop.penalty.alpha
            loop.strength.epoch_end(epoch + 1, entry.theoretical_speedup)
            self._save(loop, epoch + 1)
            if self.progress is not None:
                left = pace.seconds_left(epoch + 1 - start, epochs - epoch - 1)
                self.progress({"kind": "epoch", "epochs": epochs, "seconds_left": left, **asdict(entry)})
        loop.strength.finish()

    def _epoch(self, loop: _Loop, epoch: int, pace: Pace, done: int) -> EpochResult:
        """One epoch; ``done``: those before this run, which ``pace`` did not see."""
        batches = self._batches(epoch)
        per_epoch = batches_of(batches)
        train_mode(loop.network, freeze_norm=self.config.freeze_norm)
        sums, whole = _Sums(), True
        for i, batch in enumerate(batches):
            place = Place(epoch, i, per_epoch, self.config.epochs)
            whole = (i + 1) % self.config.accumulate == 0 or i + 1 == per_epoch
            task, cost = self._pass(loop, batch, place, last=whole)
            if whole:
                self._step(loop)
            sums.add(float(task.detach()), float(cost.detach()))
            if per_epoch:
                loop.strength.after(place)
            if self.progress is not None:
                seen = place.step + 1 - done * per_epoch
                left = pace.seconds_left(seen, place.total - place.step - 1) if per_epoch else None
                self.progress({**self._figures(loop, place, sums), "seconds_left": left})
        if not sums.batches:
            raise DataError("the training data has no batch")
        if not whole:
            self._step(loop)
        return sums.result(epoch, loop.penalty.alpha)

    def _pass(self, loop: _Loop, batch: Any, place: Place, *, last: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch; the task loss and the cost of the penalty. ``last``:
        of the step."""
        c = self.config
        x, y, other, share = self._prepared(batch)
        if place.per_epoch:
            for group in loop.optimizer.param_groups:
                group["lr"] = c.lr * _rate(c, place)
        loop.penalty.alpha = loop.strength.at(place)
        with self.devices.accumulating(loop.network, last=last):
            with self.devices.autocast(), self._packing(loop.network):
                out = logits(loop.network(x))
                if y is not None and self.objective.uses_labels:
                    beyond = out.dim() == 2 and int(y.max()) >= out.shape[1]
                    if place.batch == 0 or beyond:
                        check_labels(out, y)
                task = self.objective(out, x, y, other, share)
            cost = loop.penalty()
            if loop.learned is not None:
                cost = cost + loop.learned.penalty(loop.penalty.alpha)
            value = float((task + cost).detach())
            if not math.isfinite(value):
                raise self._not_finite(value, place)
            self.devices.backward((task + cost) / c.accumulate)
        return task, cost

    def _packing(self, network: nn.Module) -> AbstractContextManager[Any]:
        memory = self.config.memory
        if memory == "plain":
            return nullcontext()
        return packed_activations(network, memory if isinstance(memory, int) else None)

    def _prepared(self, batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        """Samples, labels, and with mixup the other labels and the share of the first."""
        c = self.config
        x, y = unpack(batch)
        x = x.to(self.device)
        y = y.to(self.device) if y is not None else None
        other, share = None, 1.0
        if c.mixup > 0:
            x, other, share = mixed(x, y, c.mixup)
        if c.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y, other, share

    def _step(self, loop: _Loop) -> None:
        if self.config.clip > 0:
            torch.nn.utils.clip_grad_norm_(loop.network.parameters(), self.config.clip)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
        if loop.learned is not None:
            loop.learned.clamp()
        self.average.update()

    def _batches(self, epoch: int) -> Any:
        return epoch_batches(self.train, epoch, self.config.seed)

    # -- looking at it

    def _look(self) -> Measurement:
        """Of the weights that would be returned now, on the validation data of a check."""
        assert self.val is not None
        with self.average.applied():
            return measure(self.student, self.val, limit=self.config.check_samples or None)

    def _validate(self, entry: EpochResult) -> None:
        if self.val is None:
            return
        with self.average.applied():
            m = measure(self.student, self.val)
        entry.accuracy, entry.validation_loss = m.accuracy, m.loss
        entry.density, entry.theoretical_speedup = m.density, m.theoretical_speedup

    def _figures(self, loop: _Loop, place: Place, sums: _Sums) -> dict[str, Any]:
        """What is reported of a step."""
        known = loop.penalty.densities
        last = self.result.history[-1] if self.result.history else None
        return {
            "kind": "step",
            "epoch": place.epoch + 1,
            "epochs": place.epochs,
            "step": place.batch + 1,
            "steps": place.per_epoch,
            "loss": sums.loss / sums.batches,
            "penalty": sums.penalty / sums.batches,
            "alpha": loop.penalty.alpha,
            "density": sum(known.values()) / len(known) if known else None,
            "accuracy": last.accuracy if last else None,
            "theoretical_speedup": last.theoretical_speedup if last else None,
        }

    def _not_finite(self, value: float, place: Place) -> TrainingError:
        kept = ""
        if self.checkpoint is not None:
            kept = (
                f"; the last good checkpoint (epoch {place.epoch}) is {self.checkpoint}"
                if self.checkpoint.exists()
                else "; there was no checkpoint yet"
            )
        where = f"epoch {place.epoch + 1}, step {place.batch + 1}"
        return TrainingError(f"the loss is {value} at {where}{kept}; a lower lr or alpha may help")

    # -- checkpoints and the end

    def _save(self, loop: _Loop, epochs_done: int) -> None:
        if self.checkpoint is None or not self.devices.main:
            return
        weights = self.student.state_dict()
        if not all(bool(torch.isfinite(v).all()) for v in weights.values() if v.is_floating_point()):
            raise TrainingError(
                f"weights are not finite after epoch {epochs_done}; {self.checkpoint} keeps the epoch before"
            )
        state = {
            "epochs_done": epochs_done,
            "config": self.config.mark(),
            "model": weights,
            "optimizer": loop.optimizer.state_dict(),
            "penalty": loop.penalty.state_dict(),
            "learned": loop.learned.state() if loop.learned is not None else {},
            "thresholds": get_thresholds(self.student) if self.config.thresholds == "calibrated" else None,
            "ema": self.average.values,
            **loop.strength.state(),
            "rng": torch.get_rng_state(),
            "history": [asdict(h) for h in self.result.history],
        }
        write_torch(self.checkpoint, state)

    def _resume(self, loop: _Loop, state: dict[str, Any]) -> int:
        """Takes up what :meth:`_save` left; how many epochs are done."""
        if state.get("config") != self.config.mark():
            raise DataError(
                f"{self.checkpoint} belongs to a run with other settings; use another folder, or delete it"
            )
        self.student.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
        loop.penalty.load_state_dict(state["penalty"])
        if loop.learned is not None:
            loop.learned.load(state["learned"])
        loop.strength.load(state)
        self.average.values = state["ema"]
        torch.set_rng_state(state["rng"])
        self.result.history = [EpochResult(**h) for h in state["history"]]
        return int(state["epochs_done"])

    def _finish(self, loop: _Loop) -> nn.Module:
        """The student with the weights and thresholds that the run found, and its record."""
        result, best = self.result, loop.strength.best
        result.checks, result.floor = loop.strength.checks, loop.strength.floor
        result.floor_met = loop.strength.floor_met
        result.dead = sorted(loop.penalty.dead)
        result.unsuitable = dict(loop.penalty.unsuitable)
        if best is not None:
            self.student.load_state_dict(best["model"])
            if loop.learned is not None and best.get("learned"):
                loop.learned.load(best["learned"])
        elif self.average.values:
            self.student.load_state_dict(self.average.values)
        if loop.learned is not None:
            set_thresholds(self.student, loop.learned.values())
        self.student.__dict__["_actzip_sparsify"] = result
        return self.student.eval()


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the checkpoint folder {folder}: {error.strerror}") from error
    return folder


def _optimizer(
    c: SparsifyConfig, model: nn.Module, learned: LearnedThresholds | None
) -> torch.optim.Optimizer:
    """Weight decay is for matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if learned is not None:
        groups.append({"params": learned.parameters(), "weight_decay": 0.0})
    groups = [g for g in groups if g["params"]]
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, nesterov=c.momentum > 0)
    made = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
    return made(groups, lr=c.lr)


def _rate(c: SparsifyConfig, place: Place) -> float:
    """The learning rate at ``place`` as a share of the highest."""
    step, total = place.step, place.total
    warm = c.warmup * place.per_epoch
    if c.schedule == "onecycle":
        warm = max(warm, 0.3 * total)
    if step < warm:
        return (step + 1) / warm
    if c.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))


def _copy(model: nn.Module) -> nn.Module:
    with without_thresholds(model) as thresholds:
        made = copy.deepcopy(model)
    return set_thresholds(made, thresholds) if thresholds else made


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """In-place ReLUs cost a copy while they are watched, so for the time of training they are
    ordinary ones."""
    changed = [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6)) and m.inplace]
    for m in changed:
        m.inplace = False
    try:
        yield
    finally:
        for m in changed:
            m.inplace = True
