"""Penalties, costs and the fine-tuning loop, on networks of a few hundred weights."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import Net, images, loader, net

import actzip
from actzip.data import Images, Loader
from actzip.errors import ActzipWarning, DataError, InputError, LayerError, TrainingError
from actzip.sparsify import (
    ActivationPenalty,
    LearnedThresholds,
    SparsifyConfig,
    map_costs,
    measure,
    sparsify,
    sparsify_result,
)
from actzip.sparsify import train as training


class Killed(Exception):
    pass


def kill_at(epoch, step):
    """A progress callback that ends the run there."""

    def kill(event):
        if event["kind"] == "step" and (event["epoch"], event["step"]) == (epoch, step):
            raise Killed

    return kill


def test_costs_are_exact():
    model = net().eval()
    x = torch.randn(2, 3, 8, 8)
    costs = map_costs(model, x)
    # conv2 reads `relu` with 3x3 taps at stride 2 and padding 1: along an axis of 8 that makes
    # 4 * 3 - 1 (padding) = 11 reads; conv3 reads the 16 maxima of each channel
    assert costs["relu"].macs == 8 * 11 * 11 * 12 + 8 * 16 * 16
    assert costs["(model)"].macs == 12 * 16 * 16
    assert (
        costs["(model):1"].macs == pytest.approx(16 * 4)  # the mean passes 1/16 of 64 MACs to each element
    )  # the mean passes 1/16 of 24 MACs to each of 16 elements a channel
    whole = 8 * 3 * 64 + 12 * 72 * 16 + 16 * 20 * 16 + 64
    assert costs["relu"].share == pytest.approx(costs["relu"].macs / whole)


def test_measure_counts_by_hand():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3))
    x = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])
    m = measure(model, [(x, torch.tensor([0]))])
    assert m.densities == {"0": 0.5}
    assert m.macs == 8 + 6
    assert m.effective_macs == 4 + 6  # a bias keeps both outputs of the convolution from zero
    assert m.theoretical_speedup == pytest.approx(14 / 10)
    assert m.samples == 1


def test_values_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 1))
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0], [2.0, 2.0, -1.0, -1.0]], requires_grad=True)

    def value(kind: str, **kwargs) -> float:
        with ActivationPenalty(model, kind, alpha=2.0, **kwargs) as penalty:
            model(x)
            out = penalty()
            assert out.requires_grad
            return float(out.detach())

    assert value("l1", weighting="elements") == pytest.approx(2 * 8 / 8)
    assert value("l1", weighting="paper") == pytest.approx(2 * 8 / 2)  # the norm a sample
    t = [1 / 1.5, 3 / 3.5, 2 / 2.5, 2 / 2.5]
    assert value("tl1", normalise=False) == pytest.approx(2 * 1.5 * sum(t) / 8)
    logs = [np.log1p(v / 0.5) for v in (1, 3, 2, 2)]
    assert value("log", normalise=False) == pytest.approx(2 * sum(logs) / 8 / np.log1p(2), rel=1e-6)
    assert value("hoyer") == pytest.approx(2 * np.mean([16 / 10, 16 / 8]) / 4)


@pytest.mark.parametrize("kind", ["l1", "tl1", "log", "hoyer"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradient_is_that_of_the_value(kind, normalise):
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = (torch.randn(3, 3, 2, 2, dtype=torch.float64) + 0.3).requires_grad_()
    penalty = ActivationPenalty(model, kind, alpha=1.0, normalise=normalise, stats_every=10**9)
    model(x)
    penalty()  # fixes the scales

    def f(v: torch.Tensor) -> torch.Tensor:
        model(v)
        return penalty()

    (grad,) = torch.autograd.grad(f(x), x)
    step = 1e-3
    for i in [(0, 0, 0, 0), (1, 2, 1, 0), (2, 1, 1, 1)]:
        up, down = x.detach().clone(), x.detach().clone()
        up[i] += step
        down[i] -= step
        if abs(float(x[i].detach())) < 2 * step:
            continue
        slope = float(f(up.requires_grad_()).detach() - f(down.requires_grad_()).detach()) / (2 * step)
        assert float(grad[i]) == pytest.approx(slope, abs=5e-4)
    penalty.detach()


def test_every_nth_loss_has_n_times_the_penalty():
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(3, 3, 2, 2, requires_grad=True)

    def values(penalty: ActivationPenalty, n: int) -> list[torch.Tensor]:
        out = []
        for _ in range(n):
            model(x)
            out.append(penalty())
        return out

    with ActivationPenalty(model, alpha=2.0, normalise=False) as plain:
        (expected,) = values(plain, 1)
    with ActivationPenalty(model, alpha=2.0, normalise=False, every=3) as lazy:
        first = values(lazy, 4)
        state = lazy.state_dict()
    assert [v.requires_grad for v in first] == [True, False, False, True]
    assert float(first[0].detach()) == pytest.approx(3 * float(expected.detach()))
    assert float(first[1]) == 0.0
    with ActivationPenalty(model, alpha=2.0, normalise=False, every=3) as resumed:
        resumed.load_state_dict(state)
        assert [v.requires_grad for v in values(resumed, 3)] == [False, False, True]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="every"):
            ActivationPenalty(model, every=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="penalty_every"):
        SparsifyConfig(penalty_every=0)
    with pytest.raises(InputError, match="penalty_every"):
        SparsifyConfig(penalty_every=2.5)  # type: ignore[arg-type]


def test_two_lines_in_your_own_loop(trained):
    import copy

    model = copy.deepcopy(trained)
    data = list(loader())
    before = measure(model, data)
    penalty = ActivationPenalty(model, alpha=3.0, example=data[0][0])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(25):
        for x, y in data:
            loss = F.cross_entropy(model(x), y) + penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    penalty.detach()
    after = measure(model, data)
    assert after.theoretical_speedup > 1.15 * before.theoretical_speedup
    assert penalty.densities.keys() == {"relu", "(model)", "(model):1"}


def test_keys_class_and_original_stay(trained):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    sparse = actzip.sparsify(trained, loader(), loader(), {"epochs": 1, "lr": 0.02, "alpha": 1.0})
    assert type(sparse) is Net and list(sparse.state_dict()) == list(before)
    assert not sparse.training and sparse.relu.inplace
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    fresh = net(seed=5)
    fresh.load_state_dict(sparse.state_dict())
    entry = sparsify_result(sparse).history[-1]
    assert measure(fresh, loader()).accuracy == entry.accuracy
    assert entry.theoretical_speedup == pytest.approx(measure(sparse, loader()).theoretical_speedup)


@pytest.mark.parametrize(("kind", "every"), [("l1", 1), ("tl1", 1), ("tl1", 4), ("log", 1), ("hoyer", 1)])
def test_penalty_beats_its_control(trained, kind, every):
    same = {"epochs": 12, "lr": 0.05, "penalty": kind, "weight_decay": 0.0}
    control = sparsify(trained, loader(), None, {**same, "alpha": 0})
    sparse = sparsify(trained, loader(), None, {**same, "alpha": 3.0, "penalty_every": every})
    a, b = measure(control, loader()), measure(sparse, loader())
    assert b.theoretical_speedup > 1.15 * a.theoretical_speedup
    assert b.accuracy >= a.accuracy - 0.1


def test_resume_is_bit_equal(trained, tmp_path):
    settings = {"epochs": 3, "lr": 0.02, "alpha": 1.0, "ema": 0.9}
    whole = sparsify(trained, loader(augment="crop_flip"), loader(), settings)

    with pytest.raises(Killed):
        sparsify(
            trained,
            loader(augment="crop_flip"),
            loader(),
            settings,
            checkpoint_dir=tmp_path,
            progress=kill_at(3, 2),
        )
    torch.manual_seed(99)  # another process has another state
    resumed = sparsify(trained, loader(augment="crop_flip"), loader(), settings, checkpoint_dir=tmp_path)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert [h.loss for h in sparsify_result(whole).history] == [
        h.loss for h in sparsify_result(resumed).history
    ]
    with pytest.raises(DataError, match="other settings"):
        sparsify(trained, loader(), None, {**settings, "lr": 0.03}, checkpoint_dir=tmp_path)
    (tmp_path / "last.pt").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no readable checkpoint"):
        sparsify(trained, loader(), None, settings, checkpoint_dir=tmp_path)


def test_auto_keeps_the_floor(trained):
    base = measure(trained, loader())
    settings = {
        "epochs": 6,
        "lr": 0.05,
        "alpha": "auto",
        "alpha_start": 3.0,
        "floor": base.accuracy - 0.05,
        "checks": 3,
    }
    sparse = sparsify(trained, loader(), loader(), settings)
    result = sparsify_result(sparse)
    found = measure(sparse, loader())
    assert result.floor_met
    assert found.accuracy >= base.accuracy - 0.05
    assert found.theoretical_speedup > 1.2 * base.theoretical_speedup
    allowed = [c["theoretical_speedup"] for c in result.checks if c["accuracy"] >= result.floor]
    assert found.theoretical_speedup == pytest.approx(max(allowed))
    assert len({c["alpha"] for c in result.checks}) > 2


def test_auto_returns_the_thresholds_that_were_measured_with_the_weights(trained):
    settings = {
        "epochs": 3,
        "lr": 0.05,
        "alpha": "auto",
        "alpha_start": 60.0,
        "alpha_step": 3.0,
        "checks": 3,
        "floor_margin": -0.05,
        "thresholds": "learned",
    }
    sparse = sparsify(trained, loader(), loader(), settings)
    result, found = sparsify_result(sparse), measure(sparse, loader())
    held = [c for c in result.checks if c["accuracy"] >= result.floor]
    best = max(held, key=lambda c: c["theoretical_speedup"])
    assert result.checks[-1] not in held  # the last thresholds are others
    assert found.accuracy == best["accuracy"]
    assert found.theoretical_speedup == pytest.approx(best["theoretical_speedup"])


def test_impossible_floor_says_so(trained):
    random = images(seed=7)
    noise = Images(random.images, np.roll(random.labels, 1), 4, random.mean, random.std, "noise", "made here")
    with pytest.warns(ActzipWarning, match="best found is"):
        sparse = sparsify(
            trained, loader(), Loader(noise, 32), {"epochs": 1, "alpha": "auto", "floor": 1.0, "checks": 2}
        )
    result = sparsify_result(sparse)
    assert not result.floor_met
    assert measure(sparse, Loader(noise, 32)).accuracy == max(c["accuracy"] for c in result.checks)


def test_distillation_without_labels(trained):
    unlabelled = [x for x, _ in loader()]
    sparse = sparsify(trained, unlabelled, loader(), {"epochs": 12, "lr": 0.02, "distill": 1.0, "alpha": 5.0})
    before, after = measure(trained, loader()), measure(sparse, loader())
    assert after.theoretical_speedup > 1.15 * before.theoretical_speedup
    assert after.accuracy >= before.accuracy - 0.1
    with pytest.raises(InputError, match="no labels"):
        sparsify(trained, unlabelled, None, {"epochs": 1, "distill": 0.5})


def test_mixup_mixes_images_and_losses_alike(monkeypatch):
    model, y = net(norm=False), torch.arange(4)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    seen = []
    honest = training.mixed

    def spy(*batch):
        seen.append(honest(*batch))
        return seen[-1]

    monkeypatch.setattr(training, "mixed", spy)
    done = sparsify(model, [(x, y)], None, {"epochs": 2, "lr": 1e-12, "alpha": 0, "mixup": 0.7})
    assert len(seen) == 2 and seen[0][2] != seen[1][2]
    for (mixed, other, share), entry in zip(seen, sparsify_result(done).history):
        assert 0 <= share <= 1
        # labels are all different: they say which image went to which
        assert torch.allclose(mixed, share * x + (1 - share) * x[other], atol=1e-6)
        with torch.no_grad():
            out = model(mixed)
        want = share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, other)
        assert entry.loss == pytest.approx(float(want), rel=1e-5)


def test_mixup_asks_the_original_about_the_mixed_images(trained):
    settings = {"epochs": 1, "lr": 1e-12, "alpha": 0, "distill": 1, "mixup": 1.0, "freeze_norm": True}
    done = sparsify(trained, [(x,) for x, _ in loader()], None, settings)
    assert sparsify_result(done).history[0].loss == pytest.approx(0, abs=1e-6)


def test_mixup_resumes_bit_equal_and_refuses_integers(trained, tmp_path):
    settings = {"epochs": 3, "lr": 0.02, "alpha": 1.0, "distill": 0.5, "mixup": 0.4}
    whole = sparsify(trained, loader(), loader(), settings)
    with pytest.raises(Killed):
        sparsify(trained, loader(), loader(), settings, checkpoint_dir=tmp_path, progress=kill_at(3, 2))
    torch.manual_seed(99)
    resumed = sparsify(trained, loader(), loader(), settings, checkpoint_dir=tmp_path)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    with pytest.raises(DataError, match="other settings"):
        sparsify(trained, loader(), None, {**settings, "mixup": 0.0}, checkpoint_dir=tmp_path)
    with pytest.raises(InputError, match="mixup must be between 0"):
        SparsifyConfig(mixup=-0.1)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(F.relu(self.embed(x)).mean(1))

    tokens = [(torch.arange(8).reshape(2, 4), torch.tensor([0, 1]))]
    with pytest.raises(InputError, match="samples of floating point"):
        sparsify(Tokens(), tokens, None, {"epochs": 1, "alpha": 0, "mixup": 0.4})


def test_release_lets_alpha_fall_and_the_task_loss_with_it(trained):
    alphas = []

    def see(event):
        if event["kind"] == "step":
            alphas.append(event["alpha"])

    settings = {"epochs": 10, "lr": 0.02, "alpha": 3.0, "ramp": 0.2}
    held = sparsify(trained, loader(), None, settings)
    released = sparsify(trained, loader(), None, {**settings, "release": 0.5}, progress=see)
    n = len(alphas)
    peak = [i for i, a in enumerate(alphas) if a == pytest.approx(3.0)]
    assert peak[0] == pytest.approx(0.2 * n, abs=1.01) and peak[-1] == pytest.approx(0.5 * n, abs=1.01)
    assert alphas[-1] == pytest.approx(3.0 / (0.5 * n)) and alphas == sorted(alphas[: peak[0]]) + sorted(
        alphas[peak[0] :], reverse=True
    )
    assert sparsify_result(released).history[-1].loss < sparsify_result(held).history[-1].loss
    assert (
        measure(released, loader()).theoretical_speedup > 1.1 * measure(trained, loader()).theoretical_speedup
    )
    with pytest.raises(InputError, match="release"):
        SparsifyConfig(alpha="auto", release=0.3)


def test_accumulation_is_a_larger_batch():
    model = net(norm=False)
    settings = {"epochs": 2, "lr": 0.05, "alpha": 0.7, "penalty": "l1", "ramp": 0.0, "schedule": "constant"}
    data = images(128)
    big = sparsify(model, Loader(data, 64), None, settings)
    small = sparsify(model, Loader(data, 32), None, {**settings, "accumulate": 2})
    for key, value in big.state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_learned_thresholds(trained):
    settings = {"epochs": 8, "lr": 0.05, "alpha": 2.0, "thresholds": "learned"}
    sparse = sparsify(trained, loader(), loader(), settings)
    thresholds = actzip.activations.get_thresholds(sparse)
    assert set(thresholds) == {"relu", "(model)", "(model):1"}
    assert any(float(t.max()) > 0 for t in thresholds.values())
    with_t = measure(sparse, loader())
    actzip.activations.clear_thresholds(sparse)
    assert with_t.theoretical_speedup > 1.01 * measure(sparse, loader()).theoretical_speedup
    assert sparsify_result(sparse).history[-1].theoretical_speedup == pytest.approx(
        with_t.theoretical_speedup
    )


CALIBRATED = {
    "epochs": 3,
    "lr": 0.02,
    "alpha": 0,
    "thresholds": "calibrated",
    "threshold_samples": 64,
    "distill": 0.5,
}


@pytest.mark.parametrize("per", ["channel", "layer"])
def test_calibrated_thresholds_stay_and_weights_learn_to_live_with_them(trained, per):
    import copy

    before = measure(trained, loader())
    wanted = 1.3 * before.theoretical_speedup
    settings = {**CALIBRATED, "epochs": 6, "threshold_speedup": wanted, "learned_per": per}
    sparse = sparsify(trained, loader(), loader(), settings)
    assert actzip.activations.get_thresholds(trained) == {}
    thresholds = actzip.activations.get_thresholds(sparse)
    assert any(float(torch.as_tensor(t).max()) > 0 for t in thresholds.values())
    if per == "layer":
        assert all(isinstance(t, float) for t in thresholds.values())
    untrained = copy.deepcopy(trained)
    actzip.activations.set_thresholds(untrained, thresholds)
    cut, after = measure(untrained, loader()), measure(sparse, loader())
    assert cut.theoretical_speedup > 1.2 * before.theoretical_speedup
    assert after.theoretical_speedup > 1.2 * before.theoretical_speedup
    assert after.loss < cut.loss
    assert sparsify_result(sparse).history[-1].theoretical_speedup == pytest.approx(after.theoretical_speedup)


def test_calibrated_thresholds_by_density_and_resumed(trained, tmp_path):
    settings = {**CALIBRATED, "threshold_density": 0.8 * measure(trained, loader()).density}
    whole = sparsify(trained, loader(), loader(), settings)

    with pytest.raises(Killed):
        sparsify(trained, loader(), loader(), settings, checkpoint_dir=tmp_path, progress=kill_at(2, 2))
    torch.manual_seed(99)
    resumed = sparsify(trained, loader(), loader(), settings, checkpoint_dir=tmp_path)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    mine, other = map(actzip.activations.get_thresholds, (whole, resumed))
    assert mine.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in mine.items())
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(DataError, match="not a checkpoint but a list"):
        sparsify(trained, loader(), None, settings, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": "calibrated"}, "needs threshold_speedup"),
        (
            {"thresholds": "calibrated", "threshold_speedup": 2.0, "threshold_density": 0.5},
            "one of the two",
        ),
        ({"thresholds": "calibrated", "threshold_speedup": 0.5}, "threshold_speedup must be between 1"),
        ({"threshold_speedup": 2.0}, "not of thresholds='none'"),
        ({"thresholds": "learned", "threshold_density": 0.5}, "not of thresholds='learned'"),
    ],
)
def test_calibrated_thresholds_need_one_target(settings, message):
    with pytest.raises(InputError, match=message):
        SparsifyConfig(**settings)


def test_settings_of_earlier_versions_keep_their_identity():
    assert not {"threshold_speedup", "threshold_density", "threshold_samples", "mixup"} & set(
        SparsifyConfig().identity()
    )
    assert "threshold_" not in SparsifyConfig(thresholds="learned").mark()


def test_learned_thresholds_keep_nan():
    from actzip.sparsify.learned import _Jump

    y = torch.tensor([[torch.nan, torch.inf, 0.3, 0.4]], requires_grad=True)
    kept, density = _Jump.apply(y, torch.tensor([[0.3]]), torch.tensor(0.1))
    assert kept[0, 0].isnan() and kept[0, 1:].tolist() == [torch.inf, 0, y[0, 3].item()] and density == 0.75


def test_learned_threshold_gradients_have_the_right_signs():
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    learned = LearnedThresholds(model, torch.rand(8, 2, 4, 4))
    with torch.no_grad():
        for t in learned.parameters():
            t.fill_(0.3)
    model(torch.rand(8, 2, 4, 4))
    learned.penalty(1.0).backward()
    assert all(bool((t.grad < 0).all()) for t in learned.parameters())  # descent raises the thresholds
    learned.detach()


def test_bfloat16_and_channels_last(trained, monkeypatch):
    monkeypatch.setattr("actzip.training.precision.has_bfloat16", lambda device: True)  # slow or not
    sparse = sparsify(
        trained,
        loader(),
        loader(),
        {"epochs": 2, "lr": 0.02, "alpha": 1.0, "precision": "bfloat16", "channels_last": True},
    )
    assert sparsify_result(sparse).history[-1].accuracy > 0.5
    assert all(v.dtype != torch.bfloat16 for v in sparse.state_dict().values())


def test_progress_says_everything(trained):
    events = []
    sparsify(trained, loader(), loader(), {"epochs": 2, "alpha": 1.0}, progress=events.append)
    steps = [e for e in events if e["kind"] == "step"]
    assert [e["epoch"] for e in events if e["kind"] == "epoch"] == [1, 2]
    assert len(steps) == 2 * len(loader())
    assert steps[-1]["seconds_left"] == 0 and 0 < steps[-1]["density"] < 1
    assert steps[-1]["accuracy"] is not None and steps[-1]["theoretical_speedup"] > 1


def test_terminal_bar(trained, capsys):
    sparsify(trained, loader(), loader(), {"epochs": 1, "alpha": 1.0}, progress=True)
    assert "validation accuracy" in capsys.readouterr().err.replace("\n", " ")


# --- bad input


def test_no_relu_is_said_and_the_rest_is_done():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    with pytest.warns(ActzipWarning, match=r"cannot become sparse: 1 \(silu\)"):
        sparse = sparsify(model, loader(), None, {"epochs": 1, "alpha": 1.0})
    assert sparsify_result(sparse).unsuitable == {"1": "silu"}
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.warns(ActzipWarning, match="no ReLU"):
        done = sparsify(smooth, loader(), None, {"epochs": 1})
    assert len(sparsify_result(done).history) == 1


def test_dead_map_is_named_and_let_go():
    model = net(norm=False)
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1.0)
    penalty = ActivationPenalty(model, alpha=1.0, stats_every=1, weighting="elements")
    x = torch.randn(4, 3, 8, 8)
    with pytest.warns(ActzipWarning, match=r"'\(model\)' is all zero"):
        for _ in range(3):
            model(x)
            penalty()
    assert penalty.dead == {"(model)"}
    model(x)
    assert "(model)" not in penalty._terms and "relu" in penalty._terms
    penalty.detach()


def test_nan_loss_keeps_the_checkpoint(trained, tmp_path):
    data = list(loader())

    class Spoilt:
        epoch = 0

        def at(self, epoch):
            self.epoch = epoch
            return self

        def __len__(self):
            return len(data)

        def __iter__(self):
            for i, (x, y) in enumerate(data):
                yield (x * float("nan") if self.epoch == 1 and i == 2 else x), y

    with pytest.raises(TrainingError, match=r"nan at epoch 2, step 3; the last good checkpoint \(epoch 1\)"):
        sparsify(trained, Spoilt(), None, {"epochs": 2, "alpha": 0.1}, checkpoint_dir=tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epochs_done"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values() if v.is_floating_point())


def test_empty_loaders_and_wrong_classes(trained):
    with pytest.raises(DataError, match="no batch"):
        sparsify(trained, [], None, {"epochs": 1})
    with pytest.raises(DataError, match="no batch"):
        sparsify(trained, loader(), [], {"epochs": 1})
    bad = [(x, y + 2) for x, y in loader()]
    with pytest.raises(InputError, match=r"labels run from \d to \d, but the model gives 4 classes"):
        sparsify(trained, bad, None, {"epochs": 1})
    with pytest.raises(InputError, match="4 classes"):
        measure(trained, bad)
    with pytest.raises(InputError, match="a batch is x or"):
        sparsify(trained, [("a", "b")], None, {"epochs": 1})


def test_wrong_settings(trained):
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="did you mean epochs"):
        SparsifyConfig.of({"epoch": 3})
    for field, value in {
        "epochs": 0,
        "lr": -1,
        "penalty": "l2",
        "alpha": "much",
        "distill": 2,
        "schedule": "step",
        "floor": 80,
    }.items():
        with pytest.raises(InputError, match=field):
            SparsifyConfig(**{field: value})
    with pytest.raises(InputError, match="validation data"):
        sparsify(trained, loader(), None, {"alpha": "auto"})
    with pytest.raises(InputError, match="alpha must be a finite"):
        ActivationPenalty(trained, alpha=float("nan"))
    with pytest.raises(InputError, match="needs example"):
        ActivationPenalty(trained, weighting="macs")
    with pytest.raises(LayerError, match=r"no layer 'rellu'.*relu"):
        ActivationPenalty(trained, layers="rellu", example=x)
    with pytest.raises(InputError, match="must be a torch"):
        sparsify("model", loader())
    with pytest.raises(InputError, match="no parameter"):
        sparsify(nn.ReLU(), loader())
    with pytest.raises(InputError, match="does not come from"):
        sparsify_result(trained.relu)


def test_alpha_per_layer():
    model = net()
    x = torch.randn(4, 3, 8, 8)
    penalty = ActivationPenalty(model, "l1", alpha={"relu": 2.0}, weighting="paper")
    model(x)
    seen = {}
    from actzip.activations import ActivationTap

    with ActivationTap(model, lambda s, y: seen.__setitem__(s.name, y.detach())):
        model(x)
    assert float(penalty().detach()) == pytest.approx(2 * float(seen["relu"].abs().sum()) / 4, rel=1e-5)
    penalty.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


class WithAux(Net):
    """Gives an auxiliary output while it trains, as Inception does."""

    def forward(self, x):
        out = super().forward(x)
        return (out, out * 0) if self.training else out


def test_auxiliary_outputs():
    torch.manual_seed(0)
    model = sparsify(WithAux(), loader(), loader(), {"epochs": 1, "alpha": 1.0})
    assert sparsify_result(model).history[0].accuracy is not None


@pytest.mark.parametrize("weighting", ["macs", "mixed"])
def test_alpha_auto_is_steered_to_a_theoretical_speedup(trained: Net, weighting: str) -> None:
    before = measure(trained, loader()).theoretical_speedup
    goal = 1.5 * before
    config = {
        "epochs": 120,
        "lr": 0.01,
        "optimizer": "adam",
        "alpha": "auto",
        "alpha_start": 0.2,
        "speedup": goal,
        "weighting": weighting,
    }
    sparse = sparsify(trained, loader(), loader(), config)
    reached = measure(sparse, loader()).theoretical_speedup
    assert 0.8 * goal < reached < 1.25 * goal  # from 0.67 of it, in 720 steps


def test_speedup_needs_alpha_auto_and_weights_by_work() -> None:
    with pytest.raises(InputError, match=r"alpha='auto'"):
        SparsifyConfig(speedup=2.0)
    with pytest.raises(InputError, match="weighting"):
        SparsifyConfig(speedup=2.0, alpha="auto", weighting="elements")
    with pytest.raises(InputError, match="speedup must be between 1"):
        SparsifyConfig(speedup=0.5, alpha="auto")
