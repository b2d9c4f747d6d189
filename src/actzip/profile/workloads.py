"""A report's layers as the workloads that simulators of accelerators know: seven or eight loop
bounds and three densities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LeftOut", "Workload", "one_stride", "workloads"]


@dataclass(frozen=True)
class LeftOut:
    """A layer that a simulator cannot express, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Workload:
    """One convolution or linear layer, of one image.

    A linear layer is a convolution of 1x1: features are channels, and what else its input has is
    ``rows``. A 1-D convolution has one row.

    Attributes:
        groups: of channels; ``inputs`` and ``outputs`` are channels of one group.
        kernel, stride, dilation, out: rows and columns.
        read: rows and columns of the input that it reads, padding included.
        times: how often an image runs it.
        input_density: of what it reads, where padding counts as zeros.
        output_density: of the activation map that its output becomes; 1 where there is none.
        tiles: occupancy of tiles of the input, as the report has it.
    """

    number: int
    name: str
    kind: str
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]
    read: tuple[int, int]
    rows: int
    times: int
    input_density: float
    weight_density: float
    output_density: float
    output_map: str | None
    tiles: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def macs(self) -> int:
        """Of one run."""
        channels = self.groups * self.inputs * self.outputs
        return self.rows * channels * math.prod((*self.kernel, *self.out))

    @property
    def file(self) -> str:
        """A name for files: the place in the network, and what is harmless of the layer's name."""
        return f"{self.number:03}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', self.name)[:80]}"


def workloads(data: Mapping[str, Any]) -> tuple[list[Workload], list[LeftOut]]:
    """The layers of a report's ``data`` in order of execution, and those that are no such loops."""
    found, left = [], []
    maps = {m["name"]: m["density"] for m in data["maps"]}
    for number, row in enumerate(data["layers"]):
        why = _unlike(row)
        if why:
            left.append(LeftOut(row["name"], why))
        else:
            found.append(_workload(number, row, maps))
    return found, left


def _unlike(row: Mapping[str, Any]) -> str:
    """Why a layer has no such loops; empty where it has."""
    if "transpose" in row["kind"]:
        return "a transposed convolution"
    if row["kind"].endswith("3d"):
        return "a convolution in three dimensions"
    if "read_shape" not in row:
        return "the report is of an older actzip: it does not say the padding"
    return ""


def _workload(number: int, row: Mapping[str, Any], maps: Mapping[str, float]) -> Workload:
    linear = row["kind"] == "linear"
    weight, shape = row["weight_shape"], row["input_shape"]
    read = _pair(row["read_shape"], 1)
    outputs, inputs = weight[:2]
    groups = row["groups"] or 1
    rows = math.prod(shape[:-1]) if linear else 1
    size = rows * inputs if linear else shape[0] * math.prod(read)
    out = (1, 1) if linear else _pair(row["output_shape"][1:], 1)
    one = rows * outputs * inputs * math.prod((*_pair(weight[2:], 1), *out))
    return Workload(
        number=number,
        name=row["name"],
        kind=row["kind"],
        groups=groups,
        inputs=inputs,
        outputs=outputs // groups,
        kernel=_pair(weight[2:], 1),
        stride=_pair(row["stride"], 1),
        dilation=_pair(row["dilation"], 1),
        out=out,
        read=read,
        rows=rows,
        times=max(1, round(row["macs"] / max(1, one))),
        input_density=min(1.0, row["read_nonzeros"] / max(1, size)),
        weight_density=row["weight_density"],
        output_density=maps.get(row["output_map"], 1.0),
        output_map=row["output_map"],
        tiles=row.get("tiles"),
    )


def one_stride(layer: Workload, simulator: str) -> str:
    """Why a simulator of one stride and no dilation cannot express a layer; '' where it can."""
    if layer.stride[0] != layer.stride[1]:
        return f"strides {layer.stride[0]} and {layer.stride[1]}: {simulator} has one"
    if layer.dilation != (1, 1):
        return f"dilation {layer.dilation[0]}x{layer.dilation[1]}: {simulator} has none"
    return ""


def _pair(sides: list[int], fill: int) -> tuple[int, int]:
    """Rows and columns; ``fill`` for those that are not there."""
    rows, columns = [*[fill] * (2 - len(sides)), *sides]
    return rows, columns
