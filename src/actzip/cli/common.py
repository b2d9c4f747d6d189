"""What the verbs share: consoles, progress bars, JSON out, arrays in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from actzip.errors import CodecError, DataError, InputError

__all__ = ["JSON", "errors", "one_line", "out", "print_json", "progress", "read_array", "read_blob"]

#: Results go to standard output, everything else (progress, warnings, errors) to standard error.
out = Console()
errors = Console(stderr=True)

#: The option that every verb has.
JSON: bool = typer.Option(False, "--json", help="Print the result as JSON on standard output.")


def one_line(message: object) -> str:
    """A message on one line, without Rich markup of its own."""
    return escape(" ".join(str(message).split()))


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on standard error; nothing is shown where that is not a terminal, or with ``quiet``."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
        transient=True,
        disable=quiet or not errors.is_terminal,
    ) as bar:
        yield bar


def read_array(path: Path, name: str | None = None) -> Any:
    """The array in a ``.npy`` or ``.npz`` file, or the tensor ``name`` of a ``.safetensors`` file.

    Raises:
        DataError: the file is missing, unreadable or of another kind.
        InputError: it holds several arrays and ``name`` is not one of them.
    """
    import numpy as np

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return np.load(path, allow_pickle=False)
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return arrays[_choose(list(arrays.files), name, path)]
        if kind == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "np") as file:
                return file.get_tensor(_choose(list(file.keys()), name, path))
    except InputError:
        raise
    except Exception as error:  # numpy and safetensors raise many types for a damaged file
        raise DataError(
            f"{path} is not a readable {kind[1:]} file: {' '.join(str(error).split())}"
        ) from error
    raise DataError(f"{path}: a .npy, .npz or .safetensors file is needed")


def _choose(names: list[str], name: str | None, path: Path) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return str(name)
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise InputError(f"{path} holds {len(names)} arrays ({shown}); choose one with --name")


def read_blob(path: Path) -> bytes:
    """The bytes of a blob file.

    Raises:
        DataError: the file cannot be read. CodecError: it is empty.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not blob:
        raise CodecError(f"{path} is empty: 0 bytes are no blob")
    return blob
