"""Training with quantizers in place: weights by the straight-through estimator, scales as learned step sizes.

A small loop for those who have none. People with their own add ``quantization(model).parameters()``
to their optimiser and call ``quantization(model).clamp_scales_()`` after each step. A sparsity
penalty goes on working on a quantized model (it sees the maps before or after the quantizer,
depending on which was attached first), so both can be trained together.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import call_model, eval_mode
from actzip.checks import flag, function, number, one_of, shown, whole
from actzip.errors import DataError, InputError, TrainingError
from actzip.files import write_torch
from actzip.quantize.linear import aligned, lsq_gradients, on_grid, per_scale, pieces
from actzip.quantize.model import SiteQuantizer, quantization, visiting
from actzip.training.batches import batches_of, check_labels, check_loader, device_of, logits, unpack
from actzip.training.loop import Pace, read_checkpoint, train_mode
from actzip.training.mixup import mixed
from actzip.training.precision import autocast, usable

__all__ = ["RatePenalty", "finetune", "parameter_groups"]


class _QuantizedRate(torch.autograd.Function):
    """The map on the grid of its scale (:func:`fake_quantize`), and the sum of log2(1 + |x| / s)
    over its first samples.

    Both in one, because apart from each other their gradients would meet in two more passes over every map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, samples: int) -> Any:
        s = scale.detach().clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(x, s)
        ctx.range, ctx.samples = (qmin, qmax), samples
        shaped, looked = aligned(s, x), x[:samples]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for part in pieces(looked):
            total += torch.div(looked[part].abs(), shaped).log1p_().sum(dtype=torch.float64)
        return on_grid(x, shaped, qmin, qmax), (total / math.log(2)).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, s = ctx.saved_tensors
        qmin, qmax = ctx.range
        grad_x, grad_s = lsq_gradients(grads[0], x, s, qmin, qmax, ctx.needs_input_grad[1])
        weight = float(grads[1]) / math.log(2)
        shaped, looked, out = aligned(s, x), x[: ctx.samples], grad_x[: ctx.samples]
        total = torch.zeros(s.numel(), device=x.device)
        for part in pieces(looked):
            size = looked[part].abs()
            inverse = torch.add(size, shaped).reciprocal_().mul_(weight)
            out[part] += torch.mul(inverse, looked[part].sign())  # nothing at 0
            if grad_s is not None:
                total -= per_scale(torch.div(size, shaped).mul_(inverse), s)
        return grad_x, None if grad_s is None else grad_s + total.reshape(s.shape), None, None, None


class RatePenalty:
    """A differentiable estimate of the coded size of a quantized model's maps, in bits an element.

    The mean over all elements of all quantized maps of log2(1 + |x| / scale): nearly what a
    Golomb-like code of the integer spends, and 0 for zeros. Its gradient makes small values zero,
    large ones smaller, and scales coarser. Multiplied by a factor and added to the loss, it trains
    sparsity and quantizer together.

        with RatePenalty(model, 0.1) as penalty:
            finetune(model, train, epochs=5, penalty=penalty)

    Args:
        factor: of the loss, a bit an element.
        share: of the samples of a batch (the first ones, at least one) that it looks at; the
            estimate stays unbiased for shuffled batches, and the time falls with it.

    Attributes:
        rate: the estimate of the last forward pass, bits an element.
    """

    def __init__(self, model: nn.Module, factor: float, share: float = 1.0) -> None:
        number(factor, "factor", 0)
        number(share, "share", 0, 1, above=True)
        self.share = share
        self.model = model
        self.factor = factor
        self.rate = 0.0
        self._sums: list[Tensor] = []
        self._elements = 0
        self._context: Any = None

    def _visit(self, q: SiteQuantizer, x: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or not x.requires_grad or x.dim() == 0:
            return None
        samples = max(1, round(self.share * x.shape[0])) if x.dim() > 1 else x.shape[0]
        y, total = _QuantizedRate.apply(x, q.scale, q.range.qmin, q.range.qmax, samples)  # type: ignore[no-untyped-call]
        self._sums.append(total)
        self._elements += x[:samples].numel()
        return y  # type: ignore[no-any-return]

    def __enter__(self) -> RatePenalty:
        self._context = visiting(quantization(self.model), self._visit)
        self._context.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._context.__exit__(None, None, None)
        self._sums, self._elements = [], 0

    def __call__(self) -> Tensor:
        """factor * rate of the forward passes since the last call.

        Raises:
            TrainingError: there was none with gradients.
        """
        if not self._sums:
            raise TrainingError(
                "the penalty was asked for before a training pass of the model inside its `with` block"
            )
        rate = torch.stack(self._sums).sum() / self._elements
        self._sums, self._elements = [], 0
        self.rate = float(rate.detach())
        return self.factor * rate


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, scale_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Groups for AdamW: weights (decayed), BatchNorm and biases (not decayed), and each scale on its own.

    Scales of different maps differ by orders of magnitude; the rate of each is ``scale_lr`` times
    its present value, so one step of Adam moves it by at most about that share.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": others, "lr": lr, "weight_decay": 0.0},
    ]
    for p in quantization(model).parameters():
        groups.append({"params": [p], "lr": scale_lr * float(p.detach().mean()), "weight_decay": 0.0})
    return [g for g in groups if g["params"]]


def finetune(
    model: nn.Module,
    train: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    lr: float = 1e-3,
    scale_lr: float = 1e-3,
    weight_decay: float = 0.0,
    penalty: Callable[[], Tensor] | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 2.0,
    freeze_norm: bool = False,
    mixup: float = 0.0,
    precision: str = "float32",
    clip: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Fine-tunes a quantized classifier, in place: Adam, cosine learning rate to zero, cross-entropy.

    Args:
        train: batches (images ``N, C, H, W``, labels ``N``), iterated once an epoch. Where its
            ``len`` is not known, the learning rate falls by epochs. Where it has a method
            ``at(epoch)`` (:class:`actzip.data.Loader`), that gives the epoch's batches.
        lr, scale_lr: first learning rates of the weights and, relative to each, of the scales.
        penalty: added to the loss after each forward pass (an ``ActivationPenalty``, say).
        teacher: a float model whose outputs are learned too, with share ``distill`` of the loss.
        freeze_norm: BatchNorm keeps its statistics (for the last epochs of low-bit training).
        mixup: samples and losses of labels are mixed, with shares of Beta(mixup, mixup), as in
            :class:`~actzip.sparsify.SparsifyConfig`; 0: off.
        precision: ``float32`` or ``bfloat16`` (autocast: convolutions and what lies between; the
            quantizers divide and round in float32; on a CPU without fast bfloat16 all is float32,
            with a warning). The trained model runs in float32.
        clip: largest norm of the gradient (0: no clipping).
        checkpoint: a file written after each epoch, whole or not at all; a run that finds it goes
            on from there, and ends with the weights and scales that an unbroken run gives.
        on_epoch: called with (epoch from 1, figures) after each; on_step: with epoch, step, steps
            (of the epoch), loss and seconds_left after each step.

    Returns:
        figures of each epoch: ``loss``, ``accuracy`` (of training, 0 to 1), ``seconds``.

    Raises:
        InputError: the model is not quantized, or an option is out of range.
        DataError: an epoch without a batch; a checkpoint that cannot be read, or is of a run with
            other settings.
        TrainingError: the loss is not finite.
    """
    options = _Options(
        epochs, lr, scale_lr, weight_decay, distill, temperature, freeze_norm, mixup, precision, clip
    )
    if not isinstance(model, nn.Module) or not isinstance(teacher, (nn.Module, type(None))):
        raise InputError("model must be a torch.nn.Module, and so must teacher, where there is one")
    if not isinstance(checkpoint, (str, os.PathLike, type(None))):
        raise InputError(f"checkpoint must be a path, not {shown(checkpoint)}")
    for name, given in (("penalty", penalty), ("on_epoch", on_epoch), ("on_step", on_step)):
        function(given, name)
    path = Path(checkpoint) if checkpoint is not None else None
    return _Finetuning(model, train, options, penalty, teacher, path).run(on_epoch, on_step)


@dataclass(frozen=True)
class _Options:
    """What :func:`finetune` is told, in plain values."""

    epochs: int
    lr: float
    scale_lr: float
    weight_decay: float
    distill: float
    temperature: float
    freeze_norm: bool
    mixup: float
    precision: str
    clip: float

    def __post_init__(self) -> None:
        whole(self.epochs, "epochs", 1)
        number(self.lr, "lr", 0)
        number(self.scale_lr, "scale_lr", 0)
        number(self.weight_decay, "weight_decay", 0)
        number(self.distill, "distill", 0, 1)
        number(self.temperature, "temperature", 0, above=True)
        flag(self.freeze_norm, "freeze_norm")
        if number(self.mixup, "mixup", 0):
            number(self.mixup, "mixup", 1e-6, 1e3)
        one_of(self.precision, "precision", ("float32", "bfloat16"))
        number(self.clip, "clip", 0)

    def mark(self, *, steps: int, teacher: bool, bits: dict[str, int]) -> str:
        """What identifies a run, for checkpoints."""
        names = ("epochs", "lr", "scale_lr", "weight_decay", "distill", "temperature", "freeze_norm", "clip")
        values = {**{n: getattr(self, n) for n in names}, "steps": steps, "teacher": teacher, "bits": bits}
        # of later versions: where they are not used, checkpoints of earlier ones go on
        if self.mixup:
            values["mixup"] = self.mixup
        if self.precision != "float32":
            values["precision"] = self.precision
        return repr(values)


class _Finetuning:
    """One run of :func:`finetune`."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        options: _Options,
        penalty: Callable[[], Tensor] | None,
        teacher: nn.Module | None,
        checkpoint: Path | None,
    ) -> None:
        self.model, self.train, self.options = model, train, options
        self.penalty, self.teacher, self.checkpoint = penalty, teacher, checkpoint
        self.quantizers = quantization(model)
        self.device = device_of(model).type
        self.precision = usable(options.precision, self.device)
        o = options
        self.optimizer = torch.optim.AdamW(parameter_groups(model, o.lr, o.weight_decay, o.scale_lr))
        self.rates = [g["lr"] for g in self.optimizer.param_groups]
        self.per_epoch = batches_of(check_loader(train, "train"))  # 0: it does not say
        self.steps = o.epochs * self.per_epoch
        if teacher is not None:
            teacher.eval()  # before its first pass: its statistics are not to move
        self._check_first()
        self.mark = o.mark(steps=self.steps, teacher=teacher is not None, bits=self.quantizers.bits)
        self.figures: list[dict[str, float]] = []

    def _check_first(self) -> None:
        """The first batch goes through the model and has labels for its outputs."""
        with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(self.model):
            first = next(iter(self._batches(1)), None)
            if first is None:
                raise DataError("the training data has no batch")
            x, y = self._labelled(first)
            out = logits(call_model(self.model, (x[:2],), {}))
            check_labels(out, y[:2])
            if self.teacher is not None:
                answer = logits(call_model(self.teacher, (x[:2],), {}))
                if answer.shape != out.shape:
                    raise InputError(
                        f"teacher gives outputs {tuple(answer.shape)}, the model {tuple(out.shape)}"
                    )

    def _batches(self, epoch: int) -> Any:
        return self.train.at(epoch) if hasattr(self.train, "at") else self.train

    def _labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = unpack(batch)
        if y is None:
            raise InputError("train gives batches without labels; finetune needs (x, y)")
        return x.to(self.device), y.to(self.device)

    def run(
        self,
        on_epoch: Callable[[int, dict[str, float]], None] | None,
        on_step: Callable[[dict[str, float]], None] | None,
    ) -> list[dict[str, float]]:
        self._resume()
        done = len(self.figures)
        pace = Pace()

        def report(epoch: int, batch: int, row: dict[str, float]) -> None:
            if on_step is not None:
                step = (epoch - 1) * self.per_epoch + batch
                left = (
                    pace.seconds_left(step - done * self.per_epoch, self.steps - step)
                    if self.steps
                    else math.nan
                )
                place = {
                    "epoch": epoch,
                    "epochs": self.options.epochs,
                    "step": batch,
                    "steps": self.per_epoch,
                }
                on_step({**place, **row, "seconds_left": left})

        for epoch in range(done + 1, self.options.epochs + 1):
            row = self._epoch(epoch, report)
            self.figures.append(row)
            if on_epoch is not None:
                on_epoch(epoch, row)
            self._save()
        self.model.eval()
        return self.figures

    def _epoch(self, epoch: int, report: Callable[[int, int, dict[str, float]], None]) -> dict[str, float]:
        train_mode(self.model, freeze_norm=self.options.freeze_norm)
        start, total, right, seen = time.perf_counter(), 0.0, 0, 0
        for i, batch in enumerate(self._batches(epoch)):
            x, y = self._labelled(batch)
            out, value = self._pass(x, y, epoch, i)
            if self.options.clip > 0:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
            self.optimizer.step()
            self.quantizers.clamp_scales_()
            total += value * len(y)
            right += int((out.argmax(1) == y).sum())
            seen += len(y)
            report(epoch, i + 1, {"loss": total / seen, "accuracy": right / seen})
        if not seen:
            raise DataError(f"epoch {epoch} of the training data has no batch")
        return {"loss": total / seen, "accuracy": right / seen, "seconds": time.perf_counter() - start}

    def _pass(self, x: Tensor, y: Tensor, epoch: int, batch: int) -> tuple[Tensor, float]:
        """Forward and backward of one batch: logits and loss."""
        step = (epoch - 1) * self.per_epoch + batch
        # where the number of batches is not known the rate falls by epochs
        done = step / self.steps if self.steps else (epoch - 1) / self.options.epochs
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for g, rate in zip(self.optimizer.param_groups, self.rates):
            g["lr"] = rate * factor
        self.optimizer.zero_grad()
        other, share, answer = None, 1.0, None
        if self.options.mixup > 0:
            x, other, share = mixed(x, y, self.options.mixup)
        with autocast(self.device) if self.precision == "bfloat16" else nullcontext():
            out = logits(self.model(x))
            if self.teacher is not None:
                with torch.no_grad():
                    answer = logits(self.teacher(x)).float()
        out = out.float()
        loss = self._loss(out, y, other, share, answer)
        if self.penalty is not None:
            cost = self.penalty()
            if not isinstance(cost, (Tensor, float, int)):
                raise InputError(f"penalty() must give a number or a tensor, not {shown(cost)}")
            loss = loss + cost
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {step} (epoch {epoch}): lower the learning rate"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return out, value

    def _loss(
        self, out: Tensor, y: Tensor, other: Tensor | None, share: float, answer: Tensor | None
    ) -> Tensor:
        """Of the labels (those of ``other`` count with 1 - share) and of the teacher's answer."""
        loss = F.cross_entropy(out, y)
        if other is not None:
            loss = share * loss + (1 - share) * F.cross_entropy(out, other)
        if answer is not None:
            t, distill = self.options.temperature, self.options.distill
            soft = F.cross_entropy(out / t, (answer / t).softmax(1)) * t**2
            loss = (1 - distill) * loss + distill * soft
        return loss

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state = {
            "settings": self.mark,
            "model": self.model.state_dict(),
            "scales": [p.detach() for p in self.quantizers.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "figures": self.figures,
            "rng": torch.get_rng_state(),
        }
        write_torch(self.checkpoint, state)

    def _resume(self) -> None:
        """Takes up what an earlier run left, if there was one."""
        state = read_checkpoint(self.checkpoint)
        if state is None:
            return
        if state.get("settings") != self.mark:
            raise DataError(
                f"{self.checkpoint} belongs to a run with other settings; use another file, or delete it"
            )
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for p, value in zip(self.quantizers.parameters(), state["scales"]):
                p.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.figures = list(state["figures"])
