"""The allocator's heap: what packed maps leave there goes back to the system before large maps are restored.

Blocks of some megabytes lie in the C library's heap, larger ones in pages of their own. What is freed in
the heap stays with the process, and a large block does not fit into it: without this a step takes more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["LARGE", "give_back", "released"]

#: From here on glibc gives a block pages of its own, whatever its moving threshold.
LARGE = 32 << 20
#: So much is worth a call: it takes some tens of milliseconds.
_WORTH = 128 << 20

_freed = 0


def _found() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return trim


_trim = _found()


def released(nbytes: int) -> None:
    """So much was freed."""
    global _freed
    _freed += nbytes


def give_back() -> None:
    """Free memory of the heap goes back to the system, where enough was freed since the last time."""
    global _freed
    if _freed >= _WORTH and _trim is not None:
        _freed = 0
        _trim(0)
