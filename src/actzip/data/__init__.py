"""Data sets by name: images as arrays, decoded once, served in an order that a resumed run repeats exactly.

    data = resolve("mnist", "train")                         # MNIST from the shared data, or downloaded
    data = resolve("parquet:some/train.parquet", "train")    # Hugging Face layout
    data = resolve("folder:/data/imagenet/val", image_size=224)
    for x, y in Loader(data, batch_size=128, seed=1, epoch=3, augment="crop_flip"): ...

Images are uint8 ``N, C, H, W`` in memory (or mapped from the cache on disk); a :class:`Loader`
makes float32 batches ``(x - mean) / std`` of them, with x in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy
from actzip.data.roots import data_roots

if TYPE_CHECKING:
    from actzip.data.arrays import Images, Loader, split
    from actzip.data.sources import names, resolve

__all__ = ["Images", "Loader", "data_roots", "names", "resolve", "split"]

if not TYPE_CHECKING:
    # torch is imported where images are needed, not before
    __getattr__ = lazy(
        __name__,
        {"Images": "arrays", "Loader": "arrays", "split": "arrays", "names": "sources", "resolve": "sources"},
    )
