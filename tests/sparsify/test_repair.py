"""Repaired layers have the moments that they had, whatever kind of layer reads the thresholded maps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toys import loader, net

from actzip.activations import find_sites, get_thresholds, set_thresholds
from actzip.errors import DataError, InputError
from actzip.sparsify import calibrate_thresholds, measure
from actzip.sparsify.judge import agreement_of, error_of, jackknife, mean_of, wilson
from actzip.sparsify.repair import augmented, distil, moments, repair, with_views

X = torch.randn(24, 6, 12, 12, generator=torch.Generator().manual_seed(0))


def behind(layer, norm=None):
    """A ReLU, the layer, and what reads it."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), layer, *([norm] if norm else []), nn.ReLU()).eval()


def used(norm):
    """Statistics and parameters as after training."""
    with torch.no_grad():
        for t in (norm.running_mean, norm.weight, norm.bias):
            if t is not None:
                t.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


LAYERS = {
    "conv": lambda: behind(nn.Conv2d(8, 10, 3, padding=1)),
    "conv without bias": lambda: behind(nn.Conv2d(8, 10, 3, bias=False)),
    "grouped": lambda: behind(nn.Conv2d(8, 12, 3, groups=4)),
    "depthwise": lambda: behind(nn.Conv2d(8, 8, 3, groups=8, bias=False)),
    "transposed": lambda: behind(nn.ConvTranspose2d(8, 10, 2, stride=2)),
    "transposed, grouped": lambda: behind(nn.ConvTranspose2d(8, 12, 2, groups=4, bias=False)),
    "norm": lambda: behind(nn.Conv2d(8, 10, 3, bias=False), used(nn.BatchNorm2d(10))),
    "norm without parameters": lambda: behind(nn.Conv2d(8, 10, 3), used(nn.BatchNorm2d(10, affine=False))),
    "norm of a sum of channels": lambda: behind(nn.Identity(), used(nn.BatchNorm2d(8))),
}


def read_by_the_last_relu(model, x):
    seen = []
    handle = model[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    v = seen[0].transpose(0, 1).flatten(1)
    return v.mean(1), v.std(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_mean_and_variance_are_back(kind):
    model = LAYERS[kind]()
    mean, deviation = read_by_the_last_relu(model, X)
    wanted = moments(model, X)
    changed = set_thresholds(copy.deepcopy(model), {"1": 0.4})
    moved = read_by_the_last_relu(changed, X)
    assert float((moved[0] - mean).abs().max()) > 0.01
    with torch.no_grad():
        out = repair(changed, wanted, X)
        torch.testing.assert_close(changed(X), out, rtol=1e-3, atol=1e-3)  # the parameters say the same
    got = read_by_the_last_relu(changed, X)
    torch.testing.assert_close(got[0], mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1], deviation, rtol=2e-3, atol=1e-3)


def test_nothing_to_repair_changes_nothing():
    model = LAYERS["norm"]()
    same = copy.deepcopy(model)
    repair(same, moments(model, X), X)
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layers_that_run_twice_or_share_weights_are_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1)
            self.a = nn.Conv2d(6, 6, 1)
            self.b = nn.Conv2d(6, 6, 1)
            self.b.weight = self.a.weight
            self.own = nn.Conv2d(6, 6, 1)

        def forward(self, x):
            x = torch.relu(self.conv(torch.relu(self.conv(x))))
            return self.own(self.a(x) + self.b(x))

    assert set(moments(Twice().eval(), X).convs) == {"own"}


def test_of_few_values_the_mean_alone_is_put_right():
    torch.manual_seed(1)
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    wanted = moments(model, X)
    assert set(wanted.convs) == {"3"}
    changed = set_thresholds(copy.deepcopy(model), {"0": 0.8})
    with torch.no_grad():
        before, plain = model(X), changed(X)
        repair(changed, wanted, X)
        assert torch.equal(changed[3].weight, model[3].weight)
        torch.testing.assert_close(changed(X).mean(0), before.mean(0), rtol=1e-4, atol=1e-4)
        assert float((plain.mean(0) - before.mean(0)).abs().max()) > 0.01
    assert not moments(model, X[:4]).convs


def test_distillation_brings_outputs_closer(trained):
    batches = [x for x, _ in loader()]
    found = calibrate_thresholds(trained, batches, density=0.3, per="channel", samples=192)
    model = found.apply(copy.deepcopy(trained))

    def apart(m):
        with torch.no_grad():
            return error_of([trained(x) for x in batches], [m(x) for x in batches]).value

    before = apart(model)
    weights = [p.clone() for n, p in model.named_parameters() if n.endswith("weight") and "bn" not in n]
    distil(model, trained, batches, steps=60, batch=32, lr=5e-3, mix=0)
    assert apart(model) < before
    now = [p for n, p in model.named_parameters() if n.endswith("weight") and "bn" not in n]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def passed(model, x, at):
    """What the ReLU ``at`` lets through."""
    seen = []
    handle = model[at].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["full", "depthwise"])
@pytest.mark.parametrize("high", [None, 1.0])
def test_fits_meet_what_a_relu_passes(norm, kind, high, monkeypatch):
    """Below zero and above the limit any value does: what passes is nearer than by a fit to
    every value."""
    from actzip.sparsify import reconstruct

    torch.manual_seed(5)
    layer = nn.Conv2d(12, 12, 3, padding=1, bias=not norm, groups=12 if kind == "depthwise" else 1)
    relu = nn.ReLU if high is None else lambda: nn.Hardtanh(0, high)
    model = nn.Sequential(
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        layer,
        *([used(nn.BatchNorm2d(12))] if norm else []),
        relu(),
    ).eval()
    thresholds = {"1": 0.5}
    wanted = moments(model, X, fitted=True)
    assert wanted.targets.readers["2"][0] == str(len(model) - 1)
    goal = passed(model, X, len(model) - 1)
    errors = []
    for rounds in (1, 8):
        monkeypatch.setattr(reconstruct, "ROUNDS", rounds)
        changed = set_thresholds(copy.deepcopy(model), thresholds)
        with torch.no_grad():
            out = repair(changed, wanted, X)
            torch.testing.assert_close(changed(X), out, rtol=1e-3, atol=1e-3)
        errors.append(float((passed(changed, X, len(model) - 1) - goal).square().mean()))
    plain = passed(set_thresholds(copy.deepcopy(model), thresholds), X, len(model) - 1)
    assert errors[1] < errors[0]
    assert errors[1] < float((plain - goal).square().mean())


class Skip(nn.Module):
    """A block with a shortcut: identity, a convolution that runs last, in place or not."""

    def __init__(self, norm=True, inplace=False, projection=False, depthwise=False):
        super().__init__()
        self.stem = nn.Conv2d(6, 12, 3, padding=1)
        self.a = nn.Conv2d(12, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 3, padding=1, bias=not norm, groups=12 if depthwise else 1)
        self.norm = used(nn.BatchNorm2d(12)) if norm else nn.Identity()
        self.projection = nn.Conv2d(12, 12, 1) if projection else nn.Identity()
        self.stem_relu, self.relu, self.end = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.inplace = inplace

    def forward(self, x):
        x = self.stem_relu(self.stem(x))
        y = self.norm(self.b(self.relu(self.a(x))))
        short = self.projection(x)
        if self.inplace:
            y += short
        else:
            y = short + y
        return self.end(y)


SKIPS = {
    "norm": {},
    "no norm": {"norm": False},
    "in place": {"inplace": True},
    "in place, no norm": {"inplace": True, "norm": False},
    "projection": {"projection": True},
    "depthwise": {"depthwise": True},
}


@pytest.mark.parametrize("kind", SKIPS)
def test_a_sum_takes_back_what_its_shortcut_gathered(kind, monkeypatch):
    from actzip.sparsify import reconstruct

    torch.manual_seed(5)
    model = Skip(**SKIPS[kind]).eval()
    errors = []
    for sums in (reconstruct._SUMS, frozenset()):
        monkeypatch.setattr(reconstruct, "_SUMS", sums)
        wanted = moments(model, X, fitted=True)
        last = "projection" if "projection" in kind else "b"
        assert set(wanted.targets.sums) == ({last} if sums else set())
        assert (last in wanted.targets.readers) == bool(sums)
        changed = set_thresholds(copy.deepcopy(model), {"stem_relu": 0.4, "relu": 0.3, "end": 0.1})
        with torch.no_grad():
            out = repair(changed, wanted, X)
            torch.testing.assert_close(changed(X), out, rtol=1e-3, atol=1e-3)
            errors.append(float((out - model(X)).square().mean()))
    assert errors[0] < errors[1]


def test_what_is_read_before_the_sum_too_is_not_fitted_to_the_sum():
    class Twice(Skip):
        def forward(self, x):
            y = self.norm(self.b(torch.relu(self.stem(x))))
            half = 0.5 * y
            return self.end(y + x.repeat(1, 2, 1, 1)) + half

    torch.manual_seed(0)
    found = moments(Twice().eval(), X, fitted=True).targets
    assert set(found.values) == {"stem", "b"} and not found.sums and set(found.readers) == {"stem"}


@pytest.mark.parametrize("inputs", [24, 47, 48, 100])
def test_views_are_crops_in_front_and_the_images_behind(inputs):
    shades = torch.linspace(0, 1, 24).reshape(-1, 1, 1, 1)
    x = shades + 0.01 * torch.rand(24, 3, 20, 20)
    made = with_views(x, inputs)
    views = 24 * (inputs // 24 - 1)
    assert len(made) == 24 + views and torch.equal(made[views:], x)
    of = (made[:views].mean((1, 2, 3))[:, None] - x.mean((1, 2, 3))).abs().argmin(1)
    assert bool((of[: views // 4] >= 18).all()) and bool(
        (of[views // 4 :] < 18).all()
    )  # the last quarter's first
    assert with_views(torch.rand(8, 5), 64).shape == (8, 5)


def test_views_are_for_fits_and_means_and_not_for_the_choice():
    model = LAYERS["conv without bias"]()
    sample = with_views(torch.rand(24, 6, 16, 16, generator=torch.Generator().manual_seed(0)), 96)
    plain, more = moments(model, sample), moments(model, sample, fitted=True, views=72)
    for name, (mean, variance) in plain.convs.items():
        torch.testing.assert_close(more.convs[name][0], mean)
        torch.testing.assert_close(more.convs[name][1], variance)
    assert more.targets.held == 6 and more.targets.hidden == 18
    rows = len(more.targets.values["2"])
    fit, choose, later = more.targets.spans(96, rows)
    each = rows // 96
    assert (later.stop, fit.start, fit.stop, choose.start) == (18 * each, 18 * each, 90 * each, 90 * each)
    changed = set_thresholds(copy.deepcopy(model), {"1": 0.3})
    with torch.no_grad():
        out = repair(changed, more, sample)
        torch.testing.assert_close(changed(sample), out, rtol=1e-3, atol=1e-3)


def test_a_classifier_is_fitted_where_inputs_abound():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(400, 6)
    others, errors = torch.randn(1000, 6), []
    for fitted in (True, False):
        changed = set_thresholds(copy.deepcopy(model), {"1": 0.4})
        with torch.no_grad():
            repair(changed, moments(model, x, fitted=fitted), x)
            errors.append(float((changed(others) - model(others)).square().mean()))
    assert errors[0] < 0.9 * errors[1]
    few = moments(model, x[:20], fitted=True).targets
    assert set(few.values) == {"0"}  # 20 inputs are too few for 12 weights


def test_a_fit_that_helps_no_other_input_is_left(monkeypatch):
    """Targets that inputs do not explain: the weights stay, mean and variance are put right."""
    from actzip.sparsify.reconstruct import _ridge

    g = torch.Generator().manual_seed(0)
    a, y = torch.randn(1, 60, 25, generator=g), torch.randn(1, 60, 4, generator=g)
    parts = [(a[:, s], y[:, s]) for s in (slice(45), slice(45, 60))]
    grams = [(p.transpose(1, 2) @ p).double() for p, _ in parts]
    crosses = [(p.transpose(1, 2) @ q).double() for p, q in parts]
    start = torch.zeros(1, 25, 4, dtype=torch.float64)
    assert _ridge(grams, crosses, start, (45, 15)) is None
    assert _ridge(grams, [c + g @ (start + 1) for c, g in zip(crosses, grams)], start, (45, 15)) is not None


def test_augmented_images_are_like_the_images():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(5, 3, 32, 32)
    made = augmented(x, g)
    assert (
        made.shape == x.shape
        and float(made.min()) >= 0
        and float(made.max()) <= 1
        and not torch.equal(made, x)
    )
    assert augmented(torch.rand(4, 7), g).shape == (4, 7)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("repaired", [False, True])
def test_the_density_is_hit_within_one_percent(trained, per, repaired):
    before = measure(trained, loader()).density
    for share in (0.9, 0.6, 0.4):
        found = calibrate_thresholds(
            trained, loader(), density=share * before, per=per, repair=repaired, samples=192
        )
        assert found.met and 0.99 * share * before <= found.density <= share * before
        model = found.apply(copy.deepcopy(trained))
        assert measure(model, loader()).density == pytest.approx(found.density, rel=1e-4)
    assert get_thresholds(trained) == {}


def test_repair_keeps_more_than_thresholds_alone(trained):
    batches = [x for x, _ in loader()]
    errors = {}
    for repaired in (False, True):
        found = calibrate_thresholds(
            trained, batches, density=0.3, per="channel", repair=repaired, samples=96
        )
        model = found.apply(copy.deepcopy(trained))
        with torch.no_grad():
            errors[repaired] = error_of([trained(x) for x in batches], [model(x) for x in batches]).value
    assert errors[True] < errors[False]


def test_agreement_is_met_on_held_out_samples_only(trained, monkeypatch):
    found = calibrate_thresholds(trained, loader(), agree=0.95, samples=96)
    assert found.met and found.held_out is not None and found.held_out.samples == 96
    assert found.held_out.value >= 0.95 and found.held_out.low < 0.95
    from actzip.sparsify import thresholds

    real = thresholds.agreement_of

    def poor(before, after):  # what was held out agrees less than what was calibrated on
        made = real(before, after)
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return made if same or len(before) == 3 else type(made)("agreement", 0.5, 0.4, 0.6, made.samples)

    monkeypatch.setattr(thresholds, "agreement_of", poor)
    found = calibrate_thresholds(trained, loader(), agree=0.95, samples=192)  # a third of them is held out
    assert found.thresholds == {} and found.held_out is not None and found.held_out.value == 1.0


def test_what_was_calibrated_fits_its_model_only(trained):
    found = calibrate_thresholds(trained, loader(), density=0.3, repair=True, samples=96)
    with pytest.raises(InputError, match="calibrated"):
        found.apply(nn.Sequential(nn.Conv2d(3, 8, 1)))
    wide = net()
    wide.bn = nn.BatchNorm2d(9)
    wide.conv2 = nn.Conv2d(8, 13, 3)
    with pytest.raises(InputError, match="has shape"):
        found.apply(wide)


def test_intervals():
    low, high = wilson(95, 100)
    assert low == pytest.approx(0.8882, abs=1e-3) and high == pytest.approx(0.9785, abs=1e-3)
    assert wilson(4, 4)[1] == 1.0 and wilson(4, 4)[0] == pytest.approx(0.5101, abs=1e-3)
    found = mean_of("error", [1.0, 2.0, 3.0, 4.0])
    assert found.value == 2.5 and found.high == pytest.approx(2.5 + 3.182 * 1.29099 / 2, rel=0.02)
    values = [1.0, 2.0, 3.0, 4.0]  # the mean's jackknife is the mean's interval
    parts = [(10 - v) / 3 for v in values]
    assert jackknife(parts) == pytest.approx(found.high - found.value)
    with pytest.raises(DataError, match="held out"):
        mean_of("error", [])
    a = [torch.tensor([[1.0, 2.0], [2.0, 1.0]])]
    assert agreement_of(a, [torch.tensor([[1.0, 2.0], [1.0, 2.0]])]).value == 0.5
    three = [torch.eye(3), torch.eye(3)[:1]]  # answers 0, 1, 2, 0: always 0 is right twice
    assert agreement_of(three, three).chance == 0.5
    assert error_of(a, a).value == 0.0


def test_thresholds_stay_where_sites_are(trained):
    found = calibrate_thresholds(trained, loader(), density=0.3, per="channel", repair=True, samples=96)
    sites = {s.name for s in find_sites(trained, next(iter(loader()))[0])[0] if s.sparse}
    assert set(found.thresholds) <= sites
