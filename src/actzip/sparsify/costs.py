"""What the zeros of each activation map are worth: MACs a non-zero, exactly, and the effective MACs
of a network."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import (
    ActivationTap,
    ComputeCall,
    Selector,
    Site,
    call_model,
    count_macs,
    eval_mode,
    run_model,
)
from actzip.activations.macs import reads, reads_transposed
from actzip.errors import DataError
from actzip.training.batches import batches_in, check_labels, logits, unpack

__all__ = ["MapCost", "Measurement", "map_costs", "measure"]


@dataclass(frozen=True)
class MapCost:
    """The work that one activation map causes.

    Attributes:
        site: the activation.
        elements: elements a sample.
        macs: MACs a sample whose activation operand is an element of this map (at density 1).
        share: ``macs`` / all MACs of the network's convolutions and linear layers.
    """

    site: Site
    elements: int
    macs: float
    share: float

    @property
    def macs_per_element(self) -> float:
        """MACs that one non-zero element of this map costs, on average over positions."""
        return self.macs / max(1, self.elements)


def _position_weights(call: ComputeCall) -> Tensor:
    """MACs that each position of a computation's input costs, as a tensor that broadcasts over the input."""
    x, weight = call.input, call.weight
    if weight.dim() == 2 and not call.stride:
        return torch.full((1,), float(weight.shape[0]), dtype=x.dtype, device=x.device)
    out_channels = int(weight.shape[1]) if call.transposed else int(weight.shape[0]) // call.groups
    total = torch.full((1, 1), float(out_channels), dtype=x.dtype, device=x.device)
    dims = x.dim() - 2
    total = total.reshape(1, 1, *([1] * dims))
    for axis in range(dims):
        size, k = int(x.shape[2 + axis]), int(weight.shape[2 + axis])
        s, p, d = call.stride[axis], call.padding[axis], call.dilation[axis]
        if call.transposed:
            uses, _ = reads_transposed(size, k, s, p, d, call.output_padding[axis])
        else:
            uses = reads(size, k, s, p, d)
        shape = [1] * x.dim()
        shape[2 + axis] = size
        total = total * torch.tensor(uses, dtype=x.dtype, device=x.device).reshape(shape)
    return total


def map_costs(model: nn.Module, example: Any) -> dict[str, MapCost]:
    """MACs that the non-zeros of each activation map cost, by site name, for one pass of
    ``example`` in eval mode.

    Found by differentiation: the sum over convolutions and linear layers of input times MACs per position is
    differentiated with respect to every activation map. So a map that reaches its consumers through pooling,
    concatenation, addition or reshaping is charged with what those pass on (through max pooling an
    element is charged when it is the maximum). Sites that no computation reads, and every site that
    is not an activation, cost nothing.

    Args:
        example: the model's input: a tensor, a tuple of inputs or a dict of keyword arguments;
            first dimension N.
    """
    maps: dict[str, tuple[Site, Tensor]] = {}
    works: list[Tensor] = []
    total = [0]

    def activation(site: Site, y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        maps[site.name] = (site, y)
        return y

    def compute(site: Site, call: ComputeCall) -> Tensor | None:
        total[0] += count_macs(call)[0]
        if call.input.requires_grad:
            works.append((call.input * _position_weights(call)).sum())
            return call.input.detach()
        return None

    tap = ActivationTap(model, activation, compute)
    with tap, eval_mode(model), torch.enable_grad():
        run_model(model, example)
    if not maps:
        return {}
    found = list(maps.values())
    if works:
        grads = torch.autograd.grad(torch.stack(works).sum(), [y for _, y in found], allow_unused=True)
    else:
        grads = ()
    # images, which a map's own first dimension (windows, tokens) need not be
    inputs = torch.utils._pytree.tree_leaves(example)
    n = next((int(v.shape[0]) for v in inputs if isinstance(v, Tensor) and v.dim() and len(v)), 1)
    costs: dict[str, MapCost] = {}
    for i, (site, y) in enumerate(found):
        grad: Tensor | None = grads[i] if grads else None
        macs = float(grad.sum()) / n if grad is not None else 0.0
        costs[site.name] = MapCost(site, y.numel() // n, macs, macs * n / max(1, total[0]))
    return costs


@dataclass(frozen=True)
class Measurement:
    """One pass of a data set through a network.

    Attributes:
        samples: how many.
        accuracy: fraction with the right label, or None where there were no labels.
        loss: mean cross-entropy, likewise.
        density: non-zero elements / elements over all ReLU outputs.
        densities: the same for each ReLU site.
        macs, effective_macs: a sample, over all convolution and linear layers.
    """

    samples: int
    accuracy: float | None
    loss: float | None
    density: float
    densities: dict[str, float]
    macs: float
    effective_macs: float

    @property
    def theoretical_speedup(self) -> float:
        """MACs / effective MACs."""
        return self.macs / self.effective_macs if self.effective_macs else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "density": self.density,
            "macs": self.macs,
            "effective_macs": self.effective_macs,
            "theoretical_speedup": self.theoretical_speedup,
            "densities": self.densities,
        }


def measure(
    model: nn.Module,
    data: Iterable[Any],
    *,
    work: bool = True,
    limit: int | None = None,
    layers: Selector | Iterable[Selector] | None = None,
) -> Measurement:
    """Accuracy, density and effective MACs of ``model`` in eval mode over ``data``.

    Args:
        data: batches ``(x, y)`` or ``x`` alone; x is ``N, ...``, y int64 ``N``.
        work: count densities and MACs as well (about twice the time).
        limit: at most this many samples (whole batches).
        layers: which ReLU sites count for the densities.

    Raises:
        DataError: there is no batch in ``data``.
        InputError: labels outside the classes that the model gives.
    """
    nonzero: dict[str, Tensor] = {}
    elements: dict[str, int] = {}
    macs = [0]
    effective = [0]

    def activation(site: Site, y: Tensor) -> None:
        if site.sparse:
            nonzero[site.name] = nonzero.get(site.name, torch.zeros(())) + torch.count_nonzero(y).cpu()
            elements[site.name] = elements.get(site.name, 0) + y.numel()

    def compute(site: Site, call: ComputeCall) -> None:
        all_macs, _, used = count_macs(call)
        macs[0] += all_macs
        effective[0] += used

    samples = right = 0
    loss = 0.0
    labelled = False
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        if work:
            stack.enter_context(ActivationTap(model, activation, layers=layers))
            stack.enter_context(ActivationTap(model, compute=compute))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        for batch in batches_in(data):
            x, y = unpack(batch)
            if not len(x):
                continue
            x = x.to(device)
            out = call_model(model, (x,), {})
            samples += int(x.shape[0])
            if y is not None:
                y, out = y.to(device), logits(out)
                check_labels(out, y)
                labelled = True
                right += int((out.argmax(1) == y).sum())
                loss += float(nn.functional.cross_entropy(out.float(), y, reduction="sum"))
            if limit is not None and samples >= limit:
                break
    if not samples:
        raise DataError("there is no batch in the data to measure on")
    densities = {name: float(nonzero[name]) / max(1, elements[name]) for name in nonzero}
    total = sum(elements.values())
    return Measurement(
        samples,
        right / samples if labelled else None,
        loss / samples if labelled else None,
        float(sum(float(v) for v in nonzero.values())) / total if total else 1.0,
        densities,
        macs[0] / samples,
        effective[0] / samples,
    )
