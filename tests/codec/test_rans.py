"""rans: the same bytes everywhere, smaller than what it is measured against, every lane layout, bad
payloads refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from actzip import cpu
from actzip.codec import decode, encode, inspect
from actzip.codec.rans import token
from actzip.errors import CodecError, InputError


def smooth_map(shape: tuple[int, ...], seed: int = 0, top: int = 255) -> np.ndarray:
    """Like an activation map: channels of different density, neighbours alike, about half zeros."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape)
    for axis in (-1, -2):
        a = a + np.roll(a, 1, axis) + np.roll(a, 2, axis)
    level = rng.normal(size=(*shape[:-3], shape[-3], 1, 1))
    return np.clip(np.maximum(a + 3 * level, 0) * (top / 30), 0, top).astype(
        np.uint16 if top > 255 else np.uint8
    )


# planes below, at and above the number of lanes; a row only; bands of rows; less than 8 rows; all lane counts
SHAPES = [
    (1,),
    (63,),
    (64,),
    (65,),
    (255,),
    (2047,),
    (8192,),
    (33000,),
    (3, 1, 700),
    (2, 17),
    (5, 4000),
    (1, 1, 3),
    (1, 2, 5),
    (3, 7, 300),
    (1, 9, 4000),
    (31, 20, 20),
    (32, 40, 40),
    (33, 33, 33),
    (70, 3, 3),
    (7, 90, 90),
    (600, 1, 1),
    (2, 300, 7, 7),
    (2, 64, 28, 28),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [255, 65535])
def test_every_layout_of_lanes(shape: tuple[int, ...], top: int) -> None:
    three = shape if len(shape) >= 3 else (1,) * (3 - len(shape)) + shape
    a = smooth_map(three, top=top).reshape(shape)
    blobs = set()
    for name in cpu.isas():
        with cpu.forced(name):
            for chunk in (65536, 5000) if a.size > 5000 else (65536,):
                blob = encode(a, "rans", chunk_elements=chunk)
                if chunk == 65536:
                    blobs.add(blob)
                np.testing.assert_array_equal(decode(blob), a)
    assert len(blobs) == 1


def any_map(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, int | None]:
    """An array of a dtype or of so many bits, and the bits: from nearly empty to nearly full of zeros."""
    keep = rng.random(shape) < rng.choice([0.02, 0.3, 0.9, 1.0])
    size = rng.choice([0.3, 2.0, 30.0])
    if kind.startswith("float"):
        signed = rng.normal(size=shape) * size
        return np.where(keep, signed if rng.random() < 0.5 else np.abs(signed), 0).astype(kind), None
    bits = int(kind)
    values = np.minimum(rng.exponential(size, shape), 2.0**bits - 1)
    return np.where(keep, values, 0).astype(np.uint8 if bits <= 8 else np.uint16), bits


@pytest.mark.parametrize("kind", ["1", "3", "5", "8", "9", "16", "float16", "float32"])
@pytest.mark.parametrize("seed", range(6))
def test_all_instruction_sets_write_the_same_bytes(kind: str, seed: int) -> None:
    """Lanes that end early, planes of one element, tokens with raw bits beyond 16, rotated signs."""
    rng = np.random.default_rng(seed)
    shape = [(33, 9, 13), (70, 17, 17), (2, 40, 5, 7), (300, 11, 1), (5, 64, 3), (1, 90, 97)][seed]
    a, bits = any_map(rng, shape, kind)
    blobs = {}
    for name in cpu.isas():
        with cpu.forced(name):
            blobs[name] = [
                encode(a, "rans", None if bits is None else bits, chunk_elements=c) for c in (65536, 3000)
            ]
            for blob in blobs["baseline"]:
                assert decode(blob).tobytes() == a.tobytes()
    assert all(b == blobs["baseline"] for b in blobs.values())


def test_same_bytes_on_every_thread_count() -> None:
    a = smooth_map((8, 96, 35, 35))  # more than the sample from which the classes are chosen
    assert a.size > 1 << 19
    blobs = {encode(a, "rans", threads=t) for t in (1, 2, 3, 7)}
    assert len(blobs) == 1
    for t in (1, 3):
        np.testing.assert_array_equal(decode(next(iter(blobs)), threads=t), a)


def test_context_pays() -> None:
    a = smooth_map((1, 64, 56, 56))
    size = len(encode(a, "rans"))
    p = np.bincount(a.ravel()) / a.size
    entropy = -sum(x * np.log2(x) for x in p if x) * a.size / 8
    assert size < 0.85 * entropy  # no code without context gets below that
    assert size < 0.8 * len(encode(a, "seg"))
    assert size < 0.9 * len(zlib.compress(a.tobytes(), 9))
    shuffled = np.random.default_rng(0).permutation(a.ravel()).reshape(a.shape)
    assert 0.98 * entropy < len(encode(shuffled, "rans")) < 1.02 * entropy


def test_empty_and_constant_maps_are_small() -> None:
    for value in (0, 1, 200, 255):
        a = np.full((1, 64, 56, 56), value, np.uint8)
        raw = {0: 0, 1: 0, 200: 5, 255: 5}[value] * a.size / 8
        assert len(encode(a, "rans")) < 1200 + raw
        np.testing.assert_array_equal(decode(encode(a, "rans")), a)


def test_classes() -> None:
    a = smooth_map((2, 64, 20, 20))
    sizes = {k: len(encode(a, "rans", options={"classes": k})) for k in (1, 4, 8)}
    assert len(encode(a, "rans")) <= 1.01 * min(sizes.values())
    for k in sizes:
        np.testing.assert_array_equal(decode(encode(a, "rans", options={"classes": k})), a)
    with pytest.raises(InputError, match="classes"):
        encode(a, "rans", options={"classes": 9})


def test_tokens_are_ordered_and_complete() -> None:
    for bits in (1, 2, 5, 8, 16):
        for fine in range(min(bits, 3)):
            seen = {}
            for v in range(2**bits):
                t, raw, n = token(v, fine)
                assert 0 <= raw < 1 << n and seen.setdefault((t, raw), v) == v
            assert max(t for t, _ in seen) + 1 == (bits + 1 - fine) << fine
            assert [token(v, fine)[0] for v in range(2**bits)] == sorted(
                token(v, fine)[0] for v in range(2**bits)
            )


def damaged(blob: bytes, at: int, new: bytes) -> bytes:
    info = inspect(blob)
    start = info.header_bytes + at
    return blob[:start] + new + blob[start + len(new) :]


def test_damage_is_found_even_without_checksums() -> None:
    a = smooth_map((1, 16, 28, 28))
    blob = encode(a, "rans")
    n = inspect(blob).chunk_bytes[0]
    with pytest.raises(CodecError, match="state"):
        decode(damaged(blob, 0, b"\0\0\0\0"), verify=False)
    found = 0
    for at in range(0, n, 7):
        bad = damaged(blob, at, bytes([blob[inspect(blob).header_bytes + at] ^ 0x10]))
        with pytest.raises(CodecError, match="chunk 0"):
            decode(bad)
        try:
            out = decode(bad, verify=False)
        except CodecError as e:
            assert "byte" in str(e)
            found += 1
        else:
            assert out.shape == a.shape
    assert found > 0.7 * len(
        range(0, n, 7)
    )  # but for raw bits, the states in the end are a check of their own
