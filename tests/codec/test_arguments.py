"""What encode and decode are given by mistake ends in an error that says what was wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import odd
from actzip.codec import codecs, decode, decode_many, encode, encode_many, inspect
from actzip.errors import ActzipError, InputError

A = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
BLOB = encode(A, "seg")
FLOATS = {"float16": np.uint16, "float32": np.uint32, "bfloat16": np.uint16}


def test_field_of_records_is_encoded() -> None:
    records = np.zeros((4, 5), [("x", "f4"), ("y", "u1")])
    records["x"] = np.arange(20).reshape(4, 5)
    np.testing.assert_array_equal(decode(encode(records["x"], "raw")), records["x"])


def test_meta_tensor_is_refused() -> None:
    with pytest.raises(InputError, match="no values"):
        encode(torch.empty(3, device="meta"))


def test_blob_with_gaps_is_refused() -> None:
    spread = np.repeat(np.frombuffer(BLOB, np.uint8), 2)[::2]
    for call in (decode, inspect, lambda b: decode_many([b])):
        with pytest.raises(InputError, match="contiguous"):
            call(spread)


def test_rows_that_are_no_slice_are_refused() -> None:
    for which in ((0, 2), 1.0, True, slice("a", None), slice(None, None, 2)):
        with pytest.raises(InputError, match="rows"):
            decode(BLOB, rows=which)
        with pytest.raises(InputError, match="channels"):
            decode(BLOB, channels=which)


def test_values_beyond_float32_are_not_called_infinite() -> None:
    with pytest.raises(InputError, match=r"beyond float32.*1e\+300"):
        encode(np.array([1e300]), "raw", 8)


def test_step_that_vanishes_in_float32_is_refused() -> None:
    for values in (np.ones(3, np.float32), np.ones(3, np.uint8)):
        with pytest.raises(InputError, match="scale"):
            encode(values, "raw", 8, scale=1e-60)


@pytest.mark.parametrize("codec", [c for c in codecs() if codecs()[c].integers])
def test_truth_values_of_any_byte_stay_true(isa: str, codec: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.choice(np.array([0, 0, 1, 2, 128, 255], np.uint8), (3, 40, 41))
    for a in (raw.view(bool), torch.from_numpy(raw.view(bool))):
        back = np.asarray(decode(encode(a, codec)))
        assert back.dtype == bool
        np.testing.assert_array_equal(back.view(np.uint8), (raw != 0).view(np.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_pattern_of_floats_comes_back(dtype: str, data: st.DataObject) -> None:
    """NaNs of every payload, -0.0 and subnormals: bit by bit."""
    width = np.dtype(FLOATS[dtype]).itemsize * 8
    signs = {"float16": 0x8000, "bfloat16": 0x8000, "float32": 0x80000000}[dtype]
    most = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[dtype]
    special = st.sampled_from([0, signs, 1, signs | 1, most, signs | most, most | 1, signs | most | 5])
    one = st.one_of(special, st.integers(0, 2**width - 1))
    raw = np.array(data.draw(st.lists(one, min_size=1, max_size=200)), FLOATS[dtype])
    raw = np.tile(raw, data.draw(st.sampled_from([1, 7, 130])))
    if dtype == "bfloat16":
        a: Any = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    else:
        a = raw.view(dtype)
    for name, codec in codecs().items():
        if codec.takes(dtype):
            back = decode(encode(a, name))
            same = back.view(torch.int16).numpy() if dtype == "bfloat16" else back
            assert same.tobytes() == raw.tobytes(), name


ENCODE = ["tensor", "codec", "bits", "scale", "signed", "options", "min_speed", "chunk_elements", "threads"]
DECODE = ["blob", "chunks", "channels", "rows", "dequantize", "framework", "verify", "threads"]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("good", [A, A.astype(np.float32)], ids=["integers", "floats"])
def test_odd_arguments_of_encode(many: bool, good: Any) -> None:
    f = encode_many if many else encode
    fine = {"tensors" if many else "tensor": [good] if many else good, "codec": "seg", "bits": 8}
    names = [*fine, "out", *(n for n in ENCODE if n not in ("tensor", *fine))]
    found = {**odd.plain(), **odd.tensors()}
    calls = [
        (f"{n}={kind}", lambda n=n, v=v: f(**{**fine, n: v})) for n in names for kind, v in found.items()
    ]
    if many:
        calls += [(f"[{kind}]", lambda v=v: encode_many([good, v])) for kind, v in found.items()]
    assert list(odd.untyped(calls)) == []


@pytest.mark.parametrize("many", [False, True])
def test_odd_arguments_of_decode(many: bool) -> None:
    f = decode_many if many else decode
    fine = {"blobs" if many else "blob": [BLOB] if many else BLOB}
    names = [*fine, *(n for n in DECODE if n not in ("blob", *(DECODE[1:4] if many else ())))]
    found = {**odd.plain(), **odd.tensors()}
    calls = [
        (f"{n}={kind}", lambda n=n, v=v: f(**{**fine, n: v})) for n in names for kind, v in found.items()
    ]
    if many:
        calls += [(f"[{kind}]", lambda v=v: decode_many([BLOB, v])) for kind, v in found.items()]
    assert list(odd.untyped(calls)) == []


def test_wrong_options_name_the_option() -> None:
    for options in ({"nope": 1}, {"k": "a"}, {1: 1}, [1]):
        with pytest.raises(ActzipError):
            encode(A, "seg", options=options)
