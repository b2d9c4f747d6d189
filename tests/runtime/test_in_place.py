"""The output of a convolution lies where its residual did, where nobody else reads that afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip import cpu
from actzip.runtime import graph as g
from actzip.runtime.lower import lower
from actzip.runtime.storage import choose_storage


class Blocks(nn.Module):
    """Residual blocks of ``kernel`` x ``kernel`` convolutions; ``late``: the first map is read at
    the end once more."""

    def __init__(
        self, channels: int, kernel: int, late: bool = False, act: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(4)
        )
        self.late, self.act = late, act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = kept = self.act(self.first(x))
        for a, b in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = self.act(b(self.act(a(x))) + x)
        return x + kept if self.late else x


def dense(model: nn.Module, x: torch.Tensor) -> g.Graph:
    fast = actzip.compile(model.eval(), x, tune=False, cache=False, threads=1)
    return choose_storage(fast.graph, set(fast.graph.values))


def run(graph: g.Graph, variants: dict[str, str], x: torch.Tensor, threads: int) -> np.ndarray:
    y = np.empty(g.concrete(graph.shape(graph.outputs[0]), len(x)), np.float32)
    lower(graph, variants).plan.run(len(x), [x.numpy()], [y], threads)
    return y


def map_bytes(graph: g.Graph) -> int:
    return 4 * int(np.prod(g.concrete(graph.shape(graph.nodes[1].output), 1)))


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kernel, channels", [(1, 40), (3, 5), (3, 40), (3, 136), (5, 24), (1, 1100)])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_every_kernel_adds_a_residual_in_place(isa, kernel, channels, act):
    """1,100 channels: the dense kernels compute them in slices, partial sums between."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7)
    model = Blocks(channels, kernel, act=act)
    with cpu.forced(isa):
        graph = dense(model, x)
        names = lower(graph, want_variants=True).variants
        want = model(x).detach().numpy()
        for variant in {v for some in names.values() for v in some}:
            chosen = {n: variant for n, some in names.items() if variant in some}
            outs = [run(graph, chosen, x, threads) for threads in (1, 2)]
            assert np.abs(outs[0] - want).max() <= 1e-4 * np.abs(want).max(), variant
            assert np.array_equal(*outs), variant


def test_two_maps_are_enough_for_residual_blocks():
    graph = dense(Blocks(64, 3), torch.randn(1, 3, 24, 24))
    assert lower(graph).plan.arena_bytes(1) < 2.2 * map_bytes(graph)


def test_a_residual_that_is_read_later_keeps_its_memory():
    torch.manual_seed(0)
    model, x = Blocks(64, 3, late=True), torch.randn(3, 3, 24, 24)
    graph = dense(model, x)
    assert lower(graph).plan.arena_bytes(1) > 2.9 * map_bytes(graph)
    want = model(x).detach().numpy()
    assert np.abs(run(graph, {}, x, 1) - want).max() <= 1e-4 * np.abs(want).max()


class Same(nn.Module):
    """A residual that is the convolution's input as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return torch.relu(self.b(y) + y)


def test_the_input_of_a_convolution_keeps_its_memory():
    torch.manual_seed(0)
    model, x = Same(), torch.randn(2, 3, 16, 16)
    graph = dense(model, x)
    want = model(x).detach().numpy()
    assert np.abs(run(graph, {}, x, 2) - want).max() <= 1e-4 * np.abs(want).max()
