"""``actzip decode``: a blob or file of maps to an array file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, beside, other_than, print_json, read_blob

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
        path = other_than(source, target or source.with_suffix(".npz" if several else ".npy"))
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
        check_names(kind, arrays if several else {}, source)
        _write(path, kind, arrays, several)
        shapes = {k: {"shape": list(a.shape), "dtype": _dtype(a)} for k, a in arrays.items()}
        if json:
            head: dict[str, Any] = {"source": str(source), "target": str(path)}
            print_json(head | ({"maps": shapes} if several else next(iter(shapes.values()))))
            return
        first = next(iter(arrays.values()), None)
        what = f"{len(arrays)} maps" if several else f"{_dtype(first)} {tuple(first.shape)}"  # type: ignore[union-attr]
        beside(path).print(f"{path}: {what}")


def _dtype(a: Any) -> str:
    return str(a.dtype).removeprefix("torch.")


def _write(path: Path, kind: str, arrays: dict[str, Any], several: bool) -> None:
    import numpy as np

    from actzip.files import write_torch, write_with

    first = next(iter(arrays.values()), None)
    named = arrays if several else {k or "array": a for k, a in arrays.items()}
    if kind == ".npy":
        write_with(path, lambda file: np.save(file, _plain(path, "", first), allow_pickle=False))
    elif kind == ".npz":
        write_with(path, lambda file: _savez(file, {k: _plain(path, k, a) for k, a in named.items()}))
    elif kind == ".safetensors":
        from safetensors.numpy import save

        blob = save({k: np.ascontiguousarray(a) for k, a in named.items()})
        write_with(path, lambda file: _put(file, blob))
    else:
        write_torch(path, arrays if several else first)


def _savez(file: Any, arrays: dict[str, Any]) -> None:
    """What ``np.savez`` writes; it takes names as keywords, and so not ``file`` and ``allow_pickle``."""
    import zipfile

    import numpy as np

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _plain(path: Path, name: str, array: Any) -> Any:
    """``array``, where numpy's files can say what it is."""
    import numpy as np

    from actzip.errors import InputError

    if np.dtype(np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(array.dtype))) != array.dtype:
        of = f", map {name!r}" if name else ""
        raise InputError(f"{path}{of}: numpy's files have no {array.dtype}; write .safetensors or .pt")
    return array


def check_names(kind: str, arrays: dict[str, Any], source: Path) -> None:
    """Refuses names that a file of ``kind`` would not give back.

    Raises:
        InputError: a name that numpy or an unpacker of zip files takes for another, or that
            safetensors keeps for itself.
    """
    from actzip.errors import InputError

    for name in arrays:
        why = ""
        if kind == ".safetensors" and name == "__metadata__":
            why = "safetensors keeps that name for itself"
        elif kind == ".npz":
            parts = name.replace("\\", "/").split("/")
            if ".." in parts or name.startswith(("/", "\\")) or name[1:2] == ":":
                why = "unpacked, the archive would write outside its folder"
            elif "\0" in name:
                why = "no name in an archive has a NUL"
            elif name.endswith(".npy") and name[:-4] in arrays:
                why = f"numpy would give {name[:-4]!r} under that name"
        if why:
            other = ".npz" if kind == ".safetensors" else ".safetensors or .pt"
            raise InputError(f"{source}, map {name!r}: {why}; write {other}, or one map with --name")


def _put(file: Any, data: bytes) -> None:
    file.write(data)
