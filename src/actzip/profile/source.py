"""What to profile, by name: the model, and batches of images from files or, without any, of random
numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actzip.data import resolve
from actzip.data.form import NAMED, Form, Laid, forward_names
from actzip.errors import ActzipWarning, DataError, InputError
from actzip.runtime.models import GraphNet, load_whole, open_size, say_open

__all__ = ["Subject", "open_subject", "random_batches"]


@dataclass
class Subject:
    """A model and what to run it on.

    Attributes:
        images: how many there will be at most; None: all of them.
        source: where they come from, in words.
        random: they are random numbers.
        skipped: images that could not be read, each with the reason.
    """

    model: nn.Module
    loader: Iterable[Any]
    images: int | None
    source: str
    random: bool = False
    skipped: tuple[str, ...] = ()


def open_subject(
    model: str | nn.Module,
    data: str | None,
    *,
    weights: str | None = None,
    images: int = 100,
    batch: int = 4,
    size: int | None = None,
    trust: bool = False,
    form: Form | None = None,
) -> Subject:
    """The model and its inputs for names, as the command line and :func:`actzip.profile.profile` take them.

    Args:
        model: a name, import path, ``.pt2`` or ``.onnx`` file
            (:func:`actzip.runtime.models.load_model`), or a module (``data`` is needed then, and
            ``size`` for files of unlike images).
        data: a folder of images, a parquet file, WebDataset shards, an ``.npy`` or a data set's name
            (:func:`actzip.data.resolve`); None: random numbers, with a warning that densities mean nothing.
        weights: a safetensors file for the model.
        images: at most so many; they are spread evenly over the data set, in its order.
        batch: images a batch (a model that was exported with a fixed batch has its own).
        size: images are resized and cropped to this square; None: the model's usual one.
        trust: whether an exported program may be read (:func:`actzip.load`).
        form: shapes, normalisation and layout of the inputs, or the inputs themselves.

    Raises:
        InputError: an unknown name; a model that takes no images while ``data`` is given; a module
            without ``data``.
        DataError: the data is missing, empty or unreadable.
    """
    from actzip.data import Loader
    from actzip.models import load_weights

    form = form or Form()
    shape: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    module = model
    if not isinstance(module, nn.Module):
        first = None if form.first is None else form.first[1:]
        module, shape, mean, std = load_whole(str(module), first, shapes=form.given, trust=trust)
    elif data is None:
        raise InputError("a module needs a loader or a data set: its input's shape is not known")
    if weights is not None:
        load_weights(module, weights)
    fixed = getattr(module, "batch", None)
    batch = fixed or batch
    if form.arrays:
        if data is not None:
            raise InputError("--data and --input exclude each other: both give the inputs")
        names = list(module.graph.inputs) if isinstance(module, GraphNet) else forward_names(module)
        arrays = list(form.batches(names, batch, fixed=bool(fixed)))
        return Subject(module, arrays, sum(map(_count, arrays)), ", ".join(form.arrays) or "--input")
    if data is None:
        warnings.warn("no data: random input is used, so densities mean nothing", ActzipWarning, stacklevel=3)
        count = batch if fixed else min(images, batch)
        shapes = [tuple(shape or ())]
        if isinstance(module, GraphNet):
            shapes = [
                tuple(d if isinstance(d, int) else 1 for d in module.graph.shape(v)[1:])
                for v in module.graph.inputs
            ]
        if size and len(shapes[0]) == 3:
            shapes[0] = (*shapes[0][:-2], size, size)
        else:
            say_open(module)
        return Subject(module, random_batches(shapes, count), count, "random numbers", random=True)
    if isinstance(module, GraphNet) and len(module.graph.inputs) > 1:
        names = list(module.graph.inputs)
        raise InputError(
            f"the model has {len(names)} inputs ({', '.join(names)}), not images alone: give arrays "
            f"with --input, in Python a loader of tuples"
        )
    if shape is None:  # a module of the caller's
        found = resolve(data, "test", image_size=None if data in NAMED else size, sample=images)
    else:
        takes = open_size(module)
        found = form.images(data, shape, mean, std, size=size, sample=images, takes=takes)
        if size is None:
            say_open(module, form.laid_shape(*found.shape))
    count = min(images, len(found))
    if fixed:
        count -= count % fixed
        if count == 0:
            raise DataError(
                f"the model was exported for batches of {fixed}; {found.source} gives "
                f"{min(images, len(found))} images"
            )
    if count < len(found):
        chosen = torch.linspace(0, len(found) - 1, count).round().long().numpy()
        found = found.take(chosen)
    batches = Laid(Loader(found, batch), form)
    return Subject(module, batches, count, found.source, skipped=found.skipped)


def _count(batch: Any) -> int:
    """Inputs in a batch."""
    tensors = batch if isinstance(batch, tuple) else (batch,)
    return max((len(t) for t in tensors if t.ndim), default=1)


def random_batches(shapes: Iterable[tuple[int, ...]], count: int) -> list[Any]:
    """One batch of ``count`` random inputs in [0, 1): a tensor, or a tuple where there are several shapes."""
    generator = torch.Generator().manual_seed(0)
    inputs: list[Tensor] = [torch.rand((count, *s), generator=generator) for s in shapes]
    return [inputs[0] if len(inputs) == 1 else tuple(inputs)]
