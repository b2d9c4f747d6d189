"""``actzip inspect``: what is inside a blob."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from actzip.cli.common import JSON, out, print_json, read_blob


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip inspect maps.az --json")
    def inspect(source: Path = typer.Argument(..., help="A blob."), json: bool = JSON) -> None:
        """Say what a blob holds, from its header alone: shape, dtype, codec, sizes."""
        from actzip import codec as codecs

        info = codecs.inspect(read_blob(source))
        if json:
            print_json(info.to_dict())
            return
        table = Table(show_header=False, box=None)
        for key, value in (
            ("codec", f"{info.codec}, format version {info.version}"),
            ("array", f"{info.dtype} {info.shape}{', channels last' if info.channels_last else ''}"),
            ("integers", f"{info.bits} bits, {'signed' if info.signed else 'unsigned'}, scale {info.scale}"),
            (
                "size",
                f"{info.total_bytes:,} bytes ({info.header_bytes} of header, {len(info.chunk_bytes)} chunks)",
            ),
            ("bits/element", f"{info.bits_per_element:.4f}"),
            ("gain", f"{info.gain_float32:.2f}x against float32, {info.gain:.2f}x against {info.bits} bits"),
        ):
            table.add_row(key, value)
        out.print(table)
