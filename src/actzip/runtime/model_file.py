"""``.actzip``: a compiled model as one file of data. Read as any other input: checked, mapped,
never executed.

It is a safetensors file. Its metadata holds ``actzip``, a JSON text (the graph as
:mod:`actzip.runtime.graph_data` says it, the kernels chosen, the CPU they were chosen on), and
``crc32c`` of that text; its tensors are the graph's arrays and, under ``packed/``, the weights in
the order in which this CPU's kernels read them, which are mapped and not copied. Each tensor's own
CRC-32C is in the text and is checked when the tensor is first used.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from actzip._native import _codec
from actzip.errors import DataError
from actzip.files import write_with
from actzip.runtime.graph import Array
from actzip.runtime.mapped import give_back

__all__ = ["MODEL_FORMAT", "MappedTensors", "read_model_file", "write_model_file"]

MODEL_FORMAT = 1
_ALIGN = 64  # of every packed tensor in the file, and so in memory: a cache line
_MOST_HEADER = 100 << 20  # bytes; safetensors' own limit
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}


def write_model_file(
    path: str | os.PathLike[str],
    text: dict[str, Any],
    arrays: Mapping[str, Array],
    packed: Mapping[str, Array],
) -> Path:
    """Writes the file whole or not at all; ``text`` gets the tensors' checksums.

    Raises:
        DataError: the folder does not exist or cannot be written.
    """
    tensors = {f"packed/{k}": _padded(a) for k, a in packed.items()}
    tensors |= {f"graph/{k}": np.asarray(a, order="C") for k, a in arrays.items()}
    order = sorted(tensors, key=lambda k: (not k.startswith("packed/"), -tensors[k].itemsize, k))
    crcs = {}
    for k in order:
        crcs[k] = _codec.crc32c(_bytes(tensors[k]))
        give_back(tensors[k])
    body = json.dumps({**text, "format": MODEL_FORMAT, "crc32c": crcs}, allow_nan=False)
    header: dict[str, Any] = {
        "__metadata__": {"actzip": body, "crc32c": f"{_codec.crc32c(body.encode()):08x}"}
    }
    at = 0
    for k in order:
        a = tensors[k]
        header[k] = {
            "dtype": _NAMES[a.dtype.newbyteorder("<")],
            "shape": list(a.shape),
            "data_offsets": [at, at + a.nbytes],
        }
        at += a.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-(8 + len(head)) % _ALIGN)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(head)) + head)
        for k in order:
            file.write(_bytes(tensors[k]))
            give_back(tensors[k])

    return write_with(path, write)


def _padded(a: Array) -> Array:
    """Packed weights with zeros behind, so that the next tensor begins at a cache line; most end at
    one and are not copied."""
    flat = np.ascontiguousarray(a, "<f4").reshape(-1)
    missing = -flat.size % (_ALIGN // 4)
    return np.pad(flat, (0, missing)) if missing else flat


def _bytes(a: Array) -> memoryview:
    flat: Array = a.reshape(-1).view(np.uint8)
    return flat.data


class MappedTensors(Mapping[str, Array]):
    """The file's tensors by name, as read-only arrays on the mapped file. A tensor's checksum is
    compared when it is taken."""

    def __init__(self, path: Path, mapped: mmap.mmap, header: dict[str, Any], at: int) -> None:
        self._path, self._map, self._view, self._at = path, mapped, memoryview(mapped), at
        self._rows = {k: v for k, v in header.items() if k != "__metadata__"}
        self.crcs: dict[str, int] = {}

    def __getitem__(self, name: str) -> Array:
        row = self._rows[name]
        begin, end = row["data_offsets"]
        data = self._view[self._at + begin : self._at + end]
        if _codec.crc32c(data) != self.crcs.get(name):
            raise DataError(f"{self._path}: tensor {name!r} is damaged (its checksum differs)")
        array: Array = np.frombuffer(data, _DTYPES[row["dtype"]]).reshape(row["shape"])
        return array

    def __iter__(self) -> Any:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def folder(self, name: str) -> _Folder:
        """The tensors ``name/...`` by the rest of their names."""
        return _Folder(self, f"{name}/")

    def release(self, name: str) -> None:
        """Gives back the memory of the tensors ``name/...``, which lie together in a file of ours: who
        reads them again gets them from the file."""
        rows = [v["data_offsets"] for k, v in self._rows.items() if k.startswith(f"{name}/")]
        if rows and hasattr(mmap, "MADV_DONTNEED"):
            page = mmap.PAGESIZE
            begin = -(-(self._at + min(first for first, _ in rows)) // page) * page
            end = (self._at + max(last for _, last in rows)) // page * page
            if end > begin:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class _Folder(Mapping[str, Array]):
    def __init__(self, tensors: MappedTensors, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Array:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Any:
        return (k.removeprefix(self._prefix) for k in self._tensors if k.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_model_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], MappedTensors]:
    """The file's text and its tensors, mapped.

    Raises:
        DataError: missing, cut off, damaged, no ``.actzip`` file, or written by a newer actzip.
    """
    target = Path(path)
    try:
        with open(target, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or "it is empty"
        raise DataError(f"cannot read {target}: {reason}") from error
    header, at = _header(target, mapped)
    text = _text(target, header)
    tensors = MappedTensors(target, mapped, header, at)
    crcs = text.get("crc32c")
    if not isinstance(crcs, dict) or set(crcs) != set(tensors):
        raise DataError(f"{target}: the list of checksums does not fit the tensors")
    tensors.crcs = crcs
    return text, tensors


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """safetensors' header after safetensors' own checks, and where the tensors begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or no .actzip file: {error}") from error
    (size,) = struct.unpack_from("<Q", mapped)
    header = json.loads(mapped[8 : 8 + min(size, _MOST_HEADER)])
    for name, row in header.items():
        if name != "__metadata__" and row["dtype"] not in _DTYPES:
            raise DataError(f"{path}: tensor {name!r} is of type {row['dtype']}")
    return header, 8 + size


def _text(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    meta = header.get("__metadata__") or {}
    body = meta.get("actzip")
    if body is None:
        raise DataError(
            f"{path} is a safetensors file but no compiled model (write one with fast.save(path))"
        )
    if f"{_codec.crc32c(body.encode()):08x}" != meta.get("crc32c"):
        raise DataError(f"{path}: the description of the model is damaged (its checksum differs)")
    try:
        text = json.loads(body)
    except ValueError as error:
        raise DataError(f"{path}: the description of the model is no JSON: {error}") from error
    if not isinstance(text, dict) or not isinstance(text.get("format"), int):
        raise DataError(f"{path}: the description of the model names no format")
    if text["format"] > MODEL_FORMAT:
        raise DataError(
            f"{path} has format {text['format']}, written by a newer actzip; this one reads up to "
            f"{MODEL_FORMAT}"
        )
    return text
