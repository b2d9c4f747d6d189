"""Golden fixtures: blobs written once and kept. Today's encoder must give the same bytes, today's
decoder the same map.

A failure means that the format or the encoder's choices changed. If that is meant, raise the format
version (a decoder of old blobs stays) or, for choices alone, say so in CHANGELOG.md and run
``python tests/codec/test_golden.py`` to write the fixtures anew.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actzip.codec import decode, encode, inspect, iter_maps, save_maps

FOLDER = Path(__file__).resolve().parent / "golden" / "v1"


def integers(shape: tuple[int, ...], bits: int, seed: int) -> np.ndarray:
    """Sparse, peaked integers below 2**bits, from integer arithmetic alone."""
    state, out = seed, []
    for _ in range(int(np.prod(shape))):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        r = state >> 20
        zero = (r & 15) < 9
        out.append(0 if zero else (r >> 8) % 2**bits >> ((r >> 4 & 15) * bits // 20))
    return np.array(out, np.int64).reshape(shape)


def cases() -> dict[str, tuple[np.ndarray, str, int | None, dict[str, Any]]]:
    """name -> (array, codec, bits, further arguments of encode)."""
    u8 = integers((2, 3, 9, 11), 8, 1).astype(np.uint8)
    u16 = integers((1, 4, 7, 10), 16, 2).astype(np.uint16)
    u5 = integers((5, 33), 5, 3).astype(np.uint8)
    i8 = (integers((70,), 8, 4) - 128).astype(np.int8)
    i12 = (integers((3, 5, 6), 12, 5) - 1000).astype(np.int32)
    flag = integers((130,), 1, 6).astype(bool)
    table: dict[str, tuple[np.ndarray, str, int | None, dict[str, Any]]] = {}
    for codec in ("raw", "seg", "eg", "huffman", "zvc"):
        table[f"{codec}-uint8"] = (u8, codec, None, {})
        table[f"{codec}-uint8-chunks"] = (u8, codec, None, {"chunk_elements": 99})
        table[f"{codec}-uint16"] = (u16, codec, None, {})
        table[f"{codec}-5bits"] = (u5, codec, 5, {"scale": 0.5})
        table[f"{codec}-int8"] = (i8, codec, None, {})
        table[f"{codec}-int12"] = (i12, codec, 13, {})
        table[f"{codec}-bool"] = (flag, codec, None, {})
    for codec in ("seg", "eg"):
        table[f"{codec}-per-channel"] = (u16, codec, None, {"options": {"per_channel": 1}})
        table[f"{codec}-k3"] = (u8, codec, None, {"options": {"k": 3}})
    for codec in ("raw", "zvc"):
        table[f"{codec}-float16"] = (u16.view(np.float16), codec, None, {})
        table[f"{codec}-float32"] = ((u16.astype(np.uint32) * 65521).view(np.float32), codec, None, {})
    return table


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_same_bytes_as_ever(isa: str, name: str) -> None:
    array, codec, bits, more = CASES[name]
    golden = (FOLDER / f"{name}.acz").read_bytes()
    assert encode(array, codec, bits, **more) == golden
    back = decode(golden)
    assert back.dtype == array.dtype and back.tobytes() == array.tobytes()
    assert inspect(golden).version == 1


def maps_file() -> bytes:
    file = io.BytesIO()
    with_names = {k: CASES[k][0] for k in ("seg-uint8", "seg-int12")}
    save_maps(file, with_names, codec="seg", metadata={"made by": "test"})
    return file.getvalue()


def test_file_of_maps() -> None:
    golden = (FOLDER / "maps.azm").read_bytes()
    assert maps_file() == golden
    for name, array in iter_maps(io.BytesIO(golden)):
        np.testing.assert_array_equal(array, CASES[name][0])


def test_every_fixture_is_tested() -> None:
    mine = ("raw", "seg", "eg", "huffman", "zvc", "maps")
    assert {p.stem for p in FOLDER.iterdir() if p.name.startswith(mine)} == {*CASES, "maps"}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for key, (a, c, b, extra) in CASES.items():
        (FOLDER / f"{key}.acz").write_bytes(encode(a, c, b, **extra))
    (FOLDER / "maps.azm").write_bytes(maps_file())
