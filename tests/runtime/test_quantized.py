"""Quantized models in the engine: integers between layers, the arena in proportion, results those
of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.activations import ActivationTap, set_thresholds
from actzip.errors import ActzipWarning, InputError, LayerError
from actzip.quantize import capture as capture_integers
from actzip.quantize import quantization, without_quantization
from actzip.quantize.model import marked
from actzip.runtime.lower import lower
from actzip.runtime.passes import optimize
from actzip.runtime.storage import choose_storage
from actzip.runtime.tracing import capture
from torches import needs_2_6


class Net(nn.Module):
    """A stem, a max pool, two branches of awkward widths that join, and a tail."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.left = nn.Conv2d(40, 70, 1)
        self.right = nn.Conv2d(40, 24, 3, padding=1)
        self.tail = nn.Conv2d(134, 32, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.stem(x)))
        x = torch.cat([self.relu(self.left(x)), self.relu(self.right(x)), x], 1)
        return self.fc(self.relu(self.tail(x)).mean((2, 3)))


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 24, 24, generator=g)


def net(inplace=False):
    torch.manual_seed(1)
    return Net(inplace).eval()


def run(low, x):
    out = np.empty((len(x), 5), np.float32)
    low.plan.run(len(x), [x.numpy()], [out], 1)
    return torch.from_numpy(out)


def plan(model, x, storage=None):
    graph = choose_storage(optimize(capture(model, x)))
    if storage:
        graph.meta["storage"] = storage
    return lower(graph), graph


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 5}, {"bits": 16}, {"bits": 12}, {"bits": 8, "weights": 8}]
)
def test_the_engine_gives_what_the_fake_quantized_model_gives(data, inplace, options):
    model = net(inplace)
    q = actzip.quantize(model, data, **options)
    low, graph = plan(q, data)
    packed = [v for v in graph.values.values() if v.storage == "packed"]
    assert sum(v.quant is not None for v in packed) >= 2
    want, plain, got = q(data).detach(), model(data).detach(), run(low, data)
    step = (want - plain).abs().max()
    # sums in another order may round to the neighbouring integer now and then, never more
    assert (got - want).abs().max() < max(0.5 * step, 2e-6)
    assert (got - want).abs().mean() < 0.1 * (want - plain).abs().mean() + 1e-7


def test_integers_keep_the_bytes_of_the_arena_down(data):
    model = net()
    big = data[:1].repeat(1, 1, 8, 8)
    sizes = {}
    for name, m, storage in (
        ("f32", model, None),
        ("f16", model, "float16"),
        ("u16", actzip.quantize(model, data, bits=16), None),
        ("u8", actzip.quantize(model, data, bits=8), None),
    ):
        low, _ = plan(m, big, storage)
        sizes[name] = low.plan.arena_bytes(1)
    assert sizes["u8"] < 0.5 * sizes["f32"] and sizes["u8"] < sizes["u16"] < 0.75 * sizes["f32"]
    assert sizes["f16"] < sizes["f32"]


def test_half_float_storage_is_close(data):
    model = net()
    low, _ = plan(model, data, "float16")
    want = model(data).detach()
    assert 0 < (run(low, data) - want).abs().max() < 2e-3 * want.abs().max()


def test_thresholds_come_before_the_integers(data):
    model = net()
    set_thresholds(model, {"relu": 0.3, "relu:1": 0.2})
    q = actzip.quantize(model, data, bits=8)
    low, graph = plan(q, data)
    assert sum(v.quant is not None for v in graph.values.values()) == 4
    with capture_integers(q) as maps, torch.no_grad():
        want = q(data)
    assert all(float(m.values.float().mean()) > 0 for m in maps.values())
    assert (run(low, data) - want).abs().max() < 5e-3 * want.abs().max()


def test_what_the_engine_cannot_store_stays_float_and_is_named(data):
    q = actzip.quantize(net(), data, bits=8, per="channel")
    with pytest.warns(ActzipWarning, match=r"4 quantized maps \(relu, relu:1, relu:2 \.\.\.\)"):
        low, graph = plan(q, data)
    assert all(v.quant is None for v in graph.values.values())
    assert (run(low, data) - net()(data)).abs().max() < 1e-5


def test_the_model_is_left_as_it_was(data):
    q = actzip.quantize(net(), data, bits=8, weights=8)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    want = q(data).detach()
    capture(q, data)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
    assert torch.equal(q(data), want) and len(quantization(q).weights) == 5
    del q.tail
    with pytest.raises(LayerError, match="'tail'"), marked(q):
        pass
    assert len(quantization(q).weights) == 5
    quantization(q).enabled = False
    with marked(q) as left:
        assert left == []


def test_compile_takes_quantized_models_and_half_floats(data):
    model = net()
    q = actzip.quantize(model, data, bits=8)
    fast = actzip.compile(q, data, tune=False, cache=False, threads=1)
    assert (fast(data) - q(data)).abs().max() < 1e-3 * q(data).abs().max()
    half = actzip.compile(model, data, tune=False, cache=False, threads=1, storage="float16")
    full = actzip.compile(model, data, tune=False, cache=False, threads=1)
    assert fast.arena_bytes(1) < half.arena_bytes(1) < full.arena_bytes(1)
    with pytest.raises(InputError, match="storage"):
        actzip.compile(model, data, storage="int3")


class Pooled(nn.Module):
    """Maps that only a pool reads, and so dense that a float map of their kind is not packed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 8, 1)
        nn.init.constant_(self.a.bias, 2.0)

    def forward(self, x):
        return self.b(torch.max_pool2d(torch.relu(self.a(x)), 2))


@needs_2_6
def test_maps_that_pools_read_are_packed_where_memory_counts(data):
    model = Pooled().eval()
    big = data[:1].repeat(1, 1, 8, 8)
    q = actzip.quantize(model, big, bits=8)
    options = {"tune": False, "cache": False, "threads": 1}
    auto = actzip.compile(model, big, **options)
    always = actzip.compile(model, big, pack="always", **options)
    half = actzip.compile(model, big, pack="always", storage="float16", **options)
    packed = {v.name for v in always.graph.values.values() if v.storage == "packed"}
    # what the pool alone reads is there in bands only, what it writes is packed
    assert packed == {"max_pool2d"} and not any(v.storage == "packed" for v in auto.graph.values.values())
    want = model(big).detach()
    assert (always(big) - want).abs().max() < 1e-5
    assert half.arena_bytes(1) < 0.7 * always.arena_bytes(1)
    for tune in (False, True):  # trials never take integers away
        fast = actzip.compile(q, big, **{**options, "tune": tune})
        assert {v.name for v in fast.graph.values.values() if v.storage == "packed"} == packed
        assert fast.arena_bytes(1) < 0.55 * always.arena_bytes(1)  # the band is of floats in both
        assert (fast(big) - q(big)).abs().max() < 1e-3
    with pytest.raises(InputError, match="pack"):
        actzip.compile(model, big, pack="never")


class Exact(Net):
    def __init__(self):
        super().__init__(False)
        self.fc = nn.Conv2d(32, 5, 1)

    def forward(self, x):
        x = self.pool(self.relu(self.stem(x)))
        x = torch.cat([self.relu(self.left(x)), self.relu(self.right(x)), x], 1)
        return self.fc(self.relu(self.tail(x)))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_integers_of_a_whole_network_are_equal_bit_for_bit_where_sums_are_exact(data, bits):
    torch.manual_seed(1)
    model = Exact().eval()
    with torch.no_grad():  # powers of two everywhere, so that no sum is rounded, in whatever order it is made
        for p in model.parameters():
            p.copy_(torch.round(p * 64) / 64)
        x = torch.round(data * 8) / 8
        q = actzip.quantize(model, x, bits=bits)
        for site in quantization(q).sites.values():
            site.scale.copy_(2 ** site.scale.log2().round())
    maps = actzip.quantize.integers(q, x)
    assert len(maps) == 4 and all(int(m.values.max()) > 2 for m in maps.values())

    def decoded(site, y):
        m = maps[site.name]
        blob = actzip.encode(m.numpy(), codec="rans", bits=bits)
        back = torch.from_numpy(actzip.decode(blob, framework="numpy").astype(np.float32))
        return back * m.scale

    with torch.no_grad():
        want = q(x)
        with without_quantization(q), ActivationTap(q, decoded):
            assert torch.equal(q(x), want)  # through the codec
    fast = actzip.compile(q, x, tune=False, cache=False, threads=1)
    assert sum(v.storage == "packed" for v in fast.graph.values.values()) >= 4
    assert torch.equal(fast(x), want)  # through the engine
