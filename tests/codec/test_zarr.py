"""The seams to numcodecs and Zarr: whatever they store through Zstandard comes back the same
through actzip."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actzip.codec import available, encode
from actzip.errors import CodecError, InputError

numcodecs = pytest.importorskip("numcodecs")
zarr = pytest.importorskip("zarr", "3.0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

import zarr_arrays  # noqa: E402

from actzip.codec.numcodecs import Actzip as Actzip2  # noqa: E402
from actzip.codec.zarr import Actzip as Actzip3  # noqa: E402


def test_random_arrays_read_as_with_zstandard() -> None:
    tally = zarr_arrays.run(250, 1)
    assert tally["equal"] >= 100 and tally["format 2"] >= 20 and tally["format 3"] >= 20


@pytest.mark.parametrize("codec", available())
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8", "c8", ">u2", ">f4", "M8[s]", "S3", ">U2", "?"])
def test_zarr2_fortran_order(dtype: str, codec: str) -> None:
    case = {
        "form": 2,
        "dtype": dtype,
        "shape": (5, 7),
        "chunks": (3, 4),
        "order": "F",
        "codec": codec,
        "shards": None,
    }
    for filters in (None, "delta", "shuffle"):
        tally: Counter[str] = Counter()
        rest = {"filters": filters, "behind": None, "fill": "zero", "empty": True, "density": 0.7, "seed": 3}
        zarr_arrays.check({**case, **rest, "async": False}, tally)
        assert tally["equal"] == 1


@pytest.mark.parametrize("dtype", [">u2", ">i2", ">f2", ">f4", ">f8", ">i8", ">c8", ">M8[ns]", ">U2"])
@pytest.mark.parametrize("form", [2, 3])
def test_big_endian(form: int, dtype: str) -> None:
    a = zarr_arrays.values(np.dtype(dtype), (6, 5), 0.7, 1)
    options = {"compressors": Actzip2()} if form == 2 else {"serializer": Actzip3(), "compressors": None}
    z = zarr.create_array({}, shape=a.shape, chunks=(4, 5), dtype=dtype, zarr_format=form, **options)
    z[...] = a
    got, again = z[...], zarr.open_array(z.store, mode="r")[...]
    assert got.dtype == a.dtype and got.tobytes() == a.tobytes()
    assert again.astype(a.dtype).tobytes() == a.tobytes()


def _strided() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    a = (rng.integers(0, 300, (6, 8, 10)) * (rng.random((6, 8, 10)) < 0.5)).astype("u2")
    mixed = np.zeros((4, 5), [("x", "f4"), ("y", ">u1"), ("z", ">i4", (2,))])
    mixed["x"], mixed["z"] = rng.random((4, 5)), 7
    some = [
        a,
        a[::2],
        a[:, ::-1],
        a.transpose(2, 0, 1),
        mixed,
        mixed["x"],
        mixed["z"],
        mixed.T,
        a[:1, :1, :1],
    ]
    some += [a.astype(t) for t in (">u2", "i4", "f8", ">f4", "c16", "?", "S3", ">U3", "m8[s]")]
    return [
        *some,
        *(np.asfortranarray(x) for x in some),
        np.zeros((0, 4), "f4"),
        np.array(7, ">i2"),
        a[:, :0],
    ]


@pytest.mark.parametrize("codec", available())
def test_every_array_and_its_out(codec: str) -> None:
    coder = Actzip2(codec)
    for a in _strided():
        blob = coder.encode(a)
        out = np.empty_like(a)
        assert coder.decode(blob, out=out) is out
        assert out.tobytes() == a.tobytes()
        back = np.asarray(coder.decode(blob))
        order = "F" if a.flags.f_contiguous else "C"  # how numcodecs compares
        again = back.view(a.dtype).reshape(-1, order="A").reshape(a.shape, order=order)
        assert again.tobytes() == a.tobytes()


def test_out_in_the_other_order_gets_the_values() -> None:
    a = np.arange(12, dtype="u1").reshape(3, 4)
    for given, order in ((np.asfortranarray(a), "C"), (a, "F")):
        out = np.empty((3, 4), "u1", order)
        np.testing.assert_array_equal(Actzip2("seg").decode(Actzip2("seg").encode(given), out=out), a)


def test_buffers_that_are_no_arrays() -> None:
    import array

    for buf in (b"abc\0\0", bytearray(b"xyz"), memoryview(b"q" * 9), array.array("i", [1, 2, 3])):
        assert bytes(Actzip2().decode(Actzip2().encode(buf)).view("u1")) == bytes(buf)


@pytest.mark.parametrize("shards", [None, (4,)])
@pytest.mark.parametrize("dtype", [str, "variable_length_bytes"])
def test_what_cannot_be_held_is_refused_when_the_array_is_made(dtype: Any, shards: Any) -> None:
    store: dict[str, Any] = {}
    with pytest.raises(InputError, match="no fixed size"):
        zarr.create_array(
            store, shape=(4,), chunks=(2,), shards=shards, dtype=dtype, serializer=Actzip3(), compressors=None
        )
    assert not store
    for codec in (Actzip2("raw"), Actzip2("auto")):
        with pytest.raises(InputError, match="object"):
            codec.encode(np.array(["a", None], object))


@pytest.mark.parametrize("kind", [Actzip2, Actzip3])
def test_settings_are_checked_when_the_codec_is_made(kind: Any) -> None:
    with pytest.raises(InputError, match="unknown codec 'nope'"):
        kind("nope")
    for lossy in ({"bits": 4}, {"scale": 0.5}):
        with pytest.raises(InputError, match="quantize before storing"):
            kind("seg", **lossy)
    with pytest.raises(InputError, match="no setting 'level'"):
        kind(level=3)
    with pytest.raises(InputError, match="no setting 'level'"):
        Actzip3.from_dict({"configuration": {"codec": "seg", "level": 3}})
    with pytest.raises(InputError, match="bits"):
        numcodecs.get_codec({"id": "actzip", "bits": 4})


def test_damaged_headers_are_typed_errors() -> None:
    coder = Actzip2("seg")
    good = coder.encode(np.asfortranarray(np.arange(12, dtype=">u2").reshape(3, 4)))
    rng = np.random.default_rng(0)
    for i in range(600):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 1 + i % 3):
            bad[at] = rng.integers(256)
        try:
            coder.decode(bytes(bad))
        except CodecError:
            continue
    for about in (
        {"descr": "|O", "fortran_order": False, "shape": (2,)},
        {"descr": "<u1", "fortran_order": False, "shape": (-2,)},
        {"descr": "<u1", "fortran_order": False, "shape": (2**70,)},
        {"descr": "<u1", "fortran_order": False, "shape": (0, 2**70)},
        {"descr": "<u2", "fortran_order": True, "shape": (3, 5)},
    ):
        head = io.BytesIO()
        np.lib.format.write_array_header_2_0(head, about)
        with pytest.raises(CodecError):
            coder.decode(head.getvalue() + encode(np.zeros(12, "u1"), "raw"))
    for cut in range(0, len(good), 5):
        if cut:
            with pytest.raises(CodecError):
                coder.decode(good[:cut])
