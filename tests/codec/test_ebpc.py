"""ebpc: bit for bit the streams of the definition, for every width and block length."""

from __future__ import annotations

import numpy as np
import pytest

from actzip import cpu
from actzip.codec import decode, encode, inspect
from actzip.codec.ebpc import block_code, zero_code
from actzip.errors import InputError


def packed(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


@pytest.mark.parametrize("block", [8, 16, 32])
@pytest.mark.parametrize("bits", range(1, 17))
def test_streams_are_those_of_the_definition(bits: int, block: int) -> None:
    rng = np.random.default_rng(bits)
    for size in (1, 7, 64, 170):
        for density in (0.1, 0.6, 1.0):
            a = np.minimum(rng.exponential(2 ** rng.uniform(0, bits), size), 2**bits - 1).astype(np.uint16)
            a = (a * (rng.random(size) < density)).astype(np.uint16 if bits > 8 else np.uint8)
            blob = encode(a, "ebpc", bits, options={"block": block})
            zeros = packed(zero_code(a.tolist()))
            values = [v for v in a.tolist() if v]
            values += [0] * (-len(values) % block)
            code = "".join(block_code(values[i : i + block], bits) for i in range(0, len(values), block))
            length = len(zeros)
            head = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
            assert blob[inspect(blob).header_bytes :] == head + zeros + packed(code.replace(" ", ""))
            np.testing.assert_array_equal(decode(blob), a)


def test_every_line_of_the_table() -> None:
    codes = {
        "001": [5, 5, 5, 5, 5, 5, 5, 5],  # a run of empty planes
        "00000": [1, 2, 3, 4, 5, 6, 7, 8],  # all ones
        "00001": [5, 5, 7, 9, 9, 9, 9, 9],  # an empty plane under a full one
        "00010": [5, 6, 7, 7, 7, 7, 7, 7],  # two ones
        "00011": [5, 6, 6, 6, 6, 6, 6, 6],  # one
        "1": [1, 9, 2, 14, 7, 3, 3, 12],  # none of these
    }
    for start, block in codes.items():
        parts = block_code(block, 4).split()[1:]
        assert any(p.startswith(start) for p in parts), (start, parts)
        np.testing.assert_array_equal(decode(encode(np.array(block, np.uint8), "ebpc", 4)), block)


def test_same_bytes_everywhere() -> None:
    rng = np.random.default_rng(1)
    a = (rng.exponential(20, (2, 40, 33, 35)) * (rng.random((2, 40, 33, 35)) < 0.5)).astype(np.uint8)
    blobs = set()
    for name in cpu.isas():
        with cpu.forced(name):
            for threads in (1, 2, 3):
                blobs.add(encode(a, "ebpc", threads=threads))
    assert len(blobs) == 1
    np.testing.assert_array_equal(decode(blobs.pop()), a)


def test_smooth_values_compress() -> None:
    a = np.repeat(np.arange(40, 200, dtype=np.uint8), 64)
    assert len(encode(a, "ebpc")) < 0.5 * a.size
    with pytest.raises(InputError, match="block"):
        encode(a, "ebpc", options={"block": 12})
