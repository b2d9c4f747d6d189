"""``huffman``: canonical Huffman code of at most 12 bits, one table a map, the best of all such
codes (package-merge).

Symbols of more than 8 bits are coded as a magnitude class (:func:`split`) and raw low bits.

Of the symbols 0, 0, 0, 5, 2 the most frequent has the code ``0``, the others ``10`` (2) and ``11``
(5). A chunk has four streams of a quarter of the symbols each, here ``0 0``, ``0 11``, ``10`` and
nothing:

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([0, 0, 0, 5, 2], np.uint8), codec="huffman", bits=3)
>>> data = blob[inspect(blob).header_bytes :]
>>> list(data[:3]), [format(b, "08b")[::-1] for b in data[3:]]
([1, 1, 1], ['00000000', '01100000', '10000000'])
>>> split(5, 8), split(5, 16), split(200, 16)
((5, 0, 0), (5, 0, 0), (44, 8, 4))
"""

from __future__ import annotations

NAME = "huffman"

__all__ = ["split"]


def split(x: int, bits: int) -> tuple[int, int, int]:
    """(class, raw bits as a number, how many of them) of a symbol of ``bits`` bits."""
    if bits <= 8 or x < 16:
        return x, 0, 0
    n = x.bit_length()
    raw = n - 4
    return 16 + 8 * (n - 5) + (x >> raw & 7), x & ((1 << raw) - 1), raw
