"""``eg``: exponential-Golomb code of order k, without SEG's flag for zero: what SEG is compared with.

The code of x is the binary number x + 2**k, preceded by as many zeros as it has bits beyond k + 1:

>>> [code(x, 0) for x in (0, 1, 2, 3)]
['1', '010', '011', '00100']
>>> [code(x, 1) for x in (0, 1, 2)]
['10', '11', '0100']

In a chunk all prefixes (zeros closed by the leading one) come first, then all suffixes, least significant bit
first. Values 2, 0 with k = 0 have the codes ``01 1`` and ``1`` (prefix, suffix):

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([2, 0], np.uint8), codec="eg", bits=2, options={"k": 0})
>>> length_of_prefixes, prefixes, suffixes = blob[inspect(blob).header_bytes :]
>>> [format(b, "08b")[::-1] for b in (prefixes, suffixes)]
['01100000', '10000000']
"""

from __future__ import annotations

NAME = "eg"

__all__ = ["code", "length"]


def code(x: int, k: int) -> str:
    """The order-k exponential-Golomb code of ``x`` >= 0 as a string of bits."""
    binary = format(x + (1 << k), "b")
    return "0" * (len(binary) - k - 1) + binary


def length(x: int, k: int) -> int:
    """Bits of the order-k exponential-Golomb code of ``x`` >= 0."""
    return 2 * (x + (1 << k)).bit_length() - k - 1
