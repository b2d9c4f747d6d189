"""Memory for restored maps, used again as soon as nothing holds it.

A backward pass restores one map after the other, each for a moment. Fresh memory costs a fault a page,
and is cold; where maps are small, that is most of what restoring takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from actzip.heap import LARGE, settle
from actzip.training.bits import empty, fresh

__all__ = ["Buffers"]

#: Smaller tensors are not worth the search.
_SMALL = 64 << 10
#: What all buffers take at most.
_LIMIT = 64 << 20
#: One that so many others were asked for without is not of a size that is needed now.
_AGE = 8

#: How many tensors share a storage, by its address; None where this torch does not tell.
_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class _Buffer:
    __slots__ = ("asked", "idle", "nbytes", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        assert _users is not None
        self.storage, self.nbytes, self.asked = storage, storage.nbytes(), 0
        self.idle = _users(storage._cdata)  # its users while it is free

    def free(self) -> bool:
        assert _users is not None
        return _users(self.storage._cdata) <= self.idle


class Buffers:
    """The buffers of one forward pass; they live as long as a map that it packed.

    Attributes:
        largest: bytes of the largest map around.
        thorough: memory counts more than time, as where blocks are computed again.
    """

    __slots__ = ("_asked", "_held", "_lock", "largest", "thorough")

    def __init__(self) -> None:
        self.largest, self.thorough = 0, False
        self._held: list[_Buffer] = []
        self._asked = 0
        self._lock = threading.Lock()  # graphs run backward in any thread, and in several

    def empty(self, n: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of ``n`` elements, nobody else's until it is freed."""
        nbytes = n * dtype.itemsize
        if nbytes >= LARGE:
            self._drop_free()
        if self.thorough:
            settle(nbytes, self.largest)
            self._drop_free()
            return fresh(n, dtype)
        if _users is None or nbytes < _SMALL or self.frugal(nbytes):
            return empty(n, dtype)
        with self._lock:
            self._asked += 1
            free = [b for b in self._held if b.free()]
            fitting = [b for b in free if nbytes <= b.nbytes <= 2 * nbytes]
            if fitting:
                buffer = min(fitting, key=lambda b: b.nbytes)
            else:
                buffer = self._more(nbytes, free)
            buffer.asked = self._asked
            found = torch.empty(0, dtype=dtype)
            found.set_(buffer.storage, 0, (n,))  # type: ignore[call-overload]
            return found.data  # at version 0, as fresh memory is

    def frugal(self, nbytes: int) -> bool:
        """Whether memory of so many bytes is given back at once, not held."""
        return self.thorough or nbytes >= LARGE

    def _more(self, nbytes: int, free: list[_Buffer]) -> _Buffer:
        for other in sorted(free, key=lambda b: b.asked):
            if self._room() >= nbytes and self._asked - other.asked <= _AGE:
                break
            self._held.remove(other)
        buffer = _Buffer(empty(nbytes, torch.uint8).untyped_storage())
        if self._room() >= nbytes:
            self._held.append(buffer)
        return buffer

    def _drop_free(self) -> None:
        """Where maps are larger than any buffer, what is free only adds to the peak."""
        with self._lock:
            self._held = [b for b in self._held if not b.free()]

    def _room(self) -> int:
        return _LIMIT - sum(b.nbytes for b in self._held)
