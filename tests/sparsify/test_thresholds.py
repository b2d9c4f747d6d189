"""Thresholds from a few samples: targets are met by measurement, and the choice beats a naive one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toys import loader, net

from actzip.activations import get_thresholds, set_thresholds
from actzip.errors import ActzipWarning, DataError, InputError, LayerError
from actzip.sparsify import agreement, calibrate_thresholds, measure, sparsify, table


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_density_target(trained, per):
    before = measure(trained, loader())
    target = 0.7 * before.density
    found = calibrate_thresholds(trained, loader(), density=target, per=per, samples=192)
    assert found.met and found.density <= target and found.density > 0.6 * target
    assert get_thresholds(trained) == {}
    set_thresholds(trained, found.thresholds)
    try:
        after = measure(trained, loader())
        assert after.density == pytest.approx(found.density)
        assert after.theoretical_speedup == pytest.approx(found.theoretical_speedup)
    finally:
        set_thresholds(trained, {})
    assert measure(trained, loader()).density == before.density
    shapes = {n: t.shape if isinstance(t, torch.Tensor) else () for n, t in found.thresholds.items()}
    if per == "channel":
        assert shapes["relu"] == (8,)
    else:
        assert all(s == () for s in shapes.values())


def test_speedup_and_agreement_targets(trained):
    base = measure(trained, loader()).theoretical_speedup
    found = calibrate_thresholds(trained, loader(), speedup=1.3 * base, samples=192)
    assert found.met and found.theoretical_speedup >= 1.3 * base
    kept = calibrate_thresholds(trained, loader(), agree=0.98, samples=192)
    assert kept.held_out is not None and kept.met == (kept.held_out.value >= 0.98)  # the proof is held out
    assert kept.met and kept.density < kept.density_before
    reached = [t for t in found.tried if t["theoretical_speedup"] == found.theoretical_speedup]
    assert reached and len(found.tried) == 7


def test_choice_beats_one_quantile_for_all(trained):
    """At equal density the outputs move less than with the same share of non-zeros removed everywhere."""
    batches = [x for x, _ in loader()]
    found = calibrate_thresholds(trained, batches, density=0.45, samples=192)
    maps = {}
    from actzip.activations import ActivationTap

    with torch.no_grad(), ActivationTap(trained, lambda s, y: maps.setdefault(s.name, []).append(y)):
        want = [trained(x) for x in batches]

    def moved(thresholds) -> tuple[float, float]:
        set_thresholds(trained, thresholds)
        with torch.no_grad():
            d = sum(float((trained(x) - w).square().sum()) for x, w in zip(batches, want))
        density = measure(trained, batches).density
        set_thresholds(trained, {})
        return d, density

    cost, density = moved(found.thresholds)
    low, high = 0.0, 1.0
    for _ in range(12):
        share = (low + high) / 2
        naive = {n: float(torch.cat([v[v > 0] for v in ys]).quantile(share)) for n, ys in maps.items()}
        naive_cost, naive_density = moved(naive)
        if naive_density > density:
            low = share
        else:
            high = share
    assert naive_density == pytest.approx(density, abs=0.02)
    assert cost < naive_cost


def test_layers_and_ignore(trained):
    found = calibrate_thresholds(trained, loader(), density=0.3, layers=["relu", "(model)"], ignore="(model)")
    assert set(found.thresholds) == {"relu"}
    with pytest.raises(LayerError, match="no layer"):
        calibrate_thresholds(trained, loader(), density=0.3, layers="reluu")


def test_bad_input(trained):
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(InputError, match="exactly one target"):
        calibrate_thresholds(trained, [x])
    with pytest.raises(InputError, match="exactly one target"):
        calibrate_thresholds(trained, [x], density=0.3, agree=0.9)
    with pytest.raises(InputError, match="density must be"):
        calibrate_thresholds(trained, [x], density=1.5)
    with pytest.raises(InputError, match="per must be"):
        calibrate_thresholds(trained, [x], density=0.5, per="pixel")
    with pytest.raises(DataError, match="no batch"):
        calibrate_thresholds(trained, [], density=0.3)
    with pytest.raises(InputError, match="not finite"):
        calibrate_thresholds(trained, [x / 0], density=0.3)
    with pytest.raises(DataError, match="no batch"):
        agreement(trained, trained, [])


def test_out_of_reach_says_what_is_reached(trained):
    with pytest.warns(ActzipWarning, match="out of reach"):
        found = calibrate_thresholds(trained, loader(), density=1e-9)
    assert not found.met and found.density > 1e-9
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.GELU())
    with pytest.warns(ActzipWarning, match="no ReLU"):
        nothing = calibrate_thresholds(smooth, loader(), density=0.5)
    assert nothing.thresholds == {} and not nothing.met


def test_target_already_met_changes_nothing(trained):
    found = calibrate_thresholds(trained, loader(), density=0.99)
    assert found.met and found.thresholds == {} and found.agreement == 1.0


def test_same_seed_same_thresholds():
    model = net()
    a = calibrate_thresholds(model, loader(), density=0.3, seed=4)
    b = calibrate_thresholds(model, loader(), density=0.3, seed=4)
    assert a.thresholds == b.thresholds


def test_a_thresholded_network_learns_what_it_gave_without(trained):
    found = calibrate_thresholds(
        trained, loader(), density=0.5 * measure(trained, loader()).density, samples=192
    )
    student = set_thresholds(copy.deepcopy(trained), found.thresholds)

    def distance(model):
        with torch.no_grad():
            pairs = [(model(x), trained(x)) for x, _ in loader()]
        return float(sum((a - b).square().sum() for a, b in pairs))

    settings = {"epochs": 4, "lr": 2e-3, "optimizer": "adam", "alpha": 0, "distill": 1.0, "distill_maps": 1.0,
                "distill_layers": ["conv2"], "freeze_norm": True}  # fmt: skip
    made = sparsify(student, loader(), None, settings, teacher=trained)
    assert distance(made) < 0.5 * distance(student)
    assert {n: float(t) for n, t in get_thresholds(made).items()} == found.thresholds
    assert get_thresholds(trained) == {}
    before = dict(trained.named_buffers())
    assert before and all(torch.equal(b, before[n]) for n, b in made.named_buffers())
    with pytest.raises(LayerError, match="no module 'conv9'"):
        sparsify(student, loader(), None, {**settings, "distill_layers": "conv9"})
    with pytest.raises(InputError, match="distill_layers"):
        sparsify(student, loader(), None, {**settings, "distill_layers": None})


def test_projections_of_scores_feel_what_their_divergence_feels():
    """Squared on average: Fisher's information at the temperature; of other outputs the mean square."""
    generator = torch.Generator().manual_seed(0)
    out = 4 * torch.randn(1, 6, generator=generator)
    change = torch.randn(1, 6, generator=generator)
    spread = (out - out.mean()).square().mean().sqrt()
    shares = {True: (out / table.TEMPERATURE).softmax(1), False: torch.full((1, 6), 1 / 6)}
    for scores, share in shares.items():
        pushes = []
        for _ in range(4000):
            leaf = out.clone().requires_grad_()
            table._projection(leaf, scores, generator).backward()
            pushes.append(float((leaf.grad * change).sum()) ** 2)
        off = change - (share * change).sum()
        wanted = float(6 * (share * off.square()).sum() / spread.square())
        assert sum(pushes) / len(pushes) == pytest.approx(wanted, rel=0.1)


def test_maps_of_few_values_cost_more_where_they_are_repaired(trained, monkeypatch):
    """What the repair estimates on few values it puts less right."""
    batches = [b[0] for b in loader()][:1]
    cost = table.Table(trained, batches, per="channel", repaired=True).cost
    monkeypatch.setattr(table, "VALUES", 0)
    plain = table.Table(trained, batches, per="channel", repaired=True).cost
    more = {name: float(cost[name].sum() / plain[name].sum()) for name in cost}
    names = sorted(more, key=more.__getitem__)
    assert names[0] == "relu" and more["relu"] > 1  # four times the positions of the others
    assert more[names[-1]] - 1 == pytest.approx(4 * (more["relu"] - 1))


def test_no_unit_is_free_because_few_inputs_felt_it(trained, monkeypatch):
    """Where there are few values, what a unit costs is drawn to what all units of its map cost."""
    batches = [b[0] for b in loader()][:1]
    drawn = table.Table(trained, batches, per="channel", repaired=True).cost
    monkeypatch.setattr(table, "VALUES", 0)
    felt = table.Table(trained, batches, per="channel", repaired=True).cost
    for name, cost in drawn.items():
        gone = felt[name][:, -1] > 0
        mean, before = (c[gone, -1].log().mean() for c in (cost, felt[name]))
        less = (cost[gone, -1].log() - mean).square().sum()
        assert less < (felt[name][gone, -1].log() - before).square().sum()
        assert int((cost[:, -1] > 0).sum()) >= int(gone.sum())
        torch.testing.assert_close(cost.sum(0) / cost.sum(), felt[name].sum(0) / felt[name].sum())
