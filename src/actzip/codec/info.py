"""What a blob says of itself without being decoded: its header and where its chunks lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from actzip._native import _codec
from actzip.errors import InputError

__all__ = ["Chunk", "Info", "chunks", "info_of", "inspect", "read_header"]


@dataclass(frozen=True)
class Info:
    """What a blob's header says.

    ``shape`` is the array's, ``dtype`` what :func:`~actzip.codec.decode` returns;
    ``bits``/``signed`` are those of the coded integers, ``scale`` the quantizer's step or None.
    ``chunk_shape`` is (planes, rows, columns).
    """

    version: int
    codec: str
    dtype: str
    bits: int
    signed: bool
    scale: float | None
    zero: int
    shape: tuple[int, ...]
    channels_last: bool
    from_torch: bool
    elements: int
    chunk_shape: tuple[int, int, int]
    chunk_bytes: tuple[int, ...]
    header_bytes: int
    params: bytes = field(repr=False)

    @property
    def total_bytes(self) -> int:
        """Length of the blob."""
        return self.header_bytes + sum(self.chunk_bytes)

    @property
    def bits_per_element(self) -> float:
        """Bits of the blob, header included, per element."""
        return 8 * self.total_bytes / max(self.elements, 1)

    @property
    def gain_float32(self) -> float:
        """Compression gain: bits of the float32 array / bits of the blob, header included."""
        return 32 / self.bits_per_element

    @property
    def gain(self) -> float:
        """Compression gain against the q-bit array."""
        return self.bits / self.bits_per_element

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        d = asdict(self)
        d["params"] = self.params.hex()
        d |= {"total_bytes": self.total_bytes, "bits_per_element": self.bits_per_element}
        d |= {"gain": self.gain, "gain_float32": self.gain_float32}
        return d


def inspect(blob: Any) -> Info:
    """What the header of a blob says; only the header is read and checked.

    Raises:
        CodecError: the header is damaged or of an unknown version.
    """
    return info_of(read_header(blob))


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in the map (as planes x rows x columns) and in the blob."""

    index: int
    offset: int
    bytes: int
    first_plane: int
    first_row: int
    first_col: int
    planes: int
    rows: int
    cols: int

    @property
    def bits_per_element(self) -> float:
        """Bits of the chunk's payload per element."""
        return 8 * self.bytes / (self.planes * self.rows * self.cols)


def chunks(blob: Any) -> list[Chunk]:
    """The chunks of a blob, in order; see ``decode(blob, chunks=...)``."""
    h = read_header(blob)
    sizes, offsets = h.chunk_sizes, h.chunk_offsets
    return [Chunk(i, offsets[i], sizes[i], *h.box(i)) for i in range(len(sizes))]


def read_header(blob: Any) -> Any:
    """The native header of a blob.

    Raises:
        CodecError: it is damaged or of an unknown version.
        InputError: ``blob`` is no buffer.
    """
    _check_buffer(blob)
    return _codec.parse_header(blob)


def _check_buffer(blob: Any) -> None:
    try:
        view = memoryview(blob)
    except (TypeError, ValueError, BufferError):
        raise InputError(f"a blob is bytes or a buffer, not {type(blob).__name__}") from None
    if not view.c_contiguous:
        raise InputError("the blob's buffer has gaps: a contiguous one is needed, bytes(...) makes it")


def info_of(h: Any) -> Info:
    """What the native header ``h`` says."""
    d = h.describe()
    return Info(
        version=d["version"],
        codec=d["codec"],
        dtype=d["dtype"],
        bits=d["bits"],
        signed=d["signed"],
        scale=d["scale"],
        zero=d["zero"],
        shape=tuple(d["shape"]),
        channels_last=d["channels_last"],
        from_torch=d["from_torch"],
        elements=d["elements"],
        chunk_shape=d["chunk_shape"],
        chunk_bytes=tuple(h.chunk_sizes),
        header_bytes=d["header_bytes"],
        params=d["params"],
    )
