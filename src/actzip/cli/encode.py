"""``actzip encode``: an array file to a blob file."""

from __future__ import annotations

from pathlib import Path

import typer

from actzip.cli.common import JSON, out, print_json, read_array


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip encode maps.npy maps.az --codec seg --bits 8")
    def encode(
        source: Path = typer.Argument(..., help="A .npy, .npz or .safetensors file."),
        target: Path = typer.Argument(..., help="The blob to write; replaced in one step if it exists."),
        codec: str = typer.Option("auto", help="A codec (see actzip info), or auto for the smallest result."),
        bits: int | None = typer.Option(
            None, help="Quantize floating point to 1..16 bits; without it lossless."
        ),
        scale: float | None = typer.Option(
            None, help="The quantizer's step; by default the largest value decides."
        ),
        name: str | None = typer.Option(None, help="Which array of a file that holds several."),
        threads: int = typer.Option(0, help="0 for all; the bytes do not depend on it."),
        json: bool = JSON,
    ) -> None:
        """Encode an array into a self-describing blob (format: docs/bitstream.md)."""
        from actzip import codec as codecs
        from actzip.files import write_bytes

        array = read_array(source, name)
        blob = codecs.encode(array, codec=codec, bits=bits, scale=scale, threads=threads)
        write_bytes(target, blob)
        info = codecs.inspect(blob)
        if json:
            print_json({"source": str(source), "target": str(target), **info.to_dict()})
            return
        out.print(
            f"{target}: {info.total_bytes:,} bytes, codec {info.codec}, {info.bits_per_element:.3f} bits/element, "
            f"gain {info.gain_float32:.2f}x against float32, {info.gain:.2f}x against {info.bits} bits",
            highlight=False,
        )
