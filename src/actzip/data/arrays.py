"""Images as arrays, and a loader whose order depends on (seed, epoch, position) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actzip.errors import DataError, InputError

__all__ = ["AUGMENTATIONS", "Images", "Loader", "split"]

AUGMENTATIONS = ("none", "crop_flip")


def _tensor(a: npt.NDArray[Any]) -> Tensor:
    """The array's own memory, unless that may not be written: a tensor may."""
    return torch.from_numpy(np.require(a, requirements=("C", "W")))


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        images: uint8 ``N, C, H, W``.
        labels: int64 ``N``.
        classes: number of classes.
        mean, std: per channel, of images scaled to [0, 1].
        name: what was asked for; ``source`` says where it came from (a stand-in says so here).
        skipped: files that could not be read, with the reason.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    source: str
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise InputError(f"images must be uint8 N, C, H, W, not {self.images.dtype} {self.images.shape}")
        if len(self.images) == 0:
            raise DataError(f"{self.name}: there is no image in {self.source}")
        if len(self.labels) != len(self.images):
            raise InputError(f"{len(self.labels)} labels for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        _, c, h, w = self.images.shape
        return c, h, w

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64] | slice) -> Images:
        """The images at ``indices``."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def batch(self, indices: npt.NDArray[np.int64] | slice) -> tuple[Tensor, Tensor]:
        """Normalised float32 images ``N, C, H, W`` and int64 labels."""
        x = _tensor(self.images[indices])
        return self.normalise(x), _tensor(self.labels[indices])

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 -> float32, (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).reshape(1, -1, 1, 1)
        return (x.float() / 255 - mean) / std


def split(data: Images, validation: int, seed: int) -> tuple[Images, Images]:
    """``data`` without and with ``validation`` images, chosen by ``seed`` alone (the same split every time).

    Raises:
        InputError: ``validation`` is not between 1 and the number of images - 1.
    """
    if not 0 < validation < len(data):
        raise InputError(f"validation must be between 1 and {len(data) - 1} images, not {validation}")
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5EED]))).permutation(
        len(data)
    )
    return data.take(np.sort(order[validation:])), data.take(np.sort(order[:validation]))


class Loader:
    """Batches of one epoch: ``(x, y)`` with x float32 ``N, C, H, W``.

    Order and augmentation are functions of ``seed``, ``epoch`` and the batch's number alone, so a
    run that starts again at ``start`` sees what it would have seen.

    Args:
        data: the images.
        batch_size: images a batch; the last batch is smaller unless ``drop_last``.
        shuffle: a new order each epoch; False: as stored.
        augment: ``none``, or ``crop_flip`` (pad by an eighth, crop at random, flip at random).
        start: the first batch to serve.
        shard: ``(rank, world)``: serve the rank-th part of every global batch of ``batch_size`` images.
        channels_last: memory format of x.
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        augment: str = "none",
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        channels_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if augment not in AUGMENTATIONS:
            raise InputError(f"augment must be one of {', '.join(AUGMENTATIONS)}, not {augment!r}")
        rank, world = shard
        if not 0 <= rank < world:
            raise InputError(f"shard must be (rank, world) with 0 <= rank < world, not {shard}")
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle
        self.augment = augment
        self.start = start
        self.shard = shard
        self.drop_last = drop_last
        self.channels_last = channels_last

    def __len__(self) -> int:
        n = len(self.data)
        batches = n // self.batch_size if self.drop_last else -(-n // self.batch_size)
        return max(0, batches - self.start)

    def at(self, epoch: int, start: int = 0) -> Loader:
        """The same loader for another epoch."""
        return Loader(
            self.data,
            self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
            augment=self.augment,
            start=start,
            shard=self.shard,
            drop_last=self.drop_last,
            channels_last=self.channels_last,
        )

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, *key])))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.data)
        order = self._random(0).permutation(n) if self.shuffle else np.arange(n)
        rank, world = self.shard
        for b in range(self.start, self.start + len(self)):
            indices = order[b * self.batch_size : (b + 1) * self.batch_size]
            x = _tensor(self.data.images[indices])
            if self.augment == "crop_flip":
                x = _crop_flip(x, self._random(1, b))
            y = _tensor(self.data.labels[indices])
            if world > 1:
                each = -(-len(indices) // world)
                x, y = x[rank * each : (rank + 1) * each], y[rank * each : (rank + 1) * each]
            x = self.data.normalise(x)
            yield (x.contiguous(memory_format=torch.channels_last) if self.channels_last else x), y


def _crop_flip(x: Tensor, random: np.random.Generator) -> Tensor:
    n, _, h, w = x.shape
    pad = max(1, h // 8)
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    top = torch.from_numpy(random.integers(0, 2 * pad + 1, n))
    left = torch.from_numpy(random.integers(0, 2 * pad + 1, n))
    flip = torch.from_numpy(random.integers(0, 2, n).astype(bool))
    rows = top[:, None] + torch.arange(h)[None]
    cols = left[:, None] + torch.arange(w)[None]
    cols = torch.where(flip[:, None], cols.flip(1), cols)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def as_batches(data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``data`` in order, without augmentation."""
    yield from Loader(data, batch_size)
