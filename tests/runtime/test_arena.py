"""A plan's arena: values and scratch, placed by the time at which they are used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip import cpu
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.lower import lower
from actzip.runtime.storage import choose_storage


def tiled() -> g.Graph:
    """A 3x3 convolution of 64 channels by the largest tiles that there are, all maps dense."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 2, 1)
    )
    fast = actzip.compile(model.eval(), torch.randn(1, 3, 56, 56), tune=False, cache=False, threads=1)
    return choose_storage(fast.graph, set(fast.graph.values))


def plan_of(graph: g.Graph, kernel: str):
    names = [n.name for n in graph.nodes if isinstance(n, ops.Conv2d) and n.weight.shape[2:] == (3, 3)]
    return lower(graph, dict.fromkeys(names, kernel)).plan


def scratch_of(plan, batch: int, threads: int = 1) -> int:
    return max(scratch for _, _, scratch in plan.memory(batch, threads))


def run(plan, x: np.ndarray, threads: int = 1) -> np.ndarray:
    y = np.empty((len(x), 2, 56, 56), np.float32)
    plan.run(len(x), [x], [y], threads)
    return y


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("kernel", ["winograd-2x2", "winograd-4x4", "winograd-6x6"])
def test_scratch_is_cut_where_the_arena_hangs_on_it_and_results_stay(isa, kernel):
    with cpu.forced(isa):
        plan = plan_of(tiled(), kernel)
        x = np.random.default_rng(0).standard_normal((4, 3, 56, 56)).astype(np.float32)
        assert scratch_of(plan, 1) < 0.8 * scratch_of(plan, 4)  # four images' maps are the larger part
        want = run(plan, x)
        for image, y in zip(x, want, strict=True):
            assert np.array_equal(run(plan, image[None])[0], y)


def test_the_arena_holds_values_and_scratch():
    plan = plan_of(tiled(), "winograd-4x4")
    for threads in (1, 2):
        rows = plan.memory(1, threads)
        most = max(values + scratch for _, values, scratch in rows)
        assert most <= plan.arena_bytes(1, threads) <= 1.05 * most
    assert scratch_of(plan, 1, 2) <= 2 * scratch_of(plan, 1)


def test_an_arena_is_no_larger_than_what_is_used_at_a_time():
    """Blocks of unlike sizes, which the largest first leave holes between."""
    torch.manual_seed(0)
    widths = [(3, 48), (48, 16), (16, 96), (96, 8), (8, 64), (64, 24)]
    layers = [m for i, o in widths for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    fast = actzip.compile(model, torch.randn(1, 3, 40, 40), tune=False, cache=False, threads=1)
    for dense in (set(), set(fast.graph.values)):
        plan = lower(choose_storage(fast.graph, dense)).plan
        most = max(values + scratch for _, values, scratch in plan.memory(1))
        assert plan.arena_bytes(1) <= 1.1 * most


class Branches(nn.Module):
    """A residual block with a 1x1 convolution beside its 3x3 ones, as ResNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 1)
        self.a, self.b = nn.Conv2d(64, 128, 3, 2, 1), nn.Conv2d(128, 128, 3, 1, 1)
        self.side, self.last = nn.Conv2d(64, 128, 1, 2), nn.Conv2d(128, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.b(torch.relu(self.a(x))) + self.side(x)))


def test_the_input_of_a_block_is_gone_before_its_last_3x3_convolution():
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(2, 3, 32, 32)
    fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    order = [n.name for n in fast.graph.nodes]
    assert order.index("side") < order.index("b")
    values = {name: kept for name, kept, _ in lower(fast.graph).plan.memory(1)}
    assert values["b"] < values["side"]
    assert (fast(x) - model(x)).abs().max() < 1e-4
