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
from rich.progress import Progress, TextColumn

from actzip.errors import CodecError, DataError, InputError
from actzip.files import read_torch
from actzip.progress import display

__all__ = [
    "IMAGES",
    "JSON",
    "MODEL",
    "SIZE",
    "THREADS",
    "TRUST",
    "WEIGHTS",
    "errors",
    "model_and_input",
    "one_line",
    "out",
    "print_json",
    "progress",
    "read_array",
    "read_arrays",
    "read_blob",
]

#: Results go to standard output, everything else (progress, warnings, errors) to standard error.
out = Console()
errors = Console(stderr=True)

#: The option that every verb has.
JSON: bool = typer.Option(False, "--json", help="Print the result as JSON on standard output.")
#: What the verbs that run a model on the engine take, in the order of :func:`model_and_input`.
MODEL: str = typer.Argument(
    ..., help="A torchvision or timm name, one of ours, package.module:attribute, a .pt2 or an .onnx file."
)
WEIGHTS: str | None = typer.Option(None, "--weights", help="A safetensors file for the model.")
IMAGES: str | None = typer.Option(
    None, "--data", "-d", help="Typical images: folder, parquet file, .npy, or a data set's name."
)
SIZE: int | None = typer.Option(None, "--size", min=1, help="Images are resized and cropped to this square.")
TRUST: bool = typer.Option(
    False, "--trust", help="Run code that the given file holds: a .pt2, or a recipe that names Python code."
)
THREADS: int | None = typer.Option(
    None, "--threads", min=1, help="Threads of each engine; all CPUs where not given."
)


def one_line(message: object) -> str:
    """A message on one line, without Rich markup of its own."""
    return escape(" ".join(str(message).split()))


def print_json(value: Any) -> None:
    """JSON on standard output, nothing else."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """A progress display on standard error; nothing is shown where that is not a terminal, or with
    ``quiet``."""
    with display(errors, TextColumn("{task.fields[note]}"), quiet=quiet) as bar:
        yield bar


def read_arrays(path: Path, name: str | None = None) -> dict[str, Any]:
    """The arrays in a ``.npy``, ``.npz``, ``.pt``/``.pth`` (a tensor or a dict of them) or
    ``.safetensors`` file.

    The one of a ``.npy`` file, or a lone tensor, is called ``""``. With ``name`` only that one is read.

    Raises:
        DataError: the file is missing, unreadable or of another kind.
        InputError: there is no array called ``name``.
    """
    import numpy as np

    if not path.is_file():
        raise DataError(f"there is no file {path}")
    kind = path.suffix.lower()
    try:
        if kind == ".npy":
            return {"": np.load(path, allow_pickle=False)}
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {n: arrays[n] for n in _named(list(arrays.files), name, path)}
        if kind == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "np") as file:
                names = _named(list(file.keys()), name, path)
                wide = any(file.get_slice(n).get_dtype() == "BF16" for n in names)
                if not wide:
                    return {n: file.get_tensor(n) for n in names}
            with safe_open(str(path), "pt") as file:  # numpy has no bfloat16
                return {n: file.get_tensor(n) for n in names}
        if kind in (".pt", ".pth"):
            import torch

            value = read_torch(path)
            if isinstance(value, torch.Tensor):
                return {"": value}
            if not isinstance(value, dict):
                raise InputError(
                    f"{path} holds a {type(value).__name__}; a tensor or a dict of tensors is needed"
                )
            tensors = {str(n): t for n, t in value.items() if isinstance(t, torch.Tensor)}
            return {n: tensors[n] for n in _named(list(tensors), name, path)}
    except (InputError, DataError):
        raise
    except Exception as error:  # numpy, torch and safetensors raise many types for a damaged file
        raise DataError(
            f"{path} is not a readable {kind[1:]} file: {' '.join(str(error).split())}"
        ) from error
    raise DataError(f"{path}: a .npy, .npz, .pt or .safetensors file is needed")


def _named(names: list[str], name: str | None, path: Path) -> list[str]:
    if name is None and names:
        return names
    if name in names:
        return [str(name)]
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    raise InputError(f"{path} holds {len(names)} arrays ({shown}), none is called {name!r}")


def read_array(path: Path, name: str | None = None) -> Any:
    """The array in a file, or the one called ``name``; see :func:`read_arrays`.

    Raises:
        DataError: the file is missing, unreadable or of another kind.
        InputError: it holds several arrays and ``name`` is not one of them.
    """
    arrays = read_arrays(path, name)
    if len(arrays) > 1:
        shown = ", ".join(list(arrays)[:8]) + (" ..." if len(arrays) > 8 else "")
        raise InputError(f"{path} holds {len(arrays)} arrays ({shown}); choose one with --name")
    return next(iter(arrays.values()))


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


def model_and_input(
    ref: str, weights: str | None, data: str | None, batch: int, size: int | None, trust: bool
) -> tuple[Any, Any, Any]:
    """What ``actzip.compile`` takes for the model ``ref`` (a module, a graph, or the path of an
    ONNX file), the same as a module in eval mode, and a batch of ``data`` (random numbers, with a
    warning, where that is None) as float32 (N, C, H, W).

    Raises:
        InputError: unknown model or data, or data that does not fit the model. DataError: a file is
            missing, damaged or not trusted.
    """
    import warnings

    import torch

    from actzip.data import Loader, resolve
    from actzip.errors import ActzipWarning
    from actzip.models import load_weights
    from actzip.runtime.models import load_model

    torch.manual_seed(0)
    net, shape, mean, std = load_model(ref, trust=trust)
    for m in net.modules():  # an exported program's module refuses eval()
        m.training = False
    if weights is not None:
        load_weights(net, weights)
    found = Path(ref) if ref.endswith(".onnx") and weights is None else net
    if data is None:
        warnings.warn(
            "no --data: random input is used, so densities mean little", ActzipWarning, stacklevel=2
        )
        return (
            found,
            net,
            torch.randn((batch, *(shape[:-2] if size else shape), *((size, size) if size else ()))),
        )
    if len(shape) != 3:
        raise InputError(f"the model takes inputs of shape {shape}, not images")
    images = resolve(
        data,
        "test",
        image_size=None if data in ("mnist", "cifar10", "digits") else size or shape[-1],
        mean=mean,
        std=std,
        limit=batch,
    )
    if images.shape[0] != shape[0]:
        raise InputError(f"{images.source} has {images.shape[0]} channels, the model takes {shape[0]}")
    if len(images) < batch:
        raise InputError(f"{images.source} has {len(images)} images, --batch wants {batch}")
    return found, net, next(iter(Loader(images, batch)))[0]
