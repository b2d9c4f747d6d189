"""``actzip encode``: an array to a blob file, or several to a file of maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, beside, other_than, print_json, progress, read_arrays, with_elements


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip encode maps.npy maps.acz --codec seg --bits 8")
    def encode(
        source: Path = typer.Argument(..., help="A .npy, .npz, .pt or .safetensors file."),
        target: Path | None = typer.Argument(
            None,
            help="The file to write, replaced in one step if it exists; default: the source's name "
            "with .acz, or .azm for several arrays.",
        ),
        codec: str = typer.Option("auto", help="A codec (see actzip info), or auto for the smallest result."),
        bits: int | None = typer.Option(
            None, help="Quantize floating point to 1..16 bits; without it lossless."
        ),
        scale: float | None = typer.Option(
            None, help="The quantizer's step; by default the largest value decides."
        ),
        name: str | None = typer.Option(None, help="Encode only this array of a file that holds several."),
        threads: int = typer.Option(0, help="0 for all; the bytes do not depend on it."),
        json: bool = JSON,
    ) -> None:
        """Encode an array into a self-describing blob, or several into a file of maps (docs/bitstream.md)."""
        from actzip import codec as codecs
        from actzip.files import write_bytes

        arrays = with_elements(read_arrays(source, name), source)
        options: dict[str, Any] = {"codec": codec, "bits": bits, "scale": scale, "threads": threads}
        if len(arrays) == 1:
            path = other_than(source, target or source.with_suffix(".acz"))
            key, array = next(iter(arrays.items()))
            blob = _encode(source, key, array, options)
            write_bytes(path, blob)
            infos = {key: codecs.inspect(blob)}
        else:
            path = other_than(source, target or source.with_suffix(".azm"))
            infos = {}
            with codecs.MapWriter(path) as writer, progress(json) as bar:
                task = bar.add_task("encode", total=len(arrays), note="")
                for key, array in arrays.items():
                    # Integers have no use for the quantizer's options.
                    kept = options if _floating(array) else {**options, "bits": None, "scale": None}
                    blob = _encode(source, key, array, kept)
                    writer.add_blob(key, blob)
                    infos[key] = codecs.inspect(blob)
                    bar.advance(task)
        coded = sum(i.total_bytes for i in infos.values())
        elements = sum(i.elements for i in infos.values())
        plain = sum(i.elements * i.bits for i in infos.values()) / 8
        if json:
            head: dict[str, Any] = {"source": str(source), "target": str(path)}
            if len(infos) == 1:
                print_json(head | next(iter(infos.values())).to_dict())
            else:
                print_json(head | {"total_bytes": coded, "maps": {k: i.to_dict() for k, i in infos.items()}})
            return
        what = next(iter(infos.values())).codec if len(infos) == 1 else f"{len(infos)} maps"
        beside(path).print(
            f"{path}: {coded:,} bytes, {'codec ' if len(infos) == 1 else ''}{what}, "
            f"{8 * coded / elements:.3f} bits/element, gain {4 * elements / coded:.2f}x against float32, "
            f"{plain / coded:.2f}x against the uncoded bits",
        )


def _encode(source: Path, name: str, array: Any, options: dict[str, Any]) -> bytes:
    from actzip.codec import encode
    from actzip.errors import InputError

    try:
        return bytes(encode(array, **options))
    except InputError as error:
        raise InputError(f"{source}{f', array {name!r}' if name else ''}: {error}") from None


def _floating(array: Any) -> bool:
    return "float" in str(array.dtype)
