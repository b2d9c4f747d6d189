"""Thresholded ReLUs."""

import copy
import io
import math

import pytest
import torch
from nets import X
from torch import nn

from actzip.activations import (
    ActivationTap,
    clear_thresholds,
    get_thresholds,
    set_thresholds,
    threshold_activation,
    without_thresholds,
)
from actzip.errors import InputError, LayerError


def test_thresholds_are_applied_kept_beside_the_model_and_removed(model):
    keys = list(model.state_dict())
    plain = model(X)
    set_thresholds(model, {"relu": 0.2, "block.1": torch.full((8,), 0.1)}, X)
    assert list(model.state_dict()) == keys
    maps = {}
    with ActivationTap(model, lambda s, y: maps.__setitem__(s.name, y.clone())):
        cut = model(X)
    assert ((maps["relu"] == 0) | (maps["relu"] > 0.2)).all()
    assert ((maps["block.1"] == 0) | (maps["block.1"] > 0.1)).all()
    assert not torch.equal(cut, plain)
    with without_thresholds(model) as values:
        assert set(values) == {"relu", "block.1"} and torch.equal(model(X), plain)
    assert torch.equal(model(X), cut)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), cut)
    set_thresholds(twin, {"relu": 9.0})
    assert torch.equal(model(X), cut) and not torch.equal(twin(X), cut)
    clear_thresholds(model)
    assert torch.equal(model(X), plain) and get_thresholds(model) == {}


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.5, 0.25])])
def test_thresholds_keep_nan_and_infinity_as_torch_does(t):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5, 0.75, 0.0]).reshape(1, 1, 6).repeat(1, 2, 1)
    y = threshold_activation(torch.relu(x), t)
    want = nn.Threshold(0.5, 0.0)(x)
    assert torch.equal(y[:, 0].isnan(), want[:, 0].isnan()) and y[0, 0, 0].isnan()
    assert y[0, 0, 1:].tolist() == want[0, 0, 1:].tolist() == [math.inf, 0, 0, 0.75, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_thresholds_by_channel_are_the_same_with_a_gradient(dtype, form):
    torch.manual_seed(0)
    t = torch.tensor([0.0, 0.3, 1.0, 0.7])
    plain = torch.relu(torch.randn(3, 4, 5, 6)).to(dtype).contiguous(memory_format=form)
    plain[0, :, 0, 0] = t.to(dtype)  # on the threshold: dropped
    plain[0, :, 0, 1] = torch.nextafter(t.to(dtype), torch.tensor(9.0, dtype=dtype))  # the next number: kept
    plain[0, :, 0, 2] = torch.nan
    plain[0, :, 0, 3] = torch.inf
    y = plain.clone().requires_grad_()
    kept = threshold_activation(y, t)
    want = threshold_activation(plain, t)
    assert kept.dtype == dtype and kept.is_contiguous(memory_format=form)
    torch.testing.assert_close(kept.detach(), want, rtol=0, atol=0, equal_nan=True)
    g = torch.randn_like(want)
    kept.backward(g)
    assert torch.equal(y.grad, torch.where(plain <= t.to(dtype).reshape(1, -1, 1, 1), torch.zeros_like(g), g))
    assert threshold_activation(y.double(), t).dtype == torch.float64


def test_a_thresholded_model_pickles():
    model = set_thresholds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {"1": 0.3})
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -1.0])])
def test_bad_thresholds_are_refused(model, bad):
    with pytest.raises(InputError, match="relu"):
        set_thresholds(model, {"relu": bad})
    with pytest.raises(LayerError, match="silu"):
        set_thresholds(model, {"(model):4": 0.1}, X)
    with pytest.raises(LayerError):
        set_thresholds(model, {"nope": 0.1}, X)


def test_thresholded_models_pickled_by_version_0_1_load():
    import pickle

    x = torch.randn(2, 3, 8, 8)
    model = set_thresholds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), {"1": 0.25})
    now = pickle.dumps(model, protocol=2)  # which names classes in lines of text
    then = now
    for module in ("sites", "tap", "thresholds"):
        then = then.replace(f"cactzip.activations.{module}\n".encode(), b"cactzip.activations\n")
    assert then != now and b"cactzip.activations\n" in then
    for data in (now, then):
        back = pickle.loads(data)
        assert torch.equal(back(x), model(x)) and get_thresholds(back) == {"1": 0.25}
