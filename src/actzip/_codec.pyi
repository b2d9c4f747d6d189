"""Native codec of actzip."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """The instruction sets that this CPU can run, best last."""

def force_isa(name: str) -> bool:
    """
    Force an instruction set in this module ('' for the best); False if it cannot run here.
    """

def isa_warning() -> str:
    """What was wrong with ACTZIP_ISA, or ''."""

def cpu_model() -> str:
    """The CPU's own name."""

def cpu_extras() -> list[str]:
    """Features beyond the ladder: AMX, VNNI, bfloat16."""

def default_threads() -> int:
    """Threads used where none are given."""

def count_maps(x: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], image_nonzeros: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], channel_nonzeros: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], position_nonzeros: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], magnitudes: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], zero_runs: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')], bursts: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu')]) -> tuple:
    """
    Adds the counts of maps (images, channels, positions) to the arrays; returns (negatives, max_abs).
    """

def codecs() -> list:
    """The registry: one dict a codec."""

def encode(array: Annotated[NDArray, dict(device='cpu', writable=False)], codec: str, dtype: str, bits: int, signed: bool, scale: float | None, zero: int, channels_last: bool, from_torch: bool, options: Mapping[str, int], chunk_elements: int, threads: int, out: object | None = None) -> object:
    """
    The blob of an array of symbols (uint8, int8, uint16, int16, or uint32 patterns of float32); with `out`, a writable buffer, it is written there and its length returned.
    """

def encode_many(items: Sequence[tuple[Annotated[NDArray, dict(device='cpu', writable=False)], str, int, bool, float | None, bool, bool]], codec: str, options: Mapping[str, int], chunk_elements: int, threads: int, out: Sequence[object] | None = None) -> list:
    """
    The blobs of many arrays, each given as (array, dtype, bits, signed, scale, channels_last, from_torch); with `out`, a writable buffer for each, they are written there and their lengths returned.
    """

def value_range(array: Annotated[NDArray, dict(device='cpu', writable=False)], signed: bool, threads: int = 0) -> tuple:
    """(least, greatest) of an integer array and zero."""

def crc32c(data: object) -> int:
    """CRC-32C of a byte buffer."""

def copy(array: Annotated[NDArray, dict(device='cpu', writable=False)], out: Annotated[NDArray, dict(device='cpu')], threads: int) -> None:
    """
    memcpy of a contiguous array, an equal part a thread: what the codecs' speeds are compared with.
    """

class Header:
    """A parsed and checked header of a blob."""

    def describe(self) -> dict: ...

    @property
    def chunk_sizes(self) -> list[int]: ...

    @property
    def chunk_offsets(self) -> list[int]: ...

    def box(self, chunk: int) -> tuple:
        """
        (first plane, first row, first column, planes, rows, columns) of a chunk.
        """

def parse_header(data: object, total: int | None = None) -> object:
    """
    The header of a blob. With `total`, the length of the whole blob, `data` may be its beginning: returns how many bytes are needed where it is too short.
    """

def decode(data: object, header: Header, out: Annotated[NDArray, dict(device='cpu')], verify: bool = True, threads: int = 0) -> None:
    """Decode a whole blob into an array of symbols of the header's shape."""

def decode_many(blobs: Sequence[object], headers: Sequence[object], outs: Sequence[Annotated[NDArray, dict(device='cpu')]], verify: bool = True, threads: int = 0) -> None:
    """
    Decode many whole blobs, each into an array of symbols of its header's shape.
    """

def decode_chunks(header: Header, chunks: Sequence[int], payloads: Sequence[object], outs: Sequence[Annotated[NDArray, dict(device='cpu')]], verify: bool = True, threads: int = 0) -> None:
    """
    Decode some chunks, each into its own one-dimensional array of symbols.
    """
