"""Batches of any loader, the outputs of any classifier, and the order of an epoch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.checks import shown
from actzip.errors import InputError

__all__ = [
    "arguments",
    "as_tensor",
    "batch_size",
    "batches_in",
    "batches_of",
    "check_finite",
    "check_labels",
    "check_loader",
    "device_of",
    "epoch_batches",
    "first_of",
    "logits",
    "output_tensors",
    "samples_of",
    "unpack",
]


#: What data sets call the samples and the labels of a batch.
_SAMPLES = ("x", "pixel_values", "image", "images", "input", "inputs", "img", "data")
_LABELS = ("y", "labels", "label", "target", "targets")


def batches_in(data: Any, name: str = "data") -> Iterable[Any]:
    """The batches of ``data``: of a loader, a list or a generator its own; one tensor, array,
    mapping, named tuple or dataclass object is one batch. Nothing is read before the first step.

    Raises:
        InputError: nothing that holds batches.
    """
    if isinstance(data, (Tensor, np.ndarray, Mapping)) or _named(data) is not None:
        return [data]
    plain = isinstance(data, (str, bytes, bytearray, memoryview, nn.Module, type))
    if plain or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise InputError(f"{name} must be batches (a DataLoader, a list, a generator), not {shown(data)}")
    try:
        iter(data)
    except TypeError:
        raise InputError(f"{name} cannot be iterated: it is a {type(data).__name__}") from None
    return data  # type: ignore[no-any-return]


def _named(batch: Any) -> dict[str, Any] | None:
    """The fields of a named tuple or of a dataclass object, by name; None for others."""
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        return {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return None


def as_tensor(value: Any) -> Any:
    """An array as a tensor, of shared memory where it can be; anything else as it is.

    Raises:
        InputError: an array of a dtype that torch does not have; a tensor without values.
    """
    if isinstance(value, Tensor) and (value.is_meta or value.is_nested):
        kind = "meta" if value.is_meta else "nested"
        raise InputError(f"a batch holds a {kind} tensor; a dense one with values is needed")
    if not isinstance(value, np.ndarray):
        return value
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    usable = value.flags.writeable and all(s >= 0 and s % value.itemsize == 0 for s in value.strides)
    try:
        return torch.from_numpy(value if usable else value.copy())
    except TypeError as error:
        raise InputError(f"an array of dtype {value.dtype} makes no tensor: {error}") from None


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Samples and labels (None without) of a batch: a tensor or array, ``(x,)``, ``(x, y)``, or a
    mapping, named tuple or dataclass object with such names.

    Raises:
        InputError: something else.
    """
    found, names = as_tensor(batch), _named(batch)
    if isinstance(found, Tensor):
        return _plain(found), None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and not isinstance(batch[0], str):
        x, y = as_tensor(batch[0]), batch[1] if len(batch) == 2 else None
        if isinstance(x, Tensor):
            return _plain(x), _labels(y)
    elif names is not None or isinstance(batch, Mapping):
        fields: Mapping[str, Any] = batch if names is None else names
        x = as_tensor(next((fields[n] for n in _SAMPLES if n in fields), None))
        if isinstance(x, Tensor):
            return _plain(x), _labels(next((fields[n] for n in _LABELS if n in fields), None))
        raise InputError(
            f"a batch is x or (x, y) with tensors, not {type(batch).__name__} with "
            f"{sorted(map(str, fields))}; samples are called {', '.join(_SAMPLES)}, "
            f"labels {', '.join(_LABELS)}"
        )
    raise InputError(f"a batch is x or (x, y) with tensors, not {type(batch).__name__}")


def samples_of(batch: Any) -> Tensor:
    """The samples of a batch whose labels, and what else it has, are not needed."""
    plain = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
    return unpack(batch[:1] if plain else batch)[0]


def _plain(x: Tensor) -> Tensor:
    odd = "nested" if x.is_nested else "meta" if x.is_meta else "quantized" if x.is_quantized else ""
    if not odd and x.layout != torch.strided:
        odd = str(x.layout).removeprefix("torch.")
    if not odd and x.dim() == 0:
        odd = "0-dimensional"
    if odd:
        raise InputError(f"the samples of a batch are a {odd} tensor; a dense one, N, ..., is needed")
    return x


def check_finite(x: Tensor, what: str) -> None:
    """Raises InputError where ``x`` holds infinity or NaN, or is of a type that nothing computes in."""
    try:
        finite = bool(torch.isfinite(x).all())
    except RuntimeError as error:  # NotImplementedError from PyTorch 2.5 on
        if "not implemented" not in str(error):
            raise
        raise InputError(f"{what} is {x.dtype}, which nothing computes in: convert it") from None
    if not finite:
        raise InputError(f"{what} holds values that are not finite")


def _labels(y: Any) -> Any:
    """Labels as PyTorch's losses take them: tensors, integers as int64."""
    if isinstance(y, (list, tuple)):
        try:
            y = torch.as_tensor(y)
        except (ValueError, TypeError, RuntimeError):
            raise InputError(f"the labels of a batch make no tensor: {shown(y)}") from None
    y = as_tensor(y)
    if y is not None and not isinstance(y, Tensor):
        raise InputError(f"the labels of a batch are a tensor, not {shown(y)}")
    if y is None or y.is_floating_point() or y.dtype == torch.bool:
        return y
    return y.long()


def arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for ``model`` in a batch: of a mapping (also a tokenizer's), named tuple or
    dataclass object those that ``forward`` names; of a tuple or list as many as ``forward``
    requires, at least one.

    All of a mapping where ``forward`` takes ``**kwargs``. What follows in a tuple (labels) is left
    out; ``((a, b), labels)`` gives a and b where two are required. Arrays become tensors.

    Raises:
        InputError: nothing in the batch can be an input.
    """
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # not of Python
        parameters = []
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    n = getattr(model, "arity", None) or max(1, len(required))
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    fields = _named(batch)
    if isinstance(batch, Mapping):
        return _keywords(batch, names, any(p.kind is p.VAR_KEYWORD for p in parameters))
    if fields is not None and (not isinstance(batch, tuple) or {p.name for p in required} <= fields.keys()):
        return _keywords(fields, names, False)
    if isinstance(batch, (tuple, list)):
        if batch and isinstance(batch[0], Mapping) and names & batch[0].keys():
            return _keywords(batch[0], names, False)
        if n > 1 and batch and isinstance(batch[0], (tuple, list)) and len(batch[0]) >= n:
            batch = batch[0]
        if len(batch) < n:
            raise InputError(f"a batch has {len(batch)} parts; forward requires {n}")
        return tuple(as_tensor(v) for v in batch[:n]), {}
    if isinstance(batch, (Tensor, np.ndarray)):
        return (as_tensor(batch),), {}
    raise InputError(f"a batch is {shown(batch)}; a tensor, an array, a tuple or a dict is needed")


def _keywords(
    fields: Mapping[Any, Any], names: set[str], every: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if every and all(isinstance(k, str) for k in fields):
        return (), {k: as_tensor(v) for k, v in fields.items()}
    chosen = {k: as_tensor(v) for k, v in fields.items() if k in names}
    if chosen:
        return (), chosen
    known = [fields[n] for n in _SAMPLES if n in fields]
    for value in (*known, *fields.values()):
        if isinstance(value, (Tensor, np.ndarray)):
            return (as_tensor(value),), {}
    raise InputError(f"a batch has the keys {sorted(map(str, fields))}; forward takes {sorted(names)}")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many inputs a model is given: dimension 0 of the first tensor, or tensors in a list; else 1."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
        if isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value):
            return len(value)  # images of unlike sizes, as detectors take them
    return 1


def first_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], most: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for the first ``most`` inputs. Tensors of another first dimension than the batch (a
    recurrent model's state) stay as they are."""
    n = batch_size(args, kwargs)

    def part(value: Any) -> Any:
        return value[:most] if isinstance(value, Tensor) and value.ndim and len(value) == n else value

    return tuple(map(part, args)), {k: part(v) for k, v in kwargs.items()}


def check_loader(loader: Any, name: str) -> Any:
    """``loader``, which can be iterated once an epoch.

    Raises:
        InputError: an iterator, which one pass uses up; a tensor; nothing that can be iterated.
    """
    if isinstance(loader, Tensor):
        raise InputError(f"{name} is a tensor; batches are needed: [(x, y)], or a DataLoader")
    loader = batches_in(loader, name)
    if isinstance(loader, Iterator):
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


def check_labels(out: Tensor, y: Tensor) -> None:
    """Raises InputError where labels ``y`` do not fit logits ``out`` (N, classes)."""
    if out.dim() != 2 or y.dim() != 1 or y.is_floating_point():
        raise InputError(
            f"expected logits (N, classes) and integer labels (N,), got {tuple(out.shape)} and "
            f"{y.dtype} {tuple(y.shape)}"
        )
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= out.shape[1]):
        raise InputError(
            f"labels run from {int(y.min())} to {int(y.max())}, but the model gives {out.shape[1]} classes"
        )


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
