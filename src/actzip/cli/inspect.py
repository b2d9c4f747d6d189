"""``actzip inspect``: what is inside a blob or a file of maps."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from actzip.cli.common import JSON, out, print_json, read_blob
from actzip.text import cell


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  actzip inspect maps.acz --json")
    def inspect(
        source: Path = typer.Argument(..., help="A blob or a file of maps."),
        name: str | None = typer.Option(None, help="This map of a file of maps, in full."),
        json: bool = JSON,
    ) -> None:
        """Say what a blob holds, from its header alone: shape, dtype, codec, sizes, bits of every chunk."""
        from actzip import codec as codecs
        from actzip.codec.maps import is_map_file
        from actzip.errors import InputError

        data = read_blob(source)
        if is_map_file(data) and name is None:
            with codecs.MapReader(source) as reader:
                infos = {key: reader.inspect(key) for key in reader}
                metadata = reader.metadata
            if json:
                print_json({"metadata": metadata, "maps": {k: i.to_dict() for k, i in infos.items()}})
                return
            table = Table(box=None)
            for column in ("map", "dtype", "shape", "codec", "bytes", "bits/element", "gain"):
                table.add_column(
                    column, justify="left" if column in ("map", "dtype", "shape", "codec") else "right"
                )
            for key, i in infos.items():
                row = (
                    cell(key),
                    i.dtype,
                    str(i.shape),
                    i.codec,
                    f"{i.total_bytes:,}",
                    f"{i.bits_per_element:.3f}",
                )
                table.add_row(*row, f"{i.gain_float32:.2f}x")
            out.print(table)
            return
        if is_map_file(data):
            with codecs.MapReader(source) as reader:
                info = reader.inspect(str(name))
        elif name is not None:
            raise InputError(f"{source} is one blob: its map has no name")
        else:
            info = codecs.inspect(data)
        if json:
            print_json(info.to_dict())
            return
        table = Table(show_header=False, box=None)
        for key, value in (
            ("codec", f"{info.codec}, format version {info.version}"),
            ("array", f"{info.dtype} {info.shape}{', channels last' if info.channels_last else ''}"),
            ("symbols", f"{info.bits} bits, {'signed' if info.signed else 'unsigned'}, scale {info.scale}"),
            (
                "size",
                f"{info.total_bytes:,} bytes ({info.header_bytes} of header, {len(info.chunk_bytes)} chunks)",
            ),
            ("bits/element", f"{info.bits_per_element:.4f}"),
            ("gain", f"{info.gain_float32:.2f}x against float32, {info.gain:.2f}x against {info.bits} bits"),
        ):
            table.add_row(key, value)
        out.print(table)
        chunks = Table(box=None)
        for column in ("chunk", "first (plane, row, column)", "shape", "bytes", "bits/element"):
            chunks.add_column(column, justify="right")
        for c in codecs.chunks(data if name is None else reader_blob(source, name)):
            place = f"{c.first_plane}, {c.first_row}, {c.first_col}"
            shape = f"{c.planes} x {c.rows} x {c.cols}"
            chunks.add_row(str(c.index), place, shape, f"{c.bytes:,}", f"{c.bits_per_element:.3f}")
        out.print(chunks)


def reader_blob(source: Path, name: str) -> bytes:
    """The bytes of one map of a file."""
    from actzip.codec import MapReader

    with MapReader(source) as reader:
        return bytes(reader.blob(name))
