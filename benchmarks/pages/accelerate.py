"""docs/results/accelerate.md: zeros without training."""

from __future__ import annotations

import json
from typing import Any

from .common import RESULTS, grid, load, percent, table


@table
def accelerate() -> list[str]:
    rows: list[tuple[str, ...]] = []
    for path in sorted((RESULTS / "accelerate").glob("*.json")):
        d = json.loads(path.read_text(encoding="utf-8"))
        for i, p in enumerate([d["before"], *d["points"]]):
            rows.append((d["network"] if i == 0 else "", *accelerate_row(p, natural=i == 0)))
    head = "network | density | less work | top-1 | points (95 %) | agreement | output error | CPU s"
    return grid(head, "lrrrrrrr", rows)


def accelerate_row(p: dict[str, Any], *, natural: bool) -> tuple[str, ...]:
    change, same = p.get("top1_change"), p.get("agreement")
    points = ""
    if change is not None and not natural:
        points = "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(**{k: 100 * v for k, v in change.items()})
    return (
        f"{p['density']:.3f}",
        "natural" if natural else f"{p['less_work']:.2f}x",
        percent(p["top1"]) if "top1" in p else "",
        points,
        percent(same["value"]) if same is not None and not natural else "",
        "" if natural else moved(p),
        "" if natural else f"{p['cpu_seconds']:.0f}",
    )


def moved(p: dict[str, Any]) -> str:
    """How far outputs moved: of maps the root mean square in per cent of their range."""
    if "range_error" in p:
        return f"{100 * p['range_error']['rms']:.2f} % of range"
    return f"{p['output_error']['value']:.3f}"


@table
def accelerate_draws() -> list[str]:
    rows: list[tuple[Any, ...]] = []
    for path in sorted((RESULTS / "accelerate" / "draws").glob("*.json")):
        drawn = json.loads(path.read_text(encoding="utf-8"))
        even = load(f"accelerate/{path.stem}")
        every = [{"draw": 0} | p for p in even["points"]] + drawn["points"]
        for target in dict.fromkeys(aim(p) for p in every):
            points = [p for p in every if aim(p) == target]
            if len(points) < 2:
                continue
            numbers = [draw_row(p) for p in points]
            short = min(map(len, numbers))  # not every draw was coded
            means = [sum(n[i] for n in numbers) / len(numbers) for i in range(short)]
            for draw, row in [*zip([p["draw"] for p in points], numbers, strict=True), ("mean", means)]:
                density, work, change, same, divergence, error, *coded = row
                bits = [f"{g:.2f}x at {100 * c:+.2f}" for g, c in zip(coded[::2], coded[1::2], strict=True)]
                rows.append(
                    (
                        drawn["network"],
                        draw,
                        f"{density:.3f}",
                        f"{work:.2f}x",
                        f"{100 * change:+.2f}",
                        percent(same),
                        f"{divergence:.4f}",
                        f"{error:.3f}",
                        *[*bits, "", ""][:2],
                    )
                )
    head = "network | draw | density | less work | points | agreement | divergence | output error"
    return grid(f"{head} | 16 bits | 8 bits", "lrrrrrrrrr", rows)


def aim(p: dict[str, Any]) -> tuple[Any, ...]:
    """The target of a point; a theoretical speed-up is the calibration images' and differs by draw."""
    target = p["target"]
    return ("density", target["density"]) if "density" in target else ("work", round(p["less_work"], 1))


def draw_row(p: dict[str, Any]) -> tuple[float, ...]:
    """Numbers of a draw: what is known of every one, and gain and points at 16 and 8 bits of those coded."""
    shares = (p["less_work"], p["top1_change"]["value"], p["agreement"]["value"])
    both = [(c["codecs"]["best"]["gain_float32"], c["top1_change"]["value"]) for c in p.get("coded", [])]
    coded = [v for pair in both for v in pair]
    return (p["density"], *shares, p["divergence"]["value"], p["output_error"]["value"], *coded)


@table
def accelerate_coded() -> list[str]:
    rows = []
    for path in sorted((RESULTS / "accelerate").glob("*.json")):
        d = json.loads(path.read_text(encoding="utf-8"))
        for p in [d["before"], *d["points"]]:
            for c in p.get("coded", []):
                gains = [f"{c['codecs'][k]['gain_float32']:.2f}x" for k in ("seg", "rans", "best")]
                change = f"{100 * c['top1_change']['value']:+.2f}" if "top1_change" in c else ""
                what = d["network"], f"{c['density']:.3f}", c["bits"], f"{c.get('widen', 1):g}"
                rows.append((*what, *gains, change))
    return grid("network | density | bits | steps | seg | rans | best, map by map | points", "lrrrrrrr", rows)
