"""What a faster network has to keep, and how well it does on inputs that chose nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import eval_mode, run_model
from actzip.checks import flag, function, number
from actzip.errors import InputError
from actzip.sparsify.judge import Judgement, agreement_of, are_scores, commonest, error_of, jackknife, wilson
from actzip.training.batches import output_tensors

__all__ = ["Metric", "Promise", "Reference"]

#: A user's measure: ``metric(model, batches)``, higher is better; batches are what the data gives.
Metric = Callable[[nn.Module, Sequence[Any]], float]
#: Groups of batches that a metric's interval is made of, at most.
_GROUPS = 10


@dataclass(frozen=True)
class Promise:
    """Exactly one kind of promise.

    Attributes:
        keep: smallest share: of highest outputs that stay the same, of the accuracy with
            ``labels``, of a ``metric``.
        max_error: or the largest mean relative error of the outputs.
    """

    keep: float | None = 0.99
    max_error: float | None = None
    labels: bool = False
    metric: Metric | None = None

    def check(self) -> None:
        """Raises InputError where it cannot be a promise."""
        if (self.keep is None) == (self.max_error is None):
            raise InputError("promise either keep (a share that stays) or max_error, not both")
        if self.keep is not None:  # 0.99 keeps 99 of 100 highest outputs
            number(self.keep, "keep", 0, 1, above=True)
        if self.max_error is not None:  # 0.05 lets outputs move by 5 %
            number(self.max_error, "max_error", 0, above=True)
        flag(self.labels, "labels")
        function(self.metric, "metric")
        if self.max_error is not None and (self.labels or self.metric is not None):
            raise InputError("labels and a metric go with keep, not with max_error")
        if self.labels and self.metric is not None:
            raise InputError("give labels or a metric, not both")

    def __str__(self) -> str:
        if self.max_error is not None:
            return f"mean relative error of the outputs at most {self.max_error:g}"
        what = "the accuracy" if self.labels else "the metric" if self.metric else "the highest outputs"
        return f"at least {self.keep:.4g} of {what}"

    def kept(self, found: Judgement) -> bool:
        """Whether the estimate keeps the promise."""
        if self.max_error is not None:
            return found.value <= self.max_error
        return found.value >= (self.keep or 0.0)

    def proven(self, found: Judgement) -> bool:
        """Whether the whole 95 % interval does, and one answer for all inputs would not."""
        if self.max_error is not None:
            return found.high <= self.max_error
        return found.low >= (self.keep or 0.0) and not self.by_chance(found)

    def by_chance(self, found: Judgement) -> bool:
        """Whether one and the same answer for every input would keep it."""
        return self.keep is not None and found.chance >= self.keep


class Reference:
    """What the original gives for some inputs; judges changed networks by it.

    Args:
        batches: ``(inputs, labels or None)``.
        interval: also of a metric, by leaving groups of batches out in turns (a jackknife), each of
            which calls it once more.

    Raises:
        InputError: outputs that are not finite or no scores where the promise needs them, labels
            that are missing.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Any]],
        promise: Promise,
        interval: bool = False,
    ) -> None:
        self.batches, self.promise = list(batches), promise
        self.samples = sum(len(x) for x, _ in batches)
        self.outputs = self._run(model)
        for y in self.outputs:
            if not all(bool(torch.isfinite(t).all()) for t in output_tensors(y)):
                raise InputError("the model's outputs are not finite: there is nothing to keep")
        self.scores = all(are_scores(y) for y in self.outputs)
        if promise.labels and not self.scores:
            raise InputError("labels need outputs (N, classes); promise a max_error, or give a metric")
        if promise.labels and any(y is None for _, y in batches):
            raise InputError("labels are asked for, and the data has none")
        if promise.keep is not None and promise.metric is None and not self.scores:
            raise InputError("outputs are no rows of scores: promise a max_error, or give a metric")
        self.groups = min(len(self.batches), _GROUPS) if interval else 0
        self.metric_before = self._metric(model, self.batches) if promise.metric else 0.0
        self.parts_before = self._parts(model) if promise.metric else []
        self.right_before = self._right(self.outputs) if promise.labels else 0

    def _run(self, model: nn.Module) -> list[Any]:
        with torch.no_grad(), eval_mode(model):
            return [run_model(model, x) for x, _ in self.batches]

    def _metric(self, model: nn.Module, batches: Sequence[tuple[Tensor, Any]]) -> float:
        assert self.promise.metric is not None
        data = [x if y is None else (x, y) for x, y in batches]
        try:
            with torch.no_grad(), eval_mode(model):
                value = float(self.promise.metric(model, data))
        except Exception as error:
            raise InputError(f"the metric raises {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise InputError(f"the metric gives {value}")
        return value

    def _parts(self, model: nn.Module) -> list[float]:
        """The metric without each group of batches in turn; none where it cannot do with less."""
        try:
            return [
                self._metric(model, [b for i, b in enumerate(self.batches) if i % self.groups != k])
                for k in range(self.groups if self.groups > 1 else 0)
            ]
        except InputError:
            return []

    def _metric_judged(self, model: nn.Module) -> Judgement:
        value = self._metric(model, self.batches)
        share = value / self.metric_before if self.metric_before else float(value >= 0)
        parts = self._parts(model) if self.parts_before and all(self.parts_before) else []
        half = math.inf
        if parts:
            half = jackknife([a / b for a, b in zip(parts, self.parts_before, strict=True)])
        return Judgement("metric", share, share - half, share + half, self.samples)

    def _right(self, outputs: Sequence[Any]) -> int:
        pairs = zip(outputs, self.batches, strict=True)
        return sum(int((y.argmax(1) == labels).sum()) for y, (_, labels) in pairs)

    def judge(self, model: nn.Module) -> dict[str, Judgement]:
        """``promised`` (what counts), and where outputs allow them ``agreement`` and ``error``."""
        if self.promise.metric is not None:
            return {"promised": self._metric_judged(model)}
        outputs = self._run(model)
        found = {"error": error_of(self.outputs, outputs)}
        if self.scores:
            found["agreement"] = agreement_of(self.outputs, outputs)
        if self.promise.labels:
            right, before = self._right(outputs), max(1, self.right_before)
            low, high = (v * self.samples / before for v in wilson(right, self.samples))
            chance = commonest([torch.as_tensor(labels) for _, labels in self.batches]) / before
            found["promised"] = Judgement("accuracy", right / before, low, high, self.samples, chance)
        else:
            found["promised"] = found["error" if self.promise.max_error is not None else "agreement"]
        return found
