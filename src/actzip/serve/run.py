"""A server, from a file to its end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from actzip.checks import text, whole
from actzip.errors import ActzipError, DataError, InputError
from actzip.serve.settings import Settings

__all__ = ["serve"]


def serve(
    model: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[str], None] | None = None,
    **settings: Any,
) -> None:
    """Serves a compiled model until the process is told to stop (SIGTERM, Ctrl-C); accepted
    requests are answered first.

    Args:
        model: an ``.actzip`` file (``CompiledModel.save``, ``actzip compile --out``). It is data:
            nothing in it, or in a request, is executed; torch is not needed.
        host, port: where to listen; port 0: any that is free.
        on_ready: called with the address, ``http://host:port``, once the model is loaded.
        settings: those of :class:`Settings`.

    Raises:
        DataError: the file is missing, damaged or no model; FastAPI is not installed.
        InputError: a setting out of range; an address that cannot be listened on (a port in use).
    """
    from actzip import cpu
    from actzip.runtime.model_file import read_model_file

    limits = _settings(settings)
    whole(port, "port", 0, 65535)
    path = os.path.abspath(os.fspath(model))
    read_model_file(path)
    uvicorn, make_app, Pool = _imports()
    pool = Pool(path, limits, limits.threads_each(int(cpu.info()["threads"])))
    with _listening(text(host, "host"), port) as bound:
        at = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
        failed: list[ActzipError] = []

        def started(error: ActzipError | None) -> None:
            if error is not None:
                failed.append(error)
                server.should_exit = True
            elif on_ready is not None:
                on_ready(at)

        config = uvicorn.Config(
            make_app(pool, limits, started),
            log_level="warning",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(limits.grace_seconds)),
            server_header=False,
        )
        server = uvicorn.Server(config)
        # uvicorn raises the signal that it has obeyed again: a stop that was asked for is no error
        with suppress(SystemExit, KeyboardInterrupt):
            server.run(sockets=[bound])
    if failed:
        raise failed[0]


def _settings(given: dict[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except TypeError as error:
        raise InputError(f"serve: {str(error).partition(') ')[2] or error}") from None


def _imports() -> tuple[Any, Any, Any]:
    try:
        import uvicorn

        from actzip.serve.app import make_app
        from actzip.serve.pool import Pool
    except ModuleNotFoundError as error:
        raise DataError(f"serving needs {error.name}: `pip install actzip[serve]` brings it") from error
    return uvicorn, make_app, Pool


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, or one line that says why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(1024)
    except (OSError, ValueError, TypeError) as error:  # a host that is no name has many of them
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host!r}, port {port}: {why}") from error
    return bound
