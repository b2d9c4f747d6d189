"""``actzip serve``: a compiled model behind HTTP."""

from __future__ import annotations

from pathlib import Path

import typer

from actzip.cli.common import JSON, errors, print_json

_EPILOG = "Example:  actzip serve tail.actzip --port 8000 --workers 2"


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    def serve(
        model: Path = typer.Argument(..., help="An .actzip file: actzip compile --out, fast.save."),
        host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all."),
        port: int = typer.Option(8000, "--port", "-p", min=0, max=65535, help="0 for a free one."),
        workers: int = typer.Option(1, min=1, help="Processes that run the model."),
        threads: int | None = typer.Option(None, min=1, help="Threads of each worker."),
        queue: int = typer.Option(64, min=0, help="Requests that may wait; one more gets 503."),
        max_mb: float = typer.Option(16.0, help="Largest body, in MiB."),
        max_batch: int = typer.Option(64, min=1, help="Largest batch of a request."),
        streams: int = typer.Option(64, min=1, help="Video streams at once, of the tail of a split."),
        rate: float = typer.Option(0.0, min=0, help="Requests a second from an address; 0: any."),
        seconds: float = typer.Option(60.0, help="Longest run of the model."),
        json: bool = JSON,
    ) -> None:
        """Serve a compiled model: feature maps in, outputs back."""
        from actzip.checks import number
        from actzip.serve.run import serve as run

        def ready(url: str) -> None:
            if json:
                print_json({"url": url, "model": str(model), "workers": workers})
            else:
                errors.print(f"serving {model} on {url} ({url}/docs); Ctrl-C ends it")

        run(
            model,
            host=host,
            port=port,
            on_ready=ready,
            workers=workers,
            threads=threads,
            queue=queue,
            max_bytes=int(number(max_mb, "--max-mb", 0, 2**20, above=True) * 2**20),
            max_batch=max_batch,
            streams=streams,
            rate=rate,
            seconds=seconds,
        )
