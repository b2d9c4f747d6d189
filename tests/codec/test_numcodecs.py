"""The codec for numcodecs."""

from __future__ import annotations

import numpy as np
import pytest

from actzip.codec import available, codecs, inspect
from actzip.errors import InputError

numcodecs = pytest.importorskip("numcodecs")

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "int32",
    "uint64",
    "float16",
    "float32",
    "float64",
    "S3",
)


@pytest.mark.parametrize("codec", available())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_registry_says_what_a_codec_keeps_as_bytes(codec: str, dtype: str) -> None:
    from actzip.codec.numcodecs import Actzip

    a = np.arange(24).reshape(2, 3, 4).astype(dtype)
    coder = Actzip(codec)
    blob = coder.encode(a)
    back = coder.decode(blob)
    assert back.tobytes() == a.tobytes()
    able = list(codecs().values()) if codec == "auto" else [codecs()[codec]]
    floating = np.issubdtype(a.dtype, np.floating)
    whole = any(dtype in c.floats for c in able) if floating else a.dtype.kind in "bui" and a.itemsize <= 2
    assert inspect(blob).dtype == (dtype if whole else "uint8")


def test_an_unknown_codec_is_refused_by_name() -> None:
    from actzip.codec.numcodecs import Actzip

    for dtype in ("u1", "f4", "f8"):
        with pytest.raises(InputError, match="unknown codec 'sge': did you mean 'seg'"):
            Actzip("sge").encode(np.zeros(4, dtype))
