"""Fine-tuning with a penalty on activation maps: one loop, its order a function of seed and epoch, resumable."""

from __future__ import annotations

import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import eval_mode, get_thresholds, set_thresholds, without_thresholds
from actzip.errors import ActzipWarning, DataError, InputError, LayerError, TrainingError
from actzip.files import read_torch, write_with
from actzip.sparsify.config import SparsifyConfig
from actzip.sparsify.costs import check_labels, measure
from actzip.sparsify.learned import LearnedThresholds
from actzip.sparsify.penalties import ActivationPenalty
from actzip.sparsify.thresholds import calibrate_thresholds
from actzip.training.batches import device_of, epoch_batches, logits, unpack
from actzip.training.mixup import mixed
from actzip.training.precision import autocast, usable

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
    """A copy of ``model``, fine-tuned so that its activation maps are sparser: same class, same ``state_dict`` keys.

    Args:
        model: a trained classifier, ``(N, ...) -> (N, classes)``; it is not changed.
        train: batches ``(x, y)`` (``x`` alone where ``distill=1``): an :class:`actzip.data.Loader`, a ``DataLoader``, or
            anything that can be iterated once an epoch. Where it has ``at(epoch, start)`` or a sampler with
            ``set_epoch``, order follows the epoch, so that a resumed run sees what it would have seen.
        val: labelled batches, looked at after each epoch, and by ``alpha="auto"``.
        recipe: :class:`SparsifyConfig`, or a mapping of its fields.
        checkpoint_dir: a folder; ``last.pt`` in it is written after each epoch, whole or not at all, and a run that finds it
            goes on from there.
        progress: called with a dict at every step (``kind="step"``) and epoch (``kind="epoch"``): epoch, epochs, step,
            steps, loss, penalty, alpha, density, accuracy, theoretical_speedup, seconds_left; True: a bar on the terminal.
        accelerator: an ``accelerate.Accelerator``; made by itself under ``torchrun`` or ``accelerate launch``.
        teacher: what ``distill`` learns from; ``model`` as it is where not given. So a model with thresholds learns to give
            what it gave without them.

    Returns:
        The sparse model in eval mode; :func:`sparsify_result` gives its history, and learned or calibrated thresholds are set on it.

    Raises:
        TrainingError: the loss is not finite: says at which step; the last checkpoint stays.
        DataError: an empty loader.
        InputError: labels outside the classes, a wrong setting, ``alpha="auto"`` without validation data.
        LayerError: an unknown layer name.

    Source: Georgiadis, CVPR 2019, section 3.1 (task loss + sum over layers of alpha_l times the norm of map l).
    """
    config = SparsifyConfig.of(recipe)
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("the model has no parameter to train")
    if config.alpha == "auto" and not config.speedup and val is None:
        raise InputError("alpha='auto' needs validation data (or speedup=, a theoretical speed-up to reach)")
    if progress is True:
        from actzip.sparsify.bar import Bar

        with Bar() as bar:
            return _Run(model, train, val, config, checkpoint_dir, bar, accelerator, teacher).run()
    return _Run(model, train, val, config, checkpoint_dir, progress or None, accelerator, teacher).run()


def _copy(model: nn.Module) -> nn.Module:
    with without_thresholds(model) as thresholds:
        made = copy.deepcopy(model)
    return set_thresholds(made, thresholds) if thresholds else made


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """In-place ReLUs cost a copy while they are watched, so for the time of training they are ordinary ones."""
    changed = [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6)) and m.inplace]
    for m in changed:
        m.inplace = False
    try:
        yield
    finally:
        for m in changed:
            m.inplace = True


class _Run:
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
        self.original = model
        self.val = val
        self.progress = progress
        self.accelerator = accelerator if accelerator is not None else _make_accelerator(config)
        self.device = self.accelerator.device if self.accelerator is not None else device_of(model)
        if self.accelerator is None:  # else it decides
            self.precision = usable(config.precision, self.device.type)
        self.main = self.accelerator is None or bool(self.accelerator.is_main_process)
        self.checkpoint: Path | None = None
        if checkpoint_dir is not None:
            folder = Path(checkpoint_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"cannot make the checkpoint folder {folder}: {error.strerror}") from error
            self.checkpoint = folder / "last.pt"
        self.student = _copy(model).to(self.device)
        self.teacher: nn.Module | None = None
        if config.distill > 0 or config.distill_maps > 0:
            self.teacher = _copy(model if teacher is None else teacher).to(self.device)
            self.teacher.eval().requires_grad_(requires_grad=False)
        self.compared = _Compared(self.student, self.teacher, config) if config.distill_maps > 0 else None
        if config.channels_last:
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train = self._shard(train)
        self.result = SparsifyResult()
        self.best: dict[str, Any] | None = None
        self.kept: dict[str, Any] | None = None  # the checkpoint, until it is taken up
        self.ema: dict[str, Tensor] = {}

    def _shard(self, train: Any) -> Any:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return train
        from actzip.data import Loader

        if isinstance(train, Loader):
            sharded = copy.copy(train)
            sharded.shard = (self.accelerator.process_index, self.accelerator.num_processes)
            return sharded
        return self.accelerator.prepare_data_loader(train)

    # -- the parts

    def _optimizer(self, learned: LearnedThresholds | None) -> torch.optim.Optimizer:
        c = self.config
        matrices = [p for p in self.student.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in self.student.parameters() if p.requires_grad and p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": c.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if learned is not None:
            groups.append({"params": learned.parameters(), "weight_decay": 0.0})
        groups = [g for g in groups if g["params"]]
        if c.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=c.lr, momentum=c.momentum, nesterov=c.momentum > 0)
        made = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
        return made(groups, lr=c.lr)

    def _rate(self, step: int, total: int, per_epoch: int) -> float:
        c = self.config
        warm = c.warmup * per_epoch
        if c.schedule == "onecycle":
            warm = max(warm, 0.3 * total)
        if step < warm:
            return (step + 1) / warm
        if c.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total - warm))))

    def _loss(
        self, out: Tensor, x: Tensor, y: Tensor | None, other: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """Task loss and distillation; where ``other`` is given, its labels count with 1 - share."""
        c = self.config
        hard = None
        if c.distill < 1 or self.teacher is None:
            if y is None:
                raise InputError("the training data has no labels; distill=1 learns from the original alone")
            hard = F.cross_entropy(out.float(), y, label_smoothing=c.label_smoothing)
            if other is not None:
                rest = F.cross_entropy(out.float(), other, label_smoothing=c.label_smoothing)
                hard = share * hard + (1 - share) * rest
            if self.teacher is None:
                return hard
        assert self.teacher is not None
        with torch.no_grad():
            target = logits(self.teacher(x)).float()
        maps = self.compared.distance() * c.distill_maps if self.compared is not None else 0.0
        if c.distill == 0:
            assert hard is not None
            return hard + maps
        t = c.temperature
        soft = (
            t
            * t
            * F.kl_div(
                F.log_softmax(out.float() / t, 1),
                F.log_softmax(target / t, 1),
                reduction="batchmean",
                log_target=True,
            )
        )
        return (soft if hard is None else (1 - c.distill) * hard + c.distill * soft) + maps

    # -- the run

    def run(self) -> nn.Module:
        c = self.config
        torch.manual_seed(c.seed)
        first = next(iter(epoch_batches(self.train, 0, self.config.seed)), None)
        if first is None:
            raise DataError("the training data has no batch")
        x0, y0 = unpack(first)
        x0 = x0[:2].to(self.device)
        with torch.no_grad(), eval_mode(self.student):
            out = logits(self.student(x0))
        if y0 is not None and c.distill < 1:
            check_labels(out, y0[:2].to(self.device))
        self.kept = self._read_checkpoint()
        if c.thresholds == "calibrated":
            self._calibrate()
        with _out_of_place(self.student):
            off = c.alpha == 0
            penalty = ActivationPenalty(
                self.student,
                c.penalty,
                alpha=0.0 if off or c.alpha == "auto" else c.alpha,  # type: ignore[arg-type]
                weighting=c.weighting,
                elements_share=c.elements_share,
                every=c.penalty_every,
                beta=c.beta,
                normalise=c.normalise,
                example=x0,
                layers=c.layers,
                ignore=c.ignore,
            )
            learned = (
                LearnedThresholds(self.student, x0, per=c.learned_per, layers=c.layers, ignore=c.ignore)
                if c.thresholds == "learned"
                else None
            )
            try:
                self._train(penalty, learned)
            finally:
                penalty.detach()
                if learned is not None:
                    learned.detach()
                if self.compared is not None:
                    self.compared.detach()
        self.result.dead = sorted(penalty.dead)
        self.result.unsuitable = dict(penalty.unsuitable)
        if self.best is not None:
            self.student.load_state_dict(self.best["model"])
            if learned is not None and self.best.get("learned"):
                learned.load(self.best["learned"])
        elif self.ema:
            self.student.load_state_dict(self.ema)
        if learned is not None:
            set_thresholds(self.student, learned.values())
        self.student.__dict__["_actzip_sparsify"] = self.result
        return self.student.eval()

    def _calibrate(self) -> None:
        """Sets thresholds on the student: those of the checkpoint, else new ones (of the main process, where there are several)."""
        c = self.config
        found: dict[str, Any] | None = (self.kept or {}).get("thresholds")
        if found is None:
            found = calibrate_thresholds(
                self.student,
                (
                    (unpack(batch)[0].to(self.device),)
                    for batch in epoch_batches(self.train, 0, self.config.seed)
                ),
                speedup=c.threshold_speedup or None,
                density=c.threshold_density or None,
                per=c.learned_per,
                samples=c.threshold_samples,
                seed=c.seed,
                layers=c.layers,
                ignore=c.ignore,
            ).thresholds
            if self.accelerator is not None and self.accelerator.num_processes > 1:
                from accelerate.utils import broadcast_object_list

                found = broadcast_object_list([found])[0]
        assert found is not None
        set_thresholds(self.student, found)

    def _train(self, penalty: ActivationPenalty, learned: LearnedThresholds | None) -> None:
        c, result = self.config, self.result
        optimizer = self._optimizer(learned)
        network: nn.Module = self.student
        if self.accelerator is not None:
            network, optimizer = self.accelerator.prepare(self.student, optimizer)
        auto: _Auto | _Steered | None = None
        if c.alpha == "auto":
            auto = _Steered(self, penalty) if c.speedup else _Auto(self, penalty)
        start = self._resume(optimizer, penalty, learned, auto)
        if auto is not None and start == 0:
            auto.begin()
        if c.ema and not self.ema:
            self.ema = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
        strength = 1.0 if isinstance(c.alpha, Mapping) else (c.alpha if not isinstance(c.alpha, str) else 0.0)
        clock = time.perf_counter()
        done_here = 0
        for epoch in range(start, c.epochs):
            batches = epoch_batches(self.train, epoch, self.config.seed)
            per_epoch = len(batches) if hasattr(batches, "__len__") else 0
            total = max(1, per_epoch * c.epochs)
            self.training_mode(network)
            began = time.perf_counter()
            loss_sum = penalty_sum = 0.0
            seen = waiting = 0
            for i, batch in enumerate(batches):
                step = epoch * per_epoch + i
                x, y = unpack(batch)
                x = x.to(self.device)
                y = y.to(self.device) if y is not None else None
                other, share = None, 1.0
                if c.mixup > 0:
                    x, other, share = mixed(x, y, c.mixup)
                if c.channels_last and x.dim() == 4:
                    x = x.contiguous(memory_format=torch.channels_last)
                if per_epoch:
                    for group in optimizer.param_groups:
                        group["lr"] = c.lr * self._rate(step, total, per_epoch)
                ramp = min(1.0, (step + 1) / (c.ramp * total)) if c.ramp > 0 and per_epoch else 1.0
                if c.release > 0 and per_epoch:
                    ramp *= min(1.0, (total - step) / (c.release * total))
                penalty.alpha = auto.alpha if auto is not None else strength * ramp
                last_of_step = (i + 1) % c.accumulate == 0 or i + 1 == per_epoch
                sync = (
                    self.accelerator.no_sync(network)
                    if self.accelerator is not None and not last_of_step
                    else nullcontext()
                )
                with sync:
                    with self._autocast():
                        out = logits(network(x))
                        if (seen == 0 and y is not None and c.distill < 1) or (
                            y is not None
                            and c.distill < 1
                            and out.dim() == 2
                            and int(y.max()) >= out.shape[1]
                        ):
                            check_labels(out, y)
                        task = self._loss(out, x, y, other, share)
                    cost = penalty()
                    if learned is not None:
                        cost = cost + learned.penalty(penalty.alpha)
                    loss = (task + cost) / c.accumulate
                    value = float((task + cost).detach())
                    if not math.isfinite(value):
                        raise self._not_finite(value, epoch, i)
                    if self.accelerator is not None:
                        self.accelerator.backward(loss)
                    else:
                        loss.backward()  # type: ignore[no-untyped-call]
                waiting += 1
                if last_of_step:
                    self._step(optimizer, network, learned)
                    waiting = 0
                seen += 1
                done_here += 1
                loss_sum += float(task.detach())
                penalty_sum += float(cost.detach())
                if auto is not None and per_epoch:
                    auto.after(i, per_epoch, step, total)
                if self.progress is not None and self.main:
                    left = (
                        (time.perf_counter() - clock) / done_here * (total - step - 1) if per_epoch else None
                    )
                    known = penalty.densities
                    self.progress(
                        {
                            "kind": "step",
                            "epoch": epoch + 1,
                            "epochs": c.epochs,
                            "step": i + 1,
                            "steps": per_epoch,
                            "loss": loss_sum / seen,
                            "penalty": penalty_sum / seen,
                            "alpha": penalty.alpha,
                            "density": sum(known.values()) / len(known) if known else None,
                            "accuracy": result.history[-1].accuracy if result.history else None,
                            "theoretical_speedup": (
                                result.history[-1].theoretical_speedup if result.history else None
                            ),
                            "seconds_left": left,
                        }
                    )
            if waiting:
                self._step(optimizer, network, learned)
            if not seen:
                raise DataError("the training data has no batch")
            entry = EpochResult(
                epoch + 1, loss_sum / seen, penalty_sum / seen, penalty.alpha, time.perf_counter() - began
            )
            if self.val is not None:
                with self._averaged(), learned.applied() if learned is not None else nullcontext():
                    m = measure(self.student, self.val)
                entry.accuracy, entry.validation_loss = m.accuracy, m.loss
                entry.density, entry.theoretical_speedup = m.density, m.theoretical_speedup
            result.history.append(entry)
            result.alpha = penalty.alpha
            if auto is not None:
                auto.epoch_end(epoch + 1 == c.epochs)
            self._save(optimizer, penalty, learned, auto, epoch + 1)
            if self.progress is not None and self.main:
                left = (time.perf_counter() - clock) / (epoch + 1 - start) * (c.epochs - epoch - 1)
                self.progress({"kind": "epoch", "epochs": c.epochs, "seconds_left": left, **asdict(entry)})
        if auto is not None:
            auto.finish()

    def training_mode(self, network: nn.Module) -> None:
        """As ``train()``, but for BatchNorm layers that are frozen."""
        network.train()
        if self.config.freeze_norm:
            for m in network.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()

    def _autocast(self) -> Any:
        if self.accelerator is not None:
            return self.accelerator.autocast()
        return autocast(self.device.type) if self.precision == "bfloat16" else nullcontext()

    def _step(self, optimizer: Any, network: nn.Module, learned: LearnedThresholds | None) -> None:
        c = self.config
        if c.clip > 0:
            torch.nn.utils.clip_grad_norm_(network.parameters(), c.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if learned is not None:
            learned.clamp()
        if self.ema:
            with torch.no_grad():
                for k, v in self.student.state_dict().items():
                    if v.is_floating_point():
                        self.ema[k].lerp_(v.detach(), 1 - c.ema)
                    else:
                        self.ema[k].copy_(v)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with its averaged weights, where there are any."""
        if not self.ema:
            yield
            return
        kept = {k: v.detach().clone() for k, v in self.student.state_dict().items()}
        self.student.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.student.load_state_dict(kept)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights that would be returned now."""
        source = self.ema or self.student.state_dict()
        return {k: v.detach().clone() for k, v in source.items()}

    def _not_finite(self, value: float, epoch: int, i: int) -> TrainingError:
        kept = ""
        if self.checkpoint is not None:
            kept = (
                f"; the last good checkpoint (epoch {epoch}) is {self.checkpoint}"
                if self.checkpoint.exists()
                else "; there was no checkpoint yet"
            )
        return TrainingError(
            f"the loss is {value} at epoch {epoch + 1}, step {i + 1}{kept}; a lower lr or alpha may help"
        )

    def _save(
        self,
        optimizer: Any,
        penalty: ActivationPenalty,
        learned: LearnedThresholds | None,
        auto: _Auto | _Steered | None,
        epochs_done: int,
    ) -> None:
        if self.checkpoint is None or not self.main:
            return
        if not all(
            bool(torch.isfinite(v).all()) for v in self.student.state_dict().values() if v.is_floating_point()
        ):
            raise TrainingError(
                f"weights are not finite after epoch {epochs_done}; {self.checkpoint} keeps the epoch before"
            )
        state = {
            "epochs_done": epochs_done,
            "config": self.config.mark(),
            "model": self.student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "penalty": penalty.state_dict(),
            "learned": learned.state() if learned is not None else {},
            "thresholds": get_thresholds(self.student) if self.config.thresholds == "calibrated" else None,
            "ema": self.ema,
            "best": self.best,
            "auto": auto.state() if auto is not None else {},
            "rng": torch.get_rng_state(),
            "history": [asdict(h) for h in self.result.history],
            "checks": self.result.checks,
            "floor": self.result.floor,
        }
        write_with(self.checkpoint, lambda f: torch.save(state, f))

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """What an earlier run left; None where there is nothing."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        try:
            state = read_torch(self.checkpoint)
        except DataError as error:
            raise DataError(f"no readable checkpoint: {error}; delete it to start anew") from error
        if not isinstance(state, dict):
            raise DataError(
                f"{self.checkpoint} is not a checkpoint but a {type(state).__name__}; delete it to start anew"
            )
        return state

    def _resume(
        self,
        optimizer: Any,
        penalty: ActivationPenalty,
        learned: LearnedThresholds | None,
        auto: _Auto | _Steered | None,
    ) -> int:
        state, self.kept = self.kept, None
        if state is None:
            return 0
        if state.get("config") != self.config.mark():
            raise DataError(
                f"{self.checkpoint} belongs to a run with other settings; use another folder, or delete it"
            )
        self.student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        penalty.load_state_dict(state["penalty"])
        if learned is not None:
            learned.load(state["learned"])
        if auto is not None:
            auto.load(state["auto"])
        self.ema, self.best = state["ema"], state["best"]
        torch.set_rng_state(state["rng"])
        self.result.history = [EpochResult(**h) for h in state["history"]]
        self.result.checks = state["checks"]
        self.result.floor = state["floor"]
        return int(state["epochs_done"])


class _Compared:
    """Outputs of the same modules of student and teacher, and how far apart they are."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, config: SparsifyConfig) -> None:
        assert teacher is not None
        given = config.distill_layers
        self.names: list[str] = [given] if isinstance(given, str) else [str(n) for n in given]
        self.outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._hooks = []
        for model, kept in zip((student, teacher), self.outputs):
            modules = dict(model.named_modules())
            for name in self.names:
                if name not in modules:
                    raise LayerError(f"distill_layers: the model has no module {name!r}")
                self._hooks.append(modules[name].register_forward_hook(_keep(kept, name)))

    def distance(self) -> Tensor:
        """Mean over the modules of |student - teacher|^2 / |teacher|^2, of the latest pass of each."""
        mine, wanted = self.outputs
        missing = [n for n in self.names if n not in mine or n not in wanted]
        if missing:
            raise LayerError(f"distill_layers: the forward pass does not run {missing[0]!r}")
        terms = []
        for name in self.names:
            y, t = mine.pop(name), wanted.pop(name)
            terms.append((y - t).float().square().mean() / t.float().square().mean().clamp(min=1e-12))
        return torch.stack(terms).mean()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise LayerError(f"distill_layers: {name!r} gives a {type(output).__name__}, not a tensor")
        kept[name] = output

    return hook


class _Auto:
    """alpha="auto": raises alpha while validation accuracy is at or above the floor, lowers it where it is below."""

    def __init__(self, run: _Run, penalty: ActivationPenalty) -> None:
        self.run = run
        self.penalty = penalty
        self.alpha = run.config.alpha_start
        self.fallback: tuple[float, dict[str, Any]] | None = None

    def begin(self) -> None:
        c, result = self.run.config, self.run.result
        assert self.run.val is not None
        m = measure(self.run.student, self.run.val, work=True, limit=c.check_samples or None)
        if m.accuracy is None:
            raise InputError("alpha='auto' needs labelled validation data")
        result.floor = min(1.0, c.floor if c.floor is not None else m.accuracy + c.floor_margin)
        self._consider(m.accuracy, m.theoretical_speedup, step=0)

    def after(self, i: int, per_epoch: int, step: int, total: int) -> None:
        checks = self.run.config.checks
        if (i + 1) * checks // per_epoch > i * checks // per_epoch and i + 1 < per_epoch:
            self._check(step + 1)

    def epoch_end(self, last: bool) -> None:
        self._check(len(self.run.result.history), epoch=True)

    def _check(self, step: int, *, epoch: bool = False) -> None:
        run, c = self.run, self.run.config
        assert run.val is not None and run.result.floor is not None
        with run._averaged():
            m = measure(run.student, run.val, limit=c.check_samples or None)
        assert m.accuracy is not None
        self._consider(m.accuracy, m.theoretical_speedup, step=step)
        ok = m.accuracy >= run.result.floor
        self.alpha = self.alpha * c.alpha_step if ok else self.alpha / c.alpha_step
        run.training_mode(run.student)

    def _consider(self, accuracy: float, speedup: float, step: int) -> None:
        run = self.run
        assert run.result.floor is not None
        run.result.checks.append(
            {"step": step, "alpha": self.alpha, "accuracy": accuracy, "theoretical_speedup": speedup}
        )
        if accuracy >= run.result.floor:
            if run.best is None or speedup > run.best["theoretical_speedup"]:
                run.best = {"model": run.weights(), "theoretical_speedup": speedup, "accuracy": accuracy}
        elif run.best is None and (self.fallback is None or accuracy > self.fallback[0]):
            self.fallback = (
                accuracy,
                {"model": run.weights(), "theoretical_speedup": speedup, "accuracy": accuracy},
            )

    def finish(self) -> None:
        run = self.run
        if run.best is None:
            run.result.floor_met = False
            assert self.fallback is not None
            run.best = self.fallback[1]
            warnings.warn(
                f"no state of this run reached the floor: validation accuracy {run.result.floor:.4f} was asked for, the "
                f"best found is {self.fallback[0]:.4f} (theoretical speed-up {run.best['theoretical_speedup']:.2f}), "
                "which is what is returned",
                ActzipWarning,
                stacklevel=4,
            )

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "fallback": list(self.fallback) if self.fallback else None}

    def load(self, state: dict[str, Any]) -> None:
        self.alpha = float(state["alpha"])
        kept = state["fallback"]
        self.fallback = (kept[0], kept[1]) if kept else None


class _Steered:
    """alpha="auto" with ``speedup``: a proportional-integral controller of log alpha on the relative error of the work.

    Densities answer to alpha over some hundred steps, so the integral gain is small; the proportional term, which lowers
    alpha while the work is falling, keeps it from overshooting (zeros that training has made do not all come back). What
    the estimate does not see (maps too small to penalise, evaluation instead of training mode) is corrected by the
    measurement at the end of an epoch.
    """

    INTEGRAL, PROPORTIONAL, MOST = 0.04, 6.0, 0.3

    def __init__(self, run: _Run, penalty: ActivationPenalty) -> None:
        self.config = run.config
        self.result = run.result
        self.penalty = penalty
        self.alpha = run.config.alpha_start
        self.first: float | None = None
        self.error = 0.0
        self.offset = 0.0

    def begin(self) -> None:
        """Nothing to look at before the first batch."""

    def after(self, i: int, per_epoch: int, step: int, total: int) -> None:
        if step % self.penalty.stats_every:
            return
        work = self.penalty.effective_share + self.offset
        if self.first is None:
            self.first = work
        goal = 1.0 / self.config.speedup
        ramp = self.config.ramp * total
        part = min(1.0, (step + 1) / ramp) if ramp > 0 else 1.0
        goal = self.first + (goal - self.first) * part
        error, before = work / goal - 1.0, self.error
        self.error = error
        change = self.INTEGRAL * error + self.PROPORTIONAL * (error - before)
        self.alpha *= math.exp(max(-self.MOST, min(self.MOST, change)))

    def epoch_end(self, last: bool) -> None:
        reached = self.result.history[-1].theoretical_speedup
        if reached is not None:
            self.offset = 1.0 / reached - self.penalty.effective_share

    def finish(self) -> None:
        """The last weights are the result."""

    def state(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "first": self.first, "error": self.error, "offset": self.offset}

    def load(self, state: dict[str, Any]) -> None:
        self.alpha, self.first = float(state["alpha"]), state["first"]
        self.error, self.offset = float(state["error"]), float(state["offset"])


def _make_accelerator(config: SparsifyConfig) -> Any:
    """An Accelerator where this process was launched as one of several, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise InputError(
            "WORLD_SIZE says that this is one of several processes; that needs the package 'accelerate'"
        ) from error
    cpu = not torch.cuda.is_available()
    precision = usable(config.precision, "cpu" if cpu else "cuda")
    return Accelerator(cpu=cpu, mixed_precision="bf16" if precision == "bfloat16" else "no")
