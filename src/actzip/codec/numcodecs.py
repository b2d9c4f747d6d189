"""numcodecs codec, so that Zarr arrays (and everything that numcodecs serves) store activation maps
with actzip.

Found by numcodecs through the entry point ``actzip``; importing ``actzip.codec`` does not import this module.

>>> import numpy as np
>>> codec = Actzip(codec="seg")
>>> a = np.zeros((4, 8, 8), np.uint8)
>>> bool((codec.decode(codec.encode(a)) == a).all())
True
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ensure_ndarray, ndarray_copy

from actzip.codec import arrays, registry
from actzip.codec.decode import decode
from actzip.codec.encode import encode
from actzip.errors import CodecError, InputError

__all__ = ["Actzip", "array_of", "blob_of"]

_NARROW = ("bool", "uint8", "int8", "uint16", "int16")
"""Integers no value of which is too wide to be coded."""

_NPY = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes: what numpy reads without being told that the file is trusted


class Actzip(Codec):  # type: ignore[misc]
    """Lossless compression of an array's chunks by one of actzip's codecs.

    ``codec`` is a name from :func:`actzip.codec.available`; the blob keeps shape and dtype. Types
    that actzip does not code (float64, complex, strings, 64-bit integers, structures ...), and
    floating point with a codec of integers, are kept as their bytes and come back as such. What a
    blob cannot say (Fortran order, foreign byte order, no elements) stands before it as a header of
    the ``.npy`` format, and the array comes back as it was.

    Raises:
        InputError: an unknown codec, or another setting: ``bits`` would lose information, so
            quantize before storing.
    """

    codec_id = "actzip"

    def __init__(self, codec: str = "auto", **settings: Any) -> None:
        check_settings(codec, settings)
        self.codec = codec

    def encode(self, buf: Any) -> bytes:
        """The bytes that :meth:`decode` makes the array or buffer ``buf`` of, whatever its strides.

        Raises:
            InputError: elements that are Python objects.
        """
        a = ensure_ndarray(buf)
        if a.dtype.hasobject:
            raise _ObjectsError(
                f"object arrays are not supported, nor is {a.dtype}: put an object codec before"
            )
        fortran = a.flags.f_contiguous and not a.flags.c_contiguous
        head = b""
        if fortran or not a.dtype.isnative or not a.nbytes:
            a = a.view(np.dtype(np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(a.dtype))))
            head = _header(a, fortran)
        return head + blob_of(a.T if fortran else a, self.codec) if a.nbytes else head

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array of :meth:`encode`, or of any blob; copied into ``out`` where that is given.

        An ``out`` of another shape or dtype takes the memory as it is, as numcodecs' codecs do.

        Raises:
            CodecError: damaged bytes.
        """
        data = ensure_contiguous_ndarray(buf).view(np.uint8)
        a = _described(data) if data[:6].tobytes() == _NPY else _plain(data)
        if out is None:
            return a
        if isinstance(out, np.ndarray) and (out.shape, out.dtype) == (a.shape, a.dtype):
            np.copyto(out, a)
            return out
        return ndarray_copy(a, out)

    def __repr__(self) -> str:
        return f"Actzip(codec={self.codec!r})"


class _ObjectsError(InputError, TypeError):
    """numcodecs' codecs raise TypeError for arrays of objects."""


def check_settings(codec: Any, settings: dict[str, Any]) -> None:
    """Refuses what Zarr's metadata may not say of a codec.

    Raises:
        InputError: an unknown codec, or any setting.
    """
    if codec != "auto":
        registry.get(codec)
    if settings:
        names = ", ".join(map(repr, settings))
        lossy = "" if settings.keys().isdisjoint({"bits", "scale", "signed"}) else "; quantize before storing"
        raise InputError(f"codec 'actzip' has no setting {names}: it has 'codec' and loses nothing{lossy}")


def blob_of(a: np.ndarray[Any, Any], codec: str) -> bytes:
    """The blob of the values of ``a`` in C order; where actzip does not code the type, of its bytes."""
    if _takes(codec, a.dtype):
        return encode(np.ascontiguousarray(a if a.ndim <= 16 else a.reshape(-1)), codec)
    return encode(np.ascontiguousarray(a).reshape(-1).view(np.uint8), codec)


def array_of(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The array of :func:`blob_of`, of a known shape and dtype.

    Raises:
        CodecError: damaged bytes, or a blob of something else.
    """
    a = decode(data, framework="numpy")
    elements = math.prod(shape)
    if a.dtype.newbyteorder("=") == dtype.newbyteorder("=") and a.size == elements:
        return np.ascontiguousarray(a).astype(dtype, copy=False).reshape(shape)
    if a.dtype == np.uint8 and a.size == elements * dtype.itemsize:  # a type that actzip keeps as bytes
        return np.ascontiguousarray(a).reshape(-1).view(dtype).reshape(shape)
    raise CodecError(f"a chunk of {dtype} {shape} is needed, the blob holds {a.dtype} {tuple(a.shape)}")


def _takes(codec: str, dtype: np.dtype[Any]) -> bool:
    """Whether the codec, or with ``auto`` any, codes every array of this dtype as it is."""
    floating = dtype.name in arrays.FLOATS
    if not floating and dtype.name not in _NARROW:
        return False
    able = registry.codecs().values() if codec == "auto" else [registry.get(codec)]
    return any(c.takes(dtype.name if floating else "integers") for c in able)


def _header(a: np.ndarray[Any, Any], fortran: bool) -> bytes:
    """What a blob does not say of ``a``; nothing where no reader could take it in: then the bytes
    come back."""
    file = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(a.dtype), "fortran_order": fortran, "shape": a.shape}
    try:
        np.lib.format.write_array_header_2_0(file, about)
    except UnicodeEncodeError:  # names of fields
        return b""
    return file.getvalue() if file.tell() <= _MAX_HEADER else b""


def _described(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array of a header and a blob."""
    file = io.BytesIO(data[: _MAX_HEADER + 16].tobytes())
    try:
        if np.lib.format.read_magic(file) != (2, 0):
            raise ValueError("another version than 2.0")
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file, max_header_size=_MAX_HEADER)
        if dtype.hasobject or any(n < 0 for n in shape):
            raise ValueError(f"an array of {dtype} {shape}")
        if not math.prod(shape) * dtype.itemsize:
            return np.empty(shape, dtype, "F" if fortran else "C")
    except Exception as e:  # numpy parses a Python literal: what is raised then is not told
        raise CodecError(f"the header before the blob is damaged: {e}") from None
    a = array_of(data[file.tell() :], shape[::-1] if fortran else shape, dtype)
    return a.T if fortran else a


def _plain(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    a: np.ndarray[Any, Any] = decode(data, framework="numpy") if data.size else np.empty(0, np.uint8)
    return a
