"""Batches of any loader, the outputs of any classifier, and the order of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.errors import InputError

__all__ = ["batches_of", "check_loader", "device_of", "epoch_batches", "logits", "output_tensors", "unpack"]


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Samples and labels (None without) of a batch: a tensor, ``(x,)``, ``(x, y)`` or a mapping.

    Raises:
        InputError: something else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        x = batch.get("x", batch.get("pixel_values", batch.get("image")))
        y = batch.get("y", batch.get("labels", batch.get("label")))
        if isinstance(x, Tensor):
            return x, _labels(y)
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return batch[0], _labels(batch[1]) if len(batch) == 2 else None
    raise InputError(f"a batch is x or (x, y) with tensors, not {type(batch).__name__}")


def _labels(y: Any) -> Any:
    """Labels as PyTorch's losses take them: tensors, integers as int64."""
    if isinstance(y, np.ndarray):
        y = torch.from_numpy(y)
    narrow = isinstance(y, Tensor) and not y.is_floating_point() and y.dtype != torch.bool
    return y.long() if narrow else y


def check_loader(loader: Any, name: str) -> Any:
    """``loader``, which can be iterated once an epoch.

    Raises:
        InputError: an iterator, which one pass uses up; a tensor; nothing that can be iterated.
    """
    if isinstance(loader, Tensor):
        raise InputError(f"{name} is a tensor; batches are needed: [(x, y)], or a DataLoader")
    try:
        once = iter(loader) is loader
    except TypeError:
        raise InputError(f"{name} cannot be iterated: it is a {type(loader).__name__}") from None
    if once:
        raise InputError(
            f"{name} is an iterator ({type(loader).__name__}), which one pass uses up; give a list "
            "of batches, a DataLoader, or an object whose __iter__ begins anew"
        )
    return loader


def batches_of(loader: Any) -> int:
    """How many batches ``loader`` has; 0 where it does not say (an iterable data set)."""
    try:
        return len(loader)
    except TypeError:
        return 0


def logits(out: Any) -> Tensor:
    """The classifier's output ``N, classes`` where a network in training mode gives auxiliary ones as well.

    Raises:
        InputError: ``out`` holds no tensor.
    """
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "logits", None), Tensor):
        return out.logits  # type: ignore[no-any-return]
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    raise InputError(f"the model gives a {type(out).__name__}; a classifier gives logits (N, classes)")


def output_tensors(out: Any) -> list[Tensor]:
    """The floating-point tensors in an output of any structure, in its order.

    Raises:
        InputError: there is none.
    """
    from torch.utils import _pytree as pytree

    if callable(getattr(out, "to_tuple", None)):  # transformers' outputs
        out = out.to_tuple()
    found = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise InputError(f"the model gives a {type(out).__name__} without a floating-point tensor")
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of ``model`` lie; the CPU without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def epoch_batches(train: Any, epoch: int, seed: int) -> Any:
    """The batches of ``epoch`` (from 0), in an order that follows from it and ``seed`` alone.

    By the loader's own ``at(epoch)`` or ``set_epoch``, else by torch's seed, from which a shuffling
    ``DataLoader`` draws.
    """
    if hasattr(train, "at"):
        return train.at(epoch)
    holders: tuple[Any, ...] = (train, getattr(train, "sampler", None))
    for holder in holders:
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
            return train
    torch.manual_seed(seed * 1_000_003 + epoch)
    return train
