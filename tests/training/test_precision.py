import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actzip.errors import ActzipWarning
from actzip.sparsify import sparsify
from actzip.training import precision
from actzip.training.precision import autocast


def gradients(conv, x, context):
    conv.zero_grad()
    x = x.clone().requires_grad_()
    with context:
        y = conv(x)
        loss = (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum()
    loss.backward()
    return y.detach().float(), x.grad, *(p.grad.clone() for p in conv.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), ((2, 1), (0, 2), (1, 2))])
def test_depthwise_gradients_are_those_of_float32_within_rounding(stride, padding, dilation, bias):
    torch.manual_seed(1)
    conv = nn.Conv2d(6, 6, 3, stride, padding, dilation, groups=6, bias=bias)
    x = torch.randn(4, 6, 9, 10)
    exact = gradients(conv, x, torch.enable_grad())
    rounded = gradients(conv, x, autocast("cpu"))
    assert rounded[0].shape == exact[0].shape
    for a, b in zip(rounded, exact):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_only_depthwise_convolutions_are_changed_and_functional_calls_are_seen(monkeypatch):
    seen = []
    apply = precision._DepthwiseConv.apply
    monkeypatch.setattr(precision._DepthwiseConv, "apply", lambda *a: seen.append(a[0].shape[1]) or apply(*a))
    x = torch.randn(2, 4, 6, 6)
    with autocast("cpu"):
        F.conv2d(x, torch.randn(4, 1, 3, 3), groups=4)
        F.conv2d(x, torch.randn(8, 1, 3, 3), groups=4)  # two outputs a channel
        F.conv2d(x, torch.randn(4, 4, 3, 3))
        F.conv2d(x, torch.randn(4, 1, 3, 3), padding="same", groups=4)
        with torch.no_grad():
            F.conv2d(x, torch.randn(4, 1, 3, 3), groups=4)
    assert seen == [4]


@pytest.mark.parametrize("fast", [True, False])
def test_where_bfloat16_is_slow_training_is_in_float32_and_says_so(monkeypatch, fast):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: fast)
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
    )
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(3)]
    net(batches[0][0])

    def trained(precision):
        torch.manual_seed(2)
        return sparsify(net, batches, None, {"epochs": 1, "lr": 0.1, "precision": precision}).state_dict()

    exact = trained("float32")
    expected = (
        contextlib.nullcontext() if fast else pytest.warns(ActzipWarning, match="training is in float32")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error" if fast else "default", ActzipWarning)
        with expected:
            found = trained("bfloat16")
    same = all(torch.equal(found[k], v) for k, v in exact.items())
    assert same != fast


def test_other_devices_are_trusted_with_bfloat16():
    assert precision.has_bfloat16("cuda")
    assert precision.has_bfloat16("cpu") is torch.ops.mkldnn._is_mkldnn_bf16_supported()
