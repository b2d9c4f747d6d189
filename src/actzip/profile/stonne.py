"""Tensors for STONNE: what each layer multiplies for the first image, in STONNE's memory order.

STONNE's own program fills tensors with random numbers; its library (``STONNEModel.h``) takes them
from memory. A layer's folder has ``ifmap.f32`` and ``filters.f32``, little-endian float32 as
``Stonne::loadDNNLayer`` reads them: ``ifmap[row][column][channel]`` with the padding in it,
``filters[filter][row][column][channel of its group]``. A linear layer is one of 1x1 over its rows.
``layers.csv`` has the dimensions under STONNE's names, and ``commands.sh`` runs each layer on
STONNE's program with random tensors of the measured sparsity, one GEMM a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, call_model, eval_mode
from actzip.profile.stats import read_part
from actzip.profile.workloads import LeftOut, Workload, one_stride
from actzip.training.batches import arguments, first_of

__all__ = ["export"]

_COLUMNS = ("folder", "layer", "R", "S", "C", "K", "G", "N", "X", "Y", "strides", "runs")
#: A SIGMA-like machine, as in STONNE's examples; change as needed.
_HARDWARE = "-num_ms=128 -dn_bw=64 -rn_bw=64"


def export(
    layers: list[Workload], data: Mapping[str, Any], folder: Path, model: nn.Module, batch: Any
) -> list[LeftOut]:
    """Runs ``model`` on the first image of ``batch`` and writes the layers' tensors into
    ``folder``; the layers that STONNE cannot express."""
    left = [LeftOut(w.name, why) for w in layers if (why := one_stride(w, "STONNE"))]
    known = {w.name: w for w in layers if not one_stride(w, "STONNE")}
    written: set[str] = set()

    def take(site: Site, call: ComputeCall) -> None:
        layer = known.get(site.name)
        if layer is not None and site.name not in written:
            written.add(site.name)
            _write(folder / layer.file, layer, call)

    args, kwargs = arguments(model, batch)
    with eval_mode(model), ActivationTap(model, None, take), torch.no_grad():
        call_model(model, *first_of(args, kwargs, 1))
    done = [w for w in known.values() if w.name in written]
    rows = [",".join(_COLUMNS), *(",".join(map(str, _dimensions(w))) for w in done)]
    (folder / "layers.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = ["#!/bin/sh", "# from STONNE's folder: sh .../commands.sh", *map(_command, done)]
    (folder / "commands.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
    left += [LeftOut(w.name, "the first image does not run it") for w in known.values() if w not in done]
    return left


def _write(folder: Path, layer: Workload, call: ComputeCall) -> None:
    folder.mkdir()
    if layer.kind == "linear":
        rows = call.input.reshape(-1, layer.inputs)
        x, weight = rows[: layer.rows], call.weight
    else:
        box = _padded(call, layer.read[-len(call.stride) :])
        x = box[0].reshape(-1, *layer.read).permute(1, 2, 0)
        weight = call.weight.reshape(call.weight.shape[0], layer.inputs, *layer.kernel)
        weight = weight.permute(0, 2, 3, 1)
    for name, tensor in (("ifmap", x), ("filters", weight)):
        tensor.float().contiguous().numpy().astype("<f4").tofile(folder / f"{name}.f32")


def _padded(call: ComputeCall, read: tuple[int, ...]) -> Tensor:
    """The box of ``read`` rows and columns that the convolution reads, padding included."""
    x = read_part(call)
    pads: list[int] = []
    for axis in reversed(range(len(read))):
        before = call.padding[axis][0]
        pads += [before, read[axis] - before - x.shape[2 + axis]]
    return F.pad(x, pads)


def _dimensions(w: Workload) -> tuple[Any, ...]:
    x, y = (w.rows, 1) if w.kind == "linear" else w.read
    channels = (w.groups * w.inputs, w.groups * w.outputs, w.groups)
    name = w.name.replace(",", ";").replace('"', "'")
    return (w.file, name, *w.kernel, *channels, 1, x, y, w.stride[0], w.times)


def _command(w: Workload) -> str:
    """Weights (M x K) by the patches of the input (K x N), once a group."""
    m, k, n = w.outputs, w.inputs * w.kernel[0] * w.kernel[1], w.rows * w.out[0] * w.out[1]
    sparsity = (round(100 * (1 - d)) for d in (w.weight_density, w.input_density))
    mk, kn = sparsity
    runs = w.groups * w.times
    return (
        f"./stonne -SparseGEMM -layer_name={w.file} -M={m} -N={n} -K={k} -MK_sparsity={mk} "
        f"-KN_sparsity={kn} -dataflow=MK_STA_KN_STR {_HARDWARE}"
        + (f"  # an image runs it {runs} times" if runs > 1 else "")
    )
