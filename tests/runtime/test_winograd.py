"""Winograd kernels in compiled networks: by trial where exact enough, shown, refused on request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.lower import lower
from actzip.runtime.storage import choose_storage
from actzip.runtime.winograd import (
    TOLERANCE,
    errors,
    is_winograd,
    long_products,
    products,
    read_maps,
    tile_density,
)

#: Of the largest output, behind several layers of which each keeps to TOLERANCE.
SEVERAL = 4e-5


def net(channels: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=4, dilation=(2, 3)),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=3, dilation=3),
        nn.GELU(),
        nn.Conv2d(channels, 8, 3, padding=(0, 2)),
        nn.GELU(),
    ).eval()


def kernels_of(fast: actzip.CompiledModel) -> dict[str, str]:
    return {r.name: r.kernel for r in fast.explain(runs=1).rows}


def forced(model: nn.Module, x: torch.Tensor, kernel: str, dense: bool, threads: int = 1):
    """The model compiled with ``kernel`` wherever it can run."""
    fast = actzip.compile(model, x, tune=False, cache=False, threads=threads)
    graph = choose_storage(fast.graph, set(fast.graph.values) if dense else set())
    names = lower(graph, want_variants=True).variants
    chosen = {n: kernel for n, v in names.items() if kernel in v}
    assert len(chosen) >= 3
    return lower(graph, chosen).plan, graph


@pytest.mark.parametrize("kernel", ["winograd-2x2", "winograd-4x4", "winograd-6x6"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_whole_networks_come_out_as_the_model_gives_them(kernel, dense, batch):
    """Packed and dense maps, a pool by turns, an activation that the kernel does not do."""
    model, x = net(), torch.randn(batch, 3, 22, 17)
    plan, graph = forced(model, x, kernel, dense)
    want = model(x).detach().numpy()
    outs = []
    for threads in (1, 2):
        y = np.empty(g.concrete(graph.shape(graph.outputs[0]), batch), np.float32)
        plan.run(batch, [x.numpy()], [y], threads)
        assert np.abs(y - want).max() <= SEVERAL * np.abs(want).max()
        outs.append(y)
    assert np.array_equal(*outs)


def test_errors_are_measured_on_the_input_given():
    model, x = net(), torch.randn(1, 3, 22, 17)
    fast = actzip.compile(model, x, tune=False, cache=False)
    low = lower(choose_storage(fast.graph, set(fast.graph.values)), want_variants=True)
    wanted = {n: {v for v in names if is_winograd(v)} for n, names in low.variants.items()}
    maps = read_maps(fast.graph, low, wanted, [x.numpy()], 1, 1)
    found = errors(fast.graph, wanted, maps, 1)
    assert len(found) == 6  # the first convolution reads planes
    assert all(0 < e < TOLERANCE for kernels in found.values() for e in kernels.values())
    nan = errors(fast.graph, wanted, {n: np.full_like(m, np.nan) for n, m in maps.items()}, 1)
    assert all(e == np.inf for kernels in nan.values() for e in kernels.values())


def test_a_kernel_that_is_not_exact_enough_is_not_chosen(monkeypatch):
    monkeypatch.setattr("actzip.runtime.tune.TOLERANCE", 0.0)
    fast = actzip.compile(net(), torch.randn(1, 3, 40, 40), cache=False, threads=1)
    assert not any(is_winograd(k) for k in kernels_of(fast).values())


def test_weights_too_large_for_a_transform_stay_direct():
    """Their transforms overflow; the model itself does not."""
    model, x = net(), torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        model[2].weight.div_(model[2].weight.abs().max()).mul_(3e38)
        model[0].weight.mul_(1e-35)
        model[0].bias.mul_(1e-35)
    fast = actzip.compile(model, x, cache=False, threads=1)
    assert not is_winograd(kernels_of(fast)["2"])
    want = actzip.compile(model, x, cache=False, threads=1, winograd=False)(x)
    assert torch.isfinite(want).all()
    assert (fast(x) - want).abs().max() <= SEVERAL * want.abs().max()


def test_winograd_false_refuses_it_and_trials_may_choose_it():
    model, x = net(), torch.randn(1, 3, 64, 64)
    plain = actzip.compile(model, x, cache=False, threads=1, winograd=False)
    assert not any(is_winograd(k) for k in kernels_of(plain).values())
    fast = actzip.compile(model, x, cache=False, threads=1)
    rows = [r for r in fast.explain(runs=1).rows if is_winograd(r.kernel)]
    for r in rows:  # which layers is a matter of time, which no test asserts
        assert 0 < r.tile_density <= 1 and 0 < r.products < r.macs
        assert "error" in r.why
    assert (fast(x) - model(x)).abs().max() <= SEVERAL * model(x).abs().max()


#: Which pixels of a row (rows of a column) the places of F(m, 3) depend on: of B^T, what is not zero.
DEPENDS = {
    2: ["1.1.", ".11.", ".11.", ".1.1"],
    4: ["1.1.1.", *[".1111."] * 4, ".1.1.1"],
    6: ["1.1.1.1.", *[".111111."] * 6, ".1.1.1.1"],
}


def test_tile_density_counts_as_the_definition_says():
    rng = np.random.default_rng(0)
    n = ops.Conv2d(
        name="c", inputs=("x",), output="y", weight=np.zeros((5, 7, 3, 3), np.float32), padding=(1, 0, 2, 3)
    )
    x = (rng.random((2, 7, 9, 11)) * (rng.random((2, 7, 9, 11)) < 0.05)).astype(np.float32)
    for m in (2, 4, 6):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 2 + 8), (0, 3 + 8)))
        reads = np.array([[c == "1" for c in row] for row in DEPENDS[m]], int)
        some = [
            reads @ (padded[:, :, y : y + m + 2, z : z + m + 2] != 0) @ reads.T > 0
            for y in range(0, 9 + 3 - 2, m)
            for z in range(0, 11 + 3 - 2, m)
        ]
        assert tile_density(x, n, m) == pytest.approx(np.mean(some))
        assert products(x, n, m) == np.sum(some) * 5


def test_tile_density_of_dilated_kernels_is_that_of_the_phases():
    rng = np.random.default_rng(0)
    x = (rng.random((2, 7, 8, 12)) < 0.05).astype(np.float32)
    weight = np.zeros((5, 7, 3, 3), np.float32)
    whole = ops.Conv2d("c", ("x",), "y", weight=weight, padding=(2, 3, 2, 3), dilation=(2, 3))
    phase = ops.Conv2d("c", ("x",), "y", weight=weight, padding=(1, 1, 1, 1))
    parts = [np.ascontiguousarray(x[:, :, i::2, j::3]) for i in range(2) for j in range(3)]
    for m in (2, 4, 6):
        assert products(x, whole, m) == sum(products(part, phase, m) for part in parts)
        assert tile_density(x, whole, m) == pytest.approx(np.mean([tile_density(p, phase, m) for p in parts]))


def test_long_kernels_along_one_axis_may_be_transformed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 96, (40, 1), padding=(17, 0)), nn.ReLU()).eval()
    x = torch.randn(2, 32, 90, 1)
    fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    graph = choose_storage(fast.graph)
    [(name, variants)] = lower(graph, want_variants=True).variants.items()
    assert "cook-toom-4" in variants
    plan = lower(graph, {name: "cook-toom-4"}).plan
    out = np.empty((2, 96, 85, 1), np.float32)
    plan.run(2, [x.numpy()], [out], 1)
    want = model(x).detach().numpy()
    assert np.abs(out - want).max() < TOLERANCE * np.abs(want).max()
    conv = next(n for n in graph.nodes if isinstance(n, ops.Conv2d))
    assert long_products(2, conv, 85, 1) == 2 * 22 * 7 * 10 * 32 * 96
    direct = actzip.compile(model, x, cache=False, threads=1, winograd=False)
    assert set(kernels_of(direct).values()).isdisjoint({"cook-toom-4"})
