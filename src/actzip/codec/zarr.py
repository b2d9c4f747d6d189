"""Zarr 3 codec (array to bytes), so that arrays of format 3 store activation maps with actzip.

Found by Zarr through the entry point ``actzip``; importing ``actzip.codec`` does not import this module. Arrays of
format 2 take the numcodecs codec of :mod:`actzip.codec.numcodecs` instead.

    zarr.create_array(store, shape=..., chunks=..., dtype="u1", serializer=Actzip(codec="seg"), compressors=None)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

from actzip.codec import numcodecs
from actzip.errors import CodecError

__all__ = ["Actzip"]


@dataclass(frozen=True)
class Actzip(ArrayBytesCodec):  # type: ignore[misc]
    """Lossless coding of an array's chunks by one of actzip's codecs, as that of :mod:`actzip.codec.numcodecs`.

    ``codec`` is a name from :func:`actzip.codec.available`.
    """

    is_fixed_size = False
    codec: str = "auto"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Actzip:
        """The codec of an array's metadata."""
        return cls(**data.get("configuration", {}))

    def to_dict(self) -> dict[str, Any]:
        """What the array's metadata say of it."""
        return {"name": "actzip", "configuration": {"codec": self.codec}}

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        coder = numcodecs.Actzip(self.codec)
        blob = await asyncio.to_thread(coder.encode, chunk_array.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(blob)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        coder = numcodecs.Actzip(self.codec)
        a = await asyncio.to_thread(coder.decode, chunk_bytes.as_numpy_array())
        dtype = chunk_spec.dtype.to_native_dtype()
        if a.dtype != dtype and a.dtype == np.uint8:  # a dtype that actzip keeps as bytes
            a = a.view(dtype)
        shape = tuple(chunk_spec.shape)
        if a.dtype != dtype or a.size != int(np.prod(shape, dtype=np.int64)):
            raise CodecError(
                f"a chunk of {dtype} {shape} is needed, the blob holds {a.dtype} {tuple(a.shape)}"
            )
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(a.reshape(shape))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        """Not known before encoding.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError
