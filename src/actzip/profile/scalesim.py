"""A topology for SCALE-Sim (v2 and v3): one row a convolution or group of it.

SCALE-Sim has no padding, one stride, and no density of activations: the map's size is that of what
the layer reads, padding included, and rows do not say how many zeros there are. A depthwise
convolution is one row whose name begins with ``DP``, which SCALE-Sim runs channel by channel; other
groups are rows of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actzip.profile.workloads import LeftOut, Workload, one_stride

__all__ = ["export"]

_COLUMNS = (
    "Layer name", "IFMAP Height", "IFMAP Width", "Filter Height", "Filter Width", "Channels",
    "Num Filter", "Strides",
)  # fmt: skip
_NOTE = "SCALE-Sim models no density of activations: zeros are computed like other values"


def export(layers: list[Workload], data: Mapping[str, Any], folder: Path) -> list[LeftOut]:
    """Writes ``topology.csv`` into ``folder``; the layers that SCALE-Sim cannot express."""
    left, rows = [], []
    for layer in layers:
        why = one_stride(layer, "SCALE-Sim")
        if why:
            left.append(LeftOut(layer.name, why))
        else:
            rows += list(_rows(layer))
    lines = [", ".join((*_COLUMNS, _NOTE)), *(", ".join(map(str, r)) for r in rows)]
    (folder / "topology.csv").write_text("".join(f"{line},\n" for line in lines), encoding="utf-8")
    return left


def _rows(layer: Workload) -> Iterator[tuple[Any, ...]]:
    """Rows of a layer, for as often as an image runs it."""
    name = layer.file.replace("DP", "Dp")  # SCALE-Sim reads DP in a name as depthwise
    read = (layer.rows, 1) if layer.kind == "linear" else layer.read
    for i in range(layer.times):
        again = f"_run{i}" if layer.times > 1 else ""
        if layer.groups > 1 and layer.inputs == 1:
            rest = (layer.groups, layer.outputs, layer.stride[0])
            yield (f"DP_{name}{again}", *read, *layer.kernel, *rest)
            continue
        for g in range(layer.groups):
            group = f"_g{g}" if layer.groups > 1 else ""
            rest = (layer.inputs, layer.outputs, layer.stride[0])
            yield (f"{name}{again}{group}", *read, *layer.kernel, *rest)
