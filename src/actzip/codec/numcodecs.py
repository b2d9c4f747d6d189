"""numcodecs codec, so that Zarr arrays (and everything that numcodecs serves) store activation maps with actzip.

Found by numcodecs through the entry point ``actzip``; importing ``actzip.codec`` does not import this module.

>>> import numpy as np
>>> codec = Actzip(codec="seg")
>>> a = np.zeros((4, 8, 8), np.uint8)
>>> bool((codec.decode(codec.encode(a)) == a).all())
True
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ensure_ndarray, ndarray_copy

from actzip.codec import arrays, registry
from actzip.codec.decode import decode
from actzip.codec.encode import encode

__all__ = ["Actzip"]

_NARROW = ("bool", "uint8", "int8", "uint16", "int16")
"""Integers no value of which is too wide to be coded."""


class Actzip(Codec):  # type: ignore[misc]
    """Lossless compression of an array's chunks by one of actzip's codecs.

    ``codec`` is a name from :func:`actzip.codec.available`; the blob keeps shape and dtype. Chunks that are
    bytes, or of a dtype that actzip does not code (float64, strings, 64-bit values beyond 16 bits ...), are
    kept as unsigned bytes. ``bits`` would lose information and is refused: quantize before storing.
    """

    codec_id = "actzip"

    def __init__(self, codec: str = "auto") -> None:
        self.codec = codec

    def encode(self, buf: Any) -> bytes:
        """The blob of an array or buffer."""
        a = ensure_ndarray(buf)
        if a.size == 0:
            return b""
        if not self._takes(a.dtype):
            a = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        return encode(a, self.codec)

    def _takes(self, dtype: np.dtype[Any]) -> bool:
        """Whether the codec, or with ``auto`` any, codes every array of this dtype as it is."""
        floating = dtype.name in arrays.FLOATS
        if not floating and dtype.name not in _NARROW:
            return False
        able = registry.codecs().values() if self.codec == "auto" else [registry.get(self.codec)]
        return any(c.takes(dtype.name if floating else "integers") for c in able)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """The array of a blob; copied into ``out`` where that is given."""
        data = ensure_contiguous_ndarray(buf)
        a = decode(data, framework="numpy") if data.nbytes else np.empty(0, np.uint8)
        return ndarray_copy(a, out) if out is not None else a

    def __repr__(self) -> str:
        return f"Actzip(codec={self.codec!r})"
