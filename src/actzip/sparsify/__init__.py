"""Stage 1: many more zeros in the activation maps of a trained network, at no loss of accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from actzip.sparsify.penalties import PENALTIES, ActivationPenalty, mac_weights, penalty_value
from actzip.sparsify.train import EpochResult, Evaluation, FitOptions, evaluate, fit, seed_everything

__all__ = [
    "PENALTIES",
    "ActivationPenalty",
    "EpochResult",
    "Evaluation",
    "FitOptions",
    "SparsifyOptions",
    "evaluate",
    "fit",
    "mac_weights",
    "penalty_value",
    "seed_everything",
    "sparsify",
]


@dataclass(frozen=True)
class SparsifyOptions:
    """How to sparsify: the penalty (see :class:`ActivationPenalty`) and the fine-tuning (:class:`FitOptions`)."""

    fit: FitOptions
    method: str = "l1"
    alpha: float | Mapping[str, float] = 1e-6
    beta: float = 1.0
    weighting: str = "uniform"
    layers: Any = None
    ignore: Any = None
    seed: int = 0
    checkpoint: Path | None = None
    history: list[EpochResult] = field(default_factory=list, compare=False)


def sparsify(
    model: nn.Module,
    train: Any,
    val: Iterable[Any] | None,
    options: SparsifyOptions,
    *,
    on_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int, float, float], None] | None = None,
) -> nn.Module:
    """A copy of ``model``, fine-tuned with a penalty on its activation maps: same class, same ``state_dict`` keys.

    Args:
        model: a trained classifier ``N, C, H, W -> N, classes``; it is not changed.
        train: :class:`actzip.data.Loader` or any iterable of ``(x, y)``.
        val: labelled batches for the figures after each epoch.
        options: method, weight and training; ``options.history`` receives one result an epoch.

    Raises:
        TrainingError: the loss is not finite.
        DataError: an empty loader.
        LayerError: an unknown layer name.

    Source: Georgiadis, CVPR 2019, section 3.1 (loss = task loss + sum over layers of alpha_l * L1 of map l).
    """
    student = copy.deepcopy(model)
    teacher = None
    if options.fit.distill > 0:
        teacher = copy.deepcopy(model).eval()
        for p in teacher.parameters():
            p.requires_grad_(False)
    example = next(iter(train))[0][:1] if options.weighting == "macs" else None
    penalty = ActivationPenalty(
        student,
        options.method,
        alpha=options.alpha,
        beta=options.beta,
        weighting=options.weighting,
        layers=options.layers,
        ignore=options.ignore,
        example=example,
    )
    with penalty:
        options.history[:] = fit(
            student,
            train,
            val,
            options.fit,
            penalty=penalty,
            teacher=teacher,
            checkpoint=options.checkpoint,
            seed=options.seed,
            on_epoch=on_epoch,
            on_step=on_step,
        )
    return student.eval()
