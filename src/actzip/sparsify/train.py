"""Fine-tuning with a penalty: one loop, deterministic from (seed, epoch), resumable after any epoch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, count_macs
from actzip.errors import DataError, InputError, TrainingError
from actzip.files import write_with
from actzip.sparsify.penalties import ActivationPenalty

__all__ = ["EpochResult", "Evaluation", "FitOptions", "evaluate", "fit", "seed_everything"]


@dataclass(frozen=True)
class Evaluation:
    """What a pass over labelled data says: accuracy in [0, 1], mean loss, density of the ReLU maps, exact MACs."""

    accuracy: float
    loss: float
    density: float
    macs: int
    effective_macs: int
    images: int
    layer_density: dict[str, float]

    @property
    def theoretical_speedup(self) -> float:
        """MACs / effective MACs of all convolution and linear layers."""
        return self.macs / self.effective_macs if self.effective_macs else math.inf


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, training in was.items():
            m.training = training


def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, macs: bool = True) -> Evaluation:
    """Accuracy, density and exact effective MACs of ``model`` over ``loader`` (eval mode, no gradient).

    Args:
        macs: count densities and effective MACs too; False is quicker and gives zeros there.

    Raises:
        DataError: the loader is empty.
        InputError: a label outside the model's classes.
    """
    counts = {"macs": 0, "effective": 0}
    nonzeros: dict[str, list[int]] = {}

    def activation(site: Site, y: Tensor) -> None:
        if site.sparse:
            entry = nonzeros.setdefault(site.name, [0, 0])
            entry[0] += int(torch.count_nonzero(y))
            entry[1] += y.numel()

    def compute(site: Site, call: ComputeCall) -> None:
        a, _, e = count_macs(call)
        counts["macs"] += a
        counts["effective"] += e

    correct = images = 0
    loss = 0.0
    tap = ActivationTap(model, activation, compute) if macs else None
    with _eval_mode(model), torch.no_grad():
        if tap is not None:
            tap.attach()
        try:
            for x, y in loader:
                logits = model(x)
                if logits.dim() != 2 or int(y.max()) >= logits.shape[1]:
                    raise InputError(
                        f"labels up to {int(y.max())} for an output of shape {tuple(logits.shape)}"
                    )
                correct += int((logits.argmax(1) == y).sum())
                loss += float(F.cross_entropy(logits.float(), y, reduction="sum"))
                images += len(y)
        finally:
            if tap is not None:
                tap.detach()
    if images == 0:
        raise DataError("the loader gave no batch to evaluate on")
    total = sum(e[1] for e in nonzeros.values())
    return Evaluation(
        correct / images,
        loss / images,
        sum(e[0] for e in nonzeros.values()) / total if total else 1.0,
        counts["macs"] // images,
        counts["effective"] // images,
        images,
        {n: e[0] / e[1] for n, e in nonzeros.items()},
    )


@dataclass(frozen=True)
class FitOptions:
    """How to train. ``schedule``: ``cosine`` (to 0), ``onecycle`` or ``constant``; warm-up in epochs."""

    epochs: int
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    precision: str = "float32"
    ramp: float = 0.3

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"epochs must be at least 1, not {self.epochs}")
        if self.optimizer not in ("sgd", "adam", "adamw"):
            raise InputError(f"optimizer must be sgd, adam or adamw, not {self.optimizer!r}")
        if self.schedule not in ("cosine", "onecycle", "constant"):
            raise InputError(f"schedule must be cosine, onecycle or constant, not {self.schedule!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, not {self.precision!r}")
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill must be between 0 and 1, not {self.distill}")


@dataclass
class EpochResult:
    """One epoch: mean task loss and penalty over its batches, validation figures, seconds."""

    epoch: int
    loss: float
    penalty: float
    seconds: float
    validation: dict[str, float] = field(default_factory=dict)
    alpha_scale: float = 1.0


def seed_everything(seed: int) -> None:
    """Seeds torch's generator; data order has its own (:class:`actzip.data.Loader`)."""
    torch.manual_seed(seed)


def _optimizer(model: nn.Module, o: FitOptions) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise InputError("the model has no parameter to train")
    if o.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.momentum > 0)
    cls = torch.optim.Adam if o.optimizer == "adam" else torch.optim.AdamW
    return cls(groups, lr=o.lr)


def _factor(step: int, total: int, per_epoch: int, o: FitOptions) -> float:
    """Learning rate at ``step`` as a share of ``o.lr``."""
    warm = o.warmup * per_epoch
    if o.schedule == "onecycle":
        warm = max(warm, 0.3 * total)
    if step < warm:
        return (step + 1) / warm
    if o.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, total - warm)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    model: nn.Module,
    train: Any,
    val: Iterable[tuple[Tensor, Tensor]] | None,
    options: FitOptions,
    *,
    penalty: ActivationPenalty | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int, float, float], None] | None = None,
) -> list[EpochResult]:
    """Trains ``model`` in place; with ``checkpoint`` it goes on where an earlier, killed run stopped.

    Args:
        train: a :class:`actzip.data.Loader` (its ``at(epoch)`` gives each epoch's order), or any iterable that can
            be iterated once an epoch.
        val: labelled batches, looked at after each epoch; None for none.
        penalty: added to the loss; its alpha is ramped up linearly over the first ``options.ramp`` of all steps.
        teacher: distillation: the loss is (1 - distill) * task + distill * KL to the teacher's outputs; with
            ``distill=1`` labels are not used.
        checkpoint: written after each epoch (whole or not at all) and read at the start where it exists.
        on_step: called with (epoch, step, loss, penalty).

    Returns:
        One result an epoch, those before a resume included.

    Raises:
        TrainingError: the loss is not finite; the message says at which step, the last checkpoint is kept.
        DataError: the loader gives no batch.
    """
    optimizer = _optimizer(model, options)
    results: list[EpochResult] = []
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        results = [EpochResult(**r) for r in state["results"]]
        first = len(results)
    else:
        seed_everything(seed)
    base = None if penalty is None else copy.copy(penalty.alpha)
    for epoch in range(first, options.epochs):
        loader = train.at(epoch) if hasattr(train, "at") else train
        per_epoch = len(loader) if hasattr(loader, "__len__") else 0
        total = max(1, per_epoch * options.epochs)
        model.train()
        started = time.perf_counter()
        sums, batches = [0.0, 0.0], 0
        for i, (x, y) in enumerate(loader):
            step = epoch * per_epoch + i
            factor = _factor(step, total, max(1, per_epoch), options) if per_epoch else 1.0
            for group in optimizer.param_groups:
                group["lr"] = options.lr * factor
            if penalty is not None and base is not None:
                ramp = (
                    min(1.0, (step + 1) / (options.ramp * total)) if options.ramp > 0 and per_epoch else 1.0
                )
                penalty.alpha = (
                    {k: v * ramp for k, v in base.items()} if isinstance(base, dict) else float(base) * ramp
                )  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                logits = model(x)
                task = _loss(logits.float(), y, x, teacher, options)
            cost = penalty() if penalty is not None else torch.zeros(())
            loss = task + cost
            value = float(loss.detach())
            if not math.isfinite(value):
                kept = (
                    f"; the checkpoint of epoch {epoch} is kept in {checkpoint}"
                    if checkpoint and epoch
                    else ""
                )
                raise TrainingError(f"the loss is {value} at epoch {epoch + 1}, step {i + 1}{kept}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums[0] += float(task.detach())
            sums[1] += float(cost.detach())
            batches += 1
            if on_step is not None:
                on_step(epoch, i, sums[0] / batches, sums[1] / batches)
        if batches == 0:
            raise DataError("the loader gave no batch to train on")
        result = EpochResult(epoch, sums[0] / batches, sums[1] / batches, time.perf_counter() - started)
        if val is not None:
            e = evaluate(model, val)
            result.validation = {
                "accuracy": e.accuracy,
                "loss": e.loss,
                "density": e.density,
                "theoretical_speedup": e.theoretical_speedup,
            }
        results.append(result)
        if checkpoint is not None:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "results": [vars(r) for r in results],
            }
            write_with(checkpoint, lambda f, state=state: torch.save(state, f))  # type: ignore[misc]
        if on_epoch is not None:
            on_epoch(result)
    if penalty is not None and base is not None:
        penalty.alpha = base
    return results


def _loss(logits: Tensor, y: Tensor, x: Tensor, teacher: nn.Module | None, o: FitOptions) -> Tensor:
    if teacher is None or o.distill == 0:
        return F.cross_entropy(logits, y, label_smoothing=o.label_smoothing)
    with torch.no_grad():
        target = teacher(x).float()
    t = o.temperature
    soft = F.kl_div(
        F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1), reduction="batchmean", log_target=True
    )
    if o.distill == 1:
        return soft * t * t
    hard = F.cross_entropy(logits, y, label_smoothing=o.label_smoothing)
    return (1 - o.distill) * hard + o.distill * t * t * soft
