"""Trials of kernels: the quickest wins, alike layers share the work, time is kept."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.runtime import tune as t
from actzip.runtime.graph import Graph, Sym
from actzip.runtime.ops import Conv2d

SECONDS = {"slow": 3.0, "quick": 1.0, "nearly": 0.99, "never": 9.0}


def chain(layers: int) -> Graph:
    """Convolutions of one shape, one behind the other."""
    graph = Graph()
    x = graph.add_input("x", (Sym(), 8, 6, 6))
    weight = np.zeros((8, 8, 3, 3), np.float32)
    for i in range(layers):
        x = graph.add(Conv2d(f"c{i}", (x,), f"v{i}", weight=weight, padding=(1, 1, 1, 1)))
    graph.outputs = [x]
    return graph


class Bench:
    """Times by the table, and what was run."""

    batch, threads = 1, 1

    def __init__(self) -> None:
        self.runs: list[dict[str, str]] = []

    def times(self, low: Any, repeats: int = 3) -> dict[str, float]:
        self.runs.append(low.chosen)
        return {n: SECONDS[v] for n, v in low.chosen.items()}


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Any:
    def lower(graph: Graph, variants: Any = None, want_variants: bool = False, **_: Any) -> Any:
        return SimpleNamespace(chosen=variants or {}, variants={n.name: list(SECONDS) for n in graph.nodes})

    monkeypatch.setattr(t, "lower", lower)

    def make(graph: Graph, exact: Any = None) -> tuple[t._Search, Bench]:
        bench = Bench()
        return t._Search(graph, bench, None, exact or {}), bench  # type: ignore[arg-type]

    return make


def test_the_quickest_variant_wins_by_a_margin(search: Any) -> None:
    s, bench = search(chain(1))
    t._search([s], 100.0, None)
    assert s.variants() == {"c0": "quick"}  # "nearly" is not quicker by 2 %
    assert [r["c0"] for r in bench.runs] == list(SECONDS)


def test_alike_layers_try_different_variants_in_one_run(search: Any) -> None:
    graph = chain(4)
    for v in graph.values.values():
        v.density = 0.5
    s, bench = search(graph)
    t._search([s], 100.0, None)
    assert len(bench.runs) == 1 and set(bench.runs[0].values()) == set(SECONDS)
    assert set(s.variants().values()) == {"quick"}


def tiles_of(seconds: dict[str, float]) -> dict[str, float]:
    return {v: 0.0 for v in seconds if v.startswith("winograd-")}


@pytest.mark.parametrize(
    "seconds, best",
    [
        ({"direct": 1.0, "winograd-2x2": 0.97}, "direct"),  # hardly quicker, 1.8 times the weights
        ({"direct": 1.0, "winograd-2x2": 0.9}, "winograd-2x2"),
        ({"direct": 1.0, "winograd-2x2": 0.52, "winograd-4x4": 0.51}, "winograd-2x2"),
        ({"direct": 1.0, "winograd-2x2": 0.7, "winograd-4x4": 0.5, "winograd-6x6": 0.49}, "winograd-4x4"),
        ({"direct": 0.98, "winograd-2x2": 0.97, "slow": 1.0}, "direct"),
    ],
)
def test_more_weights_must_be_worth_it(search: Any, monkeypatch: Any, seconds: Any, best: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", seconds)
    s, _ = search(chain(1), exact={"c0": tiles_of(seconds)})
    t._search([s], 100.0, None)
    assert s.variants() == {"c0": best}
    notes = s.notes()
    assert set(notes) == ({"c0"} if s.quickest(s.keys["c0"]) != best else set())
    assert all("times the weights" in note for note in notes.values())


def test_larger_tiles_that_cannot_win_are_not_tried(search: Any, monkeypatch: Any) -> None:
    """On 6x6 pixels 4x4 transforms as many as 2x2 does, 144, and 6x6 transforms 64."""
    table = {"direct": 1.0, "winograd-2x2": 2.0, "winograd-4x4": 9.0, "winograd-6x6": 0.9}
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", table)
    s, bench = search(chain(1), exact={"c0": tiles_of(table)})
    t._search([s], 100.0, None)
    assert [r["c0"] for r in bench.runs] == ["direct", "winograd-2x2", "winograd-6x6"]
    assert s.left == 0 and s.variants() == {"c0": "winograd-6x6"}


def test_of_plans_that_hardly_differ_the_smaller_is_taken() -> None:
    def plan(weights: int) -> Any:
        return SimpleNamespace(plan=SimpleNamespace(weight_bytes=lambda: weights), arena=weights)

    plans = [plan(300), plan(200), plan(100)]
    seconds = dict(zip(map(id, plans), (1.0, 1.005, 1.02), strict=True))
    bench: Any = SimpleNamespace(times=lambda p: {"n": seconds[id(p)]}, arena_bytes=lambda p: p.arena)
    assert t._quicker(bench, plans) == 1
    assert t._quicker(bench, plans[::2]) == 0


def test_a_much_smaller_arena_may_cost_a_little_time() -> None:
    """Weights, of which there are many times more, decided alone."""

    def plan(weights: int, arena: int) -> Any:
        return SimpleNamespace(plan=SimpleNamespace(weight_bytes=lambda: weights), arena=arena)

    plans = [plan(1000, 60), plan(1100, 40), plan(1000, 55)]
    seconds = dict(zip(map(id, plans), (1.0, 1.012, 1.012), strict=True))
    bench: Any = SimpleNamespace(times=lambda p: {"n": seconds[id(p)]}, arena_bytes=lambda p: p.arena)
    assert t._quicker(bench, plans[:2]) == 1
    assert t._quicker(bench, plans[::2]) == 0  # hardly smaller


def test_without_time_each_storage_is_run_once(search: Any) -> None:
    a, b = search(chain(1)), search(chain(1))
    t._search([a[0], b[0]], 0.0, None)
    assert len(a[1].runs) == len(b[1].runs) == 1
    assert a[0].variants() == {"c0": "slow"}  # the first of the list, the only one tried


def test_what_one_search_learned_another_need_not_try(search: Any) -> None:
    a, b = search(chain(1)), search(chain(1))
    t._search([a[0]], 100.0, None)
    b[0].learn(a[0])
    t._search([b[0]], 100.0, None)
    assert len(b[1].runs) == 1 and b[0].variants() == {"c0": "quick"}


def test_packing_that_costs_its_writer_more_than_it_spares_is_undone() -> None:
    """A depthwise layer's packing was not counted, only what its reader gained."""
    graph = chain(3)
    graph.values["v0"].storage = "packed"
    groups = {"v0": ["v0"], "v1": ["v1"]}
    plain = {"c0": 1.0, "c1": 5.0, "c2": 1.0}
    assert t._unpaid(graph, groups, {"c0": 2.0, "c1": 4.5, "c2": 1.0}, plain) == {"v0"}
    assert t._unpaid(graph, groups, {"c0": 2.0, "c1": 3.0, "c2": 1.0}, plain) == set()
    graph.values["v1"].storage = "packed"  # whose the difference is cannot be told
    assert t._unpaid(graph, groups, {"c0": 9.0, "c1": 9.0, "c2": 9.0}, plain) == set()


def test_progress_names_layers_and_an_interrupt_passes(search: Any) -> None:
    seen: list[tuple[int, int, str]] = []

    def step(*args: Any) -> None:
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt

    s, _ = search(chain(1))
    with pytest.raises(KeyboardInterrupt):
        t._search([s], 100.0, step)
    assert seen == [(0, 4, "c0"), (1, 4, "c0")]


@pytest.mark.parametrize("mode", [True, "thorough", False])
def test_every_mode_gives_the_models_answer(mode: bool | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    x = torch.rand(1, 3, 12, 12)
    fast = actzip.compile(model, x, threads=1, tune=mode, cache=False)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(actzip.errors.InputError, match="thorough"):
        actzip.compile(nn.ReLU(), torch.rand(1, 3), tune="quickly")


def test_a_bar_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from actzip.progress import counted

    with counted("compiling", show=False) as step:
        assert step is None
    with counted("compiling", show=True) as step:
        assert step is not None
        step(1, 3, "layer[1]")
        time.sleep(0)


_PEAK = """
import resource, torch
from torch import nn
import actzip
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.manual_seed(0)
depthwise = nn.Conv2d(1152, 1152, 5, padding=2, groups=1152)
grouped = nn.Conv2d(1152, 1152, 3, padding=1, groups=96)
layers = [nn.Conv2d(3, 1152, 1), nn.ReLU(), depthwise, nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(1152, 8, 1)]
net, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 7, 7)
actzip.compile(nn.Conv2d(3, 8, 1).eval(), x, cache=False)  # what any compilation needs
before = peak()
actzip.compile(net, x, cache=False, threads=1)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in kilobytes, as Linux counts it")
def test_memory_of_compiling_grouped_layers() -> None:
    """Kernels that are tried keep no weights of other groups: 2 GB for this depthwise layer."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250 << 10
