"""Lossless floating point: every bit pattern comes back, NaN payloads, infinities and negative zeros too."""

from __future__ import annotations

import numpy as np
import pytest

from actzip import cpu
from actzip.codec import codecs, decode, encode

torch = pytest.importorskip("torch")

LOSSLESS = [(c.name, f) for c in codecs().values() for f in c.floats]
PATTERN = {"float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert a.dtype == b.dtype and a.shape == b.shape
    kind = PATTERN[str(a.dtype).removeprefix("torch.")]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def from_patterns(patterns: np.ndarray, kind: str) -> torch.Tensor:
    signed = patterns.astype(np.uint16 if kind != "float32" else np.uint32)
    signed = signed.view(np.int16 if kind != "float32" else np.int32)
    return torch.from_numpy(signed).view(getattr(torch, kind))


@pytest.mark.parametrize("codec,kind", LOSSLESS)
def test_special_values(codec: str, kind: str) -> None:
    mantissa, bits = {"float16": (10, 16), "bfloat16": (7, 16), "float32": (23, 32)}[kind]
    top = (1 << (bits - 1)) - (1 << mantissa)  # +inf
    sign = 1 << (bits - 1)
    special = [
        0,
        sign,
        top,
        top | sign,
        top + 1,
        top + (1 << (mantissa - 1)),
        top | sign | 5,
        (1 << bits) - 1,
    ]
    special += [1, sign | 1, (1 << mantissa) - 1, 1 << mantissa, top - 1, sign | (top - 1)]
    x = from_patterns(np.array(special * 3), kind)
    assert same_bits(decode(encode(x, codec)), x)
    for one in special:
        x = from_patterns(np.array([one]), kind)
        assert same_bits(decode(encode(x, codec)), x)


@pytest.mark.parametrize("codec,kind", [x for x in LOSSLESS if x[1] != "float32"])
def test_every_16_bit_pattern(codec: str, kind: str) -> None:
    x = from_patterns(np.random.default_rng(0).permutation(65536).reshape(4, 64, 16, 16), kind)
    for name in cpu.isas():
        with cpu.forced(name):
            assert same_bits(decode(encode(x, codec)), x)


@pytest.mark.parametrize("codec,kind", LOSSLESS)
@pytest.mark.parametrize("wild", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("signs", [0.0, 0.01, 0.5])
def test_maps(codec: str, kind: str, wild: float, signs: float) -> None:
    rng = np.random.default_rng(1)
    shape = (2, 24, 30, 30)
    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).abs().to(getattr(torch, kind))
    x = x * torch.from_numpy(rng.random(shape) < 0.5)
    x = torch.where(torch.from_numpy(rng.random(shape) < signs), -x, x)
    noise = from_patterns(rng.integers(0, 1 << (8 * x.element_size()), shape, np.int64), kind)
    x = torch.where(torch.from_numpy(rng.random(shape) < wild), noise, x)
    blobs = set()
    for name in cpu.isas():
        with cpu.forced(name):
            blobs.add(encode(x, codec, threads=2))
            assert same_bits(decode(next(iter(blobs))), x)
    assert len(blobs) == 1
    if wild == signs == 0 and codec in ("rans", "zvc"):  # about half are zeros
        assert len(blobs.pop()) < 0.6 * x.numel() * x.element_size() + 2000


def test_exponents_are_cheap() -> None:
    x = torch.relu(torch.randn(1, 64, 40, 40, generator=torch.Generator().manual_seed(0)))
    for kind, mantissa in (("float16", 10), ("bfloat16", 7), ("float32", 23)):
        y = x.to(getattr(torch, kind))
        per = 8 * len(encode(y, "rans")) / y.numel()
        # half of them: a mask's bit each; the others' exponents cost less than 3 bits of 5 or 8
        assert per < 1 + 0.5 * (mantissa + 3)
