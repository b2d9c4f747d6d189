"""The one-page report of a plan: self-contained HTML with the times of every cut as bars."""

from __future__ import annotations

from importlib import resources
from typing import Any

__all__ = ["render"]

PARTS = (
    ("head_ms", "head, on the client", "#0b6e75"),
    ("encode_ms", "encoding", "#58a6a6"),
    ("link_ms", "on the link", "#b4541a"),
    ("decode_ms", "decoding", "#c9a227"),
    ("tail_ms", "tail, on the server", "#5c6bc0"),
)


def render(found: dict[str, Any]) -> str:
    """The page, of what ``Plan.to_dict()`` gives."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["n"] = lambda v, digits=2: "" if v is None else f"{v:.{digits}f}"
    source = resources.files("actzip.split").joinpath("page.html.j2").read_text(encoding="utf-8")
    rows = [*found["rows"], *found["others"]]
    return environment.from_string(source).render(
        r=found, rows=rows, parts=PARTS, most=max(row["total_ms"] for row in rows), bars=_bars(rows)
    )


def _bars(rows: list[dict[str, Any]]) -> list[list[tuple[float, float, str]]]:
    """For each row (x, width, colour) of its parts, in shares of the longest."""
    most = max(row["total_ms"] for row in rows) or 1.0
    made = []
    for row in rows:
        at, parts = 0.0, []
        for key, _, colour in PARTS:
            width = row[key] / most
            parts.append((at, width, colour))
            at += width
        made.append(parts)
    return made
