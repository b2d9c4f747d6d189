"""What keeps a server from being drowned: sizes, rates, times."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from fastapi import HTTPException, Request

__all__ = ["Rate", "read_body", "refused"]

_ADDRESSES = 10_000  # that are remembered; the one that was quiet longest goes first
_LINGER = 2.0  # seconds for the rest of a refused body


class Rate:
    """At most ``rate`` requests a second from one address, and as many at once after a pause
    (a token bucket); 0: any number."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._most = max(1.0, rate)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until a request of ``address`` is welcome; it is counted where that is 0."""
        if not self._rate:
            return 0.0
        now = self._clock()
        tokens, before = self._left.pop(address, (self._most, now))
        tokens = min(self._most, tokens + (now - before) * self._rate)
        welcome = tokens >= 1
        self._left[address] = (tokens - welcome, now)
        if len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)
        return 0.0 if welcome else (1 - tokens) / self._rate


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        HTTPException: 413 where it is, or says it is, longer than ``most`` bytes; 408 where it does
            not arrive within ``seconds``.
        ClientDisconnect: it was cut off.
    """
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise await refused(request, _too_large(int(said), most), most)
    try:
        return await asyncio.wait_for(_arrived(request, most), seconds)
    except asyncio.TimeoutError:
        close = {"Connection": "close"}
        why = f"the body did not arrive within {seconds:g} s"
        raise HTTPException(408, why, headers=close) from None


async def refused(request: Request, error: HTTPException, most: int) -> HTTPException:
    """``error``, once what is left of the body has come and gone (within reason): a client that
    still sends would otherwise lose the connection before it reads the answer."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discarded(request, 4 * most), _LINGER)
    return error


async def _discarded(request: Request, most: int) -> None:
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            return


async def _arrived(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > 4 * most:
            break
        else:
            parts.clear()
    if size > most:
        raise _too_large(size, most)
    return b"".join(parts)


def _too_large(size: int, most: int) -> HTTPException:
    why = f"a body of {size} bytes or more; this server takes {most}"
    return HTTPException(413, why, headers={"Connection": "close"})
