"""Arrays in a mapped file: memory of theirs that nobody reads goes back to the system."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Sequence

import numpy as np

from actzip.runtime.graph import Array

__all__ = ["give_back", "to_file"]


def to_file(arrays: Sequence[Array]) -> list[Array]:
    """Read-only copies of ``arrays`` in a temporary file without a name, which goes with the last of
    them; the arrays themselves where the system cannot do that or has no room for the file."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return list(arrays)
    begins = []
    try:
        with tempfile.TemporaryFile(prefix="actzip-") as file:
            for a in arrays:
                file.write(bytes(-file.tell() % mmap.PAGESIZE))  # whole pages can be given back
                begins.append(file.tell())
                file.write(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return list(arrays)
    return [
        np.frombuffer(mapped, a.dtype, a.size, begin).reshape(a.shape)
        for a, begin in zip(arrays, begins, strict=True)
    ]


def give_back(array: Array) -> None:
    """The memory of an array in a mapped file, which gets it from there again when it is read; nothing
    for other arrays."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    whole = np.frombuffer(base, np.uint8)
    begin = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = begin + array.nbytes
    if end < len(base):
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        base.madvise(mmap.MADV_DONTNEED, first, end - first)
