"""Files of many maps: written as a stream, read by name, by slice and in order; damage is found and named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from actzip.codec import MapReader, MapWriter, encode, iter_maps, load_maps, save_maps
from actzip.errors import CodecError, DataError, InputError


@pytest.fixture
def maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"block{i}.relu": (
            rng.integers(0, 99, (2, 8, 5 + i, 7)) * (rng.random((2, 8, 5 + i, 7)) < 0.4)
        ).astype("u1")
        for i in range(4)
    } | {"ünïcode": rng.standard_normal((3, 4)).astype("f4")}


def test_round_trip(tmp_path: Path, maps: dict[str, np.ndarray]) -> None:
    path = tmp_path / "maps.azm"
    save_maps(path, maps, metadata={"network": "toy"})
    back = load_maps(path)
    assert list(back) == list(maps)
    for name, a in maps.items():
        np.testing.assert_array_equal(back[name], a)
    with MapReader(path) as reader:
        assert reader.metadata == {"network": "toy"} and len(reader) == 5 and "ünïcode" in reader
        np.testing.assert_array_equal(
            reader.decode("block1.relu", channels=slice(2, 4), rows=slice(1, 3)),
            maps["block1.relu"][:, 2:4, 1:3],
        )
        assert reader.inspect("block0.relu").shape == (2, 8, 5, 7)
        with pytest.raises(InputError, match=r"block0\.relu"):
            reader.decode("block0.rel")
        with pytest.raises(KeyError):
            reader["nothing"]
    assert [p.name for p in tmp_path.iterdir()] == ["maps.azm"]


class Pipe(io.RawIOBase):
    """A stream that gives a few bytes at a time and cannot seek."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def read(self, n: int = -1) -> bytes:
        part = self._data[self._at : self._at + min(n, 7)]
        self._at += len(part)
        return part


def test_streams(maps: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    save_maps(file, maps)
    data = file.getvalue()
    got = dict(iter_maps(Pipe(data)))
    assert list(got) == list(maps)
    # cut anywhere: what was complete comes out, then an error that names the place
    for cut in (0, 5, 11, 12, 13, 30, 80, len(data) // 2):
        seen = {}
        with pytest.raises(CodecError, match="byte"):
            for name, a in iter_maps(io.BytesIO(data[:cut])):
                seen[name] = a
        for name, a in seen.items():
            np.testing.assert_array_equal(a, maps[name])


def test_damage_is_refused(tmp_path: Path, maps: dict[str, np.ndarray]) -> None:
    path = tmp_path / "a.azm"
    save_maps(path, maps)
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    path.write_bytes(b"")
    with pytest.raises(CodecError):
        MapReader(path)
    refused = 0
    for _ in range(300):
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path.write_bytes(bad[: rng.integers(len(bad)) if rng.random() < 0.3 else len(bad)])
        try:
            back = load_maps(path)
        except CodecError:
            refused += 1
        else:  # the change was in a record's frame, which reading by the index does not need
            assert list(back) == list(maps)
            for name, a in maps.items():
                np.testing.assert_array_equal(back[name], a)
    assert refused > 200


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.azm"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), MapWriter(path) as out:
        out.add("x", np.zeros(5, np.uint8))
        raise RuntimeError
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(DataError):
        MapWriter(tmp_path / "no" / "folder.azm")
    with MapWriter(io.BytesIO()) as out:
        out.add("x", np.zeros(5, np.uint8))
        for name in ("x", "", "n" * 5000):
            with pytest.raises(InputError):
                out.add(name, np.zeros(5, np.uint8))
        with pytest.raises(CodecError):
            out.add_blob("y", b"no blob")


def test_zarr_and_numcodecs(tmp_path: Path) -> None:
    numcodecs = pytest.importorskip("numcodecs")
    from actzip.codec.numcodecs import Actzip

    numcodecs.register_codec(Actzip)
    codec = numcodecs.get_codec({"id": "actzip", "codec": "seg"})
    rng = np.random.default_rng(0)
    for a in (
        rng.integers(0, 200, (4, 9, 9)).astype("u1"),
        rng.standard_normal((4, 5)).astype("f4"),
        rng.standard_normal((4, 5)),
        rng.integers(0, 2**60, 10),
        np.asfortranarray(rng.integers(0, 9, (4, 6, 5)).astype("i2")),
        np.zeros((0, 3), "u1"),
    ):
        back = codec.decode(codec.encode(a))
        assert back.tobytes() == np.ascontiguousarray(a).tobytes()
        out = np.empty(a.shape, a.dtype)
        if a.size:
            codec.decode(codec.encode(a), out=out)
            np.testing.assert_array_equal(out, a)
    assert codec.get_config() == {"id": "actzip", "codec": "seg"}


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "f8"])
def test_inside_a_zarr_array(tmp_path: Path, form: int, dtype: str) -> None:
    zarr = pytest.importorskip("zarr", "3.0")
    if form == 2:
        from actzip.codec.numcodecs import Actzip

        options = {"compressors": Actzip(codec="auto")}
    else:
        from actzip.codec.zarr import Actzip

        zarr.registry.register_codec("actzip", Actzip)
        options = {"serializer": Actzip(codec="auto"), "compressors": None}
    rng = np.random.default_rng(0)
    data = (rng.integers(0, 100, (10, 8, 9)) * (rng.random((10, 8, 9)) < 0.4)).astype(dtype)
    where = str(tmp_path / "z.zarr")
    z = zarr.create_array(
        store=where, shape=data.shape, chunks=(4, 8, 8), dtype=dtype, zarr_format=form, **options
    )
    z[:] = data
    again = zarr.open_array(where, mode="r")
    np.testing.assert_array_equal(again[:], data)
    np.testing.assert_array_equal(again[3:7, 2, 5:], data[3:7, 2, 5:])
    kept = [p for p in Path(where).rglob("*") if p.is_file() and p.read_bytes()[:4] == b"ACTZ"]
    assert len(kept) == 6
    kept[0].write_bytes(kept[1].read_bytes()[:-3])
    with pytest.raises(CodecError, match="byte"):
        again[:]


def test_a_chunk_of_another_array_is_refused(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", "3.0")
    from actzip.codec.zarr import Actzip

    zarr.registry.register_codec("actzip", Actzip)
    where = tmp_path / "z.zarr"
    z = zarr.create_array(
        store=str(where), shape=(4, 4), chunks=(4, 4), dtype="u2", serializer=Actzip("seg"), compressors=None
    )
    z[:] = 1
    (chunk,) = [p for p in where.rglob("*") if p.is_file() and p.read_bytes()[:4] == b"ACTZ"]
    for wrong in (np.zeros((4, 4), np.float32), np.zeros((4, 5), np.uint16)):
        chunk.write_bytes(encode(wrong, "zvc"))
        with pytest.raises(CodecError, match=r"uint16 \(4, 4\) is needed"):
            z[:]


def test_entry_point_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib")

    root = Path(__file__).resolve().parents[2]
    text = (root / "pyproject.toml").read_text()
    points = tomllib.loads(text)["project"]["entry-points"]
    assert points["numcodecs.codecs"]["actzip"] == "actzip.codec.numcodecs:Actzip"
    assert points["zarr.codecs"]["actzip"] == "actzip.codec.zarr:Actzip"
