"""What a sparsification minimises beside its penalty: the task loss, and what a teacher says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations.hooks import Hooks
from actzip.errors import InputError, LayerError
from actzip.sparsify.config import SparsifyConfig
from actzip.training.batches import logits

__all__ = ["Objective"]


class Objective:
    """Task loss and distillation, as a :class:`~actzip.sparsify.SparsifyConfig` weighs them.

    Args:
        teacher: in eval mode, on the device of ``student``; None where nothing is distilled.

    Raises:
        LayerError: ``distill_layers`` names a module that student or teacher does not have.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, config: SparsifyConfig) -> None:
        self.config = config
        self.teacher = teacher
        self._maps: _Maps | None = None
        if teacher is not None and config.distill_maps > 0:
            self._maps = _Maps(student, teacher, config.distill_layers)

    @property
    def uses_labels(self) -> bool:
        return self.teacher is None or self.config.distill < 1

    def __call__(
        self, out: Tensor, x: Tensor, y: Tensor | None, other: Tensor | None = None, share: float = 1.0
    ) -> Tensor:
        """The loss of logits ``out`` of samples ``x`` with labels ``y``.

        Where ``other`` is given, its labels count with 1 - share.

        Raises:
            InputError: labels are needed and there are none.
        """
        c = self.config
        hard = self._task(out, y, other, share) if self.uses_labels else None
        if self.teacher is None:
            assert hard is not None
            return hard
        with torch.no_grad():
            target = logits(self.teacher(x)).float()
        maps = self._maps.distance() * c.distill_maps if self._maps is not None else 0.0
        if c.distill == 0:
            assert hard is not None
            return hard + maps
        soft = divergence(out, target, c.temperature)
        return (soft if hard is None else (1 - c.distill) * hard + c.distill * soft) + maps

    def _task(self, out: Tensor, y: Tensor | None, other: Tensor | None, share: float) -> Tensor:
        if y is None:
            raise InputError("the training data has no labels; distill=1 learns from the original alone")
        smoothing = self.config.label_smoothing
        hard = F.cross_entropy(out.float(), y, label_smoothing=smoothing)
        if other is not None:
            rest = F.cross_entropy(out.float(), other, label_smoothing=smoothing)
            hard = share * hard + (1 - share) * rest
        return hard

    def detach(self) -> None:
        """Student and teacher are as they were before."""
        if self._maps is not None:
            self._maps.detach()


def divergence(out: Tensor, target: Tensor, t: float) -> Tensor:
    """t**2 times the Kullback-Leibler divergence of logits ``out`` from ``target`` at temperature
    ``t``, a mean over samples."""
    mine, wanted = F.log_softmax(out.float() / t, 1), F.log_softmax(target / t, 1)
    return t * t * F.kl_div(mine, wanted, reduction="batchmean", log_target=True)


class _Maps:
    """Outputs of the same modules of student and teacher, and how far apart they are."""

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Any) -> None:
        self.names: list[str] = [layers] if isinstance(layers, str) else [str(n) for n in layers]
        self.outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._hooks = Hooks()
        for model, kept in zip((student, teacher), self.outputs):
            modules = dict(model.named_modules())
            for name in self.names:
                if name not in modules:
                    raise LayerError(f"distill_layers: the model has no module {name!r}")
                self._hooks.after(modules[name], _keep(kept, name))

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
        self._hooks.remove()


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise LayerError(f"distill_layers: {name!r} gives a {type(output).__name__}, not a tensor")
        kept[name] = output

    return hook
