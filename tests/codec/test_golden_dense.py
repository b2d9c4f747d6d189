"""The bytes that `rans` and `ebpc` make are fixed: a change of the encoder's output fails here.

`python tests/codec/test_golden_dense.py` writes golden_dense.json anew, for a new format version
only. The maps are made of integers alone, the same everywhere. Small blobs are kept whole, of large
ones their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actzip.codec import decode, encode

FILE = Path(__file__).with_name("golden_dense.json")
#: name: codec, dtype, bits, shape, options
CASES: dict[str, tuple[str, str, int | None, tuple[int, ...], dict[str, int]]] = {
    "ebpc 1 bit": ("ebpc", "uint8", 1, (3, 7, 9), {}),
    "ebpc 8 bits": ("ebpc", "uint8", 8, (4, 9, 11), {}),
    "ebpc 16 bits": ("ebpc", "uint16", 16, (4, 9, 11), {}),
    "ebpc signed": ("ebpc", "int16", 12, (300,), {}),
    "ebpc block 32": ("ebpc", "uint8", 7, (2, 3, 20, 5), {"block": 32}),
    "rans 1 bit": ("rans", "uint8", 1, (3, 7, 9), {}),
    "rans 8 bits": ("rans", "uint8", 8, (4, 9, 11), {}),
    "rans 16 bits": ("rans", "uint16", 16, (4, 9, 11), {}),
    "rans signed": ("rans", "int16", 12, (300,), {}),
    "rans classes": ("rans", "uint8", 8, (2, 6, 10, 9), {"classes": 3}),
    "rans float16": ("rans", "float16", None, (3, 10, 11), {}),
    "rans float32": ("rans", "float32", None, (3, 10, 11), {}),
    "rans 8 lanes": ("rans", "uint8", 8, (1, 16, 14, 14), {}),
    "rans 16 lanes": ("rans", "uint8", 8, (1, 40, 17, 17), {}),
    "rans 32 lanes": ("rans", "uint16", 14, (2, 96, 28, 28), {}),
    "rans bands": ("rans", "uint8", 8, (1, 2, 147, 147), {}),
    "rans sampled": ("rans", "uint8", 6, (12, 64, 28, 28), {}),
}


def golden_map(dtype: str, bits: int | None, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Pseudo-random, about half zeros, magnitudes that differ by channel; integer arithmetic only."""
    n = int(np.prod(shape))
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    width = bits or 16
    plane = shape[-1] * shape[-2] if len(shape) > 1 else 50
    size = ((np.arange(n) // plane * 7 + np.arange(n) // 5) % width).astype(np.uint64)
    v = (x >> np.uint64(8)) & ((np.uint64(2) << size) - np.uint64(1))
    v[(x >> np.uint64(40)) % np.uint64(16) < np.uint64(7)] = 0
    if dtype == "float16":
        return v.astype(np.uint16).view(np.float16).reshape(shape)
    if dtype == "float32":
        return (v.astype(np.uint32) << np.uint32(15)).view(np.float32).reshape(shape)
    if dtype.startswith("i"):
        s = (v >> np.uint64(1)).astype(np.int64)
        return np.where(x & np.uint64(1), -s, s).astype(dtype).reshape(shape)
    return v.astype(dtype).reshape(shape)


def said(blob: bytes) -> str:
    return (
        blob.hex() if len(blob) < 1500 else f"sha256 {hashlib.sha256(blob).hexdigest()} of {len(blob)} bytes"
    )


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_the_format(name: str, isa: str) -> None:
    codec, dtype, bits, shape, options = CASES[name]
    a = golden_map(dtype, bits, shape)
    want = json.loads(FILE.read_text())[name]
    blob = encode(a, codec, bits, options=options)
    assert said(blob) == want
    kept = bytes.fromhex(want) if not want.startswith("sha256") else blob
    back = decode(kept)
    assert back.tobytes() == a.tobytes() and back.dtype == a.dtype


if __name__ == "__main__":
    out = {}
    for case, (codec, dtype, bits, shape, options) in CASES.items():
        out[case] = said(encode(golden_map(dtype, bits, shape), codec, bits, options=options))
    FILE.write_text(json.dumps(out, indent=1) + "\n")
