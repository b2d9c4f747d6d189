"""Packed maps of integers: the engine's integers are those of the quantizer and of the codec, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from actzip import cpu
from actzip._native import _engine
from actzip.codec import decode, encode
from actzip.codec import quantize as codec_quantize
from actzip.quantize import QuantRange, fake_quantize, quantize_linear

TYPES = {8: 2, 16: 3}


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("bits", [4, 5, 7, 8, 9, 12, 16])
def test_integers_of_engine_codec_and_training_are_equal(isa, bits):
    rng = np.random.default_rng(bits)
    x = np.maximum(rng.normal(size=(2, 5, 9, 75)), 0).astype(np.float32) * 3
    r = QuantRange(bits)
    # scales without a short binary form, and values exactly half-way and just beside it
    scale = np.float32(np.float32(8.0) / np.float32(r.qmax))
    q = rng.integers(0, r.qmax, size=x[0].shape).astype(np.float32)
    half = (q + np.float32(0.5)) * scale
    x[1] = np.where(rng.random(q.shape) < 0.5, half, np.nextafter(half, np.float32(np.inf)))
    t = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    want = quantize_linear(t, float(scale), bits).numpy().transpose(0, 2, 3, 1)
    with cpu.forced(isa):
        out, used, _, nonzeros, _ = _engine.kernels.roundtrip(
            x,
            [],
            TYPES[8 if bits <= 8 else 16],
            0.0,
            1.0,
            scales=[float(scale)] * 2,
            tops=[float(r.qmax)] * 2,
        )
    engine = np.rint(out.astype(np.float64) / float(scale)).astype(np.int64)
    assert np.array_equal(engine, want)
    assert nonzeros == np.count_nonzero(want)  # what rounds to zero is a zero of the mask
    fake = fake_quantize(t, torch.tensor([scale]), r).numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(out.view(np.uint32), np.ascontiguousarray(fake).view(np.uint32))
    by_codec, _, _ = codec_quantize(x, bits, scale=float(scale), signed=False)
    assert np.array_equal(by_codec.astype(np.int64), want)
    blob = encode(
        np.ascontiguousarray(want).astype(r.numpy_dtype), codec="seg", bits=bits, scale=float(scale)
    )
    assert np.array_equal(np.asarray(decode(blob)).astype(np.int64), want)
    assert used >= nonzeros * (1 if bits <= 8 else 2)


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_block_has_its_own_scale(isa):
    rng = np.random.default_rng(1)
    parts = [70, 10, 64]  # blocks of 64, 6, 10, 64
    x = np.maximum(rng.normal(size=(1, 4, 6, sum(parts))), 0).astype(np.float32)
    scales = np.array([0.013, 0.013, 0.07, 0.31], np.float32)
    tops = [255.0, 255.0, 15.0, 7.0]
    with cpu.forced(isa):
        out, *_ = _engine.kernels.roundtrip(x, parts, TYPES[8], 0.0, 1.0, scales=scales.tolist(), tops=tops)
    start = 0
    for scale, top, width in zip(scales, tops, (64, 6, 10, 64)):
        a = x[..., start : start + width]
        want = np.clip(np.rint(a / scale), 0, top).astype(np.float32) * scale
        assert np.array_equal(out[..., start : start + width], want)
        start += width


@pytest.mark.parametrize("isa", cpu.isas())
def test_half_floats_are_the_nearest(isa):
    rng = np.random.default_rng(2)
    x = np.maximum(rng.normal(size=(1, 7, 5, 40)), 0).astype(np.float32)
    x[0, 0, 0, :4] = [6e-8, 1e-9, 65504.0, 1e6]
    with cpu.forced(isa):
        out, *_ = _engine.kernels.roundtrip(x, [], 1, 1.0, 1.0)
    with np.errstate(over="ignore"):
        assert np.array_equal(out, x.astype(np.float16).astype(np.float32))
