"""``actzip decode``: a blob or file of maps to an array file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, out, print_json, read_blob

_KINDS = (".npy", ".npz", ".pt", ".safetensors")


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip decode maps.acz maps.npy")
    def decode(
        source: Path = typer.Argument(..., help="A blob or file of maps written by actzip encode."),
        target: Path | None = typer.Argument(
            None,
            help="A .npy, .npz, .pt or .safetensors file, replaced in one step if it exists; "
            "default: the source's name with .npy, or .npz for several maps.",
        ),
        name: str | None = typer.Option(None, help="Decode only this map of a file of maps."),
        integers: bool = typer.Option(False, "--integers", help="Keep quantized values as integers."),
        threads: int = typer.Option(0, help="0 for all."),
        json: bool = JSON,
    ) -> None:
        """Decode into an array file; what is damaged is refused and nothing is written."""
        from actzip import codec as codecs
        from actzip.codec.maps import is_map_file
        from actzip.errors import InputError

        data = read_blob(source)
        several = is_map_file(data) and name is None
        path = target or source.with_suffix(".npz" if several else ".npy")
        kind = path.suffix.lower()
        if kind not in _KINDS:
            raise InputError(f"{path}: its name must end in one of {', '.join(_KINDS)}")
        if several and kind == ".npy":
            raise InputError(f"{path}: a .npy file holds one array; choose a map with --name, or write .npz")
        options: dict[str, Any] = {
            "dequantize": not integers,
            "threads": threads,
            "framework": "torch" if kind == ".pt" else "numpy",
        }
        if is_map_file(data):
            with codecs.MapReader(source) as reader:
                names = [name] if name is not None else list(reader)
                arrays = {key: reader.decode(key, **options) for key in names}
        elif name is not None:
            raise InputError(f"{source} is one blob: its map has no name")
        else:
            arrays = {"": codecs.decode(data, **options)}
        _write(path, kind, arrays, several)
        shapes = {k: {"shape": list(a.shape), "dtype": _dtype(a)} for k, a in arrays.items()}
        if json:
            head: dict[str, Any] = {"source": str(source), "target": str(path)}
            print_json(head | ({"maps": shapes} if several else next(iter(shapes.values()))))
            return
        first = next(iter(arrays.values()), None)
        what = f"{len(arrays)} maps" if several else f"{_dtype(first)} {tuple(first.shape)}"  # type: ignore[union-attr]
        out.print(f"{path}: {what}", highlight=False)


def _dtype(a: Any) -> str:
    return str(a.dtype).removeprefix("torch.")


def _write(path: Path, kind: str, arrays: dict[str, Any], several: bool) -> None:
    import numpy as np

    from actzip.files import write_with

    first = next(iter(arrays.values()), None)
    named = arrays if several else {k or "array": a for k, a in arrays.items()}
    if kind == ".npy":
        write_with(path, lambda file: np.save(file, np.asarray(first)))
    elif kind == ".npz":
        write_with(path, lambda file: np.savez(file, **named))
    elif kind == ".safetensors":
        from safetensors.numpy import save

        blob = save({k: np.ascontiguousarray(a) for k, a in named.items()})
        write_with(path, lambda file: _put(file, blob))
    else:
        import torch

        write_with(path, lambda file: torch.save(arrays if several else first, file))


def _put(file: Any, data: bytes) -> None:
    file.write(data)
