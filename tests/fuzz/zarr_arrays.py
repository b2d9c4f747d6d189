"""Random Zarr arrays, each beside the same one stored with Zstandard: what is read must be the same bytes.

    python tests/fuzz/zarr_arrays.py --cases 20000 --seed 7

Every dtype that Zarr has, both byte orders and memory orders, chunks that do not divide the shape,
shards, fill values, filters before the codec and compressors behind it, formats 2 and 3, read
whole, in parts, reopened, and by the asynchronous interface. The last line says how many ran, by
kind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import warnings
from collections import Counter
from typing import Any

import numcodecs
import numpy as np
import zarr
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from actzip.codec import available
from actzip.codec.numcodecs import Actzip as Actzip2
from actzip.codec.zarr import Actzip as Actzip3
from actzip.errors import InputError

numcodecs.register_codec(Actzip2)
zarr.registry.register_codec("actzip", Actzip3)

NUMBERS = ["b1", *(k + n for k in "iu" for n in "1248"), "f2", "f4", "f8", "c8", "c16"]
UNITS = ("Y", "M", "D", "h", "s", "ms", "us", "ns", "10s")


def _leaf(text: bool) -> st.SearchStrategy[str]:
    kinds = [
        st.sampled_from(NUMBERS),
        st.builds("{}[{}]".format, st.sampled_from(["M8", "m8"]), st.sampled_from(UNITS)),
        st.integers(1, 9).map("S{}".format),
        st.integers(1, 9).map("V{}".format),
    ]
    if text:
        kinds.append(st.integers(1, 5).map("U{}".format))
    return st.builds("".join, st.tuples(st.sampled_from("<>"), st.one_of(kinds)))


def _fields(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.lists(
        st.sampled_from(["x", "y", "a field", "zero", "é", "n1"]), min_size=1, max_size=3, unique=True
    )
    return names.flatmap(lambda n: st.tuples(*(st.tuples(st.just(x), inner) for x in n)).map(list))


def dtypes() -> st.SearchStrategy[Any]:
    """numpy's descriptions of dtypes, or ``str`` for text of any length."""
    numbers = st.builds("".join, st.tuples(st.sampled_from("<>"), st.sampled_from(NUMBERS)))
    return st.one_of(
        numbers,
        numbers,
        numbers,
        _leaf(True),
        _leaf(True),
        _fields(_leaf(True)),
        _fields(_fields(_leaf(False))),
        st.just("str"),
    )


def values(dtype: np.dtype[Any], shape: tuple[int, ...], density: float, at: int) -> np.ndarray[Any, Any]:
    """Random elements, any pattern of bits that the dtype allows; ``1 - density`` of them zero."""
    rng = np.random.default_rng(at)
    a = np.zeros(shape, dtype)
    on = rng.random(shape) < density
    if dtype.names is not None:
        for i, name in enumerate(dtype.names):
            a[name] = values(dtype[name], shape, density, at + i + 1)
        return a
    n = int(on.sum())
    if dtype.kind == "b":
        a[on] = True
    elif dtype.kind == "U":
        a[on] = [
            "".join(map(chr, rng.integers(1, 0xD800, rng.integers(1, dtype.itemsize // 4 + 1))))
            for _ in range(n)
        ]
    elif dtype.kind == "O":
        a[...] = ""
        a[on] = ["é" * int(k) for k in rng.integers(0, 9, n)]
    else:
        bits = rng.integers(0, 256, (n, dtype.itemsize), np.uint8)
        if dtype.itemsize > 1 and rng.random() < 0.5:  # small numbers, as maps have them
            bits[:, 1:] = 0
        a[on] = bits.view(dtype).reshape(n)
    return a


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """What one array is made of."""
    form = draw(st.sampled_from([2, 3]))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    chunks = tuple(draw(st.integers(1, max(1, n + 2))) for n in shape)
    shards = None
    if form == 3 and shape and draw(st.booleans()):
        shards = tuple(c * draw(st.integers(1, 3)) for c in chunks)
    return {
        "form": form,
        "dtype": draw(dtypes()),
        "shape": shape,
        "chunks": chunks,
        "shards": shards,
        "order": draw(st.sampled_from("CF")),
        "codec": draw(st.sampled_from(available())),
        "filters": draw(
            st.sampled_from([None, None, "delta", "transpose", "shuffle", "astype", "packbits", "round"])
        ),
        "behind": draw(st.sampled_from([None, None, "zstd", "gzip", "crc32c"])),
        "fill": draw(st.sampled_from(["zero", "none", "value"])),
        "empty": draw(st.booleans()),
        "density": draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "async": draw(st.booleans()),
    }


def _filters(case: dict[str, Any], dtype: np.dtype[Any]) -> list[Any] | None:
    kind, name = case["filters"], dtype.kind
    if case["form"] == 3:
        axes = np.random.default_rng(case["seed"]).permutation(len(case["shape"]))
        return (
            [TransposeCodec(order=tuple(int(i) for i in axes))]
            if kind == "transpose" and case["shape"]
            else None
        )
    if dtype.hasobject:
        return [numcodecs.VLenUTF8()]
    if kind == "delta" and name in "iu":
        return [numcodecs.Delta(dtype=dtype)]
    if kind == "shuffle" and dtype.itemsize > 1 and name in "iufcSUVMm":
        return [numcodecs.Shuffle(dtype.itemsize)]
    if kind == "astype" and name in "iu" and dtype.itemsize <= 4:
        return [numcodecs.AsType(encode_dtype=">i8", decode_dtype=dtype)]
    if kind == "packbits" and name == "b":
        return [numcodecs.PackBits()]
    if kind == "round" and name == "f" and dtype.itemsize > 2 and dtype.isnative:
        return [numcodecs.BitRound(keepbits=5)]
    return None


def make(case: dict[str, Any], dtype: np.dtype[Any], fill: Any, ours: bool) -> Any:
    """An empty Zarr array in memory, stored with actzip or with Zstandard."""
    options: dict[str, Any] = {"filters": _filters(case, dtype), "order": case["order"]}
    if case["form"] == 2:
        options["compressors"] = Actzip2(case["codec"]) if ours else numcodecs.Zstd()
    elif ours:
        behind = {"zstd": ZstdCodec(), "gzip": GzipCodec(), "crc32c": Crc32cCodec()}
        options |= {"serializer": Actzip3(case["codec"]), "shards": case["shards"]}
        options["compressors"] = behind.get(case["behind"])
    else:
        options |= {"shards": case["shards"], "compressors": ZstdCodec()}
    return zarr.create_array(
        MemoryStore(),
        shape=case["shape"],
        chunks=case["chunks"],
        dtype=str if case["dtype"] == "str" else dtype,
        zarr_format=case["form"],
        fill_value=fill,
        config={"write_empty_chunks": case["empty"], "order": case["order"]} if case["form"] == 3 else None,
        **options,
    )


def _part(shape: tuple[int, ...], at: int) -> tuple[slice, ...]:
    rng = np.random.default_rng(at)
    return tuple(slice(*sorted(int(i) for i in rng.integers(0, n + 1, 2))) for n in shape)


def _read(z: Any, case: dict[str, Any]) -> list[Any]:
    again = zarr.open_array(z.store, mode="r")
    part = _part(case["shape"], case["seed"] + 1)
    if case["async"]:

        async def both() -> Any:
            return await asyncio.gather(again.async_array.getitem(...), again.async_array.getitem(part))

        return [z[...], *asyncio.run(both())]
    return [z[...], again[...], again[part]]


def _bytes(a: Any) -> tuple[Any, ...]:
    a = np.asarray(a)
    held = a.tolist() if a.dtype.hasobject else np.ascontiguousarray(a).tobytes()
    return a.dtype, a.shape, held


def check(case: dict[str, Any], tally: Counter[str]) -> None:
    """One array: whatever Zarr can do with it through Zstandard, it can do through actzip, or
    refuses when it is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = np.dtype(object) if case["dtype"] == "str" else np.dtype(case["dtype"])
        data = values(dtype, case["shape"], case["density"], case["seed"])
        fill = (
            None
            if case["fill"] == "none"
            else values(dtype, (1,), float(case["fill"] == "value"), case["seed"])[0]
        )
        part = _part(case["shape"], case["seed"] + 2)
        try:
            want = make(case, dtype, fill, False)
            want[...] = data
            want[part] = data[part][::-1] if data.ndim else data
            read = _read(want, case)
            if case["form"] == 3 and dtype.names and not dtype.isnative:
                read = read[
                    :1
                ]  # Zarr itself swaps their bytes, of fill values as well, when it opens them again
        except Exception as e:  # Zarr's own limits
            tally[f"Zarr refuses: {type(e).__name__}: {str(e)[:45]}"] += 1
            return
        try:
            z = make(case, dtype, fill, True)
        except InputError:
            assert dtype.hasobject and case["form"] == 3, f"refused: {case}"
            tally["refused when made"] += 1
            return
        z[...] = data
        z[part] = data[part][::-1] if data.ndim else data
        for a, b in zip(_read(z, case), read):
            assert _bytes(a) == _bytes(b), f"other values than Zstandard's: {case}"
        tally["equal"] += 1
        tally[f"format {case['form']}"] += 1
        tally["structured" if dtype.names else f"kind {dtype.kind}"] += 1
        for name in ("shards", "filters", "behind", "async"):
            tally[name] += bool(case[name])
        tally["Fortran order"] += case["order"] == "F"
        tally["foreign byte order"] += not dtype.isnative


def run(cases: int, start: int) -> Counter[str]:
    """Checks that many arrays; what is wrong is raised, made as small as hypothesis can."""
    tally: Counter[str] = Counter()

    @seed(start)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(arrays())
    def each(case: dict[str, Any]) -> None:
        tally["cases"] += 1
        check(case, tally)

    each()
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    given_ = parser.parse_args()
    print(json.dumps(run(given_.cases, given_.seed), indent=1))
