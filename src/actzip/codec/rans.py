"""``rans``: the dense codec, a context model and interleaved range asymmetric numeral systems (rANS).

Every symbol becomes a token (zero, or roughly its logarithm) and raw bits. The token is coded with
a static table, chosen by the class of its channel and by the sum of the tokens of its left and
upper neighbour: zeros lie together, and so do large values. Classes and tables are fitted to the
map and lie in the header. Integers of 1 to 16 bits; float16, bfloat16 and float32, where the token
is zero or the exponent and the first mantissa bit, and the rest is raw. Option ``classes``: 1 to 8
classes of channels, 0 (default) to choose.

J. Duda, arXiv:1311.2540 (rANS); F. Giesen, arXiv:1402.3392 (interleaving).

:func:`token` splits an integer symbol:

>>> [token(v, 1) for v in (0, 1, 2, 3, 4, 6, 255)]
[(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 1), (5, 0, 1), (15, 63, 6)]

A chunk begins with the states of its lanes (four at least, of which a short row needs one). Symbols
0 3 0 1 have the frequencies 512, 256, 0, 256 of 1024 in their one table, and no word follows:

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([0, 3, 0, 1], np.uint8), codec="rans", bits=2)
>>> blob[inspect(blob).header_bytes :].hex(" ", 4)
'00254000 00000100 00000100 00000100'
>>> decode_state(0x402500, [512, 256, 0, 256], 10, 4)
([0, 3, 0, 1], 65536)
"""

from __future__ import annotations

from collections.abc import Sequence

NAME = "rans"

__all__ = ["decode_state", "token"]


def token(v: int, fine: int) -> tuple[int, int, int]:
    """Token, raw bits' value and number of raw bits of the integer symbol ``v`` with ``fine`` bits
    in the token."""
    if v < 2 << fine:
        return v, 0, 0
    e = v.bit_length() - 1 - fine
    return ((e + 1) << fine) + (v >> e) - (1 << fine), v & ((1 << e) - 1), e


def decode_state(state: int, frequencies: Sequence[int], precision: int, count: int) -> tuple[list[int], int]:
    """The first ``count`` tokens in a state, all of one table of sum ``2**precision``, and the
    state after them.

    Raises:
        ValueError: the state falls below 2**16, where a decoder reads a word.
    """
    out = []
    for _ in range(count):
        slot, t, first = state % (1 << precision), 0, 0
        while first + frequencies[t] <= slot:
            first += frequencies[t]
            t += 1
        state = frequencies[t] * (state >> precision) + slot - first
        if state < 1 << 16:
            raise ValueError("the state needs a word")
        out.append(t)
    return out, state
