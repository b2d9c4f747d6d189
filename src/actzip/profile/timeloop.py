"""Problems for Timeloop and Sparseloop: one YAML file a layer, with measured densities.

The format is version 0.4 of Timeloop's front end (``timeloopfe``, in PyTimeloop:
``timeloopfe/v4/problem.py``). The shape is the ``CNN_Layer`` of Timeloop's own examples, so that
their architectures and constraints fit: R and S are columns and rows of the filter, P and Q columns
and rows of the output, C and M input and output channels, N the rows of a linear layer. A grouped
convolution has a dimension G more, and C and M are of one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from actzip.profile.workloads import LeftOut, Workload
from actzip.text import visible

__all__ = ["VERSION", "export", "problem"]

#: Of the format.
VERSION = 0.4
_COEFFICIENTS = ("Wstride", "Hstride", "Wdilation", "Hdilation")


def export(layers: list[Workload], data: Mapping[str, Any], folder: Path) -> list[LeftOut]:
    """Writes the problems into ``folder``."""
    for layer in layers:
        text = _comment(layer, data) + yaml.safe_dump(
            problem(layer), sort_keys=False, default_flow_style=None
        )
        (folder / f"{layer.file}.yaml").write_text(text, encoding="utf-8")
    return []


def problem(layer: Workload) -> dict[str, Any]:
    """The content of a layer's file."""
    grouped = layer.groups > 1
    inputs = [["R", "Wdilation"], ["P", "Wstride"]], [["S", "Hdilation"], ["Q", "Hstride"]]
    spaces = [
        {"name": "Weights", "projection": _axes("GCMRS", grouped)},
        {"name": "Inputs", "projection": [*_axes("NGC", grouped), *inputs]},
        {"name": "Outputs", "projection": _axes("NGMQP", grouped), "read_write": True},
    ]
    dimensions = [*(["G"] if grouped else []), "C", "M", "R", "S", "N", "P", "Q"]
    shape = {
        "name": "CNN_Layer",
        "dimensions": dimensions,
        "coefficients": [{"name": c, "default": 1} for c in _COEFFICIENTS],
        "data_spaces": spaces,
    }
    return {"problem": {"version": VERSION, "shape": shape, "instance": _instance(layer, grouped)}}


def _axes(names: str, grouped: bool) -> list[list[list[str]]]:
    return [[[name]] for name in names if grouped or name != "G"]


def _instance(layer: Workload, grouped: bool) -> dict[str, Any]:
    densities = (layer.input_density, layer.weight_density, layer.output_density)
    bounds = {"G": layer.groups} if grouped else {}
    return {
        **bounds,
        "C": layer.inputs,
        "M": layer.outputs,
        "R": layer.kernel[1],
        "S": layer.kernel[0],
        "N": layer.rows,
        "P": layer.out[1],
        "Q": layer.out[0],
        "Wstride": layer.stride[1],
        "Hstride": layer.stride[0],
        "Wdilation": layer.dilation[1],
        "Hdilation": layer.dilation[0],
        "densities": {
            name: {"distribution": "hypergeometric", "density": float(f"{density:.6g}")}
            for name, density in zip(("Inputs", "Weights", "Outputs"), densities, strict=True)
        },
    }


def _comment(layer: Workload, data: Mapping[str, Any]) -> str:
    """What a reader has to know of the figures."""
    lines = [
        f"layer {layer.name} ({layer.kind}) of {data['model']['name']}; densities measured on "
        f"{data['data']['images']} images from {data['data']['source']}",
        f"Timeloop problem, version {VERSION} of the front end; one image, {layer.macs} MACs",
    ]
    if layer.times > 1:
        lines.append(f"an image runs this layer {layer.times} times: multiply")
    lines.append("Inputs: of what the layer reads; padding, which Timeloop counts in, is zero")
    lines.append(
        f"Outputs: of the activation map {layer.output_map}"
        if layer.output_map
        else "Outputs: no activation map follows; taken as dense"
    )
    lines += _chance(layer.tiles)
    for warning in data["warnings"]:
        lines.append(f"warning: {warning}")
    return "".join(f"# {visible(' '.join(line.split()))}\n" for line in lines)


def _chance(tiles: Mapping[str, Any] | None) -> list[str]:
    """How far the hypergeometric assumption is from the measured tiles of the input."""
    if tiles is None:
        return ["hypergeometric: how far that is from the truth was not measured (--tiles)"]
    size, h = tiles["tile"], tiles["hypergeometric"]
    if not tiles["tiles"]:
        return ["hypergeometric: no whole tile was seen"]
    return [
        f"hypergeometric, against {tiles['tiles']} tiles of {'x'.join(map(str, size))} (rows x columns "
        "x channels) of the input, padding apart:",
        f"  distance {h['distance']:.3f} (largest difference of the cumulative distributions)",
        f"  empty tiles: measured {100 * tiles['empty']:.2f} %, assumed {100 * h['empty']:.2f} %",
        f"  99th percentile of non-zeros: measured {tiles['p99']}, assumed {h['p99']}",
        f"  standard deviation: measured {tiles['deviation']:.1f}, assumed {h['deviation']:.1f}",
    ]
