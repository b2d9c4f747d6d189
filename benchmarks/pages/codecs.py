"""docs/results/codecs.md: sizes and speed of the codecs."""

from __future__ import annotations

from typing import Any

from .common import grid, load, table

#: What two threads gained: keys of bench.py, of the codecs and of memcpy.
TWO_THREADS = {
    "there": (("encode", "copy"), ("decode", "copy")),
    "new": (("encode_new", "copy_new"), ("decode_new", "copy_new")),
    "all maps": (("encode_many", "copy_many"), ("decode_many", "copy_many")),
}
RIVALS = ("memcpy", "zstd", "lz4", "blosc2")


def codec_name(name: str) -> str:
    return name if name.startswith(RIVALS) else f"`{name}`"


@table
def codec_bytes() -> list[str]:
    networks: dict[str, list[dict[str, Any]]] = {}
    for entry in load("codec/bench").values():
        networks.setdefault(entry["what"], []).append(entry)
    lines = []
    for what, entries in networks.items():
        entries.sort(key=lambda e: e["bits"])
        machine = entries[0]["machine"]
        density = ", ".join(f"{e['density']:.3f} at {e['bits']} bits" for e in entries)
        lines += [f"### {what}", "", f"Density {density}; {machine['cpu']}, {machine['isa']}.", ""]
        head = " | ".join(f"{e['bits']} bits: gain | encode | decode" for e in entries)
        rows = []
        for name in entries[0]["codecs"]:
            cells = [codec_name(name)]
            for e in entries:
                c = e["codecs"][name]
                cells += [f"{c['gain']:.3f}", f"{c['encode_gbps']:.3g}", f"{c['decode_gbps']:.3g}"]
            rows.append(cells)
        lines += [*grid(f"GB/s | {head}", "l" + "r" * (3 * len(entries)), rows), ""]
    return lines[:-1]


@table
def codec_threads() -> list[str]:
    entries = [e for e in load("codec/bench").values() if "two_threads" in e]
    names = list(entries[0]["two_threads"])
    rows = []
    for e in entries:
        for memory, ways in TWO_THREADS.items():
            cells = []
            for n in names:
                s = e["two_threads"][n]
                cells.append(", ".join(dict.fromkeys(f"{s.get(w, s.get(c)):.2f}" for w, c in ways)))
            rows.append((e["what"], e["bits"], memory, *cells))
    head = " | ".join(codec_name(n) for n in names)
    return grid(f"network | bits | memory | {head}", "lrl" + "r" * len(names), rows)
