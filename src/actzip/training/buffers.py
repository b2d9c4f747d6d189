"""Memory for restored maps, used again as soon as nothing holds it.

A backward pass restores one map after the other, each for a moment. Fresh memory costs a fault a page,
and is cold; where maps are small, that is most of what restoring takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from actzip.training.bits import empty
from actzip.training.heap import LARGE

__all__ = ["Buffers"]

#: Smaller tensors are not worth the search.
_SMALL = 64 << 10
#: What all buffers take at most.
_LIMIT = 64 << 20

#: How many tensors share a storage, by its address; None where this torch does not tell.
_users: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Buffers:
    """The buffers of one forward pass; they live as long as a map that it packed."""

    __slots__ = ("_held", "_lock")

    def __init__(self) -> None:
        self._held: list[tuple[torch.UntypedStorage, int]] = []  # and its users while it is free
        self._lock = threading.Lock()  # graphs run backward in any thread, and in several

    def empty(self, n: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of ``n`` elements, nobody else's until it is freed."""
        nbytes = n * dtype.itemsize
        if _users is None or not _SMALL <= nbytes < LARGE:
            return empty(n, dtype)
        with self._lock:
            free = [s for s, idle in self._held if _users(s._cdata) <= idle]
            fitting = [s for s in free if nbytes <= s.nbytes() <= 2 * nbytes]
            storage = min(fitting, key=torch.UntypedStorage.nbytes) if fitting else self._more(nbytes, free)
            found = torch.empty(0, dtype=dtype)
            found.set_(storage, 0, (n,))  # type: ignore[call-overload]
            return found.data  # at version 0, as fresh memory is

    def _more(self, nbytes: int, free: list[torch.UntypedStorage]) -> torch.UntypedStorage:
        assert _users is not None
        for other in free:
            if self._room() >= nbytes:
                break
            self._held = [h for h in self._held if h[0] is not other]
        storage = empty(nbytes, torch.uint8).untyped_storage()
        if self._room() >= nbytes:
            self._held.append((storage, _users(storage._cdata)))
        return storage

    def _room(self) -> int:
        return _LIMIT - sum(s.nbytes() for s, _ in self._held)
