"""Every codec gives back what it was given, for every dtype, width, sign and shape."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from actzip.codec import available, codecs, decode, encode, inspect

SHAPES = [
    (),
    (1,),
    (63,),
    (64,),
    (65,),
    (7, 9),
    (3, 5, 7),
    (2, 3, 8, 9),
    (2, 2, 3, 4, 5),
    (70001,),
    (3, 40, 41, 43),
]


def sample(dtype: str, shape: tuple[int, ...], density: float = 0.4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    top = {"bool": 1, "int8": 127, "uint8": 255, "int16": 32767}.get(
        dtype, 65535 if dtype[0] == "u" else 30000
    )
    scale = rng.choice([1, top // 8 + 1, top])
    a = np.minimum(rng.exponential(scale, shape), top) * (rng.random(shape) < density)
    a = a.astype(np.int64)
    if dtype[0] == "i":
        a = np.where(rng.random(shape) < 0.3, -a, a)
    return a.astype(dtype)


@pytest.mark.parametrize("codec", available())
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "uint16", "int16", "int32", "int64", "uint32", "uint64"]
)
def test_integers_come_back(isa: str, codec: str, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        a = sample(dtype, shape, seed=seed)
        back = decode(encode(a, codec))
        assert back.dtype == a.dtype and back.shape == a.shape
        np.testing.assert_array_equal(back, a)


@pytest.mark.parametrize("codec", [c for c in codecs() if codecs()[c].integers])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width(isa: str, codec: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for density in (0.0, 0.05, 0.5, 1.0):
        a = rng.integers(0, 2**bits, (3, 17, 19)) * (rng.random((3, 17, 19)) < density)
        a = a.astype(np.uint16 if bits > 8 else np.uint8)
        blob = encode(a, codec, bits)
        assert inspect(blob).bits == bits
        np.testing.assert_array_equal(decode(blob), a)
        if bits > 1:
            s = a.astype(np.int32) - 2 ** (bits - 1)
            blob = encode(s, codec, bits)
            np.testing.assert_array_equal(decode(blob), s)


def test_import_is_light() -> None:
    code = "import sys, actzip.codec; assert 'torch' not in sys.modules and 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
