"""Training with quantizers in place: weights by the straight-through estimator, scales as learned step sizes.

A small loop for those who have none. People with their own add ``quantization(model).parameters()`` to their optimiser and call
``quantization(model).clamp_scales_()`` after each step. A sparsity penalty goes on working on a quantized model
(it sees the maps before or after the quantizer, depending on which was attached first), so both can be trained together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.errors import DataError, InputError, TrainingError
from actzip.quantize.model import quantization

__all__ = ["finetune", "parameter_groups"]


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, scale_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Groups for AdamW: weights (decayed), BatchNorm and biases (not decayed), and each scale on its own.

    Scales of different maps differ by orders of magnitude; the rate of each is ``scale_lr`` times its present value,
    so one step of Adam moves it by at most about that share.
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
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Fine-tunes a quantized classifier, in place: Adam, cosine learning rate to zero, cross-entropy.

    Args:
        train: batches (images ``N, C, H, W``, labels ``N``), iterated once an epoch; its ``len`` must be known.
        lr, scale_lr: first learning rates of the weights and, relative to each, of the scales.
        penalty: added to the loss after each forward pass (an ``ActivationPenalty``, say).
        teacher: a float model whose outputs are learned too, with share ``distill`` of the loss.
        freeze_norm: BatchNorm keeps its statistics (for the last epochs of low-bit training).
        on_epoch: called with (epoch from 1, figures) after each.

    Returns:
        figures of each epoch: ``loss``, ``accuracy`` (of training, 0 to 1), ``seconds``.

    Raises:
        InputError: the model is not quantized, or an option is out of range.
        DataError: an epoch without a batch.
        TrainingError: the loss is not finite.
    """
    if epochs < 1:
        raise InputError(f"epochs must be at least 1, not {epochs}")
    if not 0 <= distill <= 1:
        raise InputError(f"distill is a share from 0 to 1, not {distill}")
    quantizers = quantization(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr, weight_decay, scale_lr))
    base = [g["lr"] for g in optimizer.param_groups]
    steps = epochs * len(train)  # type: ignore[arg-type]
    if steps == 0:
        raise DataError("the training data has no batch")
    if teacher is not None:
        teacher.eval()
    figures: list[dict[str, float]] = []
    step = 0
    for epoch in range(1, epochs + 1):
        model.train()
        if freeze_norm:
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        start, total, right, seen = time.perf_counter(), 0.0, 0, 0
        for x, y in train:
            factor = 0.5 * (1 + math.cos(math.pi * step / steps))
            for g, rate in zip(optimizer.param_groups, base):
                g["lr"] = rate * factor
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            if teacher is not None:
                with torch.no_grad():
                    target = (teacher(x) / temperature).softmax(1)
                soft = F.cross_entropy(out / temperature, target) * temperature**2
                loss = (1 - distill) * loss + distill * soft
            if penalty is not None:
                loss = loss + penalty()
            if not math.isfinite(float(loss)):
                raise TrainingError(
                    f"the loss is {float(loss)} at step {step} (epoch {epoch}): lower the learning rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            quantizers.clamp_scales_()
            step += 1
            total += float(loss) * len(y)
            right += int((out.argmax(1) == y).sum())
            seen += len(y)
        if not seen:
            raise DataError(f"epoch {epoch} of the training data has no batch")
        row = {"loss": total / seen, "accuracy": right / seen, "seconds": time.perf_counter() - start}
        figures.append(row)
        if on_epoch is not None:
            on_epoch(epoch, row)
    model.eval()
    return figures
