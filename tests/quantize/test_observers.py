"""Observers: streaming equals whole, memory stays, scales are what the definitions say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actzip.errors import InputError
from actzip.quantize import OBSERVERS, MapObserver, QuantRange, quantize_linear


def relu_map(seed, shape=(16, 8, 12, 12), spread=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * spread).relu()


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_batches_give_what_the_whole_gives(per):
    x = relu_map(0)
    whole, parts, merged = MapObserver(per), MapObserver(per), MapObserver(per)
    whole.update(x)
    for chunk in x.split(3):
        parts.update(chunk)
        other = MapObserver(per)
        other.update(chunk)
        merged.merge(other)
    for o in (parts, merged):
        assert torch.equal(whole.counts, o.counts) and torch.equal(whole.maximum, o.maximum)
        assert (whole.elements, whole.images, whole.density) == (o.elements, o.images, o.density)
    assert whole.density == pytest.approx(float((x != 0).float().mean()))
    for observer in OBSERVERS:
        assert torch.equal(whole.scales(QuantRange(8), observer), parts.scales(QuantRange(8), observer))


def test_memory_does_not_grow_with_the_images():
    o = MapObserver()
    o.update(relu_map(0))
    size = o.counts.numel()
    for seed in range(5):
        o.update(relu_map(seed, spread=10.0**seed))
    assert o.counts.numel() == size == 16384
    held = [v for v in vars(o).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() for t in held) <= size + 2


def test_minmax_is_the_maximum_over_qmax():
    x = relu_map(1)
    o = MapObserver()
    o.update(x)
    assert o.scales(QuantRange(8), "minmax").item() == np.float32(x.max().item() / 255)
    o = MapObserver("channel")
    o.update(x)
    want = x.amax((0, 2, 3)) / 255
    assert torch.allclose(o.scales(QuantRange(8), "minmax"), want, rtol=1e-6)


def test_percentile_of_the_nonzero_elements():
    x = relu_map(2)
    o = MapObserver()
    o.update(x)
    for percentile in (50.0, 90.0, 99.0):
        want = np.percentile(x[x > 0].numpy(), percentile)
        got = o.scales(QuantRange(8), "percentile", percentile).item() * 255
        assert got == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_mse_is_close_to_the_best_clip_found_by_search(bits):
    x = relu_map(3)
    o = MapObserver()
    o.update(x)
    r = QuantRange(bits)

    def error(scale):
        q = quantize_linear(x, float(scale), bits).float() * scale
        return float((q - x).square().mean())

    best = min(error(clip / r.qmax) for clip in np.linspace(0.3, float(x.max()), 300))
    scale = o.scales(r, "mse")
    assert error(scale.item()) <= best * 1.05
    assert o.quality(r, scale)["mse"] == pytest.approx(error(scale.item()), rel=0.05)


def test_estimates_agree_with_the_integers():
    x = relu_map(4)
    for per in ("tensor", "channel"):
        o = MapObserver(per)
        o.update(x)
        for bits in (4, 6, 8):
            r = QuantRange(bits)
            scale = o.scales(r, "percentile", 99.0)
            q = quantize_linear(x, scale, bits)
            quality = o.quality(r, scale)
            p = np.unique(q.numpy(), return_counts=True)[1] / q.numel()
            entropy = -(p * np.log2(p)).sum()
            if per == "tensor":
                assert quality["entropy"] == pytest.approx(entropy, rel=0.02)
            else:
                assert quality["entropy"] <= entropy * 1.02
            shaped = scale.reshape(1, -1, 1, 1) if len(scale) > 1 else scale
            saturated = float((x > shaped * (r.qmax + 0.5)).sum()) / float((x > 0).sum())
            assert quality["saturated"] == pytest.approx(saturated, abs=2e-3)
            vanished = float(((x > 0) & (q == 0)).sum()) / float((x > 0).sum())
            assert quality["vanished"] == pytest.approx(vanished, abs=3e-3)


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_an_outlier_does_not_take_the_range(observer):
    x = relu_map(5)
    x[0, 0, 0, 0] = 1e30
    o = MapObserver()
    o.update(x)
    scale = o.scales(QuantRange(8), observer, 99.9)
    if observer == "mse":  # one element of 1e30 outweighs every other error: mse keeps it, by definition
        assert scale.item() * 255 == pytest.approx(1e30, rel=1e-3)
    else:
        assert 1.0 < scale.item() * 255 < 10.0
    assert MapObserver().dead
    quality = o.quality(QuantRange(8), o.scales(QuantRange(8), "minmax"))
    assert quality["vanished"] > 0.99


def test_entropy_clips_a_long_tail_and_keeps_a_uniform():
    g = torch.Generator().manual_seed(6)
    tail = torch.rand(20000, generator=g).pow(-1 / 3).unsqueeze(0) - 1  # Pareto
    flat = torch.rand(1, 20000, generator=g)
    for x, share in ((tail, (0.0, 0.7)), (flat, (0.95, 1.001))):
        o = MapObserver()
        o.update(x)
        clip = o.scales(QuantRange(6), "entropy").item() * 63
        assert share[0] * float(x.max()) < clip <= share[1] * float(x.max())
    assert o.scales(QuantRange(16), "entropy").item() == o.scales(QuantRange(16), "minmax").item()


def test_constant_and_zero_maps():
    o = MapObserver()
    o.update(torch.full((2, 3, 4, 4), 0.75))
    for observer in OBSERVERS:
        for bits in (4, 8, 16):
            scale = o.scales(QuantRange(bits), observer)
            back = quantize_linear(torch.tensor([0.75]), scale, bits).float() * scale
            assert back.item() == pytest.approx(0.75, rel=0.02)
    o = MapObserver("channel")
    x = relu_map(7)
    x[:, 2] = 0
    o.update(x)
    scale = o.scales(QuantRange(8), "minmax")
    assert scale[2] == scale.max()  # a dead channel can still be represented
    o = MapObserver()
    o.update(torch.zeros(2, 3, 4, 4))
    assert o.dead and o.scales(QuantRange(8), "mse").item() == 1.0
    assert o.quality(QuantRange(8), torch.ones(1))["entropy"] == 0.0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_values_are_refused_with_the_place(value):
    x = relu_map(8)
    x[0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"layer 'a'.*1 of"):
        MapObserver().update(x, "layer 'a'")


def test_bad_options():
    with pytest.raises(InputError, match="per must"):
        MapObserver("pixel")
    o = MapObserver("channel")
    o.update(torch.rand(2, 3, 4, 4))
    with pytest.raises(InputError, match="channels"):
        o.update(torch.rand(2, 4, 4, 4))
    with pytest.raises(InputError, match="no channels"):
        o.update(torch.rand(5))
    with pytest.raises(InputError, match="observer"):
        o.scales(QuantRange(8), "median")
    with pytest.raises(InputError, match="percentile"):
        o.scales(QuantRange(8), "percentile", 0.0)
