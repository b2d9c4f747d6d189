"""What a network's zeros are worth: predicted milliseconds of its layers, and MACs, from the
densities of their inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, count_macs, eval_mode, output_size, run_model
from actzip.profile.cost import Conv, CostModel, is_light, is_small
from actzip.training.batches import batch_size

__all__ = ["LayerWork", "Work", "measure_work", "worth_of_zeros"]

#: Thresholds take about this share of a map's non-zeros away; a zero's worth is the mean slope over
#: that reach.
_REACH = 0.4


@dataclass
class LayerWork:
    """One convolution or linear call: MACs an image, those that meet a non-zero, density of its
    input, predicted time."""

    name: str
    kind: str
    macs: float
    effective_macs: float
    density: float
    ms: float | None


@dataclass
class Work:
    """What one image costs.

    Attributes:
        layers: in order of execution.
        density: non-zero outputs of ReLUs / all; densities: of each.
        ms: predicted milliseconds of the layers at batch 1, None without a cost model; dense_ms: of
            the same layers, were no zero skipped.
    """

    layers: list[LayerWork] = field(default_factory=list)
    density: float = 1.0
    densities: dict[str, float] = field(default_factory=dict)
    ms: float | None = None
    dense_ms: float | None = None

    @property
    def macs(self) -> float:
        return sum(row.macs for row in self.layers)

    @property
    def effective_macs(self) -> float:
        return sum(row.effective_macs for row in self.layers)

    @property
    def theoretical_speedup(self) -> float:
        """MACs / effective MACs."""
        return self.macs / self.effective_macs if self.effective_macs else float("inf")


def geometry(call: ComputeCall) -> Conv | None:
    """The shape of a two-dimensional convolution or a linear layer, None of others."""
    if not call.stride:
        positions = math.prod(call.input.shape[1:-1]) if call.input.dim() > 2 else 1
        return Conv(int(call.weight.shape[1]), int(call.weight.shape[0]), 1, int(positions))
    if len(call.stride) != 2 or call.transposed:
        return None
    height, width = output_size(call)
    kernel = (int(call.weight.shape[2]), int(call.weight.shape[3]))
    inputs, outputs = int(call.input.shape[1]), int(call.weight.shape[0])
    return Conv(inputs, outputs, height, width, kernel, call.stride[0], call.groups, call.dilation[0])


def measure_work(model: nn.Module, batches: Sequence[Any], cost: CostModel | None) -> Work:
    """MACs, densities and predicted time of ``model`` in eval mode over ``batches``, each an input or a
    tuple of several."""
    found, shapes = Work(), dict[str, Conv | None]()
    sums: dict[str, list[float]] = {}
    maps: dict[str, list[int]] = {}

    def activation(site: Site, y: Tensor) -> None:
        if site.sparse:
            seen = maps.setdefault(site.name, [0, 0])
            seen[0] += int(torch.count_nonzero(y))
            seen[1] += y.numel()

    def compute(site: Site, call: ComputeCall) -> None:
        macs, _, used = count_macs(call)
        if site.name not in sums:
            found.layers.append(LayerWork(site.name, site.kind, 0, 0, 1.0, None))
            shapes[site.name] = geometry(call)
        total = sums.setdefault(site.name, [0.0] * 4)
        for i, v in enumerate((macs, used, int(torch.count_nonzero(call.input)), call.input.numel())):
            total[i] += v

    # the layers' taps come last, so that they see maps after the model's own thresholds
    with (
        ActivationTap(model, activation),
        ActivationTap(model, None, compute),
        eval_mode(model),
        torch.no_grad(),
    ):
        for x in batches:
            run_model(model, x)
    images = sum(batch_size(x if isinstance(x, tuple) else (x,), {}) for x in batches)
    for row in found.layers:
        macs, used, nonzero, elements = sums[row.name]
        row.macs, row.effective_macs, row.density = macs / images, used / images, nonzero / max(1, elements)
    found.densities = {k: n / max(1, e) for k, (n, e) in maps.items()}
    whole = sum(e for _, e in maps.values())
    found.density = sum(n for n, _ in maps.values()) / whole if whole else 1.0
    if cost is not None:
        every = [c for c in shapes.values() if c is not None]
        size = {"small": is_small(every), "light": is_light(every)}
        found.ms = sum(_predict(row, shapes[row.name], cost, size) for row in found.layers)
        found.dense_ms = sum(cost.predict(c, 1.0, packed=False, **size) for c in every)
    return found


def _predict(row: LayerWork, conv: Conv | None, cost: CostModel, size: dict[str, bool]) -> float:
    """Sets and gives the layer's time; what the model does not know runs at the mean rate of what
    it knows: 0 here."""
    if conv is None:
        return 0.0
    row.ms = cost.predict(conv, row.density, packed=row.density < 0.999, **size)
    return row.ms


def worth_of_zeros(model: nn.Module, x: Tensor, cost: CostModel | None) -> dict[str, float]:
    """What one zero more in each activation map saves, by site: predicted milliseconds, or MACs
    without a cost model.

    Found by differentiation, as :func:`actzip.sparsify.map_costs`: a map that reaches several
    layers, through pooling and concatenation too, is worth what it saves in each.
    """
    maps: dict[str, Tensor] = {}
    works: list[Tensor] = []
    convs = _shapes(model, x)
    every = [c for c in convs.values() if c is not None]
    size = {"small": is_small(every), "light": is_light(every)}

    def activation(site: Site, y: Tensor) -> Tensor | None:
        if not site.sparse:
            return None
        y = y.detach().requires_grad_()
        maps[site.name] = y
        return y

    def compute(site: Site, call: ComputeCall) -> Tensor | None:
        if not call.input.requires_grad:
            return None
        works.append(call.input.sum() * _slope(call, convs.get(site.name), cost, size))
        return call.input.detach()

    with ActivationTap(model, activation, compute), eval_mode(model), torch.enable_grad():
        run_model(model, x)
    if not maps or not works:
        return dict.fromkeys(maps, 0.0)
    grads = torch.autograd.grad(torch.stack(works).sum(), list(maps.values()), allow_unused=True)
    return {n: 0.0 if g is None else float(g.sum()) / g.numel() for n, g in zip(maps, grads, strict=True)}


def _shapes(model: nn.Module, x: Tensor) -> dict[str, Conv | None]:
    found: dict[str, Conv | None] = {}

    def compute(site: Site, call: ComputeCall) -> None:
        found[site.name] = geometry(call)

    with ActivationTap(model, None, compute), eval_mode(model), torch.no_grad():
        run_model(model, x[:1])
    return found


def _slope(call: ComputeCall, conv: Conv | None, cost: CostModel | None, size: dict[str, bool]) -> float:
    """What a zero more in the layer's input saves."""
    n = int(call.input.shape[0])
    elements = call.input.numel() / n
    if cost is None or conv is None:
        return count_macs(call)[0] / n / elements if cost is None else 0.0
    density = int(torch.count_nonzero(call.input)) / call.input.numel()
    if not density:
        return 0.0
    now = cost.predict(conv, density, **size)
    then = cost.predict(conv, density * (1 - _REACH), **size)
    return max(0.0, now - then) / (_REACH * density * elements)


def as_rows(before: Work, after: Work) -> list[dict[str, Any]]:
    """The layers before and after, for a table."""
    after_by_name = {row.name: row for row in after.layers}
    rows = []
    for b in before.layers:
        a = after_by_name.get(b.name)
        if a is not None:
            rows.append(
                {
                    "layer": b.name,
                    "kind": b.kind,
                    "macs": b.macs,
                    "density_before": b.density,
                    "density_after": a.density,
                    "predicted_ms_before": b.ms,
                    "predicted_ms_after": a.ms,
                }
            )
    return rows
