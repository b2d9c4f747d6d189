"""The networks of the engine benchmarks, their thresholds, and the photographs that they run on."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHARED = Path(os.environ.get("ACTZIP_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def _inception() -> nn.Module:
    from safetensors.torch import load_file

    from actzip.models._torchvision import import_torchvision

    models = import_torchvision().models
    net = models.inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
    net.fc = nn.Sequential(
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(128, 5),
    )
    state = load_file(str(SHARED / "weights/inception_v3_5class.safetensors"))
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=True)
    return net


def _own(name: str) -> nn.Module:
    from actzip import models

    return models.load(name, SHARED / "weights")


# name -> (builder, input size, statistics of the photographs)
def build(name: str, thresholds: dict[str, Any] | None = None) -> nn.Module:
    """Network ``name`` in eval mode: ``inception_v3``, ``cifar10_*`` with the given weights, else torchvision's by that
    name with seeded random ones. ``thresholds``: site -> number or list of one a channel."""
    torch.manual_seed(0)
    if name == "inception_v3":
        net = _inception()
    elif name.startswith("cifar10_"):
        net = _own(name)
    else:
        from actzip.models._torchvision import import_torchvision

        net = import_torchvision().models.get_model(name, weights=None)
    net.eval()
    if thresholds:
        from actzip.activations import set_thresholds

        values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in thresholds.items()}
        set_thresholds(net, values)
    return net


def size(name: str) -> int:
    return 299 if name == "inception_v3" else 32 if name.startswith("cifar10_") else 224


def photographs(name: str, count: int, first: int = 0) -> Tensor:
    """``count`` images as network ``name`` wants them (N, 3, H, W): the ImageNet sample, or CIFAR-10's test set.

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


class _Meter:
    def __init__(self) -> None:
        self.nonzero = 0
        self.total = 0
        self.positive_mean: dict[str, float] = {}
        self.density: dict[str, float] = {}

    def __call__(self, site: Any, y: Tensor) -> None:
        k = int(torch.count_nonzero(y))
        self.nonzero += k
        self.total += y.numel()
        self.positive_mean[site.name] = float(y.sum()) / max(k, 1)
        self.density[site.name] = k / y.numel()


@torch.no_grad()
def measure(net: nn.Module, x: Tensor) -> tuple[_Meter, Tensor]:
    """Densities of all ReLU outputs (elements pooled) and the network's outputs on ``x``."""
    from actzip.activations import ActivationTap

    meter = _Meter()
    outputs = []
    totals: dict[str, list[float]] = {}
    for part in x.split(8):
        one = _Meter()
        with ActivationTap(net, lambda s, y, one=one: one(s, y) if s.sparse else None):
            outputs.append(net(part))
        meter.nonzero += one.nonzero
        meter.total += one.total
        for k in one.density:
            totals.setdefault(k, [0.0, 0.0, 0.0])
            totals[k][0] += one.density[k] * len(part)
            totals[k][1] += one.positive_mean[k] * len(part)
            totals[k][2] += len(part)
    meter.density = {k: v[0] / v[2] for k, v in totals.items()}
    meter.positive_mean = {k: v[1] / v[2] for k, v in totals.items()}
    return meter, torch.cat(outputs)


def thresholds_for_density(name: str, target: float, x: Tensor) -> dict[str, float]:
    """One scale s for the whole network, threshold of a site = s times its mean positive value, so that the density of all
    ReLU outputs on ``x`` together is ``target``: by bisection, the thresholds in force."""
    base, _ = measure(build(name), x)
    low, high = 0.0, 1.0
    for _ in range(8):
        s = (low + high) / 2
        values = {k: s * m for k, m in base.positive_mean.items()}
        density = _density(name, values, x)
        low, high = (s, high) if density > target else (low, s)
    return {k: high * m for k, m in base.positive_mean.items()}


def _density(name: str, thresholds: dict[str, float], x: Tensor) -> float:
    meter, _ = measure(build(name, thresholds), x)
    return meter.nonzero / meter.total


@torch.no_grad()
def impose_densities(name: str, x: Tensor, densities: dict[str, float] | float) -> dict[str, list[float]]:
    """Thresholds per channel that give every ReLU site its density on ``x``, one site after the other (a random network has
    no densities of its own worth measuring). Thresholds are quantiles of the positive side; a site already sparser stays."""
    from actzip.activations import find_sites

    net = build(name)
    sites = [s.name for s in find_sites(net, x[:1])[0] if s.sparse]
    thresholds: dict[str, Any] = {}
    from actzip.activations import ActivationTap

    def fix(site: Any, y: Tensor) -> Tensor | None:
        if not site.sparse:
            return None
        want = densities if isinstance(densities, float) else densities.get(site.name, 1.0)
        flat = y.flatten()
        if float(torch.count_nonzero(flat)) / flat.numel() <= want:
            return None
        sample = flat[torch.randint(0, flat.numel(), (200_000,), generator=torch.Generator().manual_seed(0))]
        t = float(torch.quantile(sample, 1.0 - want))
        thresholds[site.name] = t
        return torch.where(y <= t, torch.zeros(()), y)

    with ActivationTap(net, fix):
        net(x)
    assert all(k in sites for k in thresholds)
    return thresholds
