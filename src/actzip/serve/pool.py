"""Processes that run the model, kept alive: a request whose worker dies goes to another one."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from actzip.errors import ActzipError, DataError
from actzip.serve.settings import Settings
from actzip.serve.worker import FAULT, HEAD, READY

__all__ = ["Pool", "Reply"]

_TRIES = 3  # of a request, before what kills its workers is taken to be the request itself
_START_SECONDS = 300.0  # on another kind of CPU kernels are chosen anew first
_LONGEST_PAUSE = 5.0
_LINGER = 1.0  # for a worker to end by itself


@dataclass(frozen=True)
class Reply:
    """A worker's answer: DONE, REFUSED or FAULT, and the content; None where it took too long."""

    kind: int | None
    content: bytes


@dataclass(order=True)
class _Job:
    late: int  # 0 for one that was begun before: it goes first
    number: int
    kind: int = field(compare=False)
    body: bytes = field(compare=False)
    reply: asyncio.Future[Reply] = field(compare=False)
    tries: int = field(default=0, compare=False)


class _GoneError(Exception):
    """The worker has died, or was ended because it took too long."""


class Pool:
    """``settings.workers`` processes of ``actzip.serve.worker`` on one ``.actzip`` file.

    Attributes:
        ready: how many can take a request now.
        restarts: how many died and were started anew.
        about: what the model takes and gives.
        pids: of the processes that are ready.
    """

    def __init__(self, model: str, settings: Settings, threads: int) -> None:
        self._command = [sys.executable, "-m", "actzip.serve.worker"]
        self._command += [model, str(threads), str(settings.max_batch)]
        self._settings = settings
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._numbers = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._first: asyncio.Future[None] | None = None
        self.restarts = 0
        self.about: dict[str, Any] = {}
        self.pids: set[int] = set()
        self.on_restart: Callable[[], None] = lambda: None

    @property
    def ready(self) -> int:
        return len(self.pids)

    async def start(self) -> None:
        """Returns when the first worker has loaded the model.

        Raises:
            DataError: it cannot be loaded.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._keep()) for _ in range(self._settings.workers)]
        try:
            await self._first
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the workers; what is still running is lost, so wait for replies first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def submit(self, kind: int, body: bytes) -> Reply:
        """The reply to one request (``ASK_BINARY`` or ``ASK_JSON``)."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait(_Job(1, next(self._numbers), kind, body, reply))
        return await reply

    async def _keep(self) -> None:
        """One worker after another, for ever."""
        pause = 0.0
        while True:
            began = time.monotonic()
            try:
                await self._one_worker()
            except _GoneError:
                self.restarts += 1
                self.on_restart()
            if time.monotonic() - began > _LONGEST_PAUSE:
                pause = 0.0
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, 2 * pause + 0.1)

    async def _one_worker(self) -> None:
        """Starts a worker and gives it requests until it is gone, which is raised."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*self._command, stdin=pipe, stdout=pipe)
        except OSError as error:  # no memory, or too many processes, for now
            self._failed(DataError(f"cannot start a worker: {error.strerror or error}"))
        try:
            await self._loaded(process)
            while True:
                await self._serve_one(process, await self._next(process))
        finally:
            self.pids.discard(process.pid)
            await _ended(process)

    def _failed(self, error: ActzipError) -> NoReturn:
        """A worker did not come up; where none ever did, the server does not start."""
        if self._first is not None and not self._first.done():
            self._first.set_exception(error)
        raise _GoneError

    async def _loaded(self, process: asyncio.subprocess.Process) -> None:
        """Waits for the worker to say that it is ready."""
        try:
            kind, content = await _within(_START_SECONDS, _read(process))
        except asyncio.TimeoutError:
            self._failed(DataError(f"the model was not loaded within {_START_SECONDS:g} s"))
        except _GoneError:
            self._failed(DataError("the worker ended before the model was loaded"))
        if kind != READY:
            self._failed(DataError(json.loads(content)["error"]))
        self.about = json.loads(content)
        self.pids.add(process.pid)
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    async def _next(self, process: asyncio.subprocess.Process) -> _Job:
        """The next request; notices a worker that dies while it has nothing to do."""
        job = asyncio.ensure_future(self._jobs.get())
        gone = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                return job.result()
            raise _GoneError
        finally:
            job.cancel()
            gone.cancel()

    async def _serve_one(self, process: asyncio.subprocess.Process, job: _Job) -> None:
        if job.reply.done():  # whoever asked has gone
            return
        job.tries += 1
        try:
            kind, content = await _within(self._settings.seconds, _ask(process, job))
        except asyncio.TimeoutError:
            _settle(job, Reply(None, b""))
            raise _GoneError from None
        except _GoneError:
            if job.tries < _TRIES:
                job.late = 0
                self._jobs.put_nowait(job)
            else:
                _settle(job, Reply(FAULT, b'{"error": "every worker that ran this request died"}'))
            raise
        _settle(job, Reply(kind, content))


def _settle(job: _Job, reply: Reply) -> None:
    if not job.reply.done():
        job.reply.set_result(reply)


async def _ask(process: asyncio.subprocess.Process, job: _Job) -> tuple[int, bytes]:
    assert process.stdin is not None
    try:
        process.stdin.write(HEAD.pack(job.kind, len(job.body)))
        process.stdin.write(job.body)
        await process.stdin.drain()
    except ConnectionError:
        raise _GoneError from None
    return await _read(process)


async def _read(process: asyncio.subprocess.Process) -> tuple[int, bytes]:
    assert process.stdout is not None
    try:
        kind, size = HEAD.unpack(await process.stdout.readexactly(HEAD.size))
        return kind, await process.stdout.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise _GoneError from None


async def _within(seconds: float, what: Any) -> Any:
    return await asyncio.wait_for(what, seconds)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """The process is gone when this returns: by itself, its input being over, or by force."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _LINGER)
    except asyncio.TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
