"""The formula: rounding, ranges, zero, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actzip.errors import InputError
from actzip.quantize import QuantRange, dequantize_linear, fake_quantize, quantize_linear


@pytest.mark.parametrize("bits", range(4, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_integers_equal_an_independent_numpy_form(bits, signed):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(3, 5, 7, 2)).astype(np.float32)
    x[x < -0.3] = 0 if not signed else x[x < -0.3]
    scale = np.float32(0.0173)
    r = QuantRange(bits, signed)
    want = np.clip(np.rint(x / scale), r.qmin, r.qmax).astype(np.int64)
    q = quantize_linear(torch.from_numpy(x), float(scale), bits, signed=signed)
    assert np.array_equal(q.numpy().astype(np.int64), want)
    assert q.dtype == r.torch_dtype
    back = dequantize_linear(q, float(scale)).numpy()
    assert np.array_equal(back, want.astype(np.float32) * scale)
    assert (back[x == 0] == 0).all()
    fake = fake_quantize(torch.from_numpy(x), torch.tensor([scale]), r)
    assert np.array_equal(fake.numpy(), back)


def test_ranges():
    assert (QuantRange(4).qmin, QuantRange(4).qmax) == (0, 15)
    assert (QuantRange(8, True).qmin, QuantRange(8, True).qmax) == (-127, 127)
    assert (QuantRange(16).qmin, QuantRange(16).qmax) == (0, 65535)
    assert QuantRange(16).numpy_dtype == np.uint16 and QuantRange(9, True).numpy_dtype == np.int16


def test_halves_round_to_even_and_bounds_clip():
    x = torch.tensor([0.5, 1.5, 2.5, 300.0, -1.0, float("inf"), -0.5])
    assert quantize_linear(x, 1.0, 8).tolist() == [0, 2, 2, 255, 0, 255, 0]
    assert quantize_linear(x, 1.0, 8, signed=True).tolist() == [0, 2, 2, 127, -1, 127, 0]


def test_per_channel_scales_follow_dimension_one():
    x = torch.rand(2, 3, 4, 5)
    scale = torch.tensor([0.01, 0.1, 1.0])
    q = quantize_linear(x, scale, 8)
    for c in range(3):
        assert torch.equal(q[:, c], quantize_linear(x[:, c], float(scale[c]), 8))
    assert torch.equal(dequantize_linear(q, scale)[:, 1], dequantize_linear(q[:, 1], float(scale[1])))


@pytest.mark.parametrize("bits", [3, 17, 0, -8, 8.0, "8", True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(InputError, match="bits"):
        quantize_linear(torch.ones(2), 1.0, bits)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales(scale):
    with pytest.raises(InputError, match="scale"):
        quantize_linear(torch.ones(2), scale, 8)
    with pytest.raises(InputError, match="scale"):
        dequantize_linear(torch.ones(2, dtype=torch.uint8), scale)


def test_bad_maps():
    with pytest.raises(InputError, match="NaN"):
        quantize_linear(torch.tensor([1.0, float("nan")]), 1.0, 8)
    with pytest.raises(InputError, match="floating"):
        quantize_linear(torch.ones(2, dtype=torch.int32), 1.0, 8)
    with pytest.raises(InputError, match="one a channel"):
        quantize_linear(torch.ones(2, 3, 4), torch.ones(4), 8)


def test_straight_through_and_learned_step_gradients():
    x = torch.tensor([-1.0, 0.2, 0.7, 1.4, 9.0], requires_grad=True)
    scale = torch.nn.Parameter(torch.tensor([0.5]))
    r = QuantRange(4)  # 0 .. 15, clip at 7.5
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (fake_quantize(x, scale, r) * weight).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    v = torch.tensor([0.4, 1.4, 2.8])
    want = ((v.round() - v) * weight[1:4]).sum() + 15 * 5.0  # -1 is clipped to qmin = 0: no slope
    assert scale.grad.item() == pytest.approx(want.item() / (5 * 15) ** 0.5, rel=1e-5)


def test_learned_step_gradient_is_per_channel():
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    scale = torch.nn.Parameter(torch.tensor([0.05, 0.1, 0.2]))
    fake_quantize(x, scale, QuantRange(4)).square().sum().backward()
    for c in range(3):
        one = torch.nn.Parameter(scale.detach()[c : c + 1].clone())
        fake_quantize(x[:, c].detach(), one, QuantRange(4)).square().sum().backward()
        assert scale.grad[c].item() == pytest.approx(one.grad.item(), rel=1e-4)


def test_a_learned_step_finds_a_better_scale():
    torch.manual_seed(0)
    x = torch.randn(4096).relu()
    scale = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.Adam([scale], lr=0.01)

    def error():
        return (fake_quantize(x, scale, QuantRange(4)) - x).square().mean()

    first = error().item()
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < first / 4
