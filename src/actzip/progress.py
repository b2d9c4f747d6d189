"""The progress display of the command line and of a profile. Imported where one is shown: rich
takes its time."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["display"]


def display(console: Console, *more: ProgressColumn, quiet: bool = False) -> Progress:
    """Description, bar, count and times, then ``more``; nothing is shown off a terminal, or with
    ``quiet``."""
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
