"""SEG and exponential-Golomb: code lengths are exactly those of the definition, with the best order."""

from __future__ import annotations

import numpy as np
import pytest

from actzip import cpu
from actzip.codec import decode, encode, inspect
from actzip.codec.eg import length as eg_length
from actzip.codec.seg import code
from actzip.codec.seg import length as seg_length

LENGTH = {"seg": seg_length, "eg": eg_length}


def varint_bytes(v: int) -> int:
    return max(1, -(-v.bit_length() // 7))


def split(blob: bytes, n: int, codec: str) -> tuple[str, str, str]:
    """Flags, prefixes and suffixes of a blob of one chunk, as strings of bits with their padding."""
    data = blob[inspect(blob).header_bytes :]
    length = shift = i = 0
    while True:
        length |= (data[i] & 127) << shift
        shift += 7
        i += 1
        if data[i - 1] < 128:
            break
    bits = [
        "".join(format(b, "08b")[::-1] for b in part)
        for part in (
            data[i : i + (n + 7) // 8 * (codec == "seg")],
            data[i + (n + 7) // 8 * (codec == "seg") :][:length],
            data[i + (n + 7) // 8 * (codec == "seg") :][length:],
        )
    ]
    return bits[0], bits[1], bits[2]


@pytest.mark.parametrize("codec", ["seg", "eg"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8, 9, 12, 16])
def test_streams_are_the_codes_of_the_definition(isa: str, codec: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for k in sorted({0, 1, bits // 2, bits - 1}):
        if k >= bits:
            continue
        a = np.minimum(rng.exponential(2 ** (k + 0.5), 700), 2**bits - 1).astype(np.uint16)
        a[::3] = 0
        a[5], a[-1] = 2**bits - 1, 1
        a = a.astype(np.uint8) if bits <= 8 else a
        blob = encode(a, codec, bits, options={"k": k})
        flags, prefixes, suffixes = split(blob, a.size, codec)
        f = p = s = 0
        for x in a.tolist():
            if codec == "seg":
                assert flags[f] == ("1" if x == 0 else "0")
                f += 1
                if x == 0:
                    continue
                x -= 1
            word = format(x + (1 << k), "b")
            zeros = len(word) - k - 1
            assert prefixes[p : p + zeros + 1] == "0" * zeros + "1"
            p += zeros + 1
            assert suffixes[s : s + len(word) - 1] == word[1:][::-1]
            s += len(word) - 1
        for stream, end in ((flags, f), (prefixes, p), (suffixes, s)):
            assert len(stream) - end < 8 and "1" not in stream[end:]
        np.testing.assert_array_equal(decode(blob), a)


@pytest.mark.parametrize("codec", ["seg", "eg"])
@pytest.mark.parametrize("bits", [1, 4, 8, 11, 16])
@pytest.mark.parametrize("per_channel", [0, 1])
def test_order_is_the_best(isa: str, codec: str, bits: int, per_channel: int) -> None:
    rng = np.random.default_rng(bits + 100 * per_channel)
    scale = 2.0 ** rng.uniform(-1, bits, (2, 5, 1, 1))
    a = np.minimum(rng.exponential(scale, (2, 5, 9, 11)), 2**bits - 1).astype(np.uint16)
    a *= rng.random(a.shape) < 0.6
    a = a.astype(np.uint8) if bits <= 8 else a
    blob = encode(a, codec, bits, options={"per_channel": per_channel})
    table = np.array([[LENGTH[codec](x, k) for x in range(2**bits)] for k in range(bits)])
    cost = table[:, a]
    best = cost.sum((1, 3, 4)).min(0).sum() if per_channel else cost.sum((1, 2, 3, 4)).min()
    flags, prefixes, suffixes = split(blob, a.size, codec)
    total = len(flags) + len(prefixes) + len(suffixes)
    assert best <= total <= best + 21  # three streams, padded to bytes
    assert inspect(blob).chunk_bytes[0] == total // 8 + varint_bytes(len(prefixes) // 8)
    np.testing.assert_array_equal(decode(blob), a)


def test_lengths_are_those_of_the_terms() -> None:
    for k in range(5):
        assert seg_length(0, k) == 1
        assert {seg_length(x, k) for x in range(1, 2**k + 1)} == {k + 2}
        assert {seg_length(x, k) for x in range(2**k + 1, 2**k + 2 ** (k + 1) + 1)} == {k + 4}
        for x in range(300):
            assert len(code(x, k)) == seg_length(x, k)


@pytest.mark.parametrize("codec", ["raw", "seg", "eg"])
def test_same_bytes_everywhere(codec: str) -> None:
    rng = np.random.default_rng(3)
    for bits in (1, 5, 8, 10, 16):
        a = np.minimum(
            rng.exponential(2.0 ** rng.uniform(0, bits, (3, 40, 1, 1)), (3, 40, 33, 35)), 2**bits - 1
        )
        a = (a * (rng.random(a.shape) < 0.5)).astype(np.uint16 if bits > 8 else np.uint8)
        for options in ({}, {"per_channel": 1}) if codec != "raw" else ({},):
            blobs = set()
            for name in cpu.isas():
                with cpu.forced(name):
                    for threads in (1, 2, 3):
                        blobs.add(encode(a, codec, bits, options=options, threads=threads))
                        np.testing.assert_array_equal(decode(next(iter(blobs)), threads=threads), a)
            assert len(blobs) == 1
