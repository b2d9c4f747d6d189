"""``actzip info``: CPU, instruction sets, versions, codecs."""

from __future__ import annotations

from typing import Any

import typer
from rich.table import Table

from actzip.cli.common import JSON, complain, out, print_json
from actzip.text import counted


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog="Example:  ACTZIP_ISA=avx2 actzip info --json")
    def info(json: bool = JSON) -> None:
        """CPU, the instruction set in use (forced by ACTZIP_ISA=NAME), threads, versions, codecs,
        data folders."""
        from actzip import codec, cpu
        from actzip.files import cache_dir

        found: dict[str, Any] = cpu.info()
        found["codecs"] = {
            c.name: {
                "integers": c.integers,
                "floats": list(c.floats),
                "encode_gbps": list(c.encode_gbps),
                "decode_gbps": list(c.decode_gbps),
            }
            for c in codec.codecs().values()
        }
        found["cache"] = str(cache_dir())
        from actzip.data.roots import data_roots

        found["data"] = [str(p) for p in data_roots()]
        if json:
            print_json(found)
            return
        table = Table(show_header=False, box=None)
        used = counted(found["threads"], "thread")
        table.add_row("CPU", f"{found['cpu']}, {counted(found['cpus'], 'logical CPU')}, {used} used")
        table.add_row("instruction set", f"{found['isa']} (can run: {', '.join(found['isas'])})")
        table.add_row("further", ", ".join(found["extras"]) or "none")
        table.add_row("platform", found["platform"])
        table.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
        table.add_row("codecs", ", ".join(found["codecs"]))
        table.add_row("data folders", ", ".join(found["data"]) or "none found (set ACTZIP_DATA)")
        table.add_row("cache", found["cache"])
        out.print(table)
        if found["isa_warning"]:
            complain("warning", found["isa_warning"], "yellow")
