"""The profile's result: a table, JSON with a published schema, one self-contained HTML file, CSV
and Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import DataError, InputError
from actzip.files import read_json, write_bytes, write_text
from actzip.profile.collect import Collection

if TYPE_CHECKING:
    from torch import nn

    from actzip.profile.export import Exported

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
        """For ``print`` and Rich: layers, maps and totals."""
        from actzip.profile.tables import report_table

        return report_table(self.data)

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

        text = render(self.to_dict(), self.collection.samples if self.collection else {})
        if path is not None:
            write_text(path, text)
        return text

    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes the tables of :meth:`frames` into ``folder``, one CSV file each."""
        base = Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        out = []
        for name, rows in self.frames().items():
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
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), buffer)
            out.append(write_bytes(base / f"{name}.parquet", buffer.getvalue()))
        return out

    def export(
        self,
        kind: str,
        folder: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        batch: Any = None,
    ) -> Exported:
        """Writes the layers, with their measured densities, for a simulator of accelerators.

        Args:
            kind: ``timeloop`` (and Sparseloop), ``scalesim`` or ``stonne``.
            folder: a new one, written whole or not at all.
            model, batch: for ``stonne`` alone: the module, and inputs whose first image gives the
                tensors.

        Returns:
            What was written, and the layers that the simulator cannot express, each with the reason.

        Raises:
            InputError: another kind, or a folder that exists. DataError: it cannot be written.
        """
        from actzip.profile.export import export

        return export(self.to_dict(), kind, folder, model=model, batch=batch)

    def frames(self) -> dict[str, list[dict[str, Any]]]:
        """The report as flat rows: ``maps``, ``layers``, ``runs`` (zero runs and bursts),
        ``values`` (magnitudes), ``channels`` (density of each), ``thresholds`` (density if
        values up to a threshold were zero) and, where they were counted, ``tiles`` (how many hold
        so many non-zeros)."""
        from actzip.profile.tables import flat_rows

        return flat_rows(self.data)

    def _repr_html_(self) -> str:
        import html as escape

        page = escape.escape(self.to_html(), quote=True)
        style = "width:100%;height:720px;border:0"
        return f'<iframe srcdoc="{page}" style="{style}" title="actzip profile"></iframe>'

    def __str__(self) -> str:
        return str(self.table())


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
        """For ``print`` and Rich: density of each map and input, before and after, and the totals."""
        from actzip.profile.tables import comparison_table

        return comparison_table(self.rows, self.before.totals, self.after.totals)


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
