"""docs/results/split.md: split inference."""

from __future__ import annotations

import json
from typing import Any

from .common import RESULTS, grid, table


def split_results(kind: str) -> list[Any]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / "split").glob(f"{kind}-*.json"))]


def interval(j: dict[str, Any]) -> str:
    return f"{100 * j['value']:.1f} % ({100 * j['low']:.1f} to {100 * j['high']:.1f})"


@table
def split_rate() -> list[str]:
    rows = []
    for d in split_results("rate"):
        for c in d["cuts"]:
            shape = " + ".join("x".join(s[1:]) for s in c["shapes"])
            top1 = c.get("top1")
            rows.append(
                (
                    d["network"],
                    c["at"],
                    shape,
                    f"{c['bits_per_element']:.2f}",
                    f"{c['kilobytes']:.1f}",
                    interval(c["judged"]["agreement"]),
                    f"{100 * top1['before']:.1f} -> {100 * top1['after']:.1f} %" if top1 else "",
                    "yes" if c["met"] else "no",
                    d["proved"],
                )
            )
    head = "network | cut behind | map | bits/element | kB | same answer (95 %) | top-1 | kept | images"
    return grid(head, "lllrrllrr", rows)


#: Codecs of which the time is compared with that of a head.
CODINGS = ("rans", "seg", "zvc")


def coding_share(c: dict[str, float]) -> str:
    return f"{100 * c['share_of_head']:.0f} % at {c['bits_per_element']:.2f}"


@table
def split_link() -> list[str]:
    rows = []
    for d in split_results("link"):
        link = f"{d['bandwidth'] / 1e6:g} Mbit/s, {1e3 * d['latency']:g} ms"
        for c in d["cuts"]:
            rows.append(
                (
                    d["network"],
                    link,
                    c["cut"],
                    c["maps"],
                    f"{c['kilobytes']:.1f}",
                    f"{c['predicted_ms']:.2f}",
                    f"{c['measured_ms']:.2f}",
                    f"{100 * c['off']:+.1f} %",
                    *(coding_share(c["coding"][k]) for k in CODINGS),
                )
            )
    head = "network | link | cut behind | maps | kB | predicted ms | measured ms | off | rans | seg | zvc"
    return grid(head, "lllrrrrrrrr", rows)
