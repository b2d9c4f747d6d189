"""Networks with real weights and the images that they are judged on, for figures.py."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from actzip.data import resolve
from actzip.data.roots import data_roots
from actzip.models import load_weights
from actzip.models import resolve as resolve_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real"))
from modules import craft, efficientnet_lite0, mobilenet_v2

Data = Callable[[int, int], tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class Network:
    """A network, its data, and the points that are asked for.

    Attributes:
        make: the module.
        data: of so many to calibrate with and a draw: calibration images, images to judge on, their
            labels. Draw 0 is spread evenly, others are random.
        density: densities of all ReLU outputs; less_work: factors of effective MACs against natural zeros.
        calibrate: images for thresholds and repair; images: judged on, at most; batch: a pass.
        labelled: labels are of the network's classes, so top-1 is counted.
        bits: the maps are also coded, as integers of so many bits, of ``coded`` images, at the
            densities of ``coded_at``, which has for each how wide steps are (quantize's ``widen``).
    """

    make: Callable[[], nn.Module]
    data: Data
    density: tuple[float, ...] = ()
    less_work: tuple[float, ...] = ()
    calibrate: int = 32
    batch: int = 16
    labelled: bool = True
    images: int = 10_000
    bits: tuple[int, ...] = ()
    coded: int = 32
    coded_at: dict[float, float] = field(default_factory=dict)


def own(name: str, weights: str) -> Callable[[], nn.Module]:
    """One of our networks with weights of the shared folder."""

    def make() -> nn.Module:
        made = resolve_model(name)
        load_weights(made, weights)
        return made.eval()

    return make


def crops(side: int, share: float, mean: float, deviation: float) -> Data:
    """ImageNet's 500 photographs as EfficientNet takes them: the middle ``share`` of the shorter side,
    resized to ``side`` bicubically, (x - mean) / deviation of 0..255."""

    def data(calibrate: int, draw: int) -> tuple[Tensor, Tensor, Tensor | None]:
        import pyarrow.parquet as pq
        from PIL import Image

        rows = pq.read_table(data_roots()[0] / "imagenet_sample" / "test.parquet").to_pylist()
        made = []
        for row in rows:
            with Image.open(io.BytesIO(row["img"]["bytes"])) as image:
                width, height = image.size
                edge = int(min(width, height) * share)
                left, top = (width - edge) // 2, (height - edge) // 2
                part = image.convert("RGB").crop((left, top, left + edge, top + edge))
                made.append(np.asarray(part.resize((side, side), Image.Resampling.BICUBIC)))
        x = (torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() - mean) / deviation
        return dealt(x, torch.tensor([row["label"] for row in rows]), calibrate, draw)

    return data


def dealt(x: Tensor, y: Tensor, calibrate: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """So many, spread evenly, to calibrate; the others to judge on, and their labels. Another draw takes
    as many of those that judge otherwise."""
    chosen = np.linspace(0, len(x) - 1, calibrate).round().astype(int)
    rest = np.setdiff1d(np.arange(len(x)), chosen)
    if draw:
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(draw)).numpy()
        chosen, rest = rest[order[:calibrate]], rest[np.sort(order[calibrate:])]
    return x[chosen], x[rest], y[rest]


def photographs(side: int, crop: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
    """ImageNet's 500 photographs: so many to calibrate, the others to judge on."""

    def data(calibrate: int, draw: int) -> tuple[Tensor, Tensor, Tensor | None]:
        found = resolve("imagenet_sample", "test", image_size=side, mean=mean, std=std)
        x, y = found.batch(slice(None))
        edge = (side - crop) // 2
        x = x[:, :, edge : edge + crop, edge : edge + crop]
        return dealt(x, y, calibrate, draw)

    return data


def cifar(mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
    """CIFAR-10: training images to calibrate, without labels; the whole test set to judge on."""

    def data(calibrate: int, draw: int) -> tuple[Tensor, Tensor, Tensor | None]:
        train = resolve("cifar10", "train", mean=mean, std=std)
        test = resolve("cifar10", "test", mean=mean, std=std)
        chosen = np.linspace(0, len(train) - 1, calibrate).round().astype(int)
        if draw:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))
            chosen = order[:calibrate].numpy()
        return train.batch(chosen)[0], *test.batch(slice(None))

    return data


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))

NETWORKS = {
    "efficientnet-lite0": Network(
        efficientnet_lite0,
        crops(224, 224 / 256, 127, 128),
        density=(0.46, 0.44, 0.42),
        bits=(16, 8),
        coded_at={0.46: 1.3, 0.44: 1.0},
    ),
    "mobilenet-v2": Network(
        mobilenet_v2, photographs(256, 224, *_IMAGENET), density=(0.57, 0.52, 0.47, 0.41)
    ),
    "inception-v3": Network(
        own("inception_v3_5class", "inception_v3_5class"),
        photographs(299, 299, (0.0,) * 3, (1.0,) * 3),
        density=(0.25,),
        labelled=False,
        images=100,
    ),
    "craft": Network(
        craft,
        photographs(240, 240, *_IMAGENET),
        less_work=(1.25,),
        calibrate=16,
        batch=4,
        labelled=False,
        images=64,
    ),
    "mobilenet-v1-cifar10": Network(
        own("mobilenet_v1", "cifar10_mobilenet_v1"),
        cifar(*_CIFAR),
        less_work=(1.4, 1.65),
        calibrate=1024,
        batch=128,
    ),
    "resnet20-cifar10": Network(
        own("cifar_resnet20", "cifar10_resnet20"),
        cifar(*_IMAGENET),
        less_work=(1.15, 1.25),
        calibrate=1024,
        batch=128,
    ),
}
