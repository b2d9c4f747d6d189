"""encode_many and decode_many: the bytes and arrays of encode and decode, whatever the sizes and threads."""

from __future__ import annotations

import numpy as np
import pytest

from actzip import codec as C
from actzip.errors import CodecError, InputError
from crowd import at_once

SIZES = {
    "even": [(2, 8, 6, 7)] * 9,
    "one large": [(4, 64, 20, 20), (1, 3, 5, 5), (2, 2, 2, 2), (7,), (3, 9)],
    "one alone": [(3, 40, 30, 11)],
    "falling": [(1, 2 ** (10 - i), 9, 8) for i in range(9)],
    "none": [],
}


def maps(shapes: list[tuple[int, ...]], dtype: type = np.uint16, top: int = 900) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [(random.integers(1, top, s) * (random.random(s) < 0.4)).astype(dtype) for s in shapes]


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("codec", [*C.codecs(), "auto"])
def test_bytes_and_arrays_are_those_of_single_calls(codec: str, sizes: str, threads: int) -> None:
    given = maps(SIZES[sizes])
    blobs = C.encode_many(given, codec, 10, chunk_elements=4096, threads=threads)
    assert blobs == [C.encode(m, codec, 10, chunk_elements=4096, threads=1) for m in given]
    back = C.decode_many(blobs, threads=threads)
    assert len(back) == len(given)
    for a, b in zip(given, back):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.parametrize("codec", ["zvc", "rans", "raw"])
def test_every_instruction_set(isa: str, codec: str) -> None:
    given = maps(SIZES["falling"], np.uint8, 200)
    blobs = C.encode_many(given, codec, threads=2)
    assert blobs == [C.encode(m, codec, threads=1) for m in given]
    assert all(np.array_equal(a, b) for a, b in zip(C.decode_many(blobs, threads=2), given))


def test_dtypes_orders_and_scales_may_differ() -> None:
    random = np.random.default_rng(1)
    x = np.maximum(random.standard_normal((2, 6, 5, 4)), 0).astype(np.float32)
    mixed = [
        x,
        x.astype(np.float16),
        (x * 9).astype(np.int64),
        x > 0,
        np.ascontiguousarray((x * 20).astype(np.uint8).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        x[:, ::2],
    ]
    for a, b in zip(mixed, C.decode_many(C.encode_many(mixed, "auto"))):
        assert a.dtype == b.dtype and np.array_equal(a, b) and a.strides[-1] > 0
    assert C.encode_many(mixed, "auto") == [C.encode(m, "auto") for m in mixed]
    blobs = C.encode_many([x, 2 * x], "seg", 8, scale=[0.5, None])
    assert blobs == [C.encode(x, "seg", 8, scale=0.5), C.encode(2 * x, "seg", 8)]
    assert C.encode_many([x, x], "seg", 8, scale=0.5) == [blobs[0]] * 2
    assert C.encode_many([x, x], "seg", 8, scale=np.array([0.5, 0.5])) == [blobs[0]] * 2
    assert C.encode_many([x, x], "seg", 8, scale=np.float32(0.5)) == [blobs[0]] * 2
    a, b = C.decode_many(blobs, dequantize=False)
    assert a.dtype == b.dtype == np.uint8 and a.max() == round(float(x.max()) / 0.5)


def test_torch_tensors_come_back_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    given = [torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4), torch.randn(1, 2, 3, 3).bfloat16()]
    blobs = C.encode_many(given, "rans")
    assert blobs == [C.encode(t, "rans") for t in given]
    for a, b in zip(given, C.decode_many(blobs)):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    assert all(isinstance(b, np.ndarray) for b in C.decode_many(blobs[:1], framework="numpy"))


@pytest.mark.parametrize("codec", ["zvc", "auto"])
def test_into_memory_of_the_caller(codec: str) -> None:
    given = maps(SIZES["one large"])
    memory = [bytearray(4 * m.nbytes + 4096) for m in given]
    views = C.encode_many(given, codec, out=memory, threads=2)
    assert [bytes(v) for v in views] == C.encode_many(given, codec)
    assert all(v.obj is m for v, m in zip(views, memory))
    with pytest.raises(InputError, match=r"bytes, the memory given for it"):
        C.encode_many(given, codec, out=[*memory[:-1], bytearray(3)])
    with pytest.raises(InputError, match="4 buffers for 5 tensors"):
        C.encode_many(given, codec, out=memory[:-1])


def test_errors_name_the_tensor() -> None:
    good = np.ones((2, 3), np.uint8)
    for bad, options, match in (
        (np.ones((2, 3), np.complex64), {}, r"tensor 1: dtype complex64"),
        (np.array([[np.nan]], np.float32), {"bits": 8}, r"tensor 1: 1 non-finite"),
        (np.array([[1.5]], np.float32), {"codec": "huffman"}, r"tensor 1: codec 'huffman' does not take"),
        (np.zeros((0, 3), np.uint8), {}, r"tensor 1: nothing to encode"),
    ):
        with pytest.raises(InputError, match=match):
            C.encode_many([good, bad], **options)
    with pytest.raises(InputError, match="gzip"):
        C.encode_many([good], "gzip")
    with pytest.raises(InputError, match="no option"):
        C.encode_many([good], "seg", options={"nonsense": 1})
    with pytest.raises(InputError, match="1 for 2 tensors"):
        C.encode_many([good, good], scale=[1.0])
    with pytest.raises(InputError, match="options belong to one codec"):
        C.encode_many([good], "auto", options={"per_channel": 1})
    with pytest.raises(InputError, match="nominal speed"):
        C.encode_many([good], "auto", min_speed=1e9)
    with pytest.raises(InputError, match="tensors: several are needed, in a list, not int"):
        C.encode_many(5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="blobs: several are needed, in a list, not int"):
        C.decode_many(5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"tensor 1: the blob has \d+ bytes"):
        C.encode_many([good, good], "raw", out=[bytearray(99), bytearray(3)])
    with pytest.raises(InputError, match="out must be"):
        C.encode_many([good], out=[b"read only"])


@pytest.mark.parametrize("threads", [1, 2])
def test_damage_names_the_blob(threads: int) -> None:
    blobs = C.encode_many(maps(SIZES["even"]), "rans")
    damaged = bytearray(blobs[4])
    damaged[-3] ^= 0x10
    with pytest.raises(CodecError, match=r"blob 4: chunk 0 .*checksum"):
        C.decode_many([*blobs[:4], damaged, *blobs[5:]], threads=threads)
    damaged[8] ^= 0xF0
    with pytest.raises(CodecError, match="blob 4: header, byte"):
        C.decode_many([*blobs[:4], damaged, *blobs[5:]], threads=threads)
    with pytest.raises(InputError, match="blob 1: a blob is bytes"):
        C.decode_many([blobs[0], 7], threads=threads)
    with pytest.raises(InputError, match="framework"):
        C.decode_many(blobs, framework="jax", threads=threads)


def test_many_callers_at_once() -> None:
    given = maps(SIZES["falling"])
    want = C.encode_many(given, "rans", threads=1)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if C.encode_many(given, "rans", threads=2) != want:
                wrong.append(i)
            if not all(np.array_equal(a, b) for a, b in zip(C.decode_many(want, threads=2), given)):
                wrong.append(i)

    at_once(work, 4)
    assert not wrong
