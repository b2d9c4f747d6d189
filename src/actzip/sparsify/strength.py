"""How strong the penalty is at each step: as given, held to a floor of accuracy, or steered to a speed-up."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actzip.errors import ActzipWarning, InputError
from actzip.sparsify.config import SparsifyConfig
from actzip.sparsify.costs import Measurement
from actzip.sparsify.penalties import ActivationPenalty

__all__ = ["AccuracyFloor", "Place", "Steered", "Strength"]


@dataclass(frozen=True)
class Place:
    """Where a run stands: epoch and batch from 0. ``per_epoch``: batches an epoch, 0 where that is
    not known."""

    epoch: int
    batch: int
    per_epoch: int
    epochs: int

    @property
    def step(self) -> int:
        """Batches before this one."""
        return self.epoch * self.per_epoch + self.batch

    @property
    def total(self) -> int:
        """Batches of the whole run, at least 1."""
        return max(1, self.per_epoch * self.epochs)


class Strength:
    """alpha as given: it rises linearly over ``ramp``, and falls over ``release``.

    Attributes:
        best: what to return: weights (``model``) and thresholds (``learned``), with their ``accuracy``
            and ``theoretical_speedup``; None: the last ones.
        checks, floor, floor_met: see :class:`~actzip.sparsify.SparsifyResult`.
    """

    def __init__(self, config: SparsifyConfig) -> None:
        self.config = config
        self.best: dict[str, Any] | None = None
        self.checks: list[dict[str, float]] = []
        self.floor: float | None = None
        self.floor_met = True

    def begin(self) -> None:
        """Before the first batch of a new run."""

    def at(self, place: Place) -> float:
        """alpha for the batch at ``place``."""
        c = self.config
        given = 1.0 if isinstance(c.alpha, Mapping) else float(c.alpha)
        if not place.per_epoch:
            return given
        ramp = min(1.0, (place.step + 1) / (c.ramp * place.total)) if c.ramp > 0 else 1.0
        if c.release > 0:
            ramp *= min(1.0, (place.total - place.step) / (c.release * place.total))
        return given * ramp

    def after(self, place: Place) -> None:
        """After the batch at ``place``, where the number of batches is known."""

    def epoch_end(self, epochs_done: int, speedup: float | None) -> None:
        """After an epoch; ``speedup``: the theoretical one that was measured, if any."""

    def finish(self) -> None:
        """After the last epoch."""

    def state(self) -> dict[str, Any]:
        """For checkpoints: plain values and tensors."""
        return {"best": self.best, "checks": self.checks, "floor": self.floor, "auto": {}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state` gave."""
        self.best, self.checks, self.floor = state["best"], state["checks"], state["floor"]


class AccuracyFloor(Strength):
    """alpha="auto": raises alpha while validation accuracy is at or above the floor, lowers it
    where it is below.

    Args:
        look: measures accuracy and theoretical speed-up of the weights that would be returned now.
        state: a copy of what makes them: ``model``, their ``state_dict``, and ``learned``, the thresholds.
    """

    def __init__(
        self,
        config: SparsifyConfig,
        look: Callable[[], Measurement],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        super().__init__(config)
        self._look = look
        self._state = state
        self.alpha = config.alpha_start
        self.fallback: tuple[float, dict[str, Any]] | None = None

    def begin(self) -> None:
        c, m = self.config, self._look()
        if m.accuracy is None:
            raise InputError("alpha='auto' needs labelled validation data")
        self.floor = min(1.0, c.floor if c.floor is not None else m.accuracy + c.floor_margin)
        self._consider(m.accuracy, m.theoretical_speedup, step=0)

    def at(self, place: Place) -> float:
        return self.alpha

    def after(self, place: Place) -> None:
        checks, i, n = self.config.checks, place.batch, place.per_epoch
        if (i + 1) * checks // n > i * checks // n and i + 1 < n:
            self._check(place.step + 1)

    def epoch_end(self, epochs_done: int, speedup: float | None) -> None:
        self._check(epochs_done)

    def _check(self, step: int) -> None:
        m = self._look()
        assert m.accuracy is not None and self.floor is not None
        self._consider(m.accuracy, m.theoretical_speedup, step=step)
        factor = self.config.alpha_step
        self.alpha = self.alpha * factor if m.accuracy >= self.floor else self.alpha / factor

    def _consider(self, accuracy: float, speedup: float, step: int) -> None:
        assert self.floor is not None
        self.checks.append(
            {"step": step, "alpha": self.alpha, "accuracy": accuracy, "theoretical_speedup": speedup}
        )
        if accuracy >= self.floor:
            if self.best is None or speedup > self.best["theoretical_speedup"]:
                self.best = self._state_of(accuracy, speedup)
        elif self.best is None and (self.fallback is None or accuracy > self.fallback[0]):
            self.fallback = (accuracy, self._state_of(accuracy, speedup))

    def _state_of(self, accuracy: float, speedup: float) -> dict[str, Any]:
        return {**self._state(), "theoretical_speedup": speedup, "accuracy": accuracy}

    def finish(self) -> None:
        if self.best is None:
            assert self.fallback is not None
            self.floor_met = False
            accuracy, self.best = self.fallback
            warnings.warn(
                f"no state of this run reached the floor: validation accuracy {self.floor:.4f} was "
                f"asked for, the best found is {accuracy:.4f} (theoretical speed-up "
                f"{self.best['theoretical_speedup']:.2f}), which is what is returned",
                ActzipWarning,
                stacklevel=5,
            )

    def state(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "fallback": list(self.fallback) if self.fallback else None}
        return {**super().state(), "auto": own}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self.alpha = float(state["auto"]["alpha"])
        kept = state["auto"]["fallback"]
        self.fallback = (kept[0], kept[1]) if kept else None


class Steered(Strength):
    """alpha="auto" with ``speedup``: a proportional-integral controller of log alpha on the
    relative error of the work.

    Densities answer to alpha over some hundred steps, so the integral gain is small; the
    proportional term, which lowers alpha while the work is falling, keeps it from overshooting
    (zeros that training has made do not all come back). What the estimate does not see (maps too
    small to penalise, evaluation instead of training mode) is corrected by the measurement at the
    end of an epoch.
    """

    INTEGRAL, PROPORTIONAL, MOST = 0.04, 6.0, 0.3

    def __init__(self, config: SparsifyConfig, penalty: ActivationPenalty) -> None:
        super().__init__(config)
        self.penalty = penalty
        self.alpha = config.alpha_start
        self.first: float | None = None
        self.error = 0.0
        self.offset = 0.0

    def at(self, place: Place) -> float:
        return self.alpha

    def after(self, place: Place) -> None:
        if place.step % self.penalty.stats_every:
            return
        work = self.penalty.effective_share + self.offset
        if self.first is None:
            self.first = work
        goal = 1.0 / self.config.speedup
        ramp = self.config.ramp * place.total
        part = min(1.0, (place.step + 1) / ramp) if ramp > 0 else 1.0
        goal = self.first + (goal - self.first) * part
        error, before = work / goal - 1.0, self.error
        self.error = error
        change = self.INTEGRAL * error + self.PROPORTIONAL * (error - before)
        self.alpha *= math.exp(max(-self.MOST, min(self.MOST, change)))

    def epoch_end(self, epochs_done: int, speedup: float | None) -> None:
        if speedup is not None:
            self.offset = 1.0 / speedup - self.penalty.effective_share

    def state(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "first": self.first, "error": self.error, "offset": self.offset}
        return {**super().state(), "auto": own}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        own = state["auto"]
        self.alpha, self.first = float(own["alpha"]), own["first"]
        self.error, self.offset = float(own["error"]), float(own["offset"])
