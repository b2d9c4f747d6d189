"""``seg``: sparse-exponential-Golomb code of order k (Georgiadis, CVPR 2019, section 3.3).

Zero is the single bit ``1``; x >= 1 is the bit ``0`` followed by the order-k exponential-Golomb
code of x - 1. k makes the map as short as possible; with the option ``per_channel=1`` each channel
has its own, with ``k=...`` it is given.

:func:`code` writes the code of one value, in the order in which a serial decoder reads it:

>>> [code(x, 0) for x in (0, 1, 2, 3, 4)]
['1', '01', '0010', '0011', '000100']
>>> [code(x, 2) for x in (0, 1, 4, 5)]
['1', '0100', '0111', '001000']

In a chunk the three parts of the codes lie in three streams (all zero flags; all prefixes, zeros
closed by a one; all suffixes, least significant bit first), which is what lets a processor decode
many at once. Values 0, 3, 0, 1 with k = 0 have the codes ``1``, ``0 01 1``, ``1``, ``0 1`` (flag,
prefix, suffix):

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([0, 3, 0, 1], np.uint8), codec="seg", bits=2, options={"k": 0})
>>> length, flags, prefixes, suffixes = blob[inspect(blob).header_bytes :]
>>> length  # of the prefixes, in bytes
1
>>> [format(b, "08b")[::-1] for b in (flags, prefixes, suffixes)]
['10100000', '01100000', '10000000']
"""

from __future__ import annotations

NAME = "seg"

__all__ = ["code", "length"]


def code(x: int, k: int) -> str:
    """The SEG-k code of ``x`` >= 0 as a string of bits."""
    from actzip.codec.eg import code as eg

    return "1" if x == 0 else "0" + eg(x - 1, k)


def length(x: int, k: int) -> int:
    """Bits of the SEG-k code of ``x`` >= 0: 1 for zero, k + 2 for 1..2**k, k + 4 for the next
    2**(k+1), ..."""
    from actzip.codec.eg import length as eg

    return 1 if x == 0 else 1 + eg(x - 1, k)
