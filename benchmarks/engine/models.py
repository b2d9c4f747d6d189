"""The networks of the engine benchmarks, their thresholds, and the photographs that they run on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.data import Loader, resolve
from actzip.models import model_info
from actzip.profile.load import load_model

#: Networks with trained weights: (name for actzip.models, file of weights). All others are torchvision's by their name,
#: with seeded random ones.
TRAINED = {
    "inception_v3": ("inception_v3_5class", "inception_v3_5class"),
    "mobilenet_v1": ("mobilenet_v1", "cifar10_mobilenet_v1"),
    "cifar_resnet20": ("cifar_resnet20", "cifar10_resnet20"),
    "cifar_resnet32": ("cifar_resnet32", "cifar10_resnet32"),
}


def reference(name: str) -> str:
    """What network ``name`` is called in actzip."""
    return TRAINED[name][0] if name in TRAINED else name


def build(name: str, thresholds: dict[str, Any] | None = None, weights: str | None = None) -> nn.Module:
    """Network ``name`` in eval mode, as an engine's process makes it too.

    Args:
        thresholds: site -> number or list of one a channel.
        weights: a safetensors file instead of the usual weights.
    """
    from actzip.activations import set_thresholds
    from actzip.models import load_weights

    torch.manual_seed(0)
    net = load_model(reference(name))[0].eval()
    if weights or name in TRAINED:
        load_weights(net, weights or TRAINED[name][1])
    if thresholds:
        values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in thresholds.items()}
        set_thresholds(net, values)
    return net


def images(name: str, part: str, count: int) -> Tensor:
    """``count`` images as network ``name`` wants them (N, 3, H, W): of the ImageNet sample, or of CIFAR-10's test set.

    They are in a fixed random order; the first two fifths are for ``calibration``, the others ``unseen``: the same split of
    the photographs as in benchmarks/sparsify/inception.py.
    """
    info = model_info(reference(name))
    side = info.input_shape[-1]
    cifar = side == 32
    data = resolve(
        "cifar10" if cifar else "imagenet_sample", "test", image_size=None if cifar else side, mean=info.mean, std=info.std
    )  # fmt: skip
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data))
    cut = len(data) * 2 // 5
    chosen = order[:cut] if part == "calibration" else order[cut:]
    return next(iter(Loader(data.take(np.sort(chosen[:count])), count)))[0].contiguous()


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
