"""docs/results/training-memory.md: memory and steps of packed training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .common import grid, load, table

PACKED = {"exact": "exact", "8": "8 bits", "4": "4 bits"}


#: Checkpointing and packing together, as added to "blocks" and "stages".
CHECKPOINT = {"": "checkpoint", "+exact": "and exact", "+8": "and 8 bits", "+4": "and 4 bits"}


def training_rows(what: str) -> list[tuple[str, dict[str, Any]]]:
    """(network, figures), networks with BatchNorm first."""
    plain = ["unet", "vgg16"]
    found = load(f"training/{what}")["networks"]
    return sorted(found.items(), key=lambda item: (item[0] in plain, item[0]))


def over_plain(row: dict[str, Any], methods: Iterable[str]) -> list[str]:
    return [f"{row[m] / row['plain']:.3f}" if m in row else "" for m in methods]


def checkpointed(row: dict[str, Any], better: Callable[..., Any]) -> dict[str, Any]:
    """Of checkpointing by blocks and by stages the better, as ``blocks``, ``blocks+exact``, ..."""
    found = {}
    for packed in CHECKPOINT:
        values = [row[m] for m in (f"blocks{packed}", f"stages{packed}") if m in row]
        if values:
            found[f"blocks{packed}"] = better(values)
    return found


@table
def training_saved() -> list[str]:
    rows = [
        (
            name,
            "yes" if r["norm"] else "no",
            r["batch"],
            f"{r['density']:.2f}{'' if r['trained'] else ' (random weights)'}",
            f"{r['plain'] / 1e6:.0f}",
            *over_plain(r, PACKED),
        )
        for name, r in training_rows("saved")
    ]
    head = "network | BatchNorm | batch | density after ReLU | plain, MB | exact | 8 bits | 4 bits"
    return grid(head, "llrlrrrr", rows)


@table
def training_step() -> list[str]:
    rows = []
    for name, r in training_rows("step"):
        ratios = [
            f"{r[m]['median'] / r['plain']['median']:.2f} ({r[m]['min'] / r['plain']['min']:.2f})"
            for m in PACKED
        ]
        rows.append((name, r["batch"], r["rounds"], f"{r['plain']['median']:.2f}", *ratios))
    return grid("network | batch | rounds | plain, s | exact | 8 bits | 4 bits", "lrrrrrr", rows)


def peaks(what: str) -> list[str]:
    methods = [*PACKED, *(f"blocks{packed}" for packed in CHECKPOINT)]
    rows = [
        (name, r["batch"], f"{r['plain'] / 1e6:.0f}", *over_plain(r | checkpointed(r, min), methods))
        for name, r in training_rows(what)
    ]
    titles = " | ".join([*PACKED.values(), *CHECKPOINT.values()])
    return grid(f"network | batch | plain, MB | {titles}", "lrr" + "r" * len(methods), rows)


@table
def training_peak() -> list[str]:
    return peaks("peak")


@table
def training_pages() -> list[str]:
    return peaks("pages")


@table
def training_predicted() -> list[str]:
    pages = [(f"{name}, pages of its own", r) for name, r in training_rows("pages")]
    rows = [
        (name, *(f"{r['predicted'][m] / r[m]:.2f}" if m in r else "" for m in ("plain", *PACKED)))
        for name, r in (*training_rows("peak"), *pages)
    ]
    return grid("network | plain | exact | 8 bits | 4 bits", "lrrrr", rows)


@table
def training_largest() -> list[str]:
    methods = {"plain": "plain", **PACKED, **{f"blocks{packed}": t for packed, t in CHECKPOINT.items()}}
    rows = []
    for name, r in training_rows("largest"):
        found = r | checkpointed(r, max)
        rows.append((name, f"{r['limit'] / 2**30:.0f} GiB", *(found.get(m, "") for m in methods)))
    return grid(f"network | limit | {' | '.join(methods.values())}", "lr" + "r" * len(methods), rows)


@table
def training_accuracy() -> list[str]:
    d = load("training/accuracy")
    rows = []
    for s in d["summary"]:
        seeds = [f"{r['accuracies'][-1]:.2f}" for r in d["runs"] if r["bits"] == s["bits"]]
        rows.append((s["bits"] or "none", *seeds, f"{s['mean']:.2f}"))
    titles = " | ".join(f"seed {i}" for i in range(len(rows[0]) - 2))
    return grid(f"bits | {titles} | mean", "l" + "r" * (len(rows[0]) - 1), rows)
