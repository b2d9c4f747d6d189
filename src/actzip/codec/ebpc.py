"""``ebpc``: extended bit-plane compression, as in hardware (Cavigelli et al., arXiv:1908.11645).

A zero run-length stream says where zeros are; the other symbols go in blocks of 8 (option
``block``: 8, 16, 32): the first as it is, then the bit planes of the differences, each xored with
the plane below and coded by the symbol table of the paper (table III a, as in the authors'
encoder). Integers of 1 to 16 bits.

:func:`block_code` writes one block, :func:`zero_code` the zero stream:

>>> zero_code([0, 5, 5, 0, 0, 7])
'0000011000011'
>>> block_code([5, 5, 7, 9, 0, 0, 0, 0], 4).split()
['0101', '00011011', '00010001', '00010001', '00001', '00011011']

Both are in the payload, first bit highest in its byte, after the byte length of the first:

>>> import numpy as np
>>> from actzip.codec import encode, inspect
>>> blob = encode(np.array([0, 5, 5, 0, 0, 7, 9], np.uint8), codec="ebpc", bits=4)
>>> length, *rest = blob[inspect(blob).header_bytes :]
>>> length, [format(byte, "08b") for byte in rest[:2]]
(2, ['00000110', '00011100'])
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

NAME = "ebpc"

__all__ = ["block_code", "zero_code"]


def zero_code(symbols: Sequence[int]) -> str:
    """The zero stream of ``symbols`` as a string of bits: ``1`` for a non-zero, ``0`` and four bits
    for 1..16 zeros."""
    out, i = "", 0
    while i < len(symbols):
        run = 0
        while run < 16 and i + run < len(symbols) and symbols[i + run] == 0:
            run += 1
        out += f"0{run - 1:04b}" if run else "1"
        i += max(run, 1)
    return out


def block_code(block: Sequence[int], bits: int) -> str:
    """The code of a block of ``bits``-bit symbols (8, 16 or 32 of them), spaces between its parts."""
    n = len(block)
    differences = [(b - a) & ((2 << bits) - 1) for a, b in itertools.pairwise(block)]
    parts, before, run = [f"{block[0]:0{bits}b}"], 0, 0
    for p in range(bits + 2):
        plane = int("".join(str(d >> p & 1) for d in differences), 2)
        x = f"{plane ^ before:0{n - 1}b}"
        before = plane
        if p <= bits and "1" not in x:
            run += 1
            continue
        if run:
            length = (bits - 1).bit_length()
            parts.append("01" if run == 1 else "001" + (f"{run - 2:0{length}b}" if length else ""))
            run = 0
        if p > bits:
            break
        place = f"{x.index('1'):0{(n - 1).bit_length()}b}"
        if "0" not in x:
            parts.append("00000")
        elif plane == 0:
            parts.append("00001")
        elif x.strip("0") == "11":
            parts.append("00010" + place)
        elif x.strip("0") == "1":
            parts.append("00011" + place)
        else:
            parts.append("1" + x)
    return " ".join(parts)
