"""Files written whole or not at all, and where decoded data and decisions are cached."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from actzip.errors import DataError

__all__ = ["cache_dir", "read_json", "read_torch", "write_bytes", "write_text", "write_with"]


def write_with(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> Path:
    """Calls ``write(file)`` on a temporary file beside ``path``, flushes it to disk and renames it.

    Whatever happens, ``path`` afterwards is what it was before or complete, and no temporary file is left.

    Raises:
        DataError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        temporary = None
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


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
    except Exception as error:  # torch.load raises many types
        raise DataError(f"{path} is no readable file of tensors: {' '.join(str(error).split())}") from error


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


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(data)
