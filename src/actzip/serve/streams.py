"""Streams of frames that predict from the one before: what each has to be told of its last frame."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import HTTPException

__all__ = ["Stream", "Streams"]

_NAME = re.compile(r"[0-9A-Za-z_-]{16,64}")


@dataclass
class Stream:
    """The frame to predict from, as a key frame; empty: there is none."""

    state: bytes = b""
    used: float = 0.0
    busy: bool = False


class Streams:
    """At most ``most`` streams; one that was quiet for ``seconds``, or longest where another begins,
    is forgotten: its client is told so and sends a key frame."""

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._all: OrderedDict[str, Stream] = OrderedDict()  # the one that was quiet longest first

    def __len__(self) -> int:
        return len(self._all)

    @contextmanager
    def frame(self, name: str) -> Iterator[Stream]:
        """The stream ``name`` while one of its frames runs; what is left in ``state`` is kept.

        Raises:
            HTTPException: 400: no name of a stream; 409: a frame of it is running; 503: as many
                others are running as there may be streams.
        """
        if not _NAME.fullmatch(name):
            raise HTTPException(400, "a stream is named by 16 to 64 letters, digits, - and _")
        self._forget()
        stream = self._all.get(name)
        if stream is None:
            self._make_room()
            stream = self._all[name] = Stream()
        if stream.busy:
            raise HTTPException(409, "a frame of this stream is running: send one after the other")
        stream.busy = True
        try:
            yield stream
        finally:
            stream.busy, stream.used = False, self._clock()
            self._all.move_to_end(name)
            if not stream.state:
                del self._all[name]

    def _forget(self) -> None:
        old = self._clock() - self._seconds
        for name in [n for n, s in self._all.items() if not s.busy and s.used < old]:
            del self._all[name]

    def _make_room(self) -> None:
        if len(self._all) < self._most:
            return
        quiet = next((n for n, s in self._all.items() if not s.busy), None)
        if quiet is None:
            raise HTTPException(503, f"{self._most} streams are running", headers={"Retry-After": "1"})
        del self._all[quiet]
