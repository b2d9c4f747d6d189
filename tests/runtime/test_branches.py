"""Sums of convolutions of one map, and depthwise convolutions to several maps a channel."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import actzip
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime import passes as P
from actzip.runtime.interpret import interpret
from actzip.runtime.tracing import capture


def _graph(net: nn.Module, *shape: int) -> g.Graph:
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return capture(net.eval(), torch.randn(2, *shape))


def _convs(net: nn.Module, x: Tensor) -> list[ops.Conv2d]:
    """What is left after all passes, whose meaning is the network's; the engine agrees."""
    graph = _graph(net, *x.shape[1:])
    after = P.optimize(graph)
    with torch.no_grad():
        want = net(x)
    (got,), _ = interpret(after, {after.inputs[0]: x})
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-5 * scale
    assert (actzip.compile(net, x, tune=False)(x) - want).abs().max() <= 1e-5 * scale
    return [n for n in after.nodes if isinstance(n, ops.Conv2d)]


class Sum(nn.Module):
    """act(sum of branches)."""

    def __init__(self, *branches: nn.Module, signs: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.branches, self.signs = nn.ModuleList(branches), signs or (1,) * len(branches)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for b, sign in zip(self.branches[1:], self.signs[1:], strict=True):
            y = y + b(x) if sign > 0 else y - b(x)
        return torch.relu(y)


def _conv(i: int, o: int, k: int | tuple[int, int], s: int = 1, groups: int = 1) -> nn.Sequential:
    pad = (k // 2) if isinstance(k, int) else (k[0] // 2, k[1] // 2)
    return nn.Sequential(nn.Conv2d(i, o, k, s, pad, groups=groups, bias=False), nn.BatchNorm2d(o))


@pytest.mark.parametrize(
    ("net", "kernel"),
    [
        (Sum(_conv(8, 8, 3), _conv(8, 8, 1), nn.BatchNorm2d(8)), (8, 8, 3, 3)),  # RepVGG
        (Sum(_conv(8, 12, 3, 2), _conv(8, 12, 1, 2)), (12, 8, 3, 3)),
        (Sum(_conv(8, 8, 7, 2, 8), _conv(8, 8, 3, 2, 8)), (8, 1, 7, 7)),  # depthwise, FastViT
        (Sum(_conv(8, 8, 3, 1, 8), _conv(8, 8, 1, 1, 8), nn.BatchNorm2d(8), signs=(1, 1, -1)), (8, 1, 3, 3)),
        (Sum(nn.Identity(), _conv(8, 8, 3, 1, 2), _conv(8, 8, 1, 1, 4)), (8, 4, 3, 3)),
        (Sum(_conv(8, 8, (1, 3)), _conv(8, 8, (1, 5)), nn.Identity()), (8, 8, 1, 5)),
        (Sum(_conv(8, 16, 3, 1, 8), _conv(8, 16, 1, 1, 8)), (16, 1, 3, 3)),
    ],
)
def test_branches_become_one_convolution(net: nn.Module, kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    (conv,) = _convs(net, torch.randn(2, 8, 13, 10))
    assert conv.weight.shape == kernel


@pytest.mark.parametrize(
    "net",
    [
        Sum(_conv(8, 8, (1, 7)), _conv(8, 8, (7, 1))),  # 49 taps of 14
        Sum(_conv(8, 8, 1), _conv(8, 8, 3, 1, 8)),
        Sum(_conv(8, 8, 3), nn.Sequential(_conv(8, 8, 1), nn.ReLU())),
        Sum(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.Conv2d(8, 8, 3, padding=1)),
    ],
)
def test_branches_that_would_multiply_more_stay(net: nn.Module) -> None:
    torch.manual_seed(0)
    assert len(_convs(net, torch.randn(2, 8, 9, 9))) == 2


class Twice(nn.Module):
    """The first branch is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.sigmoid(y) * (y + self.b(x))


def test_a_branch_with_other_readers_stays() -> None:
    torch.manual_seed(0)
    assert len(_convs(Twice(), torch.randn(1, 8, 6, 7))) == 2


class Tree(nn.Module):
    """A random sum of what is linear in x, of what is not, and of sums."""

    def __init__(self, r: random.Random, depth: int) -> None:
        super().__init__()
        self.sign = r.choice((1, -1))
        self.parts = nn.ModuleList()
        for _ in range(2):
            kind = r.choice(("conv", "conv", "norm", "same", "tree" if depth else "conv", "act"))
            k = r.choice((1, 3, 5))
            conv = nn.Conv2d(8, 8, k, 1, k // 2, groups=r.choice((1, 2, 8)), bias=r.random() < 0.5)
            made: nn.Module = conv
            if kind == "tree":
                made = nn.Sequential(Tree(r, depth - 1), nn.BatchNorm2d(8))
            elif kind in ("norm", "same"):
                made = nn.BatchNorm2d(8) if kind == "norm" else nn.Identity()
            elif kind == "act":
                made = nn.Sequential(conv, nn.Tanh())
            self.parts.append(made)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x) + self.sign * self.parts[1](x)


@pytest.mark.parametrize("seed", range(12))
def test_random_sums_keep_their_meaning(seed: int) -> None:
    torch.manual_seed(seed)
    _convs(nn.Sequential(Tree(random.Random(seed), 3), nn.ReLU()), torch.randn(2, 8, 11, 9))


class Wide(nn.Module):
    """A depthwise convolution to ``times`` maps a channel, and its readers."""

    def __init__(self, times: int, act: nn.Module, shuffled: bool = False) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 6 * times, 5, 2, 2, groups=6)
        self.act, self.shuffled = act, shuffled
        self.a = nn.Conv2d(6 * times, 10, 1)
        self.b = nn.Conv2d(6 * times, 10, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.wide(x))
        if self.shuffled:
            return y * self.b(y)[:, :1]
        return self.a(y) + torch.relu(self.b(y))


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(), "prelu"])
def test_depthwise_to_several_maps(times: int, act: nn.Module | str) -> None:
    torch.manual_seed(0)
    fn = act
    if isinstance(fn, str):
        fn = nn.PReLU(6 * times)
        nn.init.uniform_(fn.weight)
    convs = _convs(Wide(times, fn), torch.randn(2, 6, 12, 9))
    assert sum(c.groups == 6 and c.weight.shape[0] == 6 for c in convs) == times
    assert all(c.groups == 1 or c.weight.shape[0] == c.groups for c in convs)


def test_depthwise_to_several_maps_that_others_read_stays() -> None:
    torch.manual_seed(0)
    convs = _convs(Wide(2, nn.ReLU(), shuffled=True), torch.randn(1, 6, 12, 9))
    assert any(c.weight.shape[0] == 12 and c.groups == 6 for c in convs)
