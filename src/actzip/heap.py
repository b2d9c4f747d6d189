"""The allocator's heap: what lies free in it goes back to the system before large maps are restored.

Blocks of some megabytes lie in the C library's heap, larger ones in pages of their own. What is freed in
the heap stays with the process, and a large block does not fit into it: without this a step takes more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["LARGE", "WATCHED", "give_back", "look", "settle"]

#: From here on glibc gives a block pages of its own, whatever its moving threshold.
LARGE = 32 << 20
#: While tensors of this size are saved little lies free, which tells what was in memory since.
WATCHED = 1 << 20
#: So much is worth a call: it takes some tens of milliseconds.
_WORTH = 32 << 20


def _info(integer: type[ctypes.c_size_t] | type[ctypes.c_uint]) -> type[ctypes.Structure]:
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    return type("mallinfo", (ctypes.Structure,), {"_fields_": [(n, integer) for n in names.split()]})


def _found() -> tuple[Callable[[int], int], Callable[[], tuple[int, int]]] | None:
    """glibc's malloc_trim, and what is free in its heap and in use."""
    try:
        library = ctypes.CDLL(None)
        trim, found = library.malloc_trim, getattr(library, "mallinfo2", None)
        info = library.mallinfo if found is None else found  # before 2.33: modulo 4 GiB
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    info.restype = _info(ctypes.c_uint if found is None else ctypes.c_size_t)

    def account() -> tuple[int, int]:
        now = info()
        return int(now.fordblks), int(now.uordblks) + int(now.hblkhd)

    return trim, account


_calls = _found()
_given = 0  # free, but no longer in memory: the least that was free since the last call


def look() -> int:
    """Bytes that are free in the heap and in memory."""
    global _given
    if _calls is None:
        return 0
    free, _ = _calls[1]()
    _given = min(_given, free)
    return free - _given


def give_back() -> None:
    """Free memory of the heap goes back to the system, where there is much of it."""
    global _given
    if look() >= _WORTH and _calls is not None:
        trim, account = _calls
        trim(0)
        _given, _ = account()


_least: int | None = None  # of `_beyond`: that is not the heap's
_passed = 0  # bytes of maps since the heap was measured


def _beyond() -> int | None:
    """Bytes in memory beyond those that are in use: the free ones, the program and its libraries. None
    where the system does not tell."""
    if _calls is None:
        return None
    try:
        resident = int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None
    return resident - _calls[1]()[1]


def settle(nbytes: int, largest: int) -> None:
    """Where memory counts more than time: to be told of every map that is packed or restored, and of the
    largest one around. Measures what is free by the process' memory and gives it back before it makes the
    peak; while maps are small, less than the largest will take may lie free."""
    global _least, _passed, _given
    _passed += nbytes
    if nbytes < LARGE and _passed < _WORTH:
        return
    _passed, now = 0, _beyond()
    if now is None or _calls is None:
        return
    _least = now if _least is None else min(now, _least)
    if now - _least >= (_WORTH if nbytes >= LARGE else max(_WORTH, largest)):
        _calls[0](0)
        _given, _least = _calls[1]()[0], _beyond()
