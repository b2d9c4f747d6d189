"""The container: slices, single chunks, memory orders, torch in and out, and any damage found and named."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from actzip import cpu
from actzip._native import _codec
from actzip.codec import available, chunks, codecs, decode, encode, inspect, quantize
from actzip.errors import CodecError, InputError
from crowd import at_once

RNG = np.random.default_rng(7)
MAP = (RNG.integers(0, 200, (2, 12, 40, 41)) * (RNG.random((2, 12, 40, 41)) < 0.4)).astype(np.uint8)


def crc32c(data: bytes) -> int:
    c = 0xFFFFFFFF
    for b in data:
        c ^= b
        for _ in range(8):
            c = (c >> 1) ^ (0x82F63B78 if c & 1 else 0)
    return c ^ 0xFFFFFFFF


def test_crc32c(isa: str) -> None:
    assert _codec.crc32c(b"123456789") == 0xE3069283
    data = RNG.integers(0, 256, 10000).astype(np.uint8).tobytes()
    for n in (0, 1, 7, 8, 9, 100, 255, 256, 257, 511, 512, 767, 3071, 3072, 3080, 6500, 10000):
        assert _codec.crc32c(data[:n]) == crc32c(data[:n])


@pytest.mark.parametrize("elements", [1, 41, 100, 41 * 40, 5000, 41 * 40 * 12, 2**20])
def test_slices_and_single_chunks(elements: int) -> None:
    a = MAP if elements > 41 else MAP[:, :3, :5]
    blob = encode(a, "seg", chunk_elements=elements)
    np.testing.assert_array_equal(decode(blob), a)
    np.testing.assert_array_equal(decode(blob, channels=slice(1, 3)), a[:, 1:3])
    np.testing.assert_array_equal(decode(blob, channels=-1), a[:, -1])
    np.testing.assert_array_equal(decode(blob, rows=slice(2, -1)), a[..., 2:-1, :])
    np.testing.assert_array_equal(decode(blob, channels=1, rows=3), a[:, 1, 3])
    np.testing.assert_array_equal(decode(blob, channels=slice(0, 2), rows=slice(1, 4)), a[:, :2, 1:4])
    assert decode(blob, channels=slice(2, 1)).shape == (2, 0, *a.shape[2:])
    flat = a.reshape(-1, *a.shape[2:])
    table = chunks(blob)
    for i in {0, len(table) // 2, len(table) - 1}:
        c = table[i]
        part = decode(blob, chunks=[i])[0]
        box = flat[
            c.first_plane : c.first_plane + c.planes,
            c.first_row : c.first_row + c.rows,
            c.first_col : c.first_col + c.cols,
        ]
        np.testing.assert_array_equal(part, box)
        assert c.planes * c.rows * c.cols <= max(elements, 1)
    with pytest.raises(InputError, match="chunk"):
        decode(blob, chunks=[len(table)])


def test_slices_read_only_their_chunks() -> None:
    blob = bytearray(encode(MAP, "seg", chunk_elements=41 * 40))
    c = chunks(bytes(blob))[5]
    blob[c.offset + 3] ^= 1
    with pytest.raises(CodecError, match=r"chunk 5 .*checksum"):
        decode(blob)
    np.testing.assert_array_equal(decode(blob, channels=slice(6, 12)), MAP[:, 6:])
    with pytest.raises(CodecError, match="chunk 5"):
        decode(blob, channels=5)


@pytest.mark.parametrize("codec", available())
def test_memory_orders(codec: str) -> None:
    for a in (
        np.asfortranarray(MAP),
        MAP[:, ::2, ::3, 1::2],
        MAP[::-1, :, ::-1],
        MAP.transpose(3, 1, 0, 2),
        np.broadcast_to(MAP[:, :1], MAP.shape),
        np.moveaxis(np.ascontiguousarray(np.moveaxis(MAP, 1, -1)), -1, 1),
        MAP.astype(np.int16)[..., 3:] - 100,
        MAP.astype(">u2"),
        np.frombuffer(b"x" + MAP.astype(np.uint16).tobytes(), np.uint16, offset=1).reshape(MAP.shape),
    ):
        blob = encode(a, codec)
        np.testing.assert_array_equal(decode(blob), a)
        assert (
            blob[inspect(blob).header_bytes :]
            == encode(np.ascontiguousarray(a), codec)[inspect(blob).header_bytes :]
        )


def test_torch_in_and_out() -> None:
    torch = pytest.importorskip("torch")
    x = torch.relu(torch.randn(2, 6, 9, 8))
    for t in (x, x.to(memory_format=torch.channels_last), x[:, 1::2], x.requires_grad_()):
        back = decode(encode(t, "seg", 8))
        assert isinstance(back, torch.Tensor) and back.dtype == torch.float32 and back.shape == t.shape
        assert (back - t).abs().max() <= t.max() / 255 / 2 * 1.001
        assert isinstance(decode(encode(t, "seg", 8), framework="numpy"), np.ndarray)
    t = x.detach().to(memory_format=torch.channels_last)
    assert decode(encode(t, "zvc")).stride() == t.stride()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        y = x.detach().to(dtype)
        y[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-30]).to(dtype)
        back = decode(encode(y))
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        assert back.dtype == dtype and torch.equal(back.view(kind), y.view(kind))
    assert torch.equal(decode(encode(MAP), framework="torch"), torch.from_numpy(MAP))
    with pytest.raises(InputError, match="layout"):
        encode(torch.eye(3).to_sparse())


def test_quantizer() -> None:
    x = RNG.standard_normal((3, 5, 7)).astype(np.float32)
    for bits in range(2, 17):
        q, scale, signed = quantize(x, bits)
        top = 2 ** (bits - 1) - 1
        assert signed and q.max() <= top and q.min() >= -top and np.abs(q).max() == top
        expect = np.clip(np.rint(x / np.float32(scale)), -top, top)
        np.testing.assert_array_equal(q, expect)
        blob = encode(x, "seg", bits)
        np.testing.assert_array_equal(decode(blob, dequantize=False), q)
        np.testing.assert_array_equal(decode(blob), q.astype(np.float32) * np.float32(scale))
    q, scale, signed = quantize(np.maximum(x, 0), 8)
    assert not signed and q.dtype == np.uint8 and q.max() == 255 and (q[x <= 0] == 0).all()
    assert inspect(encode(x, "raw", 8, scale=0.25)).scale == 0.25
    assert decode(encode(np.zeros((3, 3), np.float32), "seg", 8)).any() == np.False_
    for dtype in (np.float16, np.float64):
        assert decode(encode(x.astype(dtype), "seg", 12)).dtype == dtype


@pytest.mark.parametrize(
    ("value", "options", "match"),
    [
        (np.zeros((0, 3), np.uint8), {}, "no elements"),
        (np.zeros(3, complex), {}, "complex128"),
        (np.array(["a"]), {}, "dtype"),
        (np.array([1, None]), {}, "dtype"),
        (object(), {}, "dtype"),
        (np.array([1.0, np.nan], np.float32), {"bits": 8}, r"non-finite.*index \(1\)"),
        (np.array([np.inf], np.float64), {"bits": 8}, "non-finite"),
        (np.zeros(3), {}, "float64"),
        (np.zeros(3, np.float32), {"codec": "seg"}, "does not take float32"),
        (np.array([70000]), {}, "17 bits"),
        (np.array([-40000, 3]), {}, "17"),
        (np.array([9], np.uint8), {"bits": 3}, "need 4"),
        (np.array([-9], np.int8), {"bits": 4}, "need 5"),
        (MAP, {"bits": 0}, "bits .*not 0"),
        (MAP, {"bits": 17}, "bits .*not 17"),
        (MAP, {"bits": 8.5}, "bits .*not 8.5"),
        (MAP, {"codec": "sge"}, "did you mean 'seg'"),
        (MAP, {"codec": "seg", "options": {"q": 1}}, "no option 'q'"),
        (MAP, {"codec": "seg", "options": {"k": 8}}, "from 0 to 7"),
        (MAP, {"chunk_elements": 0}, "chunk_elements"),
        (MAP, {"min_speed": 1e9}, "nominal speed"),
        (np.zeros(3, np.float32), {"bits": 8, "scale": 0.0}, "scale"),
        (np.zeros(3, np.float32), {"bits": 8, "scale": float("nan")}, "scale"),
        (-np.ones(3, np.float32), {"bits": 8, "signed": False}, "negative"),
        (np.zeros([1] * 17, np.uint8), {}, "17 dimensions"),
    ],
)
def test_bad_input(value: object, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        encode(value, **options)
    with pytest.raises(InputError):
        decode(12)


@pytest.mark.parametrize("codec", codecs())
def test_damage(codec: str) -> None:
    """Every cut and every altered byte of a small blob is refused; with checksums off it decodes or
    is refused."""
    a = MAP[0, :3, :9, :11]
    blob = encode(a, codec, chunk_elements=100)
    for n in range(len(blob)):
        with pytest.raises(CodecError, match="byte"):
            decode(blob[:n])
    with pytest.raises(CodecError, match="appended"):
        decode(blob + b"x")
    start = inspect(blob).header_bytes
    for i in range(len(blob)):
        bad = bytearray(blob)
        bad[i] ^= 1 << RNG.integers(8)
        with pytest.raises(CodecError, match=r"byte"):
            decode(bad)
        if i >= start:
            try:
                assert decode(bad, verify=False).shape == a.shape
            except CodecError as e:
                assert "chunk" in str(e)
        else:
            bad[start - 4 : start] = _codec.crc32c(bytes(bad[: start - 4])).to_bytes(4, "little")
            with contextlib.suppress(CodecError, InputError):
                decode(bad, verify=False)


def test_claims_are_checked_before_memory_is_taken() -> None:
    """A 100-byte blob that claims 2^60 elements fails at once, in a process that may have little memory."""
    code = """
import resource
import numpy as np
from actzip._native import _codec
from actzip.codec import decode, encode
from actzip.errors import CodecError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ([1 << 60], [1 << 30, 1 << 30], [1 << 20, 1 << 20, 1 << 20], [1 << 62, 4], [(1 << 63) - 1] * 3):
    for chunk in (1, 1 << 20):
        for codec in range(8):
            head = bytearray(b"ACTZ" + bytes([1, codec, 0, 8, 0, len(shape)]) + bytes(4))
            for d in [*shape, 1, 1, min(chunk, shape[-1]), 0]:
                while d >= 128:
                    head.append(d & 127 | 128)
                    d >>= 7
                head.append(d)
            head += bytes(92 - len(head))
            head[10:14] = (96).to_bytes(4, "little")
            blob = bytes(head) + _codec.crc32c(bytes(head)).to_bytes(4, "little") + bytes(4)
            assert len(blob) == 100
            try:
                decode(blob)
            except CodecError as e:
                assert "byte" in str(e)
            else:
                raise SystemExit("decoded")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 4096, grown
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("codec", codecs())
def test_all_zero_and_all_full(isa: str, codec: str) -> None:
    for n in (1, 64, 65, 4096, 70000):
        for value in (0, 1, 255):
            a = np.full(n, value, np.uint8)
            np.testing.assert_array_equal(decode(encode(a, codec)), a)


def test_auto_is_never_larger_than_raw() -> None:
    for bits in (1, 4, 8, 12, 16):
        a = RNG.integers(0, 2**bits, (3, 50, 50)).astype(np.uint16 if bits > 8 else np.uint8)
        blob = encode(a, "auto", bits)
        raw = a.size * bits / 8
        assert len(blob) <= raw * 1.001 + inspect(blob).header_bytes
    sizes = {c: len(encode(MAP, c)) for c in codecs()}
    assert len(encode(MAP)) <= min(sizes.values())


def test_threads_share_nothing() -> None:
    blobs: dict[int, set[bytes]] = {}

    def work(i: int) -> None:
        a = np.roll(MAP, i)
        for _ in range(5):
            blob = encode(a, "seg", threads=2)
            blobs.setdefault(i, set()).add(blob)
            assert (decode(blob, threads=2) == a).all()

    at_once(work, 6)
    assert all(len(b) == 1 for b in blobs.values()) and len(blobs) == 6


def test_isa_is_restored() -> None:
    before = cpu.isa()
    with cpu.forced("baseline"):
        assert cpu.isa() == "baseline"
    assert cpu.isa() == before


def test_into_memory_of_the_caller() -> None:
    for codec, chunk in ((c, n) for c in available() for n in (2**20, 1640, 41)):  # up to 960 chunks
        want = encode(MAP, codec, chunk_elements=chunk, threads=1)
        for size in (len(want), len(want) + 5000, 4 * MAP.nbytes + 20000):
            memory = bytearray(size)
            for threads in (1, 2, 5):
                view = encode(MAP, codec, out=memory, threads=threads, chunk_elements=chunk)
                assert isinstance(view, memoryview) and view == want and view.obj is memory
        for size in (len(want) - 1, inspect(want).header_bytes - 1):
            for threads in (1, 2, 5):
                with pytest.raises(InputError, match="memory given"):
                    encode(MAP, codec, out=bytearray(size), threads=threads, chunk_elements=chunk)
    for bad in (b"constant", 3, np.zeros((9, 9))[:, ::2]):
        with pytest.raises(InputError, match="out"):
            encode(MAP, out=bad)


@pytest.mark.parametrize("codec", codecs())
def test_other_threads_run_meanwhile(codec: str) -> None:
    """The native calls let go of the interpreter: with a switch interval of minutes, nothing else would."""
    a = np.tile(MAP, (32, 1, 1, 1))
    blob = encode(a, codec)
    header, out = _codec.parse_header(blob), np.empty_like(a)
    large = np.tile(a, (20, 1, 1, 1))
    arguments = ("uint8", 8, False, None, 0, False, False, {}, 65536, 1)
    calls = {
        "encode": lambda: _codec.encode(a, codec, *arguments),
        "decode": lambda: _codec.decode(blob, header, out, True, 1),
        "value_range": lambda: _codec.value_range(large, False, 1),
    }

    def overlaps(call: object) -> bool:
        began, ended = threading.Event(), []

        def work() -> None:
            began.set()
            call()  # type: ignore[operator]
            ended.append(True)

        thread = threading.Thread(target=work)
        thread.start()
        began.wait()
        meanwhile = not ended
        thread.join()
        return meanwhile

    interval = sys.getswitchinterval()
    sys.setswitchinterval(300)
    try:
        for name, call in calls.items():
            assert any(overlaps(call) for _ in range(50)), name
    finally:
        sys.setswitchinterval(interval)


def test_nothing_is_copied() -> None:
    """Arrays and tensors are read where they lie, and torch gets the memory that was decoded into."""
    import tracemalloc

    a = np.tile(MAP, (32, 1, 1, 1))
    memory = bytearray(4 * a.nbytes)
    kinds = [a, np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)]
    with contextlib.suppress(ImportError):
        import torch

        kinds.append(torch.from_numpy(a))
    for x in kinds:
        blob = bytes(encode(x, "zvc", threads=1, out=memory))
        tracemalloc.start()
        encode(x, "zvc", threads=1, out=memory)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
        tracemalloc.reset_peak()
        back = decode(blob, threads=1)
        assert tracemalloc.get_traced_memory()[1] < 1.01 * a.nbytes + (1 << 16)  # what is returned, no more
        tracemalloc.stop()
        assert type(back) is type(x) and back.shape == x.shape


def test_copies_at_any_distance_modulo_a_page() -> None:
    a = RNG.integers(0, 256, 9000).astype(np.uint8)
    blob = np.frombuffer(encode(a, "raw"), np.uint8)
    header = _codec.parse_header(blob)
    memory, base = np.zeros(20000, np.uint8), np.zeros(30000, np.uint8)
    for shift in (0, 1, 63, 64, 65, 4095):
        memory[: len(blob)] = blob
        payload = memory.ctypes.data + header.chunk_offsets[0]
        at = (payload + shift - base.ctypes.data) % 4096
        base[:] = 0
        _codec.decode(memory[: len(blob)], header, base[at : at + 9000], True, 1)
        assert (base[at : at + 9000] == a).all() and not base[:at].any() and not base[at + 9000 :].any()


def test_copy_by_threads() -> None:
    a = RNG.integers(0, 256, 5001).astype(np.uint8)
    for n in (1, 63, 64, 128, 5001):
        for threads in (1, 2, 3):
            out = np.zeros(n + 1, np.uint8)
            _codec.copy(a[:n], out[:n], threads)
            assert (out[:n] == a[:n]).all() and out[n] == 0
    with pytest.raises(InputError, match="copy"):
        _codec.copy(a, np.zeros(5000, np.uint8), 1)
    with pytest.raises(InputError, match="threads"):
        _codec.copy(a, np.zeros_like(a), 0)
