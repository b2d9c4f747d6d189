"""The progress display of the command line and of a profile. Imported where one is shown: rich
takes its time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["counted", "display"]


@contextmanager
def counted(what: str, show: bool | None = None) -> Iterator[Callable[[int, int, str], None] | None]:
    """Gives ``step(done, all, detail)``, which a bar on standard error shows; None where none is shown.

    Args:
        show: None: where standard error is a terminal.
    """
    if show is None:
        show = sys.stderr is not None and sys.stderr.isatty()
    if not show:
        yield None
        return
    from rich.console import Console

    with display(Console(stderr=True)) as bar:
        task = bar.add_task(what)

        def step(done: int, total: int, detail: str) -> None:
            from rich.markup import escape

            bar.update(task, completed=done, total=total, description=escape(f"{what}: {detail}"[:60]))

        yield step


def display(console: Console, *more: ProgressColumn, quiet: bool = False) -> Progress:
    """Description, bar, count and times, then ``more``; nothing is shown off a terminal, or with
    ``quiet``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *more,
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
