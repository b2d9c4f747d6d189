"""Zarr 3 codec (array to bytes), so that arrays of format 3 store activation maps with actzip.

Found by Zarr through the entry point ``actzip``; importing ``actzip.codec`` does not import this
module. Arrays of format 2 take the numcodecs codec of :mod:`actzip.codec.numcodecs` instead.

    zarr.create_array(store, shape=..., chunks=..., dtype="u1", serializer=Actzip(codec="seg"),
    compressors=None)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from actzip.codec import numcodecs
from actzip.errors import InputError

__all__ = ["Actzip"]


@dataclass(frozen=True, init=False)
class Actzip(ArrayBytesCodec):  # type: ignore[misc]
    """Lossless coding of an array's chunks by one of actzip's codecs, as that of
    :mod:`actzip.codec.numcodecs`.

    ``codec`` is a name from :func:`actzip.codec.available`. Types that actzip does not code are
    kept as bytes, least significant first.

    Raises:
        InputError: an unknown codec, or another setting; when an array is made, elements without a
            fixed size.
    """

    is_fixed_size = False
    codec: str

    def __init__(self, codec: str = "auto", **settings: Any) -> None:
        numcodecs.check_settings(codec, settings)
        object.__setattr__(self, "codec", codec)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Actzip:
        """The codec of an array's metadata."""
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """What the array's metadata say of it."""
        return {"name": "actzip", "configuration": {"codec": self.codec}}

    def evolve_from_array_spec(self, array_spec: Any) -> Actzip:
        """Refuses what cannot be held, before an array is made; inside shards, too."""
        _native(array_spec.dtype)
        return self

    def validate(self, *, dtype: Any, **_: Any) -> None:
        """The same for Zarr's other question."""
        _native(dtype)

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        a = chunk_array.as_numpy_array().astype(_native(chunk_spec.dtype).newbyteorder("<"), copy=False)
        blob = await asyncio.to_thread(numcodecs.blob_of, a, self.codec)
        return chunk_spec.prototype.buffer.from_bytes(blob)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        dtype, shape = _native(chunk_spec.dtype), tuple(chunk_spec.shape)
        data = chunk_bytes.as_numpy_array()
        a = await asyncio.to_thread(numcodecs.array_of, data, shape, dtype.newbyteorder("<"))
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(a.astype(dtype, copy=False))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not known before encoding.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError


def _native(dtype: Any) -> np.dtype[Any]:
    """numpy's dtype of what Zarr calls one."""
    native: np.dtype[Any] = np.dtype(dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else dtype)
    if native.hasobject:
        raise InputError(
            f"elements of {native} have no fixed size and cannot be held by serializer 'actzip': "
            "take Zarr's own for them, or a dtype of fixed length"
        )
    return native
