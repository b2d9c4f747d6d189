"""docs/results/serving.md: the server under load."""

from __future__ import annotations

from .common import grid, load, table


@table
def serving() -> list[str]:
    d = load("serve/load")

    def grown(what: str) -> str:
        m = d["memory"][what]
        return f"{m['last_mib']} MiB ({100 * m['change']:+.1f} %)"

    rows = [
        ("clients, workers", f"{d['clients']}, {d['workers']}"),
        ("minutes", f"{d['minutes']:g}"),
        ("requests", d["requests"]),
        ("of them damaged, oversized or cut off", sum(d["bad"].values())),
        ("workers killed", len(d["workers_killed_at_minute"])),
        ("accepted and lost", d["accepted_and_lost"]),
        ("answered wrongly", d["answered_wrongly"]),
        ("bad ones not refused as they should", len(d["bad_answered_otherwise"])),
        ("memory of the server at the end", grown("server")),
        ("memory of the workers at the end", grown("workers")),
        ("ms, median", f"{d['ms']['p50']:.1f}"),
        ("ms, 99th percentile", f"{d['ms']['p99']:.1f}"),
        ("ms, longest", f"{d['ms']['max']:.1f}"),
        ("99th percentile / median", f"{d['ms']['p99_to_p50']:.2f}"),
    ]
    return grid(" | measured", "lr", rows)
