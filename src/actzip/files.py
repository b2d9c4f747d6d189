"""Files written whole or not at all, and where decoded data and decisions are cached."""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from actzip.errors import DataError

__all__ = [
    "Target",
    "cache_dir",
    "read_json",
    "read_torch",
    "write_bytes",
    "write_text",
    "write_torch",
    "write_with",
]


class Target:
    """A file while it is written: beside its place under another name, in its place once it is complete.

    A new file has the mode that the umask leaves, one that is replaced keeps its mode and owner,
    and a link goes on pointing to what it points to. A pipe, a device or ``/dev/stdout``
    cannot be replaced: it is written to.

    Raises:
        DataError: there is no such folder, or it, or the file, may not be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.stream = False
        self._temporary: str | None = None
        self._before: os.stat_result | None = None
        if "\0" in os.fsdecode(path):
            raise DataError(f"cannot write {str(path)!r}: no name of a file has a NUL")
        with self.errors():
            with suppress(FileNotFoundError):
                self._before = os.stat(path)
            self._place = os.path.realpath(path)
            named = os.path.abspath(path).startswith(("/dev/", "/proc/"))
            if self._before is not None and (named or not stat.S_ISREG(self._before.st_mode)):
                self.stream = True
                self.file: IO[bytes] = open(path, "wb")  # noqa: SIM115
                return
            if self._before is not None and not os.access(self._place, os.W_OK):
                raise PermissionError(errno.EACCES, "it may not be written")
            folder, name = os.path.split(self._place)
            short = name.encode("utf-8", "surrogateescape")[:100].decode("utf-8", "ignore")
            self._temporary = os.path.join(folder, f".{short}.{secrets.token_hex(6)}.tmp")
            flags = (
                os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            )
            mode = 0o666 if self._before is None else 0o600  # less the umask
            self.file = os.fdopen(os.open(self._temporary, flags, mode), "w+b")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of the system as DataError."""
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def commit(self) -> None:
        """The file is complete: it is flushed to disk and takes its place."""
        with self.errors():
            self.file.flush()
            if self.stream or self._temporary is None:
                self.file.close()
                return
            os.fsync(self.file.fileno())
            self.file.close()
            if self._before is not None:
                if hasattr(os, "chown"):
                    with suppress(OSError):
                        os.chown(self._temporary, self._before.st_uid, self._before.st_gid)
                os.chmod(self._temporary, stat.S_IMODE(self._before.st_mode))
            os.replace(self._temporary, self._place)
            self._temporary = None

    def discard(self) -> None:
        """Nothing was written; after :meth:`commit` nothing is done."""
        file = getattr(self, "file", None)
        if file is not None and not file.closed:
            with suppress(OSError):
                file.close()
        if self._temporary is not None:
            with suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = None


def write_with(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> Path:
    """Calls ``write(file)`` on a temporary file beside ``path``, flushes it to disk and renames it.

    Whatever happens, ``path`` afterwards is what it was before or complete, and no temporary file is
    left. Modes, links and pipes: :class:`Target`.

    Raises:
        DataError: the folder does not exist or cannot be written, or there is no room.
    """
    target = Target(path)
    try:
        with target.errors():
            if target.stream:  # which cannot be sought in
                buffer = io.BytesIO()
                write(buffer)
                target.file.write(buffer.getbuffer())
            else:
                write(target.file)
        target.commit()
    finally:
        target.discard()
    return target.path


def write_torch(path: str | os.PathLike[str], value: Any) -> Path:
    """:func:`write_with` for ``torch.save``, which reports a full disk as it likes."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return write_with(path, lambda f: _write(f, buffer.getbuffer()))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """:func:`write_with` for bytes."""
    return write_with(path, lambda f: _write(f, data))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """:func:`write_with` for text, as UTF-8."""
    return write_bytes(path, text.encode("utf-8"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} cannot be read: no file has that name") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise DataError(f"{path} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise DataError(f"{path} is not JSON: {error}") from error


def read_torch(path: str | os.PathLike[str]) -> Any:
    """The tensors, and plain containers of them, in a file of ``torch.save``; nothing in it is run.

    Raises:
        DataError: there is no such file, it is damaged, or holds anything else.
    """
    import tarfile

    import torch

    try:
        if tarfile.is_tarfile(
            path
        ):  # before 2.6, PyTorch unpickled these whatever it was told (CVE-2025-32434)
            raise ValueError("an archive of PyTorch before 0.1.10")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises many types, and advises to run what the file holds
        raise DataError(
            f"{path} is no readable file of tensors: it is damaged, or holds more than tensors "
            f"({type(error).__name__})"
        ) from error


def cache_dir(name: str = "") -> Path:
    """``$ACTZIP_CACHE``, else ``$XDG_CACHE_HOME/actzip``, else ``~/.cache/actzip``; made if need be.

    Raises:
        DataError: it cannot be made.
    """
    base = os.environ.get("ACTZIP_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actzip"
    path = root / name if name else root
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the cache folder {path}: {error.strerror}; set ACTZIP_CACHE") from error
    return path


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    file.write(data)
