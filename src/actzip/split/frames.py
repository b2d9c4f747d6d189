"""What goes over the wire: one frame holds all maps of a cut, coded, with a number and a checksum.

Little-endian: ``AZSF``, version (u8), flags (u8: 1 key frame), number of maps (u16), the split's
mark (8 bytes), sequence number (u32); for each map its kind (u8: 0 as it is, 1 the difference to the
frame before) and length (u32); the maps, each a blob of :mod:`actzip.codec`; CRC-32C of all before
(u32).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from actzip._native import _codec
from actzip.errors import CodecError

__all__ = ["KEY", "VERSION", "Frame", "pack", "unpack"]

MAGIC, VERSION = b"AZSF", 1
KEY = 1
_HEAD = struct.Struct("<4sBBH8sI")
_MAP = struct.Struct("<BI")
_MOST_MAPS = 4096


@dataclass(frozen=True)
class Frame:
    """A frame's parts; ``maps`` are (predicted, blob)."""

    mark: bytes
    sequence: int
    key: bool
    maps: tuple[tuple[bool, bytes | memoryview], ...]


def pack(frame: Frame) -> bytes:
    """The bytes of a frame."""
    head = _HEAD.pack(MAGIC, VERSION, KEY if frame.key else 0, len(frame.maps), frame.mark, frame.sequence)
    table = b"".join(_MAP.pack(predicted, len(blob)) for predicted, blob in frame.maps)
    body = b"".join([head, table, *(bytes(blob) for _, blob in frame.maps)])
    return body + struct.pack("<I", _codec.crc32c(body))


def unpack(data: bytes | bytearray | memoryview) -> Frame:
    """The parts of a frame.

    Raises:
        CodecError: cut off, damaged, of another version, or no frame.
    """
    view = memoryview(data).cast("B")
    if bytes(view[:4]) != MAGIC[: len(view)] or len(view) == 0:
        raise CodecError("frame, byte 0: no frame of a split network: it does not begin with 'AZSF'")
    if len(view) < _HEAD.size + 4:
        raise CodecError(f"frame, byte {len(view)}: it is cut off within its header")
    _, version, flags, count, mark, sequence = _HEAD.unpack_from(view)
    if version != VERSION:
        raise CodecError(f"frame, byte 4: version {version}; this reads version {VERSION}")
    if flags & ~KEY:
        raise CodecError(f"frame, byte 5: flags {flags:#x} are not known")
    at = _HEAD.size + count * _MAP.size
    if not 1 <= count <= _MOST_MAPS or len(view) < at + 4:
        raise CodecError(f"frame, byte 6: {count} maps do not fit into {len(view)} bytes")
    rows = [_MAP.unpack_from(view, _HEAD.size + i * _MAP.size) for i in range(count)]
    if at + sum(size for _, size in rows) + 4 != len(view):
        said = at + sum(size for _, size in rows) + 4
        raise CodecError(f"frame, byte {len(view)}: it says to have {said} bytes; it is cut off or damaged")
    if _codec.crc32c(view[:-4]) != struct.unpack("<I", view[-4:])[0]:
        raise CodecError("frame: its checksum differs: it is damaged")
    maps = []
    for kind, size in rows:
        if kind > 1:
            raise CodecError(f"frame, byte {at}: a map of kind {kind}")
        maps.append((bool(kind), view[at : at + size]))
        at += size
    return Frame(bytes(mark), sequence, bool(flags & KEY), tuple(maps))
