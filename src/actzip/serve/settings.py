"""What a server is told: sizes, rates and times that it keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from actzip.checks import number, whole

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Limits of a server. A request beyond one is refused by a status that says which.

    Attributes:
        workers: processes that run the model.
        threads: threads of each; None: the CPUs shared out among the workers.
        queue: accepted requests that may wait for a worker; one more gets 503.
        max_bytes: of a request's body (413).
        max_batch: the largest batch of the maps in it (422).
        streams: of frames that predict from the one before, at once; the one that was quiet longest
            is forgotten for a new one, and each that was quiet for ``stream_seconds``.
        rate: requests a second from one address, with as many at once (429); 0: any number.
        body_seconds: for a body to arrive (408).
        seconds: for the model to run once (504; the worker is replaced).
        grace_seconds: for accepted requests to end once the server is told to stop.

    Raises:
        InputError: a value out of its range.
    """

    workers: int = 1
    threads: int | None = None
    queue: int = 64
    max_bytes: int = 16 << 20
    max_batch: int = 64
    streams: int = 64
    stream_seconds: float = 60.0
    rate: float = 0.0
    body_seconds: float = 20.0
    seconds: float = 60.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        whole(self.workers, "workers", 1, 1024)
        if self.threads is not None:
            whole(self.threads, "threads", 1, 1024)
        whole(self.queue, "queue", 0, 1_000_000)
        whole(self.max_bytes, "max_bytes", 1, 1 << 40)
        whole(self.max_batch, "max_batch", 1, 1 << 20)
        whole(self.streams, "streams", 1, 1 << 20)
        number(self.rate, "rate", 0)
        for name in ("stream_seconds", "body_seconds", "seconds", "grace_seconds"):
            number(getattr(self, name), name, 0, above=True)

    @property
    def most(self) -> int:
        """Requests that may be inside at once: those that wait, and one a worker."""
        return self.queue + self.workers

    def threads_each(self, cpus: int) -> int:
        """Threads of a worker on a machine of so many CPUs."""
        return self.threads or max(1, cpus // self.workers)
