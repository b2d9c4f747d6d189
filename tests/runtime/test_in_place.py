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
    the end once more; ``last``: a 1x1 convolution behind them."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        late: bool = False,
        act: type[nn.Module] = nn.ReLU,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2) for _ in range(4)
        )
        self.late, self.act = late, act()
        self.last = nn.Conv2d(channels, 2, 1) if last else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = kept = self.act(self.first(x))
        for a, b in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = self.act(b(self.act(a(x))) + x)
        return self.last(x + kept if self.late else x)


def dense(model: nn.Module, x: torch.Tensor) -> g.Graph:
    fast = actzip.compile(model.eval(), x, tune=False, cache=False, threads=1)
    return choose_storage(fast.graph, set(fast.graph.values))


def run(graph: g.Graph, variants: dict[str, str], x: torch.Tensor, threads: int) -> np.ndarray:
    y = np.empty(g.concrete(graph.shape(graph.outputs[0]), len(x)), np.float32)
    lower(graph, variants).plan.run(len(x), [x.numpy()], [y], threads)
    return y


def map_bytes(graph: g.Graph) -> int:
    return 4 * int(np.prod(g.concrete(graph.shape(graph.nodes[1].output), 1)))


def kept_bytes(graph: g.Graph) -> int:
    """The most bytes of values at a time."""
    return max(values for _, values, _ in lower(graph).plan.memory(1))


def check_every_variant(graph, model, x):
    """Each kernel, wherever it can be, gives the model's numbers, on two threads to the bit."""
    names = lower(graph, want_variants=True).variants
    want = model(x).detach().numpy()
    for variant in {v for some in names.values() for v in some}:
        chosen = {n: variant for n, some in names.items() if variant in some}
        outs = [run(graph, chosen, x, threads) for threads in (1, 2)]
        assert np.abs(outs[0] - want).max() <= 1e-4 * np.abs(want).max(), variant
        assert np.array_equal(*outs), variant


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
        check_every_variant(graph, model, x)


def test_two_maps_are_enough_for_residual_blocks():
    graph = dense(Blocks(64, 3), torch.randn(1, 3, 24, 24))
    assert kept_bytes(graph) < 2.2 * map_bytes(graph)


def test_a_residual_that_is_read_later_keeps_its_memory():
    torch.manual_seed(0)
    model, x = Blocks(64, 3, late=True), torch.randn(3, 3, 24, 24)
    graph = dense(model, x)
    assert kept_bytes(graph) > 2.9 * map_bytes(graph)
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


def packed(graph: g.Graph, dense: set[str], density: float) -> g.Graph:
    """All maps packed but ``dense``, with memory for this density."""
    graph = choose_storage(graph, dense)
    for value in graph.values.values():
        value.density = density
    return graph


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kernel, channels", [(1, 40), (3, 5), (3, 40), (3, 64), (3, 136), (5, 24)])
@pytest.mark.parametrize("first", ["packed", "dense"])
def test_every_kernel_packs_in_the_place_of_a_residual(isa, kernel, channels, first):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 7)
    model = Blocks(channels, kernel, last=True)
    with cpu.forced(isa):
        graph = dense(model, x)
        residual = {} if first == "packed" else {graph.nodes[1].inputs[0]}
        graph = packed(graph, set(residual), 1.0)
        if channels > 5 and (first == "packed" or channels <= 64):
            assert kept_bytes(graph) < 2.6 * map_bytes(graph)  # and masks
        check_every_variant(graph, model, x)


def test_packed_maps_lie_elsewhere_where_that_takes_less():
    graph = dense(Blocks(64, 3, last=True), torch.randn(1, 3, 24, 24))
    assert kept_bytes(packed(graph, set(), 0.2)) < 1.2 * map_bytes(graph)


class Long(nn.Module):
    """Rows that kernels compute in parts, residual blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.relu(self.b(torch.relu(self.a(y))) + y))


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("first", ["packed", "dense"])
def test_long_rows_are_packed_in_the_place_of_a_residual(isa, first):
    torch.manual_seed(0)
    model, x = Long(64).eval(), torch.randn(1, 3, 5, 400)
    with cpu.forced(isa):
        graph = dense(model, x)
        residual = {} if first == "packed" else {graph.nodes[1].inputs[0]}
        graph = packed(graph, set(residual), 1.0)
        names = lower(graph, want_variants=True).variants
        want = model(x).detach().numpy()
        for variant in {v for some in names.values() for v in some}:
            chosen = {n: variant for n, some in names.items() if variant in some}
            got = run(graph, chosen, x, 1)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), variant
