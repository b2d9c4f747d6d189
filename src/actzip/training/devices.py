"""Where a training runs: one process on the model's device, or one of several that ``accelerate``
launched."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from actzip.errors import InputError
from actzip.training.batches import device_of
from actzip.training.precision import autocast, usable

__all__ = ["Devices"]


class Devices:
    """The device, precision and processes of a training.

    Args:
        model: what is trained; without an accelerator it stays on its device.
        precision: ``float32`` or ``bfloat16``.
        accelerator: an ``accelerate.Accelerator``; made here where this process was launched as one
            of several.

    Raises:
        InputError: there are several processes, but ``accelerate`` is missing.
    """

    def __init__(self, model: nn.Module, precision: str, accelerator: Any = None) -> None:
        self._accelerator = accelerator if accelerator is not None else _accelerator(precision)
        if self._accelerator is None:
            self.device = device_of(model)
            self._precision = usable(precision, self.device.type)
        else:  # it decides
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self._accelerator is None or bool(self._accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self._accelerator is None else int(self._accelerator.num_processes)

    def shard(self, train: Any) -> Any:
        """This process's part of the data."""
        if self.processes == 1:
            return train
        if isinstance(getattr(train, "shard", None), tuple):  # actzip.data.Loader
            sharded = copy.copy(train)
            sharded.shard = (self._accelerator.process_index, self.processes)
            return sharded
        return self._accelerator.prepare_data_loader(train)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Both as they are to be used in the loop."""
        if self._accelerator is None:
            return model, optimizer
        network, prepared = self._accelerator.prepare(model, optimizer)
        return network, prepared

    def agreed(self, value: Any) -> Any:
        """What the first process says."""
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes inside the block."""
        if self._accelerator is not None:
            return self._accelerator.autocast()  # type: ignore[no-any-return]
        return autocast(self.device.type) if self._precision == "bfloat16" else nullcontext()

    def accumulating(self, network: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients inside the block are added up; processes share them in the ``last`` pass of a
        step only."""
        if self._accelerator is None or last:
            return nullcontext()
        return self._accelerator.no_sync(network)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``."""
        if self._accelerator is not None:
            self._accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]


def _accelerator(precision: str) -> Any:
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
    computed = usable(precision, "cpu" if cpu else "cuda")
    return Accelerator(cpu=cpu, mixed_precision="bf16" if computed == "bfloat16" else "no")
