"""The native decoder and the plain Python one (reference.py, written from docs/bitstream.md) agree."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import reference

from actzip import cpu
from actzip.codec import codecs, encode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
import differential

KNOWN = [c for c in codecs().values() if c.id in reference.CODECS]


def test_every_codec_has_a_reference_decoder() -> None:
    assert {c.name for c in codecs().values()} == {name for name, _, _ in reference.CODECS.values()}


@pytest.mark.parametrize("codec", [c.name for c in KNOWN])
@pytest.mark.parametrize(
    "shape", [(2, 40, 9, 8), (1, 3, 70, 55), (9000,), (5, 1800), (36, 30, 31), (1, 1, 9, 1000)]
)
def test_larger_maps(codec: str, shape: tuple[int, ...], isa: str) -> None:
    if isa != cpu.isas()[-1] and shape != (36, 30, 31):
        return  # one shape is enough for the others
    rng = np.random.default_rng(len(shape))
    a = np.minimum(rng.exponential(9, shape) * (rng.random(shape) < 0.5), 255).astype(np.uint8)
    blob = encode(a, codec)
    assert differential.compare(blob) == "decoded"
    assert reference.decode(blob)[0] == a.ravel().tolist()
