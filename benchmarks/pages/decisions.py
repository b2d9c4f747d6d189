"""docs/decisions/index.md: the list of decisions."""

from __future__ import annotations

import re

from .common import ROOT, grid, table


@table
def decisions() -> list[str]:
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        title, date = re.findall(r"^# \d+\. (.*)\n\n(\S+)\n", path.read_text(encoding="utf-8"))[0]
        rows.append((path.name[:3], f"[{title}]({path.name})", date))
    return grid("number | decision | date", "lll", rows)
