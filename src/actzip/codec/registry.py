"""Which codecs there are: the native registry (csrc/codec/registry.cpp) as Python sees it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from actzip._native import _codec
from actzip.checks import shown
from actzip.errors import InputError

__all__ = ["CodecInfo", "available", "codecs", "get"]


@dataclass(frozen=True)
class CodecInfo:
    """One codec: its id in blobs, its name, what it codes, its options and nominal speeds.

    ``encode_gbps`` and ``decode_gbps`` are (8-bit, 16-bit) nominal speeds in GB/s of the q-bit tensor on one
    core: constants by which ``auto`` chooses when a least speed is asked for, not measurements of
    this machine.
    """

    id: int
    name: str
    summary: str
    integers: bool
    floats: tuple[str, ...]
    options: tuple[str, ...]
    encode_gbps: tuple[float, float]
    decode_gbps: tuple[float, float]

    def takes(self, kind: str) -> bool:
        """Whether it codes ``kind``: ``integers``, or a floating-point dtype's name (losslessly)."""
        return self.integers if kind == "integers" else kind in self.floats


def _load() -> dict[str, CodecInfo]:
    table = {}
    for row in _codec.codecs():
        row = {**row, "floats": tuple(row["floats"]), "options": tuple(row["options"].split())}
        table[row["name"]] = CodecInfo(**row)
    return table


_TABLE = _load()


def codecs() -> dict[str, CodecInfo]:
    """Every codec by name, in order of id. ``auto`` is not among them: it chooses one of them."""
    return dict(_TABLE)


def available() -> list[str]:
    """The names that ``encode`` takes: ``auto`` and those of :func:`codecs`."""
    return ["auto", *_TABLE]


def get(name: str) -> CodecInfo:
    """The codec called ``name``.

    Raises:
        InputError: there is none; the message names the nearest and all there are.
    """
    if not isinstance(name, str) or name not in _TABLE:
        near = difflib.get_close_matches(str(name), available(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown codec {shown(name)}: {hint}there are {', '.join(available())}")
    return _TABLE[name]
