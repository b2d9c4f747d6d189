"""The profile's result: a table, JSON with a published schema, one self-contained HTML file, CSV
and Parquet."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from actzip.errors import DataError, InputError
from actzip.files import read_json, write_text
from actzip.profile.collect import Collection
from actzip.profile.stats import BINS_PER_OCTAVE, bin_edges

__all__ = ["SCHEMA", "Comparison", "Report", "compare", "load_report", "schema"]

SCHEMA = "actzip-profile/1"


def _round(value: Any) -> Any:
    """Numbers as JSON can hold them (no NaN, no infinity), floats to nine significant digits."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, (np.integer, np.floating)):
        return _round(value.item())
    if isinstance(value, dict):
        return {str(k): _round(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(v) for v in value]
    return value


def build_maps(collection: Collection, bits: Iterable[int] = (8, 16)) -> list[dict[str, Any]]:
    rows = []
    edges = bin_edges()
    for stats in collection.maps.values():
        elements = int(np.prod(stats.shape)) if stats.shape else 1
        used = np.flatnonzero(stats.hist)
        last = int(used[-1]) + 1 if used.size else 0
        low = int(used[used > 0][0]) if (used > 0).any() else last  # bin 0 is the zeros: kept apart
        dead = stats.dead_channels
        curve = [
            (stats.threshold_for(d * stats.density), d * stats.density)
            for d in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
        ]
        rows.append(
            {
                "name": stats.site.name,
                "kind": stats.site.kind,
                "module": stats.site.module,
                "module_type": stats.site.module_type,
                "can_be_sparse": stats.site.sparse,
                "shape": list(stats.shape),
                "varying_shape": stats.varying_shape,
                "dtype": stats.dtype,
                "images": stats.images,
                "elements": elements,
                "float32_bytes": 4 * elements,
                "density": stats.density,
                "density_spread": stats.density_spread(),
                "dead_channels": {
                    "count": len(dead),
                    "of": int(stats.channel_nonzeros.size),
                    "first": dead[:64],
                },
                "nonfinite": stats.nonfinite,
                "max_abs": stats.max_abs,
                "entropy": {str(b): stats.entropy(b) for b in bits},
                "coded": {key: c.summary(elements) for key, c in stats.coded.items()},
                "histogram": {
                    "bins_per_octave": BINS_PER_OCTAVE,
                    "zeros": stats.elements - stats.nonzeros,
                    "edges": [float(e) for e in edges[low : last + 1]] if last > low else [],
                    "counts": stats.hist[low:last].tolist() if last > low else [],
                },
                "zero_runs_log2": _trim(stats.zero_runs.tolist()),
                "bursts_log2": _trim(stats.bursts.tolist()),
                "thresholds": [{"threshold": t, "density": stats.density_at(t)} for t, _ in curve],
                "nonzero_places": _places(stats.position_nonzeros, stats),
                "channel_density": [
                    float(c) / max(1, stats.elements // max(1, stats.channel_nonzeros.size))
                    for c in stats.channel_nonzeros
                ],
            }
        )
    return rows


def _places(counts: Any, stats: Any) -> list[list[float]]:
    """Mean density at each position over channels and images, averaged down to at most 16 x 16."""
    if counts.size == 0:
        return []
    channels = max(1, stats.channel_nonzeros.size)
    rows = [r.sum(0) for r in np.array_split(counts, min(16, counts.shape[0]), axis=0)]
    heights = [r.shape[0] for r in np.array_split(counts, min(16, counts.shape[0]), axis=0)]
    out = []
    for row, height in zip(rows, heights):
        parts = np.array_split(row, min(16, row.size))
        out.append([float(p.sum()) / (p.size * height * channels * max(1, stats.images)) for p in parts])
    return out


def _trim(values: list[int]) -> list[int]:
    while values and values[-1] == 0:
        values.pop()
    return values


def build_layers(collection: Collection) -> list[dict[str, Any]]:
    rows = []
    for stats in collection.computations.values():
        n = max(1, stats.images)
        rows.append(
            {
                "name": stats.site.name,
                "kind": stats.site.kind,
                "module": stats.site.module,
                "module_type": stats.site.module_type,
                "input_shape": list(stats.input_shape),
                "weight_shape": list(stats.weight_shape),
                "output_shape": list(stats.output_shape),
                "stride": list(stats.stride),
                "groups": stats.groups,
                "dtype": stats.dtype,
                "macs": stats.macs / n,
                "border_macs": stats.border_macs / n,
                "effective_macs": stats.effective_macs / n,
                "input_density": stats.input_density,
                "theoretical_speedup": stats.theoretical_speedup,
                "predicted_ms": None,
                "measured_ms": None,
                "kernel": None,
                "why": None,
            }
        )
    return rows


def build_totals(maps: list[dict[str, Any]], layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over layers; bits/element and gains are of all maps together, not means of ratios."""
    elements = sum(m["elements"] for m in maps)
    macs = sum(r["macs"] for r in layers)
    effective = sum(r["effective_macs"] for r in layers)
    totals: dict[str, Any] = {
        "maps": len(maps),
        "layers": len(layers),
        "elements": elements,
        "density": sum(m["density"] * m["elements"] for m in maps) / elements if elements else None,
        "macs": macs,
        "border_macs": sum(r["border_macs"] for r in layers),
        "effective_macs": effective,
        "theoretical_speedup": macs / effective if effective else None,
        "float32_bytes": 4 * elements,
        "coded": {},
        "entropy": {},
    }
    for bits in sorted({b for m in maps for b in m["entropy"]}, key=int):
        totals["entropy"][bits] = (
            sum(m["entropy"][bits] * m["elements"] for m in maps) / elements if elements else None
        )
    for key in dict.fromkeys(k for m in maps for k in m["coded"]):
        have = [m for m in maps if key in m["coded"]]
        n = sum(m["elements"] for m in have)
        bits = int(key.rsplit("-", 1)[1])
        per_element = sum(m["coded"][key]["bits_per_element"] * m["elements"] for m in have) / n
        totals["coded"][key] = {
            "bits_per_element": per_element,
            "gain_float32": 32 / per_element,
            "gain_qbit": bits / per_element,
            "dram_bytes_saved_per_image": sum(m["float32_bytes"] for m in have) - per_element * n / 8,
            "buffer_bytes_worst": max(m["coded"][key]["buffer_bytes_worst"] for m in have),
            "buffer_bytes_p99": max(m["coded"][key]["buffer_bytes_p99"] for m in have),
        }
    for name in ("predicted_ms", "measured_ms"):  # of convolutions and linear layers alone
        values = [r[name] for r in layers if r[name] is not None]
        totals[name] = sum(values) if values else None
    return totals


@dataclass
class Report:
    """What :func:`actzip.profile` returns: the numbers in ``data`` (see ``docs/profile.md`` for the schema).

    In a notebook it shows itself; :meth:`table` is the Rich table, :meth:`to_json` and
    :meth:`to_html` write files.
    """

    data: dict[str, Any]
    collection: Collection | None = field(default=None, repr=False)

    @property
    def maps(self) -> list[dict[str, Any]]:
        """One dict an activation map, in order of execution."""
        return list(self.data["maps"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One dict a convolution or linear layer, in order of execution."""
        return list(self.data["layers"])

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the network."""
        return dict(self.data["totals"])

    def table(self) -> Any:
        """A Rich renderable: layers, maps and totals."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        t = self.totals
        engine = any(r["measured_ms"] is not None for r in self.layers)
        layers = Table(title="Convolutions and linear layers", title_justify="left", header_style="bold")
        columns = ["layer", "kind", "input", "MACs", "effective", "input density", "theoretical speed-up"]
        columns += ["predicted ms", "measured ms", "kernel"] if engine else []
        for i, column in enumerate(columns):
            layers.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
        for r in self.layers:
            row = [
                r["name"],
                r["kind"],
                "x".join(map(str, r["input_shape"])),
                si(r["macs"]),
                si(r["effective_macs"]),
                f"{r['input_density']:.3f}",
                ratio(r["theoretical_speedup"]),
            ]
            if engine:
                row += [number(r["predicted_ms"], 3), number(r["measured_ms"], 3), r["kernel"] or "-"]
            layers.add_row(*row)
        layers.add_section()
        total = ["total", "", "", si(t["macs"]), si(t["effective_macs"]), "", ratio(t["theoretical_speedup"])]
        if engine:
            total += [number(t["predicted_ms"], 3), number(t["measured_ms"], 3), ""]
        layers.add_row(*total, style="bold")

        maps = Table(title="Activation maps", title_justify="left", header_style="bold")
        keys = list(t["coded"])
        for i, column in enumerate(["map", "kind", "shape", "density", "p5-p95", "dead channels", *keys]):
            maps.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
        for m in self.maps:
            spread = m["density_spread"]
            maps.add_row(
                m["name"],
                m["kind"],
                "x".join(map(str, m["shape"])),
                f"{m['density']:.3f}",
                f"{spread['p5']:.2f}-{spread['p95']:.2f}",
                f"{m['dead_channels']['count']}/{m['dead_channels']['of']}",
                *(number(m["coded"].get(k, {}).get("bits_per_element"), 2) for k in keys),
            )
        maps.add_section()
        maps.add_row(
            "total",
            "",
            si(t["elements"]),
            f"{t['density']:.3f}" if t["density"] is not None else "-",
            "",
            "",
            *(number(t["coded"][k]["bits_per_element"], 2) for k in keys),
            style="bold",
        )
        said = []
        run = self.data["engine"] or {}
        if run.get("latency_ms") and run.get("imposed"):
            said.append(
                f"Engine at batch {run['batch']}, {run['threads']} threads: "
                f"{run['latency_ms']:.2f} ms measured,"
                f" {run['predicted_ms']:.2f} ms predicted; with every ReLU's map at density "
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
        points = self.data["whatif"].get("points", [])
        if len(points) > 1:
            said.append(
                "Thresholded ReLUs, density (output change): "
                + ", ".join(f"{p['density']:.2f} ({number(p['output_change'], 3)})" for p in points)
                + "."
            )
        notes = [Text(x) for x in said]
        notes += [Text(f"warning: {w}", style="yellow") for w in self.data["warnings"]]
        info = self.data["environment"]
        source = self.data["data"]["source"]
        foot = Text(
            f"{self.data['model']['name']}: {self.data['data']['images']} images from {source}; "
            "coded columns are"
            f" bits/element, headers included. {info['cpu']}, {info['isa']}, {info['threads']} threads."
        )
        return Group(layers, maps, *notes, foot)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, as :meth:`to_json` writes it."""
        return dict(_round(self.data))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text; written to ``path`` too where one is given (whole or not at all)."""
        text = json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML page that opens without network; written to ``path`` too where one
        is given."""
        from actzip.profile.html import render

        text = render(self)
        if path is not None:
            write_text(path, text)
        return text

    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes the tables of :meth:`frames` into ``folder``, one CSV file each."""
        base = Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        out = []
        for name, rows in self.frames().items():
            import io

            buffer = io.StringIO()
            if rows:
                writer = csv.DictWriter(buffer, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            out.append(write_text(base / f"{name}.csv", buffer.getvalue()))
        return out

    def to_parquet(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes what :meth:`to_csv` writes, as Parquet files.

        Raises:
            DataError: pyarrow is not installed.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise DataError("writing Parquet needs pyarrow; `pip install actzip[data]` brings it") from error
        base = Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        out = []
        for name, rows in self.frames().items():
            target = base / f"{name}.parquet"
            temporary = base / f".{name}.parquet.tmp"
            try:
                pq.write_table(pa.Table.from_pylist(rows), temporary)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            out.append(target)
        return out

    def frames(self) -> dict[str, list[dict[str, Any]]]:
        """The report as flat rows: ``maps``, ``layers``, ``runs`` (zero runs and bursts),
        ``values`` (magnitudes), ``channels`` (density of each) and ``thresholds`` (density if
        values up to a threshold were zero)."""
        maps, runs, values = [], [], []
        keys = list(self.totals["coded"])
        for m in self.maps:
            row = {
                k: m[k]
                for k in ("name", "kind", "module", "module_type", "dtype", "images", "elements", "density")
            }
            row["shape"] = "x".join(map(str, m["shape"]))
            row |= {f"density_{k}": v for k, v in m["density_spread"].items()}
            row |= {"dead_channels": m["dead_channels"]["count"], "channels": m["dead_channels"]["of"]}
            row |= {"max_abs": m["max_abs"], "nonfinite": m["nonfinite"], "float32_bytes": m["float32_bytes"]}
            row |= {f"entropy_{b}": e for b, e in m["entropy"].items()}
            for key in keys:
                coded = m["coded"].get(key, {})
                for name in (
                    "bits_per_element",
                    "gain_float32",
                    "gain_qbit",
                    "dram_bytes_saved_per_image",
                    "buffer_bytes_worst",
                    "buffer_bytes_p99",
                ):
                    row[f"{key}_{name}"] = coded.get(name)
            maps.append(row)
            for what in ("zero_runs_log2", "bursts_log2"):
                for i, count in enumerate(m[what]):
                    runs.append(
                        {
                            "name": m["name"],
                            "what": "zero run" if what[0] == "z" else "burst",
                            "from": 2**i,
                            "to": 2 ** (i + 1) - 1,
                            "count": count,
                        }
                    )
            h = m["histogram"]
            values.append({"name": m["name"], "from": 0.0, "to": 0.0, "count": h["zeros"]})
            for i, count in enumerate(h["counts"]):
                values.append(
                    {"name": m["name"], "from": h["edges"][i], "to": h["edges"][i + 1], "count": count}
                )
        layers = []
        for r in self.layers:
            row = {k: v for k, v in r.items() if not isinstance(v, list)}
            for k in ("input_shape", "output_shape", "weight_shape", "stride"):
                row[k] = "x".join(map(str, r[k]))
            layers.append(row)
        channels = [
            {"name": m["name"], "channel": c, "density": d}
            for m in self.maps
            for c, d in enumerate(m["channel_density"])
        ]
        thresholds = [
            {"name": m["name"], **t} for m in self.maps if m["can_be_sparse"] for t in m["thresholds"]
        ]
        return {
            "maps": maps,
            "layers": layers,
            "runs": runs,
            "values": values,
            "channels": channels,
            "thresholds": thresholds,
        }

    def _repr_html_(self) -> str:
        import html as escape

        page = escape.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" style="width:100%;height:720px;border:0" title="actzip '
            'profile"></iframe>'
        )

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        with console.file:
            console.print(self.table())
        return console.export_text()


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


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what :meth:`Report.to_json` writes, version :data:`SCHEMA`."""
    text = resources.files("actzip.profile").joinpath("schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def load_report(path: str | os.PathLike[str]) -> Report:
    """Reads a report that :meth:`Report.to_json` wrote.

    Raises:
        DataError: the file is missing, is not JSON or is not an actzip profile of a schema that
            this version knows.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path} is not a profile of schema {SCHEMA} (found {found!r})")
    return Report(data)


@dataclass
class Comparison:
    """Two profiles side by side, layers matched by name."""

    before: Report
    after: Report
    rows: list[dict[str, Any]]
    only_before: list[str]
    only_after: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Rows, totals of both, and layers that only one of them has."""
        return dict(
            _round(
                {
                    "schema": "actzip-profile-comparison/1",
                    "rows": self.rows,
                    "before": self.before.totals,
                    "after": self.after.totals,
                    "only_before": self.only_before,
                    "only_after": self.only_after,
                }
            )
        )

    def table(self) -> Any:
        """A Rich table: density of each map and input, before and after, and the totals."""
        from rich.table import Table

        table = Table(title="Before and after", title_justify="left", header_style="bold")
        for i, column in enumerate(["layer", "what", "before", "after", "change"]):
            table.add_column(column, justify="left" if i < 2 else "right", overflow="fold")
        for r in self.rows:
            a, b = r["before"], r["after"]
            table.add_row(r["name"], r["what"], f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
        table.add_section()
        a, b = self.before.totals, self.after.totals
        table.add_row(
            "total",
            "theoretical speed-up",
            ratio(a["theoretical_speedup"]),
            ratio(b["theoretical_speedup"]),
            "",
        )
        for key in a["coded"]:
            if key in b["coded"]:
                x, y = a["coded"][key]["bits_per_element"], b["coded"][key]["bits_per_element"]
                table.add_row("total", f"{key} bits/element", f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}")
        return table


def compare(before: Report, after: Report) -> Comparison:
    """Matches two profiles layer by layer, say before and after ``sparsify``.

    Raises:
        InputError: they have no layer in common.
    """
    rows = []
    for what, key, part in (("density", "density", "maps"), ("input density", "input_density", "layers")):
        other = {r["name"]: r for r in after.data[part]}
        for r in before.data[part]:
            if r["name"] in other:
                rows.append(
                    {"name": r["name"], "what": what, "before": r[key], "after": other[r["name"]][key]}
                )
    names = [{r["name"] for p in ("maps", "layers") for r in x.data[p]} for x in (before, after)]
    if not rows:
        raise InputError("the two profiles have no layer in common; are they of the same model?")
    return Comparison(before, after, rows, sorted(names[0] - names[1]), sorted(names[1] - names[0]))
