"""The networks of the engine benchmarks, their thresholds, and the photographs that they run on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.data import Loader, resolve
from actzip.models import model_info
from actzip.runtime.models import load_model

#: Thresholds of Inception-V3 with what benchmarks/sparsify/inception.py measured of them.
STORED = Path(__file__).resolve().parent.parent / "results" / "sparsify" / "inception-thresholds.json"
#: Networks with trained weights: (name for actzip.models, file of weights). All others are
#: torchvision's by their name, with seeded random ones.
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


def loader(name: str, part: str, count: int, batch: int) -> Loader:
    """``count`` images as network ``name`` wants them (N, 3, H, W): of the ImageNet sample, or of
    CIFAR-10's test set.

    They are in a fixed random order; the first two fifths are for ``calibration``, the others
    ``unseen``: the same split of the photographs as in benchmarks/sparsify/inception.py.
    """
    info = model_info(reference(name))
    side = info.input_shape[-1]
    cifar = side == 32
    data = resolve(
        "cifar10" if cifar else "imagenet_sample",
        "test",
        image_size=None if cifar else side,
        mean=info.mean,
        std=info.std,
    )
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data))
    cut = len(data) * 2 // 5
    chosen = (order[:cut] if part == "calibration" else order[cut:])[:count]
    if len(chosen) < count:
        raise SystemExit(f"{name}: there are {len(chosen)} images for {part}, not {count}")
    return Loader(data.take(np.sort(chosen)), batch)


def images(name: str, part: str, count: int) -> Tensor:
    """Those of :func:`loader` in one tensor."""
    return next(iter(loader(name, part, count, count)))[0].contiguous()


@torch.no_grad()
def measure(
    net: nn.Module, batches: Iterable[tuple[Tensor, Any]]
) -> tuple[float | None, dict[str, float], Tensor]:
    """Density of all ReLU outputs (elements pooled, None where there are none), mean positive value
    by site, the outputs."""
    from actzip.activations import ActivationTap

    counts: dict[str, list[float]] = {}  # site -> non-zeros, elements, sum
    outputs = []

    def count(site: Any, y: Tensor) -> None:
        if site.sparse:
            c = counts.setdefault(site.name, [0.0, 0.0, 0.0])
            for i, v in enumerate(
                (int(torch.count_nonzero(y)), y.numel(), float(y.sum(dtype=torch.float64)))
            ):
                c[i] += v

    with ActivationTap(net, count):
        for x, *_ in batches:
            outputs.append(net(x))
    total = sum(c[1] for c in counts.values())
    density = sum(c[0] for c in counts.values()) / total if total else None
    return density, {k: c[2] / max(c[0], 1) for k, c in counts.items()}, torch.cat(outputs)


def output_error(want: Tensor, got: Tensor) -> float:
    """Root mean square of the difference of centred outputs, relative to theirs."""
    a, b = (o - o.mean(1, keepdim=True) for o in (want, got))
    return float((b - a).square().mean().sqrt() / a.square().mean().sqrt())


def calibrated_thresholds(name: str, density: float) -> dict[str, Any]:
    """Thresholds that ``actzip.sparsify.calibrate_thresholds`` finds, one a layer, as
    benchmarks/sparsify/inception.py asks for them; those that it stored are used."""
    from actzip.sparsify import calibrate_thresholds

    if name == "inception_v3" and STORED.exists():
        stored = json.loads(STORED.read_text())
        if stored["calibration"]["target_density"] == density:
            return dict(stored["thresholds"])
    found = calibrate_thresholds(
        build(name), loader(name, "calibration", 24, 8), density=density, per="layer", samples=24, steps=6
    )
    return {k: t.tolist() if isinstance(t, Tensor) else t for k, t in found.thresholds.items()}


def scaled_thresholds(name: str, target: float, batches: Loader) -> dict[str, float]:
    """One scale s for the whole network, threshold of a site = s times its mean positive value, so
    that the density of all ReLU outputs on ``batches`` together is ``target``: by bisection, the
    thresholds in force."""
    _, means, _ = measure(build(name), batches)
    low, high = 0.0, 1.0
    for _ in range(8):
        s = (low + high) / 2
        density, _, _ = measure(build(name, {k: s * m for k, m in means.items()}), batches)
        low, high = (s, high) if density is not None and density > target else (low, s)
    return {k: high * m for k, m in means.items()}


@torch.no_grad()
def impose_density(name: str, x: Tensor, density: float) -> dict[str, float]:
    """Thresholds that give every ReLU site this density on ``x``, one site after the other (a
    random network has no densities of its own worth measuring). Thresholds are quantiles; a site
    already sparser stays."""
    from actzip.activations import ActivationTap, threshold_activation

    thresholds: dict[str, float] = {}

    def fix(site: Any, y: Tensor) -> Tensor | None:
        flat = y.flatten()
        if not site.sparse or float(torch.count_nonzero(flat)) / flat.numel() <= density:
            return None
        sample = flat[torch.randint(0, flat.numel(), (200_000,), generator=torch.Generator().manual_seed(0))]
        thresholds[site.name] = t = float(torch.quantile(sample, 1.0 - density))
        return threshold_activation(y, t)

    with ActivationTap(build(name), fix) as tap:
        tap.model(x)
    return thresholds
