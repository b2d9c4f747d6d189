"""A file of many named maps (``.azm``): written as a stream, read by name, slice or in order.

The layout is in docs/bitstream.md, section "File of maps": records of (name, blob) one after another, then an
index, then a footer that points at it. A file that was cut off still gives what was complete through
:func:`iter_maps`, which reads from any stream and needs no index.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from actzip._native import _codec
from actzip.codec.decode import decode
from actzip.codec.encode import encode
from actzip.codec.info import Info, inspect
from actzip.errors import CodecError, DataError, InputError
from actzip.files import Target

__all__ = ["MapReader", "MapWriter", "is_map_file", "iter_maps", "load_maps", "save_maps"]

_BEGIN = b"ACTZMAPS"
_END = b"ACTZMAPE"
_VERSION = 1
_MAX_NAME = 4096
_RECORD, _INDEX = b"M", b"I"


class MapWriter:
    """Writes named maps to ``target``, a path or a binary stream, one after another, in constant memory.

    A path is written under a temporary name and renamed when the ``with`` block ends without an
    error; otherwise nothing is left. ``defaults`` are keyword arguments for every
    :func:`~actzip.codec.encode`.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> with MapWriter(file, codec="seg") as out:
    ...     out.add("conv1", np.zeros((1, 2, 3, 3), np.uint8))
    ...     out.add("conv2", np.ones((1, 4, 2, 2), np.uint8))
    >>> [(name, array.shape) for name, array in iter_maps(io.BytesIO(file.getvalue()))]
    [('conv1', (1, 2, 3, 3)), ('conv2', (1, 4, 2, 2))]
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | IO[bytes],
        *,
        metadata: Mapping[str, str] | None = None,
        **defaults: Any,
    ) -> None:
        self._defaults = defaults
        self._metadata = dict(metadata or {})
        if any(not isinstance(k, str) or not isinstance(v, str) for k, v in self._metadata.items()):
            raise InputError("metadata: names and values must be strings")
        self._entries: list[tuple[str, int, int]] = []
        self._names: set[str] = set()
        self._target = Target(target) if isinstance(target, (str, os.PathLike)) else None
        self._file: IO[bytes] = self._target.file if self._target else target  # type: ignore[assignment]
        self._at = 0
        self._closed = False
        self._write(_BEGIN + struct.pack("<I", _VERSION))

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as e:
            where = self._target.path if self._target else "the stream"
            raise DataError(f"cannot write {where}: {e.strerror or e}") from e
        self._at += len(data)

    def add(self, name: str, tensor: Any, **options: Any) -> None:
        """Encode ``tensor`` and append it under ``name``, which must be new and 1 to 4096 bytes
        long in UTF-8."""
        self.add_blob(name, encode(tensor, **{**self._defaults, **options}))

    def add_blob(self, name: str, blob: bytes) -> None:
        """Append a blob made before."""
        if self._closed:
            raise InputError("the file is closed")
        key = name.encode("utf-8")
        if not 1 <= len(key) <= _MAX_NAME:
            raise InputError(f"a map's name has 1 to {_MAX_NAME} bytes, not {len(key)}")
        if name in self._names:
            raise InputError(f"there is already a map called {name!r}")
        inspect(blob)
        self._write(_RECORD + struct.pack("<I", len(key)) + key + struct.pack("<Q", len(blob)))
        self._entries.append((name, self._at, len(blob)))
        self._names.add(name)
        self._write(blob)

    def close(self) -> None:
        """Write the index and, for a path, rename the file into place."""
        if self._closed:
            return
        self._closed = True
        try:
            index = json.dumps(
                {"maps": self._entries, "metadata": self._metadata}, separators=(",", ":")
            ).encode()
            start = self._at
            self._write(_INDEX + struct.pack("<Q", len(index)) + index)
            self._write(struct.pack("<IQ", _codec.crc32c(index), start) + _END)
            if self._target is not None:
                self._target.commit()
        finally:
            self._discard()

    def _discard(self) -> None:
        if self._target is not None:
            self._target.discard()

    def __enter__(self) -> MapWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._closed = True
            self._discard()


class MapReader(Mapping[str, Any]):
    """Reads a file of maps by name: a mapping whose values are decoded when asked for.

    The file is mapped into memory: a channel or row slice touches only the chunks that hold it.

    Raises:
        DataError: the file cannot be opened. CodecError: it is not a file of maps, or it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                self._map: Any = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as e:
            raise DataError(f"cannot read {self.path}: {e.strerror or e}") from e
        self._data = memoryview(self._map)
        try:
            self._entries, self.metadata = self._index()
        except CodecError:
            self.close()
            raise

    def _fail(self, at: int, why: str) -> CodecError:
        return CodecError(f"{self.path}, byte {at}: {why}")

    def _index(self) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        d, n = self._data, len(self._data)
        if bytes(d[:8]) != _BEGIN:
            raise self._fail(0, "not a file of maps: it does not begin with 'ACTZMAPS'")
        if n < 12 + 9 + 20:
            raise self._fail(n, "the file is truncated")
        version = struct.unpack_from("<I", d, 8)[0]
        if version != _VERSION:
            raise self._fail(8, f"version {version}; this reads version {_VERSION}")
        if bytes(d[n - 8 :]) != _END:
            raise self._fail(n, "the file is truncated: it has no footer (iter_maps reads what is complete)")
        crc, start = struct.unpack_from("<IQ", d, n - 20)
        if not 12 <= start <= n - 29 or bytes(d[start : start + 1]) != _INDEX:
            raise self._fail(n - 16, f"the footer points at byte {start}, where there is no index")
        length = struct.unpack_from("<Q", d, start + 1)[0]
        if start + 9 + length != n - 20:
            raise self._fail(start + 1, f"the index claims {length} bytes")
        raw = bytes(d[start + 9 : start + 9 + length])
        if _codec.crc32c(raw) != crc:
            raise self._fail(start + 9, "checksum mismatch: the index was altered")
        try:
            index = json.loads(raw)
            metadata = {str(k): str(v) for k, v in index["metadata"].items()}
            entries: dict[str, tuple[int, int]] = {}
            for name, at, size in index["maps"]:
                if type(at) is not int or type(size) is not int or not 12 <= at <= at + size <= start:
                    raise self._fail(start + 9, f"map {name!r} lies outside the file")
                entries[str(name)] = (at, size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise e if isinstance(e, CodecError) else self._fail(start + 9, f"bad index: {e}") from None
        return entries, metadata

    def blob(self, name: str) -> memoryview:
        """The bytes of a map, not copied: valid until the reader is closed."""
        if name not in self._entries:
            import difflib

            near = difflib.get_close_matches(name, list(self._entries), 3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise InputError(f"{self.path} has no map called {name!r}{hint}")
        at, size = self._entries[name]
        return self._data[at : at + size]

    def inspect(self, name: str) -> Info:
        """What a map's header says."""
        with self.blob(name) as blob:
            return inspect(blob)

    def decode(self, name: str, **options: Any) -> Any:
        """:func:`~actzip.codec.decode` of a map, with its options."""
        with self.blob(name) as blob:
            try:
                return decode(blob, **options)
            except CodecError as e:
                raise CodecError(f"{self.path}, map {name!r}: {e}") from None

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise KeyError(name)
        return self.decode(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Let go of the file; views given by :meth:`blob` keep it open until they go."""
        try:
            self._data.release()
            if isinstance(self._map, mmap.mmap):
                self._map.close()
        except BufferError:
            pass

    def __enter__(self) -> MapReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def iter_maps(
    stream: IO[bytes], *, blobs: bool = False, max_bytes: int = 1 << 40, **options: Any
) -> Iterator[tuple[str, Any]]:
    """The maps of a binary stream in order as (name, array), or (name, blob) with ``blobs``; the
    stream need not seek.

    ``options`` are those of :func:`~actzip.codec.decode`. A blob longer than ``max_bytes`` is
    refused; no more memory is taken than bytes arrive.

    Raises:
        CodecError: the stream is damaged or ends early; what came before was complete.
    """
    at = 0

    def read(n: int, what: str) -> bytes:
        nonlocal at
        parts = []
        left = n
        while left:
            part = stream.read(min(left, 1 << 24))
            if not part:
                raise CodecError(
                    f"stream, byte {at}: it ends within {what} ({left} of {n} bytes are missing)"
                )
            parts.append(part)
            left -= len(part)
            at += len(part)
        return b"".join(parts)

    if read(8, "its first bytes") != _BEGIN:
        raise CodecError("stream, byte 0: not a file of maps: it does not begin with 'ACTZMAPS'")
    version = struct.unpack("<I", read(4, "the version"))[0]
    if version != _VERSION:
        raise CodecError(f"stream, byte 8: version {version}; this reads version {_VERSION}")
    while True:
        tag = read(1, "a record's tag")
        if tag == _INDEX:
            return
        if tag != _RECORD:
            raise CodecError(f"stream, byte {at - 1}: no record begins with {tag!r}")
        length = struct.unpack("<I", read(4, "a name's length"))[0]
        if not 1 <= length <= _MAX_NAME:
            raise CodecError(f"stream, byte {at - 4}: a name of {length} bytes; 1 to {_MAX_NAME} are allowed")
        try:
            name = read(length, "a name").decode("utf-8")
        except UnicodeDecodeError:
            raise CodecError(f"stream, byte {at - length}: a name is not UTF-8") from None
        size = struct.unpack("<Q", read(8, "a blob's length"))[0]
        if size > max_bytes:
            raise CodecError(
                f"stream, byte {at - 8}: map {name!r} claims {size} bytes, more than {max_bytes}"
            )
        blob = read(size, f"map {name!r}")
        try:
            yield name, (blob if blobs else decode(blob, **options))
        except CodecError as e:
            raise CodecError(f"stream, map {name!r}: {e}") from None


def save_maps(
    target: str | os.PathLike[str] | IO[bytes],
    maps: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """Encode all of ``maps`` into one file; ``options`` are those of :func:`~actzip.codec.encode`."""
    with MapWriter(target, metadata=metadata, **options) as writer:
        for name, tensor in maps.items():
            writer.add(name, tensor)


def load_maps(path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """All maps of a file, decoded."""
    with MapReader(path) as reader:
        return {name: reader.decode(name, **options) for name in reader}


def is_map_file(data: Any) -> bool:
    """Whether bytes are the beginning of a file of maps (a blob begins otherwise)."""
    return bytes(data[:8]) == _BEGIN
