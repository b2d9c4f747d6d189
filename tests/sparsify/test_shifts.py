"""Channels without zeros of their own are shifted in front of their threshold, where that costs less."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from actzip.activations import ActivationTap, get_thresholds, run_model, set_thresholds
from actzip.sparsify import calibrate_thresholds, measure
from actzip.sparsify.repair import moments, repair
from actzip.sparsify.shifts import Shifts, shiftable
from actzip.sparsify.table import LEVELS, Table
from actzip.sparsify.thresholds import Trials, blend

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def used(norm, low=0.0, high=4.0):
    """A BatchNorm as after training, whose channels range from many zeros to none."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.copy_(torch.linspace(low, high, len(norm.bias)))
    return norm


class Dense(nn.Module):
    """Maps with few zeros, read by a padded depthwise convolution, by a 1x1 one, by one behind a pad."""

    def __init__(self, act=nn.ReLU6, folded=False, pointwise=False):
        super().__init__()
        torch.manual_seed(3)
        side = 1 if pointwise else 3
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.Identity() if folded else used(nn.BatchNorm2d(12))
        self.deep = nn.Conv2d(12, 12, side, padding=side // 2, groups=12)
        self.norm2 = nn.Identity() if folded else used(nn.BatchNorm2d(12))
        self.point = nn.Conv2d(12, 8, 1, bias=folded)
        self.norm3 = nn.Identity() if folded else used(nn.BatchNorm2d(8))
        self.last = nn.Conv2d(8, 8, 2 if not pointwise else 1, groups=2)
        self.pointwise = pointwise
        self.act = act()
        if folded:
            with torch.no_grad():
                for m in (self.stem, self.deep, self.point):
                    m.bias.add_(torch.linspace(0, 3, len(m.bias)))
        self.eval()

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.norm2(self.deep(x)))
        x = self.act(self.norm3(self.point(x)))
        return self.last(x if self.pointwise else F.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, lambda: nn.ReLU(inplace=True)])
def test_a_relu_between_a_norm_and_convolutions_can_be_shifted(act):
    found = shiftable(Dense(act), X)
    assert {name: each.producer for name, each in found.items()} == {
        "act": "norm",
        "act:1": "norm2",
        "act:2": "norm3",
    }
    assert [each.readers for each in found.values()] == [("deep",), ("point",), ("last",)]
    assert {each.high for each in found.values()} == {6.0 if act is nn.ReLU6 else math.inf}
    assert found["act:1"].padding == 0
    edges = 1 - (1 - 2 / (3 * 12)) ** 2  # of 3x3 at 12x12, padded by one
    assert found["act"].padding == pytest.approx(edges)
    assert found["act:2"].padding == pytest.approx(1 - (1 - 1 / (2 * 12)) ** 2)


def test_a_convolution_with_a_bias_shifts_itself():
    found = shiftable(Dense(folded=True), X)
    assert {each.producer for each in found.values()} == {"stem", "deep", "point"}
    assert not any(each.norm for each in found.values())


class Odd(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.n = nn.Conv2d(3, 8, 1), used(nn.BatchNorm2d(8))
        self.b, self.run = nn.Conv2d(8, 8, 1), forward
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.eval()

    def forward(self, x):
        return self.run(self, x)


def _start(m, x):
    return m.n(m.a(x))


@torch.jit.script
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


def _written(m, x):
    y = F.relu(_start(m, x))
    both = torch.zeros(len(x), 16, *x.shape[2:])
    both[:, 8:] = y
    return m.b(y) + both[:, 8:]


ODD = {
    "read by a sum": lambda m, x: (y := F.relu(_start(m, x))) + m.b(y),
    "read by a pool": lambda m, x: m.b(F.avg_pool2d(F.relu(_start(m, x)), 3)),
    "given": lambda m, x: [y := F.relu(_start(m, x)), m.b(y)],
    "listed": lambda m, x: m.b(torch.cat([F.relu(_start(m, x))])),
    "split": lambda m, x: m.b(y := F.relu(_start(m, x))) + torch.cat(y.chunk(2, 1), 1),
    "of a sum": lambda m, x: m.b(F.relu((y := _start(m, x)) + m.a(x))) * y.mean(),
    "of a sum, in place": lambda m, x: m.b(F.relu_(_start(m, x) + m.a(x))),
    "before it is read twice": lambda m, x: m.b(F.relu(y := _start(m, x))) + y,
    "padded with ones": lambda m, x: m.b(F.pad(F.relu(_start(m, x)), (1, 1), value=1.0)),
    "padded by itself": lambda m, x: m.b(F.pad(F.relu(_start(m, x)), (1, 1, 1, 1), mode="reflect")),
    "norm without parameters": lambda m, x: m.b(F.relu(m.bare(m.a(x)))),
    "reader runs twice": lambda m, x: m.b(m.b(F.relu(_start(m, x)))),
    "reader's weights by hand": lambda m, x: F.conv2d(F.relu(_start(m, x)), m.b.weight + 0),
    "read by a scripted function": lambda m, x: m.b(y := F.relu(_start(m, x))) + doubled(y),
    "before it is scripted": lambda m, x: m.b(F.relu(y := _start(m, x))) + doubled(y),
    "read by a function of its own": lambda m, x: m.b(y := F.relu(_start(m, x))) + Doubled.apply(y),
    "written into another": _written,
    "read by numpy": lambda m, x: m.b(y := F.relu(_start(m, x))) + torch.from_numpy(y.numpy() * 2),
    "given before the ReLU": lambda m, x: {"pre": (y := _start(m, x)), "out": m.b(F.relu(y))},
    "read, given and normed": lambda m, x: [y := m.c(F.relu(_start(m, x))), m.n2(y)],
    "reader's weights twice": lambda m, x: (
        m.b(F.relu(_start(m, x))) + F.conv2d(x.mean(1, True).expand(-1, 8, -1, -1), m.b.weight)
    ),
    "norm's bias elsewhere": lambda m, x: m.b(F.relu(_start(m, x))) + m.n.bias.reshape(-1, 1, 1),
    "padded along channels": lambda m, x: m.wide(F.pad(F.relu(_start(m, x)), (0, 0, 0, 0, 2, 2))),
    "rolled along channels": lambda m, x: m.b(F.pad(F.relu(_start(m, x)), (0, 0, 0, 0, 1, -1))),
    "an image by itself": lambda m, x: m.b(F.relu(m.a(x[0]))),
    "reader is transposed": lambda m, x: m.t(F.relu(_start(m, x))),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_read_otherwise_is_not_shifted(kind):
    layers = {"bare": nn.BatchNorm2d(8, affine=False), "t": nn.ConvTranspose2d(8, 8, 1)}
    layers |= {"c": nn.Conv2d(8, 8, 1, bias=False), "n2": nn.BatchNorm2d(8), "wide": nn.Conv2d(12, 8, 1)}
    assert shiftable(Odd(ODD[kind], **layers), X) == {}


@pytest.mark.parametrize("where", [("b", "weight"), ("n", "weight"), ("n", "bias")], ids=".".join)
def test_parameters_that_hooks_compute_are_not_shifted(where):
    model = Odd(lambda m, x: m.b(F.relu(_start(m, x))))
    assert shiftable(model, X)
    prune.l1_unstructured(getattr(model, where[0]), where[1], 0.3)
    assert shiftable(model, X) == {}


def test_a_shift_passes_a_max_pool():
    model = Odd(lambda m, x: m.b(F.max_pool2d(F.relu6(_start(m, x)), 3, 2, 1)))
    where = shiftable(model, X)
    assert [each.readers for each in where.values()] == [("b",)]
    (site,) = where
    by, full = torch.full((8,), 0.5, dtype=torch.float64), torch.ones(1)
    with torch.no_grad():
        model.n.bias.copy_(torch.linspace(5, 9, 8))  # all above the shift
        wanted, work = moments(model, X), copy.deepcopy(model)
        repair(work, wanted, X, Shifts.put(work, where, {site: where[site].shift(by, full)}))
        torch.testing.assert_close(work(X), model(X), rtol=1e-3, atol=1e-3)
    assert not shiftable(Odd(lambda m, x: m.b(F.max_pool2d(F.relu(y := _start(m, x)), 2)) + y.mean()), X)


def test_layers_that_share_weights_are_not_shifted():
    model = Dense()
    model.point.weight = nn.Parameter(model.point.weight.detach())
    model.other = nn.Conv2d(12, 8, 1)
    model.other.weight = model.point.weight
    assert "act:1" not in shiftable(model, X)


def lowest(model):
    """The lowest value in front of each ReLU, channel by channel."""
    low, model = {}, copy.deepcopy(model)
    for site, each in shiftable(model, X).items():
        layer = model.get_submodule(each.producer)
        layer.register_forward_hook(lambda m, a, out, site=site: low.update({site: out.amin((0, 2, 3))}))
    with torch.no_grad():
        model(X)
    return low


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_a_shift_below_all_values_changes_nothing(act, folded):
    model = Dense(act, folded, pointwise=True)
    low = lowest(model)
    by = {site: (0.9 * v).clamp(0, 3).double() for site, v in low.items()}
    assert sum(int((v > 0.1).sum()) for v in by.values()) > 5
    wanted, work = moments(model, X), copy.deepcopy(model)
    where, full = shiftable(work, X), torch.ones(1)
    shifts = Shifts.put(work, where, {k: where[k].shift(v, full) for k, v in by.items()})
    with torch.no_grad():
        assert not torch.allclose(work(X), model(X), atol=1e-2)
    repair(work, wanted, X, shifts)
    with torch.no_grad():
        torch.testing.assert_close(work(X), model(X), rtol=1e-3, atol=1e-3)
        other = torch.randn(4, 3, 12, 12) / 4
        torch.testing.assert_close(work(other), model(other), rtol=1e-2, atol=1e-2)


def test_costs_are_of_what_goes_less_its_mean(monkeypatch):
    """Against sums written out: one projection, one input, every element of a channel below a threshold."""
    import actzip.sparsify.table as module

    monkeypatch.setattr(module, "VALUES", 0)
    model, x = Dense(nn.ReLU, pointwise=True), X[:1]
    table = Table(model, [x], per="channel", repaired=True, projections=1, seed=5)
    maps = {}

    def see(site, y):
        maps[site.name] = y.detach().requires_grad_() if not y.requires_grad else y
        return maps[site.name]

    with ActivationTap(model, see):
        out = run_model(model, x)
    value = module._projection(out.flatten(1), False, torch.Generator().manual_seed(5))
    for name, grad in zip(maps, torch.autograd.grad(value, list(maps.values())), strict=True):
        v, g = maps[name].detach()[0].flatten(1).double(), grad[0].flatten(1).double()
        for level in (3, 8, 13):
            goes = v <= LEVELS[level] * table.unit[name].double()[:, None]
            m = (v * goes).sum(1) / goes.sum(1).clamp(min=1)
            push = g * (v - m[:, None]) * goes
            shifted = push.sum(1).square() + push.square().sum(1)
            chosen = table.shift[name][:, level] > 0
            assert torch.allclose(table.shift[name][chosen, level], m[chosen], rtol=1e-4)
            assert torch.allclose(
                table.cost[name][chosen, level], shifted[chosen], rtol=1e-3, atol=1e-6 * float(shifted.max())
            )
            excess = table.cost[name][:, level] - shifted
            assert float(excess.max()) < 1e-3 * float(shifted.max())
    assert sum(int((s > 0).sum()) for s in table.shift.values()) > 50


def trials(model):
    table = Table(model, [X], per="channel", repaired=True)
    return Trials(model, [X], table, dict.fromkeys(table.unit, 1.0), repaired=True)


def near_the_limit(model):
    """Two channels of the first map lie there."""
    with torch.no_grad():
        (model.stem if isinstance(model.norm, nn.Identity) else model.norm).bias[-2:] += 3.0
    return model


def down(shift):
    """By how much, in flipped channels from their limit."""
    return torch.where(shift.scale < 0, shift.top - shift.by, shift.by)


def test_shifts_lie_between_those_of_candidates_and_below_the_threshold():
    made = trials(near_the_limit(Dense()))
    a, b = made.thresholds(0.8), made.thresholds(0.5)
    found = [made.table.shifts(t) for t in (a, blend(a, b, 0.4), b)]
    assert made.table.shifts({}) == {}
    for name, by in found[1].items():
        t = blend(a, b, 0.4)[name].double()
        assert bool((down(by) <= t).all()) and bool((down(by) >= 0).all())
    for t, by in zip((a, b), (found[0], found[2]), strict=True):
        for name in by:
            at = [
                min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - float(r)))
                for r in t[name] / made.table.unit[name]
            ]
            want = made.table.shift[name][range(len(at)), at].clamp(max=t[name].double())
            torch.testing.assert_close(down(by[name]), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_zeros_are_where_the_threshold_was(folded):
    """In the first map, which nothing before it moves."""
    model = near_the_limit(Dense(folded=folded, pointwise=True))
    made = trials(model)
    made.wanted.targets.values.clear()  # moments alone: the first layers are as they were
    thresholds = made.thresholds(0.5)
    assert "act" in made.table.shifts(thresholds)
    seen = {}

    def see(site, y):
        seen.setdefault(site.name, y)

    for each in (model, made.put(thresholds)):
        with torch.no_grad(), ActivationTap(each, see, layers="act"):
            run_model(each, X)
        if each is model:
            y, flipped = seen.pop("act"), made.table.flipped["act"].reshape(1, -1, 1, 1)
            t = thresholds["act"].reshape(1, -1, 1, 1)
            want = torch.where(flipped & (t > 0), 6 - y, y) > t
            assert bool((flipped & (t > 0)).any())
    assert float(((seen["act"] > 0) == want).float().mean()) > 0.999


@pytest.mark.parametrize("folded", [False, True])
def test_what_was_found_is_what_was_measured(folded):
    model = Dense(folded=folded)
    found = calibrate_thresholds(model, [X], density=0.5, per="channel", repair=True)
    made = found.apply(copy.deepcopy(model))
    assert get_thresholds(made).keys() == found.thresholds.keys()
    assert measure(made, [X]).density == found.density <= 0.5
    with torch.no_grad():
        assert float((made(X) - model(X)).norm() / (model(X) - model(X).mean()).norm()) < 0.25


@pytest.mark.parametrize("folded", [False, True])
def test_dense_channels_cost_less_shifted(folded, monkeypatch):
    import actzip.sparsify.table as module

    model, other = Dense(folded=folded), torch.randn(64, 3, 12, 12)

    def error():
        found = calibrate_thresholds(model, [X], density=0.6, per="channel", repair=True)
        with torch.no_grad():
            return float((found.apply(copy.deepcopy(model))(other) - model(other)).norm())

    shifted = error()
    monkeypatch.setattr(module, "shiftable", lambda model, inputs: {})
    assert shifted < 0.85 * error()


@pytest.mark.parametrize("pool", [False, True])
def test_what_is_denser_above_is_flipped_but_not_in_front_of_maxima(pool):
    """A channel that is at its limit mostly: half of it is removed from there, for next to nothing."""
    torch.manual_seed(0)
    stem, norm = nn.Conv2d(3, 4, 1), used(nn.BatchNorm2d(4), 1.0, 1.0)
    norm.bias.data[1] = 6.5
    between = [nn.MaxPool2d(2)] if pool else []
    model = nn.Sequential(stem, norm, nn.ReLU6(), *between, nn.Conv2d(4, 3, 1), used(nn.BatchNorm2d(3)))
    model.eval()
    table = Table(model, [X], per="channel", repaired=True)
    assert table.flipped["2"].tolist() == [False, not pool, False, False]
    if pool:
        return
    at_zero, at_limit = [], []
    with ActivationTap(model, lambda site, y: at_limit.append((y[:, 1] >= 6).float().mean())):
        run_model(model, X)
    thresholds = {"2": torch.tensor([0.0, 0.01, 0.0, 0.0])}
    made = Trials(model, [X], table, dict.fromkeys(table.unit, 1.0), repaired=True).put(thresholds)
    with ActivationTap(made, lambda site, y: at_zero.append((y[:, 1] == 0).float().mean())):
        out = run_model(made, X)
    assert float(at_zero[0]) >= float(at_limit[0]) > 0.5
    with torch.no_grad():
        torch.testing.assert_close(out, model(X), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6])
def test_what_is_left_is_what_the_table_counts(act):
    """Flipped channels lose the zeros that they had."""
    made = trials(near_the_limit(Dense(act, pointwise=True)))
    made.wanted.targets.values.clear()
    thresholds = {"act": made.thresholds(0.4)["act"]}
    nonzero = []
    with ActivationTap(made.put(thresholds), lambda site, y: nonzero.append(torch.count_nonzero(y))):
        run_model(made.work, X)
    levels = (torch.tensor(LEVELS) - (thresholds["act"] / made.table.unit["act"])[:, None]).abs().argmin(1)
    removed = made.table.removed["act"].gather(1, levels[:, None]).sum()
    assert int(nonzero[0]) == pytest.approx(made.table.nonzeros["act"] - float(removed), rel=2e-3)
    assert bool(made.table.flipped["act"].any()) == (act is nn.ReLU6)


def test_a_limit_that_values_reach_stays():
    where = shiftable(Dense(), X)["act"]
    by, full = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 0.1, 0.1])
    torch.testing.assert_close(where.shift(by, full).scale, torch.tensor([1.0, 1.2, 2.0]))
    assert shiftable(Dense(nn.ReLU), X)["act"].shift(by, full).scale.tolist() == [1, 1, 1]
    x = torch.tensor([6.0, 6.0, 6.0])
    assert where.shift(by, full)(x)[1:].tolist() == [6, 6]
    flipped = where.shift(by, full, torch.tensor([True, True, False]))
    assert flipped(torch.tensor([5.0, 5.0, 3.0])).tolist() == [0, 0, 0] and flipped(0 * x)[1] == 6
    assert flipped.threshold(torch.tensor([2.0, 2.0, 4.0])).tolist() == pytest.approx([1, 1.2, 2])


def test_thresholds_alone_shift_nothing():
    model = Dense()
    found = calibrate_thresholds(model, [X], density=0.5, per="channel")
    assert not found.parameters
    torch.testing.assert_close(found.apply(model).norm.bias, Dense().norm.bias)
    assert set_thresholds(model, {}) is model
