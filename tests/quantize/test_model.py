"""actzip.quantize on models: sites, modes, integers, bits chosen, training, bad input."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
import actzip.quantize as package
from actzip.activations import set_thresholds
from actzip.errors import ActzipWarning, DataError, InputError, LayerError
from actzip.quantize import (
    OBSERVERS,
    capture,
    get_quantization,
    integers,
    quantization,
    remove_quantization,
    watch_saturation,
    without_quantization,
)


class Net(nn.Module):
    """Module, functional and in-place ReLUs, a ReLU6, a residual sum and a SiLU."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu6 = nn.ReLU6(inplace=inplace)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.silu = nn.SiLU()
        self.fc = nn.Linear(8, 5)
        self.inplace = inplace

    def forward(self, x):
        y = self.relu(self.bn(self.conv1(x)))
        z = F.relu(self.conv2(y) + y, inplace=self.inplace)
        z = self.relu6(self.conv3(z))
        return self.fc(self.silu(z).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 10, 10, generator=g), torch.arange(8) % 5) for _ in range(4)]


def test_the_package_is_callable_and_the_public_name(net, batches):
    assert actzip.quantize is package
    assert get_quantization(package(net, batches)) is not None
    from actzip.quantize import quantize

    assert get_quantization(quantize(net, batches)) is not None


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [4, 8, 13, 16])
def test_every_option_quantizes_onto_the_grid(net, batches, observer, per, bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)
        q = actzip.quantize(net, batches, bits=bits, per=per, observer=observer)
    assert type(q) is Net and list(q.state_dict()) == list(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(q.state_dict().values(), net.state_dict().values()))
    state = quantization(q)
    assert set(state.sites) == {"relu", "(model)", "relu6", "silu"}
    assert [s.signed for s in state.sites.values()] == [False, False, False, True]
    assert all(s.scale.numel() == (8 if per == "channel" else 1) for s in state.sites.values())
    x = batches[0][0]
    error = (q(x) - net(x)).abs().max() / net(x).abs().max()
    assert 0 < error < {4: 0.5, 8: 0.05, 13: 0.01, 16: 1e-3}[bits] * (5 if observer == "entropy" else 1)
    assert get_quantization(net) is None  # a copy was quantized


@pytest.mark.parametrize("inplace", [False, True])
def test_integers_are_those_of_the_fake_quantized_model(net, batches, inplace):
    torch.manual_seed(0)
    model = Net(inplace).eval()
    q = actzip.quantize(model, batches, bits=8, inputs="all")
    x = batches[1][0]
    maps = integers(q, x)
    assert list(maps)[:2] == ["conv1@input", "relu"]
    seen = {}

    def watch(site, y):
        seen[site.name] = y.clone()

    from actzip.activations import ActivationTap

    with ActivationTap(q, watch), torch.no_grad():
        out = q(x)
    for name, y in seen.items():
        assert torch.equal(maps[name].dequantize(), y), name
        assert maps[name].values.dtype == (torch.int8 if name == "silu" else torch.uint8)
        assert maps[name].numpy().dtype.name == ("int8" if name == "silu" else "uint8")
    with capture(q), torch.no_grad():
        assert torch.equal(q(x), out)
    names = []
    with capture(q, lambda m: names.append(m.name)) as kept, torch.no_grad():
        q(x)
    assert names == list(maps) and not kept


def test_inputs_and_residual_sums_are_signed(net, batches):
    q = actzip.quantize(net, batches, inputs=["conv1", "conv2"])
    sites = quantization(q).sites
    assert sites["conv1@input"].signed and not sites["conv2@input"].signed
    assert "conv3@input" not in sites


def test_layers_and_bits_per_layer(net, batches):
    q = actzip.quantize(net, batches, layers="type:ReLU")
    assert list(quantization(q).sites) == ["relu"]
    q = actzip.quantize(net, batches, ignore=["silu"], bits={"*": 8, "re:relu.*": 5, "relu6": 4})
    assert quantization(q).bits == {"relu": 5, "(model)": 8, "relu6": 4}
    with pytest.raises(LayerError, match="'relu'"):
        actzip.quantize(net, batches, bits={"relu6": 4, "(model)": 8, "silu": 8})
    with pytest.raises(LayerError, match="near matches: relu"):
        actzip.quantize(net, batches, layers="rellu")


def test_weights_get_eight_bits_a_channel(net, batches):
    q = actzip.quantize(net, batches, bits=16, weights=8)
    state = quantization(q)
    assert set(state.weights) == {f"{n}@weight" for n in ("conv1", "conv2", "conv3", "fc")}
    assert state.weights["conv1@weight"].scale.numel() == 8
    seen = {}

    def compute(site, call):
        seen[site.name] = call.weight

    from actzip.activations import ActivationTap

    with without_quantization(q) as held, torch.no_grad():
        reference = q(batches[0][0])
    assert held is state and get_quantization(q) is state
    # the tap attached later calls the earlier one's function: watch what the operator gets
    torch_conv = torch.conv2d
    with ActivationTap(q, None, compute), torch.no_grad():
        out = q(batches[0][0])
    assert seen["conv2"] is q.conv2.weight  # watched before the quantizer
    w = q.conv2.weight.detach()
    scale = w.abs().flatten(1).amax(1) / 127
    want = (w / scale.view(-1, 1, 1, 1)).round().clamp(-127, 127) * scale.view(-1, 1, 1, 1)
    got = state.weights["conv2@weight"](w.unsqueeze(0)).squeeze(0)
    assert torch.equal(got, want)
    assert 1e-4 < (out - reference).abs().max() / reference.abs().max() < 0.05
    assert torch_conv is torch.conv2d and torch.equal(q.conv2.weight, net.conv2.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_training_goes_through_and_learns_the_steps(batches, inplace):
    torch.manual_seed(0)
    model = Net(inplace)
    q = actzip.quantize(model, batches, bits=4, weights=8, inputs="conv1")
    q.train()
    steps = quantization(q).parameters()
    optimizer = torch.optim.Adam([*q.parameters(), *steps], lr=3e-3)
    losses = []
    for _ in range(12):
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(q(x), y)
            loss.backward()
            optimizer.step()
            quantization(q).clamp_scales_()
            losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in steps)
    assert sum(losses[-4:]) < sum(losses[:4]) * 0.95
    maps = integers(q, batches[0][0])
    assert all(int(m.values.max()) <= m.values.new_tensor(15) for m in maps.values())


def test_in_place_and_out_of_place_train_alike(batches):
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        q = actzip.quantize(Net(inplace), batches, bits=6)
        q.train()
        F.cross_entropy(q(batches[0][0]), batches[0][1]).backward()
        grads.append([p.grad for p in [*q.parameters(), *quantization(q).parameters()]])
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-7)


def test_copies_pickles_and_removal(net, batches):
    q = actzip.quantize(net, batches, bits=6)
    x = batches[0][0]
    want = q(x)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other(x), want)
        assert quantization(other) is not quantization(q)
        quantization(other).sites["relu"].scale.data.mul_(3)
        assert not torch.equal(other(x), want)
    assert torch.equal(q(x), want)
    quantization(q).enabled = False
    assert torch.equal(q(x), net(x))
    quantization(q).enabled = True
    assert remove_quantization(q) is not None
    assert torch.equal(q(x), net(x)) and remove_quantization(q) is None
    same = actzip.quantize(q, batches, bits=6, inplace=True)
    assert same is q and torch.equal(q(x), want)
    again = actzip.quantize(q, batches, bits=6)  # quantized anew from float, not twice
    assert torch.equal(again(x), want)


def test_thresholds_act_before_the_quantizer(net, batches):
    set_thresholds(net, {"relu": 0.4})
    q = actzip.quantize(net, batches, bits=8)
    m = integers(q, batches[0][0])["relu"]
    values = m.dequantize()
    assert float(values[values > 0].min()) > 0.4 - float(m.scale)
    assert quantization(q).info["relu"]["density"] < 0.5


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_wider_steps_use_fewer_integers_and_stay_within_half_of_one(net, batches, observer, per):
    plain = actzip.quantize(net, batches, bits=8, per=per, observer=observer)
    wide = actzip.quantize(net, batches, bits=8, per=per, observer=observer, widen=1.7)
    for name, q in quantization(wide).sites.items():
        before = quantization(plain).sites[name]
        torch.testing.assert_close(q.scale, 1.7 * before.scale)
        top = float((before.scale.detach() * before.range.qmax).min())
        x = torch.linspace(0, top, 1000).reshape(1, 1, -1, 1)
        x = x.expand(1, len(q.scale), -1, 1)
        error = (q(x) - x).abs().amax((0, 2, 3))
        assert (error <= q.scale * 0.501).all() and q(torch.zeros_like(x)).eq(0).all()
    if observer == "minmax":
        for x in batches:
            of = x[0] if isinstance(x, tuple) else x
            assert all(int(m.values.abs().max()) <= 255 / 1.7 + 1 for m in integers(wide, of).values())


@pytest.mark.parametrize("widen", [0.5, 0, -1, float("nan"), float("inf"), "2"])
def test_steps_are_never_narrower_than_the_range(net, batches, widen):
    with pytest.raises(InputError, match="widen"):
        actzip.quantize(net, batches, widen=widen)
    with pytest.raises(InputError, match="widen"):
        actzip.quantize(net, batches, bits="auto", budget=1e6, widen=2)


def test_auto_bits_meet_a_budget_and_prefer_what_matters(net, batches):
    q16 = actzip.quantize(net, batches, bits=16)
    elements = {n: quantization(q16).info[n]["elements"] for n in quantization(q16).sites}
    assert elements == dict.fromkeys(elements, 800.0)
    budget = 6.5 * sum(elements.values())
    q = actzip.quantize(net, batches, bits="auto", budget=budget)
    bits = quantization(q).bits
    spent = sum(elements[n] * b for n, b in bits.items())
    assert budget - 800 < spent <= budget
    x = torch.cat([b[0] for b in batches])
    clean = net(x)
    low = actzip.quantize(net, batches, bits=6)
    assert (q(x) - clean).square().mean() < (low(x) - clean).square().mean()
    entropy = actzip.quantize(net, batches, bits="auto", budget=3.0 * sum(elements.values()), cost="entropy")
    info = quantization(entropy).info
    assert sum(info[n]["entropy"] * elements[n] for n in info) <= 3.0 * sum(elements.values())
    with pytest.raises(InputError, match="budget"):
        actzip.quantize(net, batches, bits="auto", budget=1000)


def test_auto_bits_meet_a_floor_with_few_bits(net, batches):
    x = torch.cat([b[0] for b in batches])
    label = net(x).argmax(1)
    calls = []

    def agreement(model):
        calls.append(1)
        return float((model(x).argmax(1) == label).float().mean())

    q = actzip.quantize(net, iter(batches), bits="auto", floor=0.97, evaluate=agreement)
    assert agreement(q) >= 0.97
    assert sum(quantization(q).bits.values()) < 16 * 4
    assert len(calls) < 12
    with pytest.raises(InputError, match="floor"):
        actzip.quantize(net, batches, bits="auto", floor=1.1, evaluate=agreement)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bits": 3}, "4 to 16"),
        ({"bits": 17}, "4 to 16"),
        ({"bits": 8.5}, "integer"),
        ({"bits": "most"}, "auto"),
        ({"bits": {"*": 2}}, "4 to 16"),
        ({"bits": "auto"}, "budget"),
        ({"bits": "auto", "floor": 0.5}, "evaluate"),
        ({"bits": "auto", "budget": 1e9, "cost": "gzip"}, "cost"),
        ({"budget": 5}, "auto"),
        ({"weights": 2}, "4 to 16"),
        ({"per": "pixel"}, "per"),
        ({"observer": "mean"}, "observer"),
        ({"observer": "percentile", "percentile": 120}, "percentile"),
        ({"saturation": 2}, "saturation"),
    ],
)
def test_bad_options_are_refused_by_name(net, batches, options, text):
    with pytest.raises(InputError, match=text):
        actzip.quantize(net, batches, **options)


def test_bad_data(net, batches):
    with pytest.raises(DataError, match="no batch"):
        actzip.quantize(net, [])
    with pytest.raises(InputError, match="Module"):
        actzip.quantize("model", batches)
    with pytest.raises(LayerError, match="no activation map"):
        actzip.quantize(nn.Linear(3, 2), torch.ones(4, 3))
    x = batches[0][0].clone()
    x[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layer 'relu'.*infinite or NaN in the calibration"):
        actzip.quantize(net, [x])
    q = actzip.quantize(net, batches)
    with pytest.raises(InputError, match="layer 'relu'"):
        integers(q, x)
    with pytest.raises(InputError, match="not quantized"):
        integers(net, x)
    assert torch.isfinite(q(batches[0][0])).all()
    with capture(q) as maps, torch.no_grad():
        q(batches[0][0])
    assert maps  # an error inside a capture leaves nothing behind


def test_a_layer_that_is_never_activated_is_named(net, batches):
    net.bn.bias.data.fill_(-1e3)
    with pytest.warns(ActzipWarning, match="layer 'relu' was never activated"):
        q = actzip.quantize(net, batches, bits=8)
    assert quantization(q).sites["relu"].scale.item() == 1.0
    assert torch.isfinite(q(batches[0][0])).all()


def test_constant_maps(batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    model[0].weight.data.zero_()
    model[0].bias.data = torch.tensor([0.5, 0.5, 0.5, 0.5])
    for bits in (4, 16):
        q = actzip.quantize(model, batches, bits=bits)
        assert torch.allclose(q(batches[0][0]), torch.tensor(0.5), rtol=0.02)


def test_saturation_is_warned_of_with_the_layer(net, batches):
    with pytest.warns(ActzipWarning, match=r"layer 'relu'.*saturate"):
        actzip.quantize(net, batches, observer="percentile", percentile=80.0)
    q = actzip.quantize(net, batches, observer="minmax")
    with pytest.warns(ActzipWarning, match="layer 'relu'"), watch_saturation(q, 0.02) as shares:
        q(batches[0][0] * 20)
    assert shares["relu"] > 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActzipWarning)
        with watch_saturation(q) as shares:
            q(batches[0][0])
    assert set(shares) == set(quantization(q).sites) and max(shares.values()) < 0.01


def test_an_outlier_that_empties_a_layer_is_warned_of(net, batches):
    x = batches[0][0].clone()
    x[0, 0, 0, 0] = 1e6
    with pytest.warns(ActzipWarning, match="become zero"):
        actzip.quantize(net, [x], observer="minmax", layers="relu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*become zero")
        warnings.filterwarnings("ignore", message=".*saturate")
        actzip.quantize(net, [x], observer="percentile", percentile=99.0, layers="relu")


def test_a_quantizer_does_not_count_as_an_activation_to_taps_before_it(batches):
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu).eval()
    set_thresholds(model, {"1": 0.1, "1:1": 0.2})
    plain = {}

    from actzip.activations import ActivationTap

    with ActivationTap(model, lambda site, y: plain.__setitem__(site.name, y.clone())), torch.no_grad():
        model(batches[0][0])
    maps = integers(actzip.quantize(model, batches, bits=16, observer="minmax"), batches[0][0])
    for name in ("1", "1:1"):
        assert torch.allclose(maps[name].dequantize(), plain[name], atol=1e-3)
