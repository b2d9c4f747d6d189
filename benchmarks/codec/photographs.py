"""The images that the codec figures are of."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SHARED = Path(os.environ.get("ACTZIP_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def size(name: str) -> int:
    return 299 if name == "inception_v3" else 32 if name.startswith("cifar10_") else 224


def photographs(name: str, count: int, first: int = 0) -> Tensor:
    """``count`` images as network ``name`` wants them (N, 3, H, W): the ImageNet sample, or
    CIFAR-10's test set.

    Every 500 / count-th of the sample, from ``first``, so that small counts see different classes too.
    """
    import pyarrow.parquet as pq
    from PIL import Image

    side = size(name)
    cifar = name.startswith("cifar10_")
    path = SHARED / ("data/cifar10/test.parquet" if cifar else "data/imagenet_sample/test.parquet")
    table = pq.read_table(path)
    columns = table.column_names
    column = "img" if "img" in columns else "image"
    rows = table.column(column)
    at = [(first + i * max(1, len(rows) // max(count, 1))) % len(rows) for i in range(count)]
    out = []
    for i in at:
        cell = rows[i].as_py()
        image = Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)).convert("RGB")
        if not cifar:
            scale = max(side / image.width, side / image.height)
            image = image.resize(
                (max(side, round(image.width * scale)), max(side, round(image.height * scale))), 2
            )
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        out.append(np.asarray(image, np.float32).transpose(2, 0, 1) / 255)
    x = np.stack(out)
    if name != "inception_v3":
        mean = (0.4914, 0.4822, 0.4465) if name == "cifar10_mobilenet_v1" else (0.485, 0.456, 0.406)
        std = (0.2470, 0.2435, 0.2616) if name == "cifar10_mobilenet_v1" else (0.229, 0.224, 0.225)
        x = (x - np.array(mean, np.float32).reshape(3, 1, 1)) / np.array(std, np.float32).reshape(3, 1, 1)
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))
