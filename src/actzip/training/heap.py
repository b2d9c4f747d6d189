"""The allocator's heap: what lies free in it goes back to the system before it makes the peak.

Blocks of some megabytes lie in the C library's heap, larger ones in pages of their own. What is freed in
the heap stays with the process, in holes that the next map often does not fit, and a large block never
does: without this a step takes more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from actzip.training import pages

__all__ = ["LARGE", "WATCHED", "give_back", "settle"]

#: From here on glibc gives a block pages of its own, whatever its moving threshold.
LARGE = 32 << 20
#: Maps of this size and more leave holes that matter.
WATCHED = 1 << 20
#: So much is worth a call: it takes some tens of milliseconds.
_WORTH = 64 << 20


def _info(integer: type[ctypes.c_size_t] | type[ctypes.c_uint]) -> type[ctypes.Structure]:
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    return type("mallinfo", (ctypes.Structure,), {"_fields_": [(n, integer) for n in names.split()]})


def _found() -> tuple[Callable[[int], int], Callable[[], int]] | None:
    """glibc's malloc_trim, and how many bytes it has handed out."""
    try:
        library = ctypes.CDLL(None)
        trim, found = library.malloc_trim, getattr(library, "mallinfo2", None)
        info = library.mallinfo if found is None else found  # before 2.33: modulo 4 GiB
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    info.restype = _info(ctypes.c_uint if found is None else ctypes.c_size_t)

    def used() -> int:
        now = info()
        return int(now.uordblks) + int(now.hblkhd)

    return trim, used


_calls = _found()
_least: int | None = None  # of `_beyond`: that is not the heap's
_passed = 0  # bytes of maps since the heap was looked at


def _beyond() -> int | None:
    """Bytes in memory beyond those that are in use: the free ones, the program and its libraries. None
    where the system does not tell."""
    if _calls is None:
        return None
    try:
        resident = int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
    return resident - _calls[1]() - pages.mapped()


def give_back(worth: int = _WORTH) -> None:
    """Free memory of the heap goes back to the system, where there are ``worth`` bytes of it."""
    global _least, _passed
    _passed = 0
    now = _beyond()
    if now is None or _calls is None:
        return
    _least = now if _least is None else min(now, _least)
    if now - _least >= worth:
        _calls[0](0)
        _least = _beyond()


def settle(nbytes: int, largest: int = 0) -> None:
    """To be told of every map that is packed or restored, and of the largest one around: gives back what
    is free before it matters. While maps are small, less than the largest will take may lie free."""
    global _passed
    _passed += nbytes
    if nbytes >= LARGE:
        give_back()
    elif largest >= LARGE and _passed >= _WORTH:
        give_back(largest)
