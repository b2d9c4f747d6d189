"""Networks, photographs and methods of the benchmarks of training memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actzip.data import Loader, resolve
from actzip.models import load_weights
from actzip.models import resolve as resolve_model
from actzip.training import packed_activations


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
        maps = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        maps.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge)):
            x = merge(torch.cat([maps.pop(), up(x)], 1))
        return self.last(x).mean((2, 3))  # one loss for every network here


@dataclass(frozen=True)
class Network:
    """A network as it is measured."""

    make: Callable[[], nn.Module]
    data: str
    size: int
    batch: int
    norm: bool
    trained: bool
    blocks: tuple[str, ...]  # class names of what is checkpointed


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: resolve_model(name)


def _given(name: str, weights: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = resolve_model(name)
        load_weights(model, weights)
        return model

    return make


NETWORKS = {
    "resnet50": Network(_torchvision("resnet50"), "imagenet_sample", 224, 32, True, False, ("Bottleneck",)),
    "vgg16_bn": Network(_torchvision("vgg16_bn"), "imagenet_sample", 224, 16, True, False, ("segments",)),
    "mobilenet_v2": Network(
        _torchvision("mobilenet_v2"), "imagenet_sample", 224, 32, True, False, ("InvertedResidual",)
    ),
    "cifar_resnet20": Network(
        _given("cifar_resnet20", "cifar10_resnet20"), "cifar10", 32, 128, True, True, ("BasicBlock", "Block")
    ),
    "cifar_resnet32": Network(
        _given("cifar_resnet32", "cifar10_resnet32"), "cifar10", 32, 128, True, True, ("BasicBlock", "Block")
    ),
    "unet_bn": Network(lambda: UNet(norm=True), "imagenet_sample", 224, 8, True, False, ("DoubleConv",)),
    "vgg16": Network(_torchvision("vgg16"), "imagenet_sample", 224, 16, False, False, ("segments",)),
    "unet": Network(lambda: UNet(norm=False), "imagenet_sample", 224, 8, False, False, ("DoubleConv",)),
}

METHODS = ("plain", "exact", "8", "4", "checkpoint", "checkpoint+exact", "checkpoint+8", "checkpoint+4")


def batch_of(network: Network, count: int) -> tuple[Tensor, Tensor]:
    """``count`` photographs (again from the first where there are fewer) and their labels, in ten classes."""
    images = resolve(
        network.data, "test", image_size=network.size if network.size > 32 else None, limit=min(count, 500)
    )
    x, y = next(iter(Loader(images, len(images))))
    times = -(-count // len(x))
    return x.repeat(times, 1, 1, 1)[:count].contiguous(), y.repeat(times)[:count] % 10


def recompute_blocks(model: nn.Module, blocks: tuple[str, ...], packed: bool) -> nn.Module:
    """Checkpoints every block of these classes; "segments": the features of a VGG from pool to pool.

    With packing in the way that records while it recomputes, so that this is packed too."""
    if blocks == ("segments",):
        model.features = _segments(model.features)
    for module in model.modules():
        if type(module).__name__ in (*blocks, "Segment"):
            module.forward = _recomputed(module.forward, packed)
    return model


class Segment(nn.Sequential):
    """Layers up to a pool."""


def _segments(features: Any) -> nn.Sequential:
    parts: list[list[nn.Module]] = [[]]
    for layer in features:
        parts[-1].append(layer)
        if isinstance(layer, nn.MaxPool2d):
            parts.append([])
    return nn.Sequential(*(Segment(*p) for p in parts if p))


def _recomputed(forward: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    def run(*args: Tensor) -> Any:
        if packed and not any(a.requires_grad for a in args):  # the reentrant way would have no gradients
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=packed)

    return run


def prepare(name: str, method: str) -> nn.Module:
    """The network in training mode, as ``method`` wants it."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.make().train()
    if not method.startswith("checkpoint"):
        return model
    return recompute_blocks(model, network.blocks, packed="+" in method)


def packing(model: nn.Module, method: str) -> AbstractContextManager[Any]:
    """What goes around forward and loss."""
    how = method.split("+")[-1]
    if how in ("plain", "checkpoint"):
        return nullcontext()
    return packed_activations(model, None if how == "exact" else int(how))


def train_step(model: nn.Module, batch: tuple[Tensor, Tensor], method: str, optimizer: Any = None) -> Any:
    """Forward, loss, backward and, where there is one, the optimizer's step; returns what packing says."""
    x, y = batch
    with packing(model, method) as packed:
        loss = F.cross_entropy(model(x), y)
        if "+" in method:  # what is recomputed is packed
            loss.backward()
    if "+" not in method:
        loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return packed
