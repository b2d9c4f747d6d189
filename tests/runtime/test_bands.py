"""A convolution and the pool that alone reads it run by turns: results, memory, and what stays whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import actzip
from actzip._native import _engine
from actzip.errors import UnsupportedError
from actzip.runtime import compile_graph
from actzip.runtime.explain import dense_arena_bytes
from actzip.runtime.lower import lower
from actzip.runtime.passes import optimize
from actzip.runtime.storage import banded, choose_storage
from actzip.runtime.tracing import capture


@pytest.fixture(params=_engine.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _engine.force_isa(request.param)
    yield request.param
    _engine.force_isa("")


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps as small as those of these tests come in bands."""
    monkeypatch.setattr("actzip.runtime.lower._WHOLE_BYTES", 0)
    monkeypatch.setattr("actzip.runtime.storage.BAND_PAYS", 0)


class Net(nn.Module):
    """A packed map, the convolution and the pool in question, and a convolution on what is left."""

    def __init__(self, channels: int, kernel: int, stride: int, pool: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.conv = nn.Conv2d(20, channels, kernel, stride=stride, padding=kernel // 2)
        self.pool = pool
        self.relu = relu
        self.tail = nn.Conv2d(channels, 9, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.stem(x)))
        return self.tail(self.pool(torch.relu(x) if self.relu else x))


POOLS = {
    "max 3 stride 2": nn.MaxPool2d(3, 2),
    "max 3 stride 2 padded": nn.MaxPool2d(3, 2, 1),
    "max 2": nn.MaxPool2d(2),
    "max 2 ceil": nn.MaxPool2d(2, ceil_mode=True),
    "max 3 stride 1 padded": nn.MaxPool2d(3, 1, 1),
    "max dilated": nn.MaxPool2d(3, 2, 1, dilation=2),
    "max, rows between never read": nn.MaxPool2d(2, 5),
    "max of all rows": nn.MaxPool2d((31, 3), 1),
    "avg 2": nn.AvgPool2d(2),
    "avg 3 padded": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
}


CASES = [
    (channels, kernel, stride, pool)
    for channels, kernel, stride in [(70, 3, 1), (16, 1, 1), (131, 5, 2)]
    for pool in POOLS
    if stride == 1 or "all rows" not in pool  # that window would be higher than the map
]


def _check_one_band(net: nn.Module, x: Tensor) -> None:
    """One map is made by turns; PyTorch's numbers, the same for all threads and batches."""
    fast = compile_graph(capture(net, x), example=x)
    assert [v.storage for v in fast.graph.values.values()].count("band") == 1
    with torch.no_grad():
        want = net(x)
    first = fast(x)
    assert (first - want).abs().max() <= 2e-5 * want.abs().max()
    for threads in (2, 5):
        fast.threads = threads
        assert torch.equal(fast(x), first)
    assert torch.equal(fast(x[1:2]), first[1:2])


@pytest.mark.parametrize(("channels", "kernel", "stride", "pool"), CASES)
def test_results(isa: str, pool: str, channels: int, kernel: int, stride: int) -> None:
    torch.manual_seed(3)
    net = Net(channels, kernel, stride, POOLS[pool], relu="dilated" not in pool).eval()
    x = torch.randn(3, 3, 31, 26)
    _check_one_band(net, x)


def test_not_finite_numbers_come_through(isa: str) -> None:
    torch.manual_seed(3)
    net = Net(33, 3, 1, nn.MaxPool2d(3, 2, 1)).eval()
    x = torch.randn(1, 3, 31, 26)
    x[0, 1, 17, 9] = float("nan")
    fast = compile_graph(capture(net, x), example=torch.randn(1, 3, 31, 26))
    with torch.no_grad():
        want = net(x)
    assert np.array_equal(np.isnan(fast(x).numpy()), np.isnan(want.numpy())) and torch.isnan(want).any()


def test_residual_before_the_pool() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.pool(torch.relu(self.b(x) + x))

    torch.manual_seed(0)
    net, x = Residual().eval(), torch.randn(2, 3, 40, 40)
    fast = compile_graph(capture(net, x), example=x)
    assert "band" in {v.storage for v in fast.graph.values.values()}
    with torch.no_grad():
        assert (fast(x) - net(x)).abs().max() < 1e-4


class Inverted(nn.Module):
    """An expansion and its depthwise convolution, a projection behind them."""

    def __init__(self, kernel: int, stride: int, act: type[nn.Module], channels: int = 70) -> None:
        super().__init__()
        self.a = nn.Conv2d(5, channels, 1)
        self.b = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        self.c = nn.Conv2d(channels, 6, 1)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(torch.relu(x))))))


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.PReLU, nn.Identity])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 3)])
def test_expansions_and_depthwise_convolutions_by_turns(
    isa: str, kernel: int, stride: int, act: type[nn.Module]
) -> None:
    torch.manual_seed(3)
    net, x = Inverted(kernel, stride, act).eval(), torch.randn(3, 5, 31, 26)
    _check_one_band(net, x)


class Block(Inverted):
    """The same with a convolution of few channels in front, a residual if asked for, and an activation
    behind."""

    def __init__(self, kernel: int, stride: int, act: type[nn.Module], residual: bool, first: int) -> None:
        super().__init__(kernel, stride, act)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 70, first, padding=first // 2)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.c(self.act(self.b(self.act(self.a(x)))))
        return torch.tanh(x + y if self.residual else y)


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.PReLU])
@pytest.mark.parametrize(
    ("kernel", "stride", "residual", "first"),
    [(3, 1, True, 1), (3, 2, False, 1), (5, 1, True, 3), (5, 2, False, 3), (7, 3, False, 1)],
)
def test_projections_run_by_turns_too(
    isa: str, kernel: int, stride: int, residual: bool, first: int, act: type[nn.Module]
) -> None:
    torch.manual_seed(3)
    net, x = Block(kernel, stride, act, residual, first).eval(), torch.randn(3, 3, 31, 26)
    graph = optimize(capture(net, x))
    fast = compile_graph(choose_storage(graph, set(graph.values)), example=x, tune=False)
    graph = fast.graph
    for value in graph.values.values():
        value.storage = "dense" if value.storage == "packed" else value.storage
    low, apart = lower(graph), lower(graph, three=False)
    assert len(low.inside) == 2 and len(apart.inside) == 1
    assert low.plan.arena_bytes(3) < apart.plan.arena_bytes(3)
    with torch.no_grad():
        want = net(x).numpy()
    found = [np.empty_like(want) for _ in range(4)]
    for plan, threads, y in zip([low, apart, low, low], [1, 1, 2, 5], found, strict=True):
        plan.plan.profile(3, [x.numpy()], [y], threads)
    assert np.abs(found[0] - want).max() <= 2e-5 * np.abs(want).max()
    assert all(np.array_equal(y, found[0]) for y in found[1:])


@pytest.mark.parametrize("first", [1, 3])
def test_a_projection_that_is_the_next_expansion_begins_with_that(first: int) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(5, 20, first, padding=first // 2)
            layers: list[nn.Module] = []
            for stride in (1, 2, 1):
                layers += [nn.Conv2d(20, 20, 3, stride, 1, groups=20), nn.Hardswish()]
                layers += [nn.Conv2d(20, 20, 1), nn.Hardswish()]
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(torch.tanh(self.stem(x)))

    torch.manual_seed(3)
    net, x = Chain().eval(), torch.randn(2, 5, 31, 26)
    fast = compile_graph(capture(net, x), example=x)
    with torch.no_grad():
        want = net(x)
    assert (fast(x) - want).abs().max() <= 2e-5 * want.abs().max()
    assert [v.storage for v in fast.graph.values.values()].count("band") >= 2


def test_a_residual_that_comes_later_keeps_the_projection_apart() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.side = Inverted(3, 1, nn.Hardswish), nn.Conv2d(5, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.block.act(self.block.b(self.block.act(self.block.a(x))))
            return self.block.c(y) + torch.tanh(self.side(x))

    torch.manual_seed(3)
    net, x = Late().eval(), torch.randn(2, 5, 31, 26)
    _check_one_band(net, x)


def test_turns_are_tuned_explained_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net, x = Inverted(3, 1, nn.ReLU).eval(), torch.randn(1, 5, 31, 26)
    fast = actzip.compile(net, x, cache=False)
    assert "band" in {v.storage for v in fast.graph.values.values()}
    rows = fast.explain().rows
    assert [r.op for r in rows].count("conv2d") == 3
    inner = (3 * 31 - 2) * (3 * 26 - 2)  # pairs of a pixel and a tap inside the map
    assert sum(r.macs for r in rows) == 70 * ((5 + 6) * 31 * 26 + inner)
    assert all("by turns with" in r.why for r in rows if r.macs and r.milliseconds == 0)
    again = actzip.runtime.load(fast.save(tmp_path / "m.actzip"))
    assert torch.equal(again(x), fast(x))


def test_expansions_with_other_readers_stay_whole() -> None:
    class Seen(Inverted):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.a(x))
            return self.c(self.b(y)), y

    graph = optimize(capture(Seen(3, 1, nn.ReLU).eval(), torch.randn(1, 5, 12, 12)))
    assert banded(choose_storage(graph)) == set()


def test_the_map_between_takes_no_memory() -> None:
    net = Net(64, 3, 1, nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 3, 160, 160)
    graph = choose_storage(optimize(capture(net, x)))
    assert lower(graph).plan.arena_bytes(1) < 0.5 * dense_arena_bytes(graph, 1)


def test_small_maps_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(64, 3, 1, nn.MaxPool2d(2)).eval()
    graph = choose_storage(optimize(capture(net, torch.randn(1, 3, 40, 40))))
    banded_bytes = lower(graph).plan.arena_bytes(1)
    monkeypatch.undo()
    assert lower(graph).plan.arena_bytes(1) > banded_bytes


def test_maps_with_other_readers_stay_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.conv(x))
            return self.pool(x), x.mean((2, 3))

    class Output(Two):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.relu(self.conv(x))
            return self.pool(x), x

    x = torch.randn(1, 3, 12, 12)
    for net in (Two(), Output()):
        assert banded(choose_storage(optimize(capture(net.eval(), x)))) == set()


def test_nothing_else_may_read_a_band() -> None:
    b = _engine.PlanBuilder()
    x = b.value("x", [1, 4, 8, 8], [True, False, False, False])
    m = b.value("m", [1, 4, 8, 8], [True, False, False, False], "map", band=3)
    b.input(x)
    b.node("copy", "c", [x], m)
    with pytest.raises(ValueError, match="bands"):
        b.build()


def test_a_band_lower_than_the_window_is_refused() -> None:
    net = Net(64, 3, 1, nn.MaxPool2d(3)).eval()
    graph = choose_storage(optimize(capture(net, torch.randn(1, 3, 24, 24))))
    from actzip.runtime import lower as module

    real = module.Lowering.band
    try:
        module.Lowering.band = lambda self, name: 2  # type: ignore[method-assign]
        with pytest.raises(UnsupportedError, match="lower than the window"):
            lower(graph)
    finally:
        module.Lowering.band = real  # type: ignore[method-assign]
