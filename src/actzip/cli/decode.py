"""``actzip decode``: a blob file to an array file."""

from __future__ import annotations

from pathlib import Path

import typer

from actzip.cli.common import JSON, out, print_json, read_blob


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip decode maps.az maps.npy")
    def decode(
        source: Path = typer.Argument(..., help="A blob written by actzip encode."),
        target: Path = typer.Argument(..., help="The .npy file to write; replaced in one step if it exists."),
        integers: bool = typer.Option(False, "--integers", help="Keep quantized values as integers."),
        threads: int = typer.Option(0, help="0 for all."),
        json: bool = JSON,
    ) -> None:
        """Decode a blob into a .npy file; a damaged blob is refused and nothing is written."""
        import numpy as np

        from actzip import codec as codecs
        from actzip.errors import InputError
        from actzip.files import write_with

        if target.suffix.lower() != ".npy":
            raise InputError(f"{target}: the result is a .npy file, so its name must end in .npy")
        blob = read_blob(source)
        array = np.asarray(codecs.decode(blob, dequantize=not integers, framework="numpy", threads=threads))
        write_with(target, lambda file: np.save(file, array))
        if json:
            print_json(
                {
                    "source": str(source),
                    "target": str(target),
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                }
            )
            return
        out.print(f"{target}: {array.dtype} {tuple(array.shape)}", highlight=False)
