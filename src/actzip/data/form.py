"""How a model wants its inputs, where the file or name of a model does not say it: shapes, the range
of pixels, their normalisation, the order of dimensions; or the arrays themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.data.arrays import Images
from actzip.data.sources import PHOTOGRAPHS, resolve
from actzip.errors import DataError, InputError

__all__ = ["LARGEST", "LAYOUTS", "NAMED", "RANGES", "Form", "Laid", "forward_names", "looks_nhwc"]

#: Height or width up to which images keep their size where a model leaves it open.
LARGEST = 1280
#: Data sets of one size.
NAMED = ("mnist", "cifar10", "digits")

LAYOUTS = ("nchw", "nhwc")
#: Name -> the least and the greatest pixel.
RANGES = {"0..1": (0.0, 1.0), "0..255": (0.0, 255.0), "-1..1": (-1.0, 1.0)}


def looks_nhwc(shape: tuple[int, ...]) -> bool:
    """Whether a shape without the batch has its channels last: three of three, after two of more."""
    return len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] > 4 and shape[1] > 4


def _own_size(data: str, split: str, folder: Any, count: int | None) -> list[tuple[int, int]]:
    """Height and width of images that are all of one size, then in whole 32s; nothing where they are
    not."""
    try:
        _, h, w = resolve(data, split, folder=folder, sample=count).shape
    except DataError:
        return []
    if max(h, w) > LARGEST:
        return []
    return [(h, w), (max(32, h // 32 * 32), max(32, w // 32 * 32))]


def forward_names(model: nn.Module) -> list[str]:
    """What a module's ``forward`` calls the inputs that it needs; one without a name where it does
    not say."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        given = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return [""]
    return [p.name for p in given if p.kind in kinds and p.default is p.empty] or [""]


@dataclass(frozen=True)
class Form:
    """What is given about a model's inputs.

    Attributes:
        shapes: of inputs by name, the batch included; ``""`` is the first input.
        arrays: inputs as they are, by name; ``""`` is the first input.
        mean, std: of pixels in ``range``, one number or one a channel; the model's usual ones where
            neither these nor ``range`` are given.
        range: a name of :data:`RANGES`.
        layout: ``nchw`` or ``nhwc``: the order in which the model takes images.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    arrays: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    range: str | None = None
    layout: str = "nchw"

    @property
    def first(self) -> tuple[int, ...] | None:
        """The first input's shape as given, the batch included."""
        given = {**{k: tuple(a.shape) for k, a in self.arrays.items()}, **self.shapes}
        return given.get("", next(iter(given.values()), None))

    @property
    def given(self) -> dict[str, tuple[int, ...]]:
        """Shapes as given, of ``shapes`` and ``arrays``."""
        return {**{k: tuple(a.shape) for k, a in self.arrays.items()}, **self.shapes}

    def chw(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """C, H, W of a model's input of this shape, without the batch.

        Raises:
            InputError: it takes no images, or its channels are last and the layout does not say so.
        """
        if len(shape) != 3:
            raise InputError(
                f"the model takes inputs of shape {shape}, not images; give arrays with --input file.npy"
            )
        if self.layout == "nhwc":
            h, w, c = shape
            return c, h, w
        if looks_nhwc(shape):
            raise InputError(
                f"the model takes inputs of {'x'.join(map(str, shape))}: this looks like NHWC: --layout nhwc"
            )
        return shape[0], shape[1], shape[2]

    def laid_shape(self, c: int, h: int, w: int) -> tuple[int, ...]:
        """C, H, W in the model's order."""
        return (h, w, c) if self.layout == "nhwc" else (c, h, w)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images N, C, H, W in the model's order."""
        return x.permute(0, 2, 3, 1).contiguous() if self.layout == "nhwc" and x.ndim == 4 else x

    def images(
        self,
        data: str,
        shape: tuple[int, ...],
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
        *,
        size: int | None = None,
        split: str = "test",
        folder: Any = None,
        limit: int | None = None,
        sample: int | None = None,
        takes: Callable[[tuple[int, ...]], bool] | None = None,
    ) -> Images:
        """The data set for a model whose input has ``shape`` (without the batch) and that usually
        wants ``mean`` and ``std``.

        ``takes(shape)``: of a model that leaves sizes open, whether it takes another one. Images of
        one size, at most :data:`LARGEST` wide or high, then keep it, or the next smaller one that
        fits.

        Raises:
            InputError: the model takes other images. DataError: the data cannot be read.
        """
        c, h, w = self.chw(shape)
        named = data in NAMED
        side: Any = size or (h if h == w else (h, w))
        if takes is not None and size is None and not named:
            own = _own_size(data, split, folder, limit or sample)
            side = next((s for s in own if takes(self.laid_shape(c, *s))), side)
        mean, std = self.normalisation(c, mean, std)
        found = resolve(
            data,
            split,
            folder=folder,
            image_size=None if named else side,
            mean=mean,
            std=std,
            limit=limit,
            sample=sample,
        )
        if found.shape[0] != c:
            raise InputError(f"{found.source} has {found.shape[0]} channels, the model takes {c}")
        return found

    def channels_first(self, x: Tensor) -> Tensor:
        """Images in the model's order as N, C, H, W."""
        return x.permute(0, 3, 1, 2) if self.layout == "nhwc" and x.ndim == 4 else x

    @property
    def normalises(self) -> bool:
        """Whether it says how pixels are normalised."""
        return not (self.mean is None and self.std is None and self.range is None)

    def normalisation(
        self, channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and deviation of pixels between 0 and 1 that give what is asked for."""
        if not self.normalises:
            if mean is None or len(mean) == channels:
                return mean, std
            # of a file whose channels were taken to be first: photographs as usual
            return PHOTOGRAPHS if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
        low, high = RANGES[self.range or "0..1"]
        m, s = self._each("mean", self.mean, channels, 0.0), self._each("std", self.std, channels, 1.0)
        width = high - low
        return tuple((v - low) / width for v in m), tuple(v / width for v in s)

    def _each(
        self, name: str, numbers: tuple[float, ...] | None, channels: int, default: float
    ) -> tuple[float, ...]:
        numbers = numbers or (default,)
        if len(numbers) not in (1, channels):
            raise InputError(
                f"--{name} has {len(numbers)} numbers; one is needed, or {channels}: one a channel"
            )
        return numbers * channels if len(numbers) == 1 else numbers

    def batches(self, names: Iterable[str], batch: int | None, *, fixed: bool = True) -> Iterator[Any]:
        """The arrays as batches for inputs called ``names``: a tensor, or a tuple of several; where
        the model's batch is not ``fixed``, the last may be smaller. One input beside a longer array
        (a recurrent model's state) is a batch as it is.

        Raises:
            InputError: arrays missing, of other names, or of other lengths.
        """
        wanted = list(names)
        arrays = [self._array(n, wanted) for n in wanted]
        counts = {len(a) for a in arrays if a.ndim}
        if len(counts) > 1 and min(counts) == 1:
            yield tuple(torch.from_numpy(np.array(a)) for a in arrays)
            return
        if len(counts) > 1:
            raise InputError(f"arrays of {' and '.join(map(str, sorted(counts)))} inputs; as many of each")
        count = min(counts, default=1)
        if count == 0:
            raise DataError("the arrays hold no input")
        step = (batch or count) if fixed else min(batch or count, count)
        if fixed and count % step and count > step:
            count -= count % step
        if count < step:
            raise DataError(f"the model was exported for batches of {step}; the arrays have {count} inputs")
        for i in range(0, count, step):
            xs = [torch.from_numpy(np.array(a[i : i + step] if a.ndim else a)) for a in arrays]
            yield xs[0] if len(xs) == 1 else tuple(xs)

    def _array(self, name: str, names: list[str]) -> Any:
        if name in self.arrays:
            return self.arrays[name]
        if len(self.arrays) == len(names) == 1:
            return next(iter(self.arrays.values()))
        if name == names[0] and "" in self.arrays:
            return self.arrays[""]
        have = ", ".join(k or "one without a name" for k in self.arrays)
        raise InputError(f"no array for input {name!r}; there are {have}: --input {name}=file.npy")


class Laid:
    """A loader's batches ``(x, y)`` in the order that the model takes images in."""

    def __init__(self, loader: Any, form: Form) -> None:
        self.loader = loader
        self.form = form

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield self.form.laid_out(x), y
