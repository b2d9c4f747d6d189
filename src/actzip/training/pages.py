"""Memory of packed maps: pages of their own, apart from the C library's heap.

A packed map lives from forward to backward, the maps around it for a moment. In one heap the long-lived
ones would stand between holes that the next map does not fit, and holes stay with the process. Here they
lie side by side in mappings, which go back to the system as soon as nothing in them is alive.
"""

from __future__ import annotations

import mmap
import sys
import threading
import weakref
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["kept", "mapped"]

#: A mapping that many tensors share.
_SLAB = 8 << 20
#: Smaller tensors are the heap's.
_SMALL = 4 << 10
_LINE = 64

_lock = threading.Lock()
_slab: weakref.ref[mmap.mmap] | None = None  # the one that is filled now
_filled = 0
_mappings: dict[int, tuple[weakref.ref[mmap.mmap], int]] = {}  # that are in use, and their bytes


def kept(n: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of ``n`` elements, for what waits for backward."""
    nbytes = n * dtype.itemsize
    if sys.platform != "linux" or nbytes < _SMALL:
        return torch.empty(n, dtype=dtype)
    try:
        memory, offset = _place(nbytes)
    except OSError:  # no memory, or too many mappings: PyTorch's own error, or the heap
        return torch.empty(n, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)


def mapped() -> int:
    """Bytes of all mappings."""
    return sum(nbytes for _, nbytes in list(_mappings.values()))


def _place(nbytes: int) -> tuple[mmap.mmap, int]:
    global _slab, _filled
    if nbytes > _SLAB // 2:
        return _map(nbytes), 0
    with _lock:
        memory = None if _slab is None else _slab()
        if memory is None or _filled + nbytes > _SLAB:
            memory, _filled = _map(_SLAB), 0
            _slab = weakref.ref(memory)
        offset, _filled = _filled, _filled + -(-nbytes // _LINE) * _LINE
        return memory, offset


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    key = id(memory)
    _mappings[key] = weakref.ref(memory, lambda _: _mappings.pop(key, None)), nbytes
    return memory
