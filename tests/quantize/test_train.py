"""Training with quantizers: learned steps, penalties and teachers together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_model import Net

import actzip
from actzip.activations import ActivationTap
from actzip.errors import DataError, InputError, TrainingError
from actzip.quantize import integers, quantization
from actzip.quantize import train as training
from actzip.quantize.linear import QuantRange, fake_quantize
from actzip.quantize.model import SiteQuantizer
from actzip.quantize.train import RatePenalty, finetune, parameter_groups


@pytest.fixture
def task():
    """A small learnable task, and a net trained on it."""
    g = torch.Generator().manual_seed(5)
    y = torch.arange(160) % 5
    patterns = torch.randn(5, 3, 10, 10, generator=g)
    x = patterns[y] + 0.7 * torch.randn(160, 3, 10, 10, generator=g)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 160, 32)]
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(8):
        for a, b in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(a), b).backward()
            optimizer.step()
    return net.eval(), batches


def loss(model, batches):
    with torch.no_grad():
        return sum(F.cross_entropy(model(x), y).item() for x, y in batches) / len(batches)


def test_training_repairs_four_bits_and_moves_the_steps(task):
    net, batches = task
    q = actzip.quantize(net, batches, bits=4, weights=4)
    teacher = copy.deepcopy(net)
    before, scales = loss(q, batches), quantization(q).scales
    seen = []
    figures = finetune(
        q,
        batches,
        epochs=4,
        lr=2e-3,
        scale_lr=1e-2,
        teacher=teacher,
        on_epoch=lambda epoch, row: seen.append((epoch, row["loss"])),
    )
    assert loss(q, batches) < before and not q.training
    assert [e for e, _ in seen] == [1, 2, 3, 4] and figures[-1]["loss"] == seen[-1][1]
    moved = [n for n, s in quantization(q).scales.items() if not torch.equal(s, scales[n])]
    assert set(moved) == set(scales)
    assert all(bool((s > 0).all()) for s in quantization(q).scales.values())
    assert list(q.state_dict()) == list(net.state_dict())


def test_a_teacher_in_training_mode_keeps_its_statistics(task):
    net, batches = task
    teacher = torch.nn.Sequential(torch.nn.BatchNorm2d(3), copy.deepcopy(net)).train()
    before = copy.deepcopy(teacher.state_dict())
    q = actzip.quantize(net, batches, bits=6)
    finetune(q, batches, epochs=1, teacher=teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_penalty_trains_together_with_the_quantizer(task):
    net, batches = task
    means = []
    for weight in (0.0, 1.0):
        q = actzip.quantize(net, batches, bits=6)
        sums = []

        def watch(site, y, sums=sums):
            if site.sparse:
                sums.append(y.abs().mean())

        def penalty(sums=sums, weight=weight):
            total = weight * torch.stack(sums).sum()
            sums.clear()
            return total

        with ActivationTap(q, watch):
            finetune(q, batches, epochs=8, lr=5e-3, penalty=penalty)
        maps = integers(q, batches[0][0])
        assert all(int(m.values.max()) <= 63 for m in maps.values())
        means.append(float(maps["relu"].dequantize().abs().mean()))
    assert means[1] < 0.85 * means[0]


def test_norm_statistics_can_be_kept(task):
    net, batches = task
    q = actzip.quantize(net, batches, bits=5)
    mean = q.bn.running_mean.clone()
    finetune(q, batches, epochs=1, freeze_norm=True)
    assert torch.equal(q.bn.running_mean, mean)
    finetune(q, batches, epochs=1)
    assert not torch.equal(q.bn.running_mean, mean)


def test_bfloat16_and_mixup_repair_four_bits_too(task, monkeypatch):
    monkeypatch.setattr("actzip.training.precision.has_bfloat16", lambda device: True)  # slow or not
    net, batches = task
    losses = {}
    for name, more in (("plain", {}), ("bfloat16", {"precision": "bfloat16"}), ("mixup", {"mixup": 0.3})):
        q = actzip.quantize(net, batches, bits=4, weights=4)
        before = loss(q, batches)
        torch.manual_seed(1)
        with RatePenalty(q, 0.01) as penalty:
            finetune(q, batches, epochs=4, lr=2e-3, scale_lr=1e-2, teacher=net, penalty=penalty, **more)
        losses[name] = loss(q, batches)
        assert losses[name] < before, name
        assert all(v.dtype == torch.float32 for v in q.state_dict().values() if v.is_floating_point())
        # what the trained model computes with is still what the codecs store
        stored = integers(q, batches[0][0])["relu"]
        assert torch.equal(stored.dequantize(), stored.values.float() * stored.scale.reshape(1, -1, 1, 1))
    assert len(set(losses.values())) == 3


def test_mixup_weighs_the_labels_of_both_images(task, monkeypatch):
    net, batches = task
    monkeypatch.setattr(training, "mixed", lambda x, y, mixup: (x * 0.75 + x.flip(0) * 0.25, y.flip(0), 0.75))
    q = actzip.quantize(net, batches, bits=8)
    x, y = batches[0]
    with torch.no_grad():
        out = q(x * 0.75 + x.flip(0) * 0.25)
    want = 0.75 * F.cross_entropy(out, y) + 0.25 * F.cross_entropy(out, y.flip(0))
    settings = {"lr": 1e-12, "scale_lr": 0.0, "freeze_norm": True, "mixup": 0.5}
    found = finetune(q, batches[:1], epochs=1, **settings)
    assert found[0]["loss"] == pytest.approx(float(want), rel=1e-5)


def test_groups_hold_everything_once(task):
    net, batches = task
    q = actzip.quantize(net, batches, bits=5, weights=8)
    groups = parameter_groups(q, 1e-3, 1e-4, 1e-2)
    ids = [id(p) for g in groups for p in g["params"]]
    want = {id(p) for p in [*q.parameters(), *quantization(q).parameters()]}
    assert len(ids) == len(set(ids)) and set(ids) == want


def test_bad_training(task):
    net, batches = task
    with pytest.raises(InputError, match="not quantized"):
        finetune(net, batches, epochs=1)
    q = actzip.quantize(net, batches, bits=5)
    with pytest.raises(InputError, match="epochs"):
        finetune(q, batches, epochs=0)
    with pytest.raises(InputError, match="distill"):
        finetune(q, batches, epochs=1, distill=2)
    with pytest.raises(InputError, match="mixup must be a finite number"):
        finetune(q, batches, epochs=1, mixup=-1.0)
    with pytest.raises(InputError, match="precision must be one of float32, bfloat16"):
        finetune(q, batches, epochs=1, precision="float16")
    with pytest.raises(DataError, match="no batch"):
        finetune(q, [], epochs=1)
    with pytest.raises(TrainingError, match="step 0"):
        finetune(q, batches, epochs=1, penalty=lambda: torch.tensor(float("nan")))


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_rate_penalty_is_its_formula_and_its_gradient_is_right(task, per):
    net, batches = task
    q = actzip.quantize(net, batches, bits=6, per=per, layers="relu")
    q.train()
    x = batches[0][0]
    kept = []

    def watch(site, y):
        if site.name == "relu":
            y.retain_grad()
            kept.append(y)

    scale = quantization(q).sites["relu"].scale
    state = quantization(q)
    state.detach()
    tap = ActivationTap(q, watch).attach()  # sees the map before the quantizer
    state.attach(q)
    with RatePenalty(q, 0.25) as penalty:
        q(x)
        value = penalty()
        value.backward()
    tap.detach()
    a, s = kept[0].detach(), scale.detach().reshape(1, -1, 1, 1)
    want = 0.25 * torch.log2(1 + a / s).mean()
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    assert penalty.rate == pytest.approx(want.item() * 4, rel=1e-5)
    other = scale.detach().clone().requires_grad_()
    b = a.clone().requires_grad_()
    (0.25 * torch.log2(1 + b / other.reshape(1, -1, 1, 1)).mean()).backward()
    assert torch.allclose(kept[0].grad[a > 0], b.grad[a > 0], rtol=1e-4)
    assert torch.allclose(scale.grad, other.grad, rtol=1e-3)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_map_and_rate_add_up(per, dtype):
    g = torch.Generator().manual_seed(3)
    x = F.relu(torch.randn(6, 4, 5, 5, generator=g)).to(dtype)
    towards = torch.randn(6, 4, 5, 5, generator=g).to(dtype)
    scale = torch.rand(4 if per == "channel" else 1, generator=g) * 0.2 + 0.02
    q = SiteQuantizer("relu", QuantRange(4), scale)
    model = actzip.quantize(Net(), [torch.randn(2, 3, 10, 10)], bits=4)

    def gradients(penalised):
        a = x.clone().requires_grad_()
        q.scale.grad = None
        if penalised:
            with RatePenalty(model, 0.5, share=0.34) as penalty:
                y = penalty._visit(q, a)
                value = penalty()
        else:
            y = fake_quantize(a, q.scale, q.range)
            value = 0.5 * torch.log2(1 + a[:2].float() / q.scale.reshape(1, -1, 1, 1)).mean()
        ((y * towards).sum() + value).backward()
        return y.detach(), value.detach(), a.grad.float(), q.scale.grad.clone()

    y, value, grad_x, grad_s = gradients(True)
    want_y, want_value, want_x, want_s = gradients(False)
    assert torch.equal(y, want_y) and value.item() == pytest.approx(want_value.item(), rel=1e-5)
    nonzero = x > 0  # |x| has no gradient at 0 here; log2(1 + x / s) has
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    assert torch.allclose(grad_x[nonzero], want_x[nonzero], **tolerance)
    assert torch.allclose(grad_s, want_s, rtol=1e-3)


def test_the_rate_penalty_lowers_the_coded_size(task):
    net, batches = task
    entropies = []
    for factor in (0.0, 0.5):
        q = actzip.quantize(net, batches, bits=6, ignore="silu")
        with RatePenalty(q, factor) as penalty:
            finetune(q, batches, epochs=6, lr=3e-3, penalty=penalty)
        values = torch.cat([m.values.reshape(-1) for m in integers(q, batches[0][0]).values()])
        p = torch.bincount(values.int(), minlength=64).double() / len(values)
        entropies.append(float(-(p[p > 0] * p[p > 0].log2()).sum()))
    assert entropies[1] < 0.8 * entropies[0]
    with pytest.raises(TrainingError, match="before a training pass"):
        penalty()
    with pytest.raises(InputError, match="factor"):
        RatePenalty(q, -1.0)


def test_a_killed_training_goes_on_to_the_same_weights_and_scales(task, tmp_path):
    net, batches = task
    settings = {"epochs": 3, "lr": 2e-3, "scale_lr": 1e-2, "clip": 1.0}

    def train(model, **options):
        with RatePenalty(model, 0.1) as penalty:
            return finetune(model, batches, penalty=penalty, **settings, **options)

    whole = actzip.quantize(net, batches, bits=4)
    figures = train(whole)

    class Killed(Exception):
        pass

    def kill(event):
        if (event["epoch"], event["step"]) == (3, 2):
            assert event["steps"] == len(batches) and event["seconds_left"] > 0
            raise Killed

    file = tmp_path / "last.pt"
    with pytest.raises(Killed):
        train(actzip.quantize(net, batches, bits=4), checkpoint=file, on_step=kill)
    resumed = actzip.quantize(net, batches, bits=4)
    again = train(resumed, checkpoint=file)
    assert [f["loss"] for f in again] == [f["loss"] for f in figures]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for name, scale in quantization(whole).scales.items():
        assert torch.equal(scale, quantization(resumed).scales[name]), name
    with pytest.raises(DataError, match="other settings"):
        finetune(actzip.quantize(net, batches, bits=5), batches, checkpoint=file, **settings)
    file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="no readable checkpoint"):
        train(resumed, checkpoint=file)


def test_the_rate_of_a_share_is_that_of_the_first_samples(task):
    net, batches = task
    x = batches[0][0]
    q = actzip.quantize(net, batches, bits=6)
    q.eval()  # no batch statistics, so that samples do not depend on each other
    rates = []
    for images, share in ((x[: len(x) // 4], 1.0), (x, 0.25), (x, 1.0)):
        with RatePenalty(q, 0.5, share) as penalty:
            q(images)
            penalty()
            rates.append(penalty.rate)
    assert rates[1] == pytest.approx(rates[0], rel=1e-5) and rates[2] != pytest.approx(rates[0], rel=1e-5)
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match="share"):
            RatePenalty(q, 0.5, share)
