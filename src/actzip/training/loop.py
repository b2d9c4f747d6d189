"""Parts of a training loop: modes, averaged weights, checkpoints, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.errors import DataError
from actzip.files import read_torch

__all__ = ["Pace", "WeightAverage", "read_checkpoint", "train_mode"]


def train_mode(model: nn.Module, *, freeze_norm: bool = False) -> None:
    """As ``model.train()``; with ``freeze_norm`` BatchNorm layers go on using their running statistics."""
    model.train()
    if freeze_norm:
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()


class Pace:
    """How long what is left will take, from what was done since this was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def seconds_left(self, done: int, left: int) -> float:
        """For ``left`` pieces of work, after ``done`` (at least one) of the same size."""
        return (time.perf_counter() - self._began) / done * left


class WeightAverage:
    """The exponential running mean of a model's ``state_dict``; nothing at all where ``decay`` is 0.

    Attributes:
        values: the mean by name, for checkpoints; empty before :meth:`start`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self.values: dict[str, Tensor] = {}

    def start(self) -> None:
        """Begins with the weights as they are, unless a mean was put into ``values`` before."""
        if self._decay and not self.values:
            self.values = _copies(self._model.state_dict())

    def update(self) -> None:
        """After each step of the optimizer."""
        if not self.values:
            return
        with torch.no_grad():
            for k, v in self._model.state_dict().items():
                if v.is_floating_point():
                    self.values[k].lerp_(v.detach(), 1 - self._decay)
                else:
                    self.values[k].copy_(v)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the mean, or of the weights where there is none."""
        return _copies(self.values or self._model.state_dict())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with its mean weights, where there are any, inside the block."""
        if not self.values:
            yield
            return
        kept = _copies(self._model.state_dict())
        self._model.load_state_dict(self.values)
        try:
            yield
        finally:
            self._model.load_state_dict(kept)


def _copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}


def read_checkpoint(path: Path | None) -> dict[str, Any] | None:
    """The dict that an earlier run left in ``path``; None where there is no such file. Nothing in
    it is executed.

    Raises:
        DataError: the file is not a checkpoint.
    """
    if path is None or not path.exists():
        return None
    try:
        state = read_torch(path)
    except DataError as error:
        raise DataError(f"{path} is no readable checkpoint: {error}; delete it to start anew") from error
    if not isinstance(state, dict):
        raise DataError(f"{path} is not a checkpoint but a {type(state).__name__}; delete it to start anew")
    return state
