"""actzip.compile: right numbers in every way of calling it, typed errors, pickling, cache, threads."""

from __future__ import annotations

import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip import cpu
from actzip.activations import set_thresholds
from actzip.errors import InputError, UnsupportedError
from actzip.runtime import compile_graph
from actzip.runtime.tracing import capture
from crowd import at_once


class Net(nn.Module):
    """A bit of everything that a CNN has: branches, a residual, pools, depthwise, dense layers."""

    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 40, 3, 2, 1, bias=False), nn.BatchNorm2d(40), act())
        self.a, self.b = nn.Conv2d(40, 70, 1), nn.Conv2d(40, 26, 3, padding=1)
        self.dw = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.up = nn.Conv2d(96, 96, 1)
        self.pool, self.avg = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1)
        self.side = nn.Conv2d(96, 32, 1)
        self.act = act()
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.act(self.a(x)), self.act(self.b(x))], 1)
        x = self.act(self.up(self.act(self.dw(x))) + x)
        x = self.pool(x)
        x = torch.cat([x, self.act(self.side(self.avg(x)))], 1)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    model.stem[1].running_mean.normal_()
    return model.eval()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ACTZIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def close(y, want, tol=1e-5):
    y, want = np.asarray(y), np.asarray(want)
    assert y.shape == want.shape
    assert np.abs(y - want).max() <= tol * np.abs(want).max()


@torch.no_grad()
def test_tensors_arrays_batches_threads(net):
    fast = actzip.compile(net, torch.randn(2, 3, 17, 19), threads=1, tune=False)
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 17, 19)
        want = net(x)
        y = fast(x)
        assert isinstance(y, torch.Tensor)
        close(y, want)
        assert isinstance(fast(x.numpy()), np.ndarray)
        np.testing.assert_array_equal(fast(x.numpy()), y.numpy())
        strided = x.to(memory_format=torch.channels_last)
        np.testing.assert_array_equal(fast(strided).numpy(), y.numpy())
        np.testing.assert_array_equal(fast(np.asfortranarray(x.numpy())), y.numpy())
    two = actzip.compile(net, torch.randn(1, 3, 17, 19), threads=2, tune=False)
    close(two(x), want)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU])
def test_every_instruction_set_and_activation(isa, act):
    torch.manual_seed(0)
    model = Net(act).eval()
    x = torch.randn(2, 3, 15, 14)
    with cpu.forced(isa), torch.no_grad():
        close(actzip.compile(model, x, threads=2, tune=False)(x), model(x))


@torch.no_grad()
def test_tuned_and_cached(net, cache_folder):
    x = torch.randn(1, 3, 17, 19)
    first = actzip.compile(net, x, threads=1)
    close(first(x), net(x))
    (file,) = cache_folder.iterdir()
    entries = json.loads(file.read_text())["entries"]
    assert any(k.startswith("plan-") for k in entries)
    again = actzip.compile(net, x, threads=1)
    assert again._variants == first._variants
    close(again(x), net(x))
    # damaged, and with winners that do not exist
    file.write_bytes(b"\x00" * 10)
    close(actzip.compile(net, x, threads=1)(x), net(x))
    data = json.loads(file.read_text())
    for e in data["entries"].values():
        e["kernel"] = "no-such-kernel"
        e["variants"] = dict.fromkeys(e.get("variants", {}), "no-such-kernel")
    file.write_text(json.dumps(data))
    close(actzip.compile(net, x, threads=1)(x), net(x))


@torch.no_grad()
def test_results_do_not_depend_on_calibration(net):
    x = torch.randn(3, 3, 17, 19)
    for calibration in (
        torch.randn(1, 3, 17, 19) * 100,
        torch.zeros(1, 3, 17, 19),
        -torch.ones(4, 3, 17, 19),
    ):
        close(actzip.compile(net, x, calibration=calibration, tune=False)(x), net(x))


@torch.no_grad()
def test_pickle(net):
    fast = actzip.compile(net, torch.randn(1, 3, 17, 19), threads=1, tune=False)
    copy = pickle.loads(pickle.dumps(fast))
    x = torch.randn(2, 3, 17, 19)
    np.testing.assert_array_equal(copy(x).numpy(), fast(x).numpy())
    assert copy.threads == 1
    state = fast.__getstate__()
    state["format"] = 0
    with pytest.raises(InputError, match="another version"):
        copy.__setstate__(state)


@torch.no_grad()
def test_calls_from_several_threads(net):
    fast = actzip.compile(net, torch.randn(1, 3, 17, 19), threads=2, tune=False)
    xs = [torch.randn(1 + i % 3, 3, 17, 19) for i in range(6)]
    want = [fast(x).numpy().copy() for x in xs]
    bad = []

    def work(i):
        for _ in range(10):
            if not np.array_equal(fast(xs[i]).numpy(), want[i]):
                bad.append(i)

    at_once(work, len(xs))
    assert not bad


def test_structured_inputs_and_outputs():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, a, b):
            y = torch.relu(self.c(a))
            return {"map": y, "rest": (b * 2, [y.mean((2, 3)), b])}

    model = M().eval()
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 7)
    fast = actzip.compile(model, (a, b), tune=False)
    with torch.no_grad():
        want = model(a, b)
    got = fast(a, b)
    close(got["map"], want["map"])
    close(got["rest"][0], want["rest"][0])
    close(got["rest"][1][0], want["rest"][1][0])
    close(got["rest"][1][1], b)
    by_name = actzip.compile(model, {"a": a, "b": b}, tune=False)
    close(by_name(a=a, b=b)["map"], want["map"])


def test_wrong_inputs_are_typed_errors(net):
    fast = actzip.compile(net, torch.randn(1, 3, 17, 19), tune=False)
    for bad in (
        torch.randn(1, 2, 17, 19),
        torch.randn(3, 17, 19),
        torch.randn(0, 3, 17, 19),
        torch.randn(1, 3, 17, 19).double(),
        np.zeros((1, 3, 17, 19), np.int32),
        [1, 2],
        None,
        "x",
    ):
        with pytest.raises(InputError):
            fast(bad)
    with pytest.raises(InputError, match="inputs given"):
        fast(torch.randn(1, 3, 17, 19), torch.randn(1, 3, 17, 19))
    for kw in ({"threads": -1}, {"calibration": torch.randn(1, 3, 5, 5)}):
        with pytest.raises(InputError):
            actzip.compile(net, torch.randn(1, 3, 17, 19), tune=False, **kw)
    with pytest.raises(InputError, match="example"):
        actzip.compile(net)
    with pytest.raises(InputError):
        actzip.compile(3, torch.randn(1, 3))
    with pytest.raises(UnsupportedError, match="sort"):
        actzip.compile(
            type("M", (nn.Module,), {"forward": lambda self, x: x.sort(1)[0]})(), torch.randn(2, 3)
        )


@torch.no_grad()
def test_nan_in_comes_out_as_pytorch_gives_it(net):
    fast = actzip.compile(net, torch.randn(1, 3, 17, 19), tune=False)
    for where in ((0, 0, 0, 0), (0, 2, 16, 18), (1, 1, 8, 9)):
        x = torch.randn(2, 3, 17, 19)
        x[where] = math.nan
        np.testing.assert_array_equal(np.isnan(fast(x).numpy()), np.isnan(net(x).numpy()))
    x = torch.full((1, 3, 17, 19), math.inf)
    np.testing.assert_array_equal(np.isnan(fast(x).numpy()), np.isnan(net(x).numpy()))


@torch.no_grad()
@pytest.mark.parametrize("isa", cpu.info()["isas"])
@pytest.mark.parametrize("pack", ["auto", "always"])
@pytest.mark.parametrize("thresholds", ["none", "layer", "channel"])
def test_nan_and_infinity_through_thresholds(isa, pack, thresholds):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 70, 3), nn.ReLU(), nn.Conv2d(70, 70, 1), nn.ReLU(), nn.Conv2d(70, 5, 1)
    ).eval()
    if thresholds != "none":
        set_thresholds(net, {"1": 0.2, "3": 0.1 if thresholds == "layer" else torch.rand(70) / 5})
    with cpu.forced(isa):
        fast = actzip.compile(net, torch.randn(1, 3, 9, 9), tune=False, pack=pack)
        for value in (math.nan, math.inf, -math.inf):
            x = torch.randn(2, 3, 9, 9)
            x[0, 1, 4, 4] = value
            got, want = fast(x), net(x)
            assert not want[0].isfinite().all() and want[1].isfinite().all()
            torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_run_dense(value):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    model[2].weight[3, 2] = value
    x = torch.randn(2, 3, 6, 6)
    fast = actzip.compile(model, x, tune=False)
    want = model(x).numpy()
    assert np.isnan(want).any()
    np.testing.assert_array_equal(np.isnan(fast(x).numpy()), np.isnan(want))
    row = next(r for r in fast.explain(runs=1).rows if r.name == "2")
    assert row.input_storage == "dense" and "finite" in row.why


@torch.no_grad()
def test_thresholds_are_part_of_the_model(net):
    torch.manual_seed(0)
    model = Net().eval()
    set_thresholds(model, {"stem.2": 0.3, "act": torch.linspace(0, 1, 70), "act:1": 0.2})
    x = torch.randn(2, 3, 17, 19)
    fast = actzip.compile(model, x, tune=False)
    close(fast(x), model(x))
    kinds = [n.act.kind for n in fast.graph.nodes if getattr(n, "act", None) is not None]
    assert kinds.count("threshold") == 3


@torch.no_grad()
@torch.no_grad()
def test_explain_counts_what_is_no_convolution():
    """Transposed convolutions, products of two maps, recurrent layers."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
            self.lstm = nn.LSTM(5, 7, bidirectional=True)

        def forward(self, x, a, b, s):
            return self.up(x), torch.matmul(a, b), self.lstm(s)[0].relu()

    torch.manual_seed(0)
    given = [torch.randn(*shape).relu() for shape in ((2, 4, 5, 6), (2, 3, 4, 5), (2, 1, 5, 6), (8, 2, 5))]
    e = actzip.compile(Net().eval(), tuple(given), tune=False, cache=False, dynamic=False).explain(runs=1)
    rows = {r.op: r for r in e.rows}

    def count(x, a, b):  # products of operands that are not zero, each as one
        up = nn.functional.conv_transpose2d(x, torch.ones(4, 3, 3, 3), None, 2, 1, 1, 2)
        return int(up.sum()), int(torch.matmul(a, b).sum())

    masks = [(x != 0).float() for x in given]
    ones = [torch.ones_like(m) for m in masks]
    for i, name in enumerate(("conv_transpose2d", "matmul")):
        assert rows[name].macs == count(*ones[:3])[i]
        assert rows[name].effective_macs == rows[name].products == count(*masks[:3])[i]
    # the state of no step is zero but the first's
    states = 2 * 2 * 7 * 4 * 7  # images, directions, gates, weights of each
    assert (rows["recurrent"].macs, rows["recurrent"].effective_macs) == (8 * states, 7 * states)
    assert e.macs == sum(r.macs for r in e.rows)


def test_explain(net):
    fast = actzip.compile(net, torch.randn(1, 3, 17, 19), threads=1, tune=False)
    e = fast.explain(torch.randn(2, 3, 17, 19), runs=2)
    assert e.batch == 2 and e.milliseconds > 0 and 0 < e.effective_macs < e.macs
    rows = {r.name: r for r in e.rows}
    assert rows["b"].kernel and rows["b"].density is not None
    assert any(r.input_storage == "packed" and r.effective_macs < r.macs for r in e.rows)
    text = str(e)
    assert "eff. MMACs" in text and "theoretical speed-up" in text and "GFLOP/s" in text
    json.dumps(e.to_dict())
    # exact work of the first layer, counted by hand: 3x3, stride 2, padding 1, on 17 x 19 of dense input
    inside = lambda n: sum(0 <= 2 * o - 1 + k < n for o in range((n + 1) // 2) for k in range(3))  # noqa: E731
    assert rows["stem.0"].macs == rows["stem.0"].effective_macs == 2 * 3 * 40 * inside(17) * inside(19)


def test_a_graph_compiles_too(net):
    graph = capture(net, torch.randn(1, 3, 17, 19))
    x = torch.randn(3, 3, 17, 19)
    with torch.no_grad():
        close(compile_graph(graph)(x), net(x))


def test_fixed_batch():
    model = type("M", (nn.Module,), {"forward": lambda self, x: x.reshape(2, 12) * 2})()
    fast = actzip.compile(model, torch.randn(2, 3, 2, 2), tune=False)
    close(fast(torch.ones(2, 3, 2, 2)), torch.full((2, 12), 2.0))
    with pytest.raises(InputError, match=r"\(3, 3, 2, 2\)"):
        fast(torch.ones(3, 3, 2, 2))


def test_arena_is_smaller_packed_than_dense():
    torch.manual_seed(0)
    convs = [nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 40), (40, 64), (64, 64), (64, 8))]
    model = nn.Sequential(*(m for c in convs for m in (c, nn.ReLU()))).eval()
    x = torch.randn(1, 3, 65, 65)
    set_thresholds(model, {"1": 1.0, "3": 1.0, "5": 1.0})
    fast = actzip.compile(model, x, tune=False)
    dense = fast.graph.copy()
    for v in dense.values.values():
        v.storage = "dense"
    from actzip.runtime.lower import lower

    assert fast.arena_bytes() < lower(dense).plan.arena_bytes(1)


@torch.no_grad()
def test_between_convolutions_no_dense_map_is_stored():
    """Every map between two convolutions of the plan is packed, through residuals, pools and
    concatenations, and no copy of one in another form is made."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 24), (24, 24), (24, 24)))
            self.pool = nn.MaxPool2d(2)
            self.d, self.e, self.f = (
                nn.Conv2d(24, 70, 1),
                nn.Conv2d(24, 20, 3, padding=1),
                nn.Conv2d(90, 16, 1),
            )

        def forward(self, x):
            x = torch.relu(self.a(x))
            x = torch.relu(self.c(torch.relu(self.b(x))) + x)
            x = self.pool(x)
            x = torch.cat([torch.relu(self.d(x)), torch.relu(self.e(x))], 1)
            return self.f(x)

    torch.manual_seed(0)
    model = Chain().eval()
    for conv in (model.a, model.b, model.c, model.d, model.e):
        conv.bias.fill_(-0.3)  # densities at which packing pays
    x = torch.randn(2, 3, 20, 18)
    fast = actzip.compile(model, x, tune=False)
    close(fast(x), model(x))
    graph = fast.graph
    inner = {n.output for n in graph.nodes} - set(graph.outputs)
    assert len(inner) >= 6
    # a band is some rows at a time of what a convolution hands to the pool behind it
    assert {graph.values[v].storage for v in inner} <= {"packed", "band"}
    assert sum(graph.values[v].storage == "packed" for v in inner) >= 5
    copies = [name for name in fast._low.nodes if name not in {n.name for n in graph.nodes}]
    assert set(copies) <= {*graph.inputs, *graph.outputs}  # the caller's memory alone is copied from and to


def test_advice_is_given_once_on_cpus_with_matrix_units(monkeypatch, net):
    from actzip.runtime import machine

    monkeypatch.setattr(machine._engine, "cpu_extras", lambda: ["amx_bf16", "amx_int8"])
    monkeypatch.setattr(machine.cpu, "info", lambda: {"extras": ["amx_bf16"]})
    monkeypatch.setattr(machine, "_advised", False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            actzip.compile(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4), tune=False)
    assert len([w for w in seen if "amx_bf16" in str(w.message)]) == 1


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 17])
def test_first_convolutions_read_the_input_as_it_comes(isa, channels):
    """Rows, columns and images of planes, before a pool, beside another reader, and by 1x1 kernels."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(channels, 20, 3, 2, 1)
            self.b = nn.Conv2d(channels, 9, (1, 5), padding=(0, 3))
            self.c = nn.Conv2d(channels, 4, 1)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            return self.a(x).relu(), self.pool(self.b(x).relu()), self.c(x), x * 2

    torch.manual_seed(0)
    net, x = First().eval(), torch.randn(3, channels, 13, 10)
    with torch.no_grad(), cpu.forced(isa):
        fast = compile_graph(capture(net, x), example=x)
        for threads in (1, 3):
            fast.threads = threads
            for y, want in zip(fast(x), net(x), strict=True):
                close(y, want)
