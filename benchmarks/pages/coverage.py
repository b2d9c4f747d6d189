"""docs/results/coverage.md: which networks of libraries compile and agree."""

from __future__ import annotations

from .common import grid, load, table


@table
def coverage() -> list[str]:
    kinds = {"segmentation": ("deeplabv3", "fcn", "lraspp"), "detection backbone": ("_fpn",)}
    found = load("engine/coverage")
    rows = []
    for name in sorted(found):
        kind = next((k for k, words in kinds.items() if any(w in name for w in words)), "classification")
        r = found[name]
        good = (
            (r["side"], "in parts" if r["packed_maps"] is None else r["packed_maps"], f"{r['error']:.1e}")
            if r["ok"]
            else ("", "", r.get("why", r.get("error")))
        )
        rows.append((name, kind, *good))
    return [
        f"{sum(r['ok'] for r in found.values())} of {len(found)} models compile and agree.",
        "",
        *grid("model | kind | size | packed maps | error", "llrrr", rows),
    ]
