"""Networks, photographs and methods of the benchmarks of training memory."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actzip.data import Loader, resolve
from actzip.models import load_weights
from actzip.models import resolve as resolve_model
from actzip.training import checkpoint_contexts, packed_activations


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions with ReLU, as in U-Net; BatchNorm between where ``norm``."""

    def __init__(self, inputs: int, outputs: int, norm: bool) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padded convolutions, four levels down, one class a pixel."""

    def __init__(self, norm: bool = False, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        sizes = [width << i for i in range(5)]
        self.down = nn.ModuleList(DoubleConv(a, b, norm) for a, b in zip([3, *sizes], sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(sizes))
        self.merge = nn.ModuleList(DoubleConv(b, a, norm) for a, b in itertools.pairwise(sizes))
        self.last = nn.Conv2d(width, classes, 1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.lower(x, 0)
        x = self.upper(self.inner(beside), beside, 0)
        return self.last(x).mean((2, 3))  # one loss for every network here

    def inner(self, x: Tensor) -> Tensor:
        """All levels but the first, whose maps are the largest."""
        maps = []
        for level in range(1, len(self.down)):
            x = self.lower(x, level)
            maps.append(x)
        maps.pop()
        for level in reversed(range(1, len(self.up))):
            x = self.upper(x, maps.pop(), level)
        return x

    def lower(self, x: Tensor, level: int) -> Tensor:
        """One level of the way down."""
        return self.down[level](F.max_pool2d(x, 2) if level else x)

    def upper(self, x: Tensor, beside: Tensor, level: int) -> Tensor:
        """One level of the way up."""
        return self.merge[level](torch.cat([beside, self.up[level](x)], 1))


@dataclass(frozen=True)
class Network:
    """A network as it is measured."""

    make: Callable[[], nn.Module]
    data: str
    size: int
    batch: int
    norm: bool
    trained: bool
    blocks: str  # what is checkpointed: names of modules, or of methods of the network
    stages: str  # the same in larger parts, or the layers with smaller maps alone


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: resolve_model(name)


def _given(name: str, weights: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = resolve_model(name)
        load_weights(model, weights)
        return model

    return make


_RESNET = (r"conv1|layer\d\.\d+", r"conv1|layer\d")
_VGG = (r"features\.\d+\.\d+", r"features\.\d+")
_UNET = ("lower|upper", "inner")

NETWORKS = {
    "resnet50": Network(_torchvision("resnet50"), "imagenet_sample", 224, 32, True, False, *_RESNET),
    "vgg16_bn": Network(_torchvision("vgg16_bn"), "imagenet_sample", 224, 16, True, False, *_VGG),
    "mobilenet_v2": Network(
        _torchvision("mobilenet_v2"),
        "imagenet_sample",
        224,
        32,
        True,
        False,
        r"features\.\d+\.\d+",
        r"features\.\d+",
    ),
    "cifar_resnet20": Network(
        _given("cifar_resnet20", "cifar10_resnet20"), "cifar10", 32, 128, True, True, *_RESNET
    ),
    "cifar_resnet32": Network(
        _given("cifar_resnet32", "cifar10_resnet32"), "cifar10", 32, 128, True, True, *_RESNET
    ),
    "unet_bn": Network(lambda: UNet(norm=True), "imagenet_sample", 224, 8, True, False, *_UNET),
    "vgg16": Network(_torchvision("vgg16"), "imagenet_sample", 224, 16, False, False, *_VGG),
    "unet": Network(lambda: UNet(norm=False), "imagenet_sample", 224, 8, False, False, *_UNET),
}

PACKED = ("exact", "8", "4")
CHECKPOINTED = tuple(
    f"{parts}{packed}" for parts in ("blocks", "stages") for packed in ("", "+exact", "+8", "+4")
)
METHODS = ("plain", *PACKED, *CHECKPOINTED)


def batch_of(network: Network, count: int) -> tuple[Tensor, Tensor]:
    """``count`` photographs (again from the first where there are fewer) and their labels, in ten classes."""
    images = resolve(
        network.data, "test", image_size=network.size if network.size > 32 else None, limit=min(count, 500)
    )
    x, y = next(iter(Loader(images, len(images))))
    times = -(-count // len(x))
    return x.repeat(times, 1, 1, 1)[:count].contiguous(), y.repeat(times)[:count] % 10


def checkpointed(model: nn.Module, parts: str) -> nn.Module:
    """Checkpoints what ``parts`` names, once the first layers of a ResNet and the features of a VGG or
    MobileNet are grouped: within a group a ReLU ends a block."""
    if hasattr(model, "bn1"):
        stem = [n for n in ("conv1", "bn1", "relu", "maxpool") if hasattr(model, n)]
        first = nn.Sequential(*(getattr(model, n) for n in stem))
        for name in stem:
            setattr(model, name, first if name == "conv1" else nn.Identity())
    elif hasattr(model, "features"):
        model.features = _grouped(list(model.features))
    for name, module in list(model.named_modules()):
        if re.fullmatch(parts, name):
            module.forward = partial(_recomputed, module.forward)
    for name in parts.split("|"):
        if callable(method := getattr(model, name, None)) and not isinstance(method, nn.Module):
            setattr(model, name, partial(_recomputed, method))
    return model


def _grouped(layers: list[nn.Module]) -> nn.Sequential:
    """Groups of blocks: a group ends where the maps become smaller, a block with its activation and pool."""
    groups: list[list[list[nn.Module]]] = [[[]]]
    for layer in layers:
        pool = isinstance(layer, nn.MaxPool2d)
        if pool and not groups[-1][-1]:
            groups[-1].pop()
        elif any(groups[-1]) and any(getattr(m, "stride", 1) in (2, (2, 2)) for m in layer.modules()):
            groups.append([[]])
        groups[-1][-1].append(layer)
        if pool:
            groups.append([[]])
        elif not isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            groups[-1].append([])
    return nn.Sequential(
        *(nn.Sequential(*(nn.Sequential(*block) for block in group if block)) for group in groups if group[0])
    )


def _recomputed(forward: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, context_fn=checkpoint_contexts)


def prepare(name: str, method: str) -> nn.Module:
    """The network in training mode, as ``method`` wants it."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make().train()
    if method not in CHECKPOINTED:
        return model
    return checkpointed(model, network.blocks if method.startswith("blocks") else network.stages)


def packing(model: nn.Module, method: str) -> AbstractContextManager[Any]:
    """What goes around forward and loss."""
    how = method.split("+")[-1]
    if how not in PACKED:
        return nullcontext()
    return packed_activations(model, None if how == "exact" else int(how))


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], method: str, optimizer: Any = None) -> Any:
    """Forward, loss, backward and, where there is one, the optimizer's step; returns what packing says."""
    x, y = batch
    with packing(model, method) as packed:
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return packed
