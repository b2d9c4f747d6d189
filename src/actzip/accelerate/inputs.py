"""The model and the inputs that :func:`actzip.accelerate` works on, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actzip.checks import shown
from actzip.data.form import Form
from actzip.errors import DataError, InputError, UnsupportedError
from actzip.training.batches import batches_in, check_finite, unpack

__all__ = ["Inputs", "gather", "open_model"]

#: Fewer inputs than this cannot both calibrate and prove.
LEAST = 6


@dataclass
class Inputs:
    """Inputs in three parts that share none: thresholds and repair come from ``calibrate``, the
    choice among candidates from ``choose``, and what is said of the result from ``prove``. The last
    two are ``(inputs, labels or None)``."""

    calibrate: list[Tensor]
    choose: list[tuple[Tensor, Any]]
    prove: list[tuple[Tensor, Any]]


def open_model(
    model: nn.Module | str | os.PathLike[str],
    data: Iterable[Any] | str | None,
    *,
    weights: str | None,
    size: int | None,
    images: int,
    batch: int,
    trust: bool,
    form: Form | None = None,
) -> tuple[nn.Module, Iterable[Any], str]:
    """(module, batches, how the model is called) of what the user gives; names are resolved as everywhere."""
    if form is not None and not isinstance(form, Form):
        raise InputError(f"form must be an actzip.data.form.Form, not {shown(form)}")
    name = type(model).__name__ if isinstance(model, nn.Module) else os.path.basename(os.fspath(model))
    if data is None and (form is None or not form.arrays):
        raise InputError("typical inputs are needed: --data, or --input with arrays")
    if data is None or isinstance(data, str):
        from actzip.profile.source import open_subject

        chosen = model if isinstance(model, nn.Module) else os.fspath(model)
        found = open_subject(
            chosen, data, weights=weights, images=images, batch=batch, size=size, trust=trust, form=form
        )
        return _checked(found.model), found.loader, name
    if not isinstance(model, nn.Module):
        from actzip.runtime.models import load

        model = load(model, weights=weights, trust=trust)
    elif weights is not None:
        from actzip.models import load_weights

        load_weights(model, weights)
    return _checked(model), data, name


def _checked(model: nn.Module) -> nn.Module:
    """
    Raises:
        InputError: a file of several inputs. UnsupportedError: some nodes of a file run with ONNX
            Runtime.
    """
    from actzip.runtime.models import GraphNet

    if not isinstance(model, GraphNet):
        return model
    if model.arity > 1:
        raise InputError(
            f"the model has {model.arity} inputs ({', '.join(model.graph.inputs)}); accelerate and split "
            "take models of one"
        )
    if names := model.elsewhere():
        raise UnsupportedError(
            f"{len(names)} nodes run with ONNX Runtime ({', '.join(names[:6])}): thresholds are not weighed "
            "past them, which have no gradients, and no cut is made around them"
        )
    return model


def gather(data: Iterable[Any], *, calibrate: int, images: int, batch: int | None) -> Inputs:
    """The first ``images`` inputs of batches x or (x, y): so many to calibrate (half at most), the
    rest held out.

    Raises:
        DataError: fewer than six inputs, or all alike. InputError: no tensors, or values that are
            not finite.
    """
    xs: list[Tensor] = []
    ys: list[Tensor | None] = []
    count = 0
    for found in batches_in(data):
        x, y = unpack(found)
        if not len(x):
            continue
        check_finite(x, f"the data (in the batch after {count} inputs)")
        if not x.is_floating_point():
            raise InputError(f"the data is {x.dtype}; the model takes float32")
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise InputError(f"inputs of unlike shapes: {tuple(xs[0].shape[1:])} and {tuple(x.shape[1:])}")
        x = x[: images - count]
        xs.append(x)
        ys.append(y[: len(x)] if isinstance(y, Tensor) else None)
        count += len(x)
        if count >= images:
            break
    if count < LEAST:
        raise DataError(f"{count} inputs are too few: {LEAST} at least, a few dozen are better")
    every = torch.cat(xs)
    if bool((every == every[:1]).all()):
        raise DataError("all inputs are the same: they say nothing about the model's zeros")
    labels = torch.cat([y for y in ys if y is not None]) if all(y is not None for y in ys) else None
    return _parts(every, labels, min(calibrate, count // 2), batch or max(len(x) for x in xs))


def _parts(x: Tensor, labels: Tensor | None, calibrate: int, batch: int) -> Inputs:
    """Every kind of input in every part: they are dealt out in turns, for data sets often come sorted."""
    order = torch.arange(len(x))
    chosen = torch.linspace(0, len(x) - 1, calibrate).round().long().unique()
    rest = order[~torch.isin(order, chosen)]
    parts = chosen, rest[0::2], rest[1::2]
    size = max(1, batch)

    def pairs(index: Tensor) -> list[tuple[Tensor, Any]]:
        return [(x[i], None if labels is None else labels[i]) for i in index.split(size)]

    return Inputs([x[i] for i in parts[0].split(size)], pairs(parts[1]), pairs(parts[2]))
