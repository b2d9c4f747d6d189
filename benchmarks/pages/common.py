"""What the tables share: results, grids of Markdown, and the list of tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES: dict[str, Callable[[], list[str]]] = {}
MACHINES = {"zen3": "AMD EPYC (Zen 3)", "zen4": "AMD EPYC (Zen 4)", "zen5": "AMD EPYC (Zen 5)"}


def table(make: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Registers a table under its function's name."""
    TABLES[make.__name__.strip("_").replace("_", "-")] = make
    return make


def load(name: str) -> Any:
    """A file of benchmarks/results, without the ending."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def grid(head: str, align: str, rows: Iterable[Iterable[Any]]) -> list[str]:
    """A Markdown table; ``head`` has the titles between bars, ``align`` a letter (l, r) a column."""
    marks = {"l": "---", "r": "--:"}
    lines = [f"| {head} |", "|" + "".join(marks[a] + "|" for a in align)]
    return lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def stage(result: Any, name: str, bits: int = 32) -> dict[str, Any]:
    return next(s for s in result["stages"] if s["stage"] == name and s["bits"] == bits)
