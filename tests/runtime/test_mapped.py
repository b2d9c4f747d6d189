"""Weights that nobody reads: in a file without a name, so that a process has those of its kernels alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.runtime import sizes
from actzip.runtime.mapped import give_back, to_file


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    strided = rng.standard_normal((70, 50, 30))[::2, :, ::3]
    return [rng.standard_normal((5, 9000)).astype(np.float32), strided, rng.integers(0, 9, 17), np.ones(())]


def test_arrays_in_a_file_are_the_arrays_also_when_their_memory_was_given_back():
    ours = arrays()
    theirs = to_file(ours)
    for _ in range(2):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape) and not b.flags.writeable
            assert np.array_equal(a, b)
            give_back(b)
            give_back(b[:1] if b.ndim else b)
    for a in ours:  # of the heap: stays
        give_back(a)
        give_back(a.T)
    assert all(np.array_equal(a, b) for a, b in zip(ours, arrays(), strict=True))


def test_where_there_is_no_room_arrays_stay_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    ours = arrays()
    assert all(a is b for a, b in zip(ours, to_file(ours), strict=True))


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()
    return model, torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("tune", [False, True])
def test_a_model_with_its_weights_in_a_file_runs_saves_pickles_and_takes_other_sizes(
    tune, monkeypatch, tmp_path
):
    monkeypatch.setattr(sizes, "_LARGE", 1)
    monkeypatch.setattr(sizes, "_LARGE_TOGETHER", 1)
    model, x = net()
    other = torch.randn(1, 3, 20, 16)
    want, larger = model(x).detach(), model(other).detach()
    fast = actzip.compile(model, x, threads=1, tune=tune, cache=False)
    with torch.no_grad():
        model[0].weight.zero_()  # ours are others
    weights = [n.weight for n in fast.graph.nodes if hasattr(n, "weight")]
    assert weights and not any(w.flags.writeable for w in weights)
    again = pickle.loads(pickle.dumps(fast))
    loaded = actzip.runtime.load(fast.save(tmp_path / "net.actzip"), threads=1)
    for f in (fast, again, loaded):
        assert torch.allclose(f(x), want, atol=1e-5)
        assert torch.allclose(f(other), larger, atol=1e-5)
    assert torch.equal(again(x), fast(x))


MEASURE = """
import ctypes, pickle, sys
import numpy as np
from actzip.runtime import ops
from actzip.runtime.compiled import compile_graph
from actzip.runtime.graph import Graph, Sym

def anonymous():  # less what is free already, and only kept by the allocator
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Anonymous:"))

def model(layers):
    graph = Graph("g")
    x = graph.add_input("x", (Sym(), 1024))
    rng = np.random.default_rng(0)
    for i in range(layers):
        weight = rng.standard_normal((1024, 1024), np.float32)
        x = graph.add(ops.Linear(f"fc{i}", (x,), f"y{i}", weight=weight))
    graph.outputs = [x]
    return compile_graph(graph)

how, path = sys.argv[1:]
model(1)  # what is made once in a process
before = anonymous()
if how == "unpickled":
    with open(path, "rb") as file:
        fast = pickle.load(file)
else:
    fast = model(10)
print(anonymous() - before)
if how == "written":
    with open(path, "wb") as file:
        pickle.dump(fast, file)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_weights_of_a_model_just_made_lie_in_memory_once(tmp_path):
    """42 MB of them, in a process that compiles and in one that unpickles."""
    for how in ("written", "unpickled"):
        command = [sys.executable, "-c", MEASURE, how, str(tmp_path / "model")]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        assert 35_000 < int(out.stdout) < 60_000, out.stdout  # kB
