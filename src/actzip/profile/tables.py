"""Reports as Rich tables, and as the flat rows of CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from actzip.profile.verdict import verdict_of
from actzip.text import Rendered, cell, counted

__all__ = ["comparison_table", "flat_rows", "report_table"]

Row = dict[str, Any]


def report_table(data: Mapping[str, Any]) -> Rendered:
    """Layers, maps, totals and notes of a report's ``data``."""
    notes = [Text(x) for x in _said(data)]
    notes += [cell(f"warning: {w}", "yellow") for w in data["warnings"]]
    info = data["environment"]
    foot = cell(
        f"{data['model']['name']}: {data['data']['images']} images from {data['data']['source']}; "
        "coded columns are bits/element, headers included. "
        f"{info['cpu']}, {info['isa']}, {counted(info['threads'], 'thread')}."
    )
    parts = [_layers(data), _maps(data), *_tiles(data)]
    return Rendered(Text(verdict_of(data), style="bold"), *parts, *notes, foot)


def _table(title: str, columns: list[str], left: int) -> Table:
    """An empty table whose first ``left`` columns are text."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def _layers(data: Mapping[str, Any]) -> Table:
    t, rows = data["totals"], data["layers"]
    engine = any(r["measured_ms"] is not None for r in rows)
    columns = ["layer", "kind", "input", "MACs", "effective", "input density", "theoretical speed-up"]
    columns += ["predicted ms", "measured ms", "kernel"] if engine else []
    table = _table("Convolutions and linear layers", columns, 3)
    for r in rows:
        row: list[Any] = [
            cell(r["name"]),
            cell(r["kind"]),
            "x".join(map(str, r["input_shape"])),
            si(r["macs"]),
            si(r["effective_macs"]),
            f"{r['input_density']:.3f}",
            ratio(r["theoretical_speedup"]),
        ]
        if engine:
            row += [number(r["predicted_ms"], 3), number(r["measured_ms"], 3), cell(r["kernel"] or "-")]
        table.add_row(*row)
    table.add_section()
    total = ["total", "", "", si(t["macs"]), si(t["effective_macs"]), "", ratio(t["theoretical_speedup"])]
    if engine:
        total += [number(t["predicted_ms"], 3), number(t["measured_ms"], 3), ""]
    table.add_row(*total, style="bold")
    return table


def _maps(data: Mapping[str, Any]) -> Table:
    t = data["totals"]
    keys = list(t["coded"])
    columns = ["map", "kind", "shape", "density", "p5-p95", "dead channels", *keys]
    table = _table("Activation maps", columns, 3)
    for m in data["maps"]:
        spread = m["density_spread"]
        table.add_row(
            cell(m["name"]),
            cell(m["kind"]),
            "x".join(map(str, m["shape"])),
            f"{m['density']:.3f}",
            f"{spread['p5']:.2f}-{spread['p95']:.2f}",
            f"{m['dead_channels']['count']}/{m['dead_channels']['of']}",
            *(number(m["coded"].get(k, {}).get("bits_per_element"), 2) for k in keys),
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        si(t["elements"]),
        f"{t['density']:.3f}" if t["density"] is not None else "-",
        "",
        "",
        *(number(t["coded"][k]["bits_per_element"], 2) for k in keys),
        style="bold",
    )
    return table


def _tiles(data: Mapping[str, Any]) -> list[Table]:
    """Occupancy of tiles, where it was counted."""
    rows = [m for m in data["maps"] if "tiles" in m]
    if not rows:
        return []
    keys = list(rows[0]["tiles"]["coded"])
    columns = ["map", "tile", "tiles", "empty", "mean", "p99", "most", "from chance"]
    columns += [f"{k} by tile" for k in keys]
    table = _table("Tiles (rows x columns x channels): non-zeros in them", columns, 2)
    for m in rows:
        t = m["tiles"]
        table.add_row(
            cell(m["name"]),
            "x".join(map(str, t["tile"])),
            si(t["tiles"]),
            f"{100 * t['empty']:.1f} %",
            number(t["mean"], 1),
            str(t["p99"]),
            str(t["most"]),
            number(t["hypergeometric"]["distance"], 2),
            *(number(t["coded"][k]["bits_per_element"] if k in t["coded"] else None, 2) for k in keys),
        )
    return [table]


def _said(data: Mapping[str, Any]) -> list[str]:
    """The sentences below the tables."""
    said, t = [], data["totals"]
    run = data["engine"] or {}
    if run.get("latency_ms") and run.get("imposed"):
        said.append(
            f"Engine at batch {run['batch']}, {counted(run['threads'], 'thread')}: "
            f"{run['latency_ms']:.2f} ms measured, {run['predicted_ms']:.2f} ms predicted; "
            "with every ReLU's map at density "
            + ", ".join(
                f"{p['density']:g}: {p['predicted_ms']:.2f}"
                for p in run["imposed"]
                if p["density"] in (1, 0.5, 0.3, 0.1)
            )
            + " ms predicted."
        )
    if t["coded"]:
        said.append(
            "DRAM traffic saved an image, each way: "
            + ", ".join(f"{k} {si(v['dram_bytes_saved_per_image'])}B" for k, v in t["coded"].items())
            + f" of {si(t['float32_bytes'])}B."
        )
    if any("tiles" in m for m in data["maps"]):
        said.append(
            "By tile: bits/element of tiles coded each for itself, with the table of where they begin. "
            "From chance: the largest difference to the shares of tiles with at most so many "
            "non-zeros if they lay by chance (hypergeometric)."
        )
    points = data["whatif"].get("points", [])
    if len(points) > 1:
        said.append(
            "Thresholded ReLUs, density (output change): "
            + ", ".join(f"{p['density']:.2f} ({number(p['output_change'], 3)})" for p in points)
            + "."
        )
    return said


def comparison_table(rows: list[Row], before: Mapping[str, Any], after: Mapping[str, Any]) -> Rendered:
    """Density of each map and input, before and after, and the two reports' totals."""
    table = _table("Before and after", ["layer", "what", "before", "after", "change"], 2)
    for r in rows:
        a, b = r["before"], r["after"]
        table.add_row(cell(r["name"]), r["what"], f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
    table.add_section()
    speedups = (ratio(x["theoretical_speedup"]) for x in (before, after))
    table.add_row("total", "theoretical speed-up", *speedups, "")
    for key in before["coded"]:
        if key in after["coded"]:
            x, y = (of["coded"][key]["bits_per_element"] for of in (before, after))
            table.add_row("total", f"{key} bits/element", f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}")
    return Rendered(table)


_CODED = (
    "bits_per_element",
    "gain_float32",
    "gain_qbit",
    "dram_bytes_saved_per_image",
    "buffer_bytes_worst",
    "buffer_bytes_p99",
)


def flat_rows(data: Mapping[str, Any]) -> dict[str, list[Row]]:
    """A report's ``data`` as flat tables, see :meth:`actzip.profile.Report.frames`."""
    maps: list[Row] = data["maps"]
    keys = list(data["totals"]["coded"])
    tiled = {"tiles": [row for m in maps for row in _tile_rows(m)]}
    return (tiled if tiled["tiles"] else {}) | {
        "maps": [_map_row(m, keys) for m in maps],
        "layers": [_layer_row(r) for r in data["layers"]],
        "runs": [row for m in maps for row in _run_rows(m)],
        "values": [row for m in maps for row in _value_rows(m)],
        "channels": [
            {"name": m["name"], "channel": c, "density": d}
            for m in maps
            for c, d in enumerate(m["channel_density"])
        ],
        "thresholds": [{"name": m["name"], **t} for m in maps if m["can_be_sparse"] for t in m["thresholds"]],
    }


def _map_row(m: Row, keys: list[str]) -> Row:
    names = ("name", "kind", "module", "module_type", "dtype", "images", "elements", "density")
    row = {k: m[k] for k in names}
    row["shape"] = "x".join(map(str, m["shape"]))
    row |= {f"density_{k}": v for k, v in m["density_spread"].items()}
    row |= {"dead_channels": m["dead_channels"]["count"], "channels": m["dead_channels"]["of"]}
    row |= {"max_abs": m["max_abs"], "nonfinite": m["nonfinite"], "float32_bytes": m["float32_bytes"]}
    row |= {f"entropy_{b}": e for b, e in m["entropy"].items()}
    for key in keys:
        coded = m["coded"].get(key, {})
        row |= {f"{key}_{name}": coded.get(name) for name in _CODED}
    return row


def _tile_rows(m: Row) -> list[Row]:
    t = m.get("tiles", {"tile": [], "histogram": []})
    shape = "x".join(map(str, t["tile"]))
    return [
        {"name": m["name"], "tile": shape, "nonzeros": i, "tiles": count}
        for i, count in enumerate(t["histogram"])
        if count
    ]


def _layer_row(r: Row) -> Row:
    row = {k: v for k, v in r.items() if not isinstance(v, (list, dict))}
    for k in ("input_shape", "output_shape", "weight_shape", "stride"):
        row[k] = "x".join(map(str, r[k]))
    return row


def _run_rows(m: Row) -> list[Row]:
    return [
        {"name": m["name"], "what": what, "from": 2**i, "to": 2 ** (i + 1) - 1, "count": count}
        for what, key in (("zero run", "zero_runs_log2"), ("burst", "bursts_log2"))
        for i, count in enumerate(m[key])
    ]


def _value_rows(m: Row) -> list[Row]:
    h = m["histogram"]
    edges = h["edges"]
    zeros = {"name": m["name"], "from": 0.0, "to": 0.0, "count": h["zeros"]}
    others = [
        {"name": m["name"], "from": edges[i], "to": edges[i + 1], "count": count}
        for i, count in enumerate(h["counts"])
    ]
    return [zeros, *others]


def si(value: float | None) -> str:
    """12345678 -> '12.3 M'."""
    if value is None:
        return "-"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.3g}"


def number(value: float | None, digits: int) -> str:
    """A number, or '-' for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """'1.23x', or '-' for None."""
    return "-" if value is None else f"{value:.2f}x"
