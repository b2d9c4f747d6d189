"""A progress bar for sparsification."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Bar"]


class Bar:
    """Shows epoch, loss, penalty, density and time left on standard error; one line stays for each epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes one event of :func:`actzip.sparsify.sparsify`."""
        if event["kind"] == "step":
            total = event["epochs"] * event["steps"] if event["steps"] else None
            if self._task is None:
                self._task = self._progress.add_task("", total=total)
            density = f", density {event['density']:.3f}" if event["density"] is not None else ""
            self._progress.update(
                self._task,
                completed=(event["epoch"] - 1) * event["steps"] + event["step"],
                description=f"epoch {event['epoch']}/{event['epochs']}, loss {event['loss']:.3f}, "
                f"penalty {event['penalty']:.4f}{density}",
            )
            return
        self._progress.console.print(epoch_line(event))


def epoch_line(event: dict[str, Any]) -> str:
    """One line that says how an epoch went."""
    text = (
        f"epoch {event['epoch']}/{event['epochs']}: loss {event['loss']:.4f}, penalty {event['penalty']:.4f}"
    )
    if event.get("accuracy") is not None:
        text += f", validation accuracy {100 * event['accuracy']:.2f} %"
    if event.get("density") is not None:
        text += f", density {event['density']:.3f}, theoretical speed-up {event['theoretical_speedup']:.2f}x"
    minutes = (event.get("seconds_left") or 0) / 60
    return text + f", alpha {event['alpha']:.3g}, {event['seconds']:.0f} s, {minutes:.1f} min left"
