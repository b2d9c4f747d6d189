"""``zvc``: zero-value compression: a bit a symbol, set where it is not zero, then the symbols that
are not zero.

The fastest, and the runtime's packed layout. It takes floating point as well (a zero is the
all-zero bit pattern).

The symbols 0, 3, 0, 1 of 2 bits are the mask ``0101`` and the values ``11``, ``10`` (least
significant bit first):

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([0, 3, 0, 1], np.uint8), codec="zvc", bits=2)
>>> [format(b, "08b")[::-1] for b in blob[inspect(blob).header_bytes :]]
['01010000', '11100000']
"""

from __future__ import annotations

NAME = "zvc"

__all__ = ["length"]


def length(symbols: int, nonzero: int, bits: int) -> int:
    """Bytes of a chunk's payload."""
    return (symbols + 7) // 8 + (nonzero * bits + 7) // 8
