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
from actzip.sparsify.judge import agreement_of, error_of, mean_of, wilson
from actzip.sparsify.repair import augmented, distil, moments, repair

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
    with pytest.raises(DataError, match="held out"):
        mean_of("error", [])
    a = [torch.tensor([[1.0, 2.0], [2.0, 1.0]])]
    assert agreement_of(a, [torch.tensor([[1.0, 2.0], [1.0, 2.0]])]).value == 0.5
    assert error_of(a, a).value == 0.0


def test_thresholds_stay_where_sites_are(trained):
    found = calibrate_thresholds(trained, loader(), density=0.3, per="channel", repair=True, samples=96)
    sites = {s.name for s in find_sites(trained, next(iter(loader()))[0])[0] if s.sparse}
    assert set(found.thresholds) <= sites
