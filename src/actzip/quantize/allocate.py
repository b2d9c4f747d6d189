"""Bits per layer, chosen: the fewest wrong outputs for a bit budget, or the fewest bits for an
accuracy floor.

The harm of b bits at a layer is estimated as half its Fisher information times the expected squared
error of its map: sum over elements of E[g^2] * mse(b) / 2, g the gradient of the log-likelihood of
a label drawn from the network's own output (for outputs that are not ``N, classes``: of a random
signed sum of the outputs). One backward pass a batch gives g for every layer at once, the
observers' histograms give mse(b) for every b. Starting at 16 bits everywhere, the layer whose next
bit does least harm a bit saved loses it; that order gives a path from 16 to 4 bits, on which the
budget or, by bisection, the floor picks a point.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from actzip.activations import ActivationTap, ComputeCall, Site, call_model, eval_mode
from actzip.errors import InputError
from actzip.quantize.calibrate import Calibration, Forward
from actzip.quantize.linear import MAX_BITS, MIN_BITS, QuantRange
from actzip.quantize.model import INPUT, Quantization, remove_quantization
from actzip.training.batches import arguments, batch_size, batches_in

__all__ = ["allocate", "bit_path", "sensitivities"]


def sensitivities(
    model: nn.Module,
    calibration: Iterable[Any] | Tensor,
    names: Iterable[str],
    *,
    batches: int | None = 4,
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Sum over a map's elements of the mean squared gradient (see the module's documentation), by
    name, an image."""
    wanted = set(names)
    sums: dict[str, Tensor] = {}
    images = 0

    def watch(name: str, y: Tensor) -> None:
        if name in wanted and y.requires_grad:

            def add(g: Tensor) -> None:
                sums[name] = sums.get(name, torch.zeros((), device=g.device)) + g.float().square().sum()

            y.register_hook(add)  # type: ignore[no-untyped-call]

    def activation(site: Site, y: Tensor) -> None:
        watch(site.name, y)

    def compute(site: Site, call: ComputeCall) -> Tensor | None:
        if site.name + INPUT not in wanted:
            return None
        x = call.input if call.input.requires_grad else call.input.detach().requires_grad_()
        watch(site.name + INPUT, x)
        return x

    generator = torch.Generator().manual_seed(seed)
    data = batches_in(calibration, "calibration")
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in flags:
            p.requires_grad_(False)
        with ActivationTap(model, activation, compute), eval_mode(model), torch.enable_grad():
            for i, batch in enumerate(data):
                if batches is not None and i >= batches:
                    break
                out = _outputs(model, batch, forward)
                if out is None:
                    continue
                y = next(iter(_tensors(out)), None)
                if y is None or not y.requires_grad:
                    raise InputError("the model's output does not depend on its input: bits cannot be chosen")
                images += int(y.shape[0]) if y.dim() else 1
                if y.dim() == 2 and y.shape[1] > 1:
                    logp = y.float().log_softmax(1)
                    label = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(y.device)
                    loss = -logp.gather(1, label).sum()
                else:
                    sign = (
                        torch.randint(0, 2, y.shape, generator=generator).to(y.device, torch.float32) * 2 - 1
                    )
                    loss = (y.float() * sign).sum()
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)
            if not flag:
                p.grad = None
    return {n: float(sums[n]) / max(1, images) if n in sums else 0.0 for n in wanted}


def _outputs(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """The model's outputs for a batch, whose gradients reach every map; None where it has no input."""
    if forward is not None:
        return forward(model, tree_map(_tracked, batch))
    args, kwargs = arguments(model, batch)
    if not batch_size(args, kwargs):
        return None
    return call_model(model, *tree_map(_tracked, (args, kwargs)))


def _tracked(x: Any) -> Any:
    return x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tensors(out: Any) -> Iterable[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for v in out.values():
            yield from _tensors(v)
    elif isinstance(out, (list, tuple)):
        for v in out:
            yield from _tensors(v)


def bit_path(
    harm: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]]
) -> list[tuple[str, int]]:
    """(name, new bits) in the order in which bits are taken away, from 16 everywhere to 4 everywhere."""

    def step(name: str, bits: int) -> tuple[float, str, int]:
        saved = max(cost[name][bits] - cost[name][bits - 1], 1e-9)
        return max(0.0, harm[name][bits - 1] - harm[name][bits]) / saved, name, bits - 1

    heap = [step(name, MAX_BITS) for name in harm]
    heapq.heapify(heap)
    path = []
    while heap:
        _, name, bits = heapq.heappop(heap)
        path.append((name, bits))
        if bits > MIN_BITS:
            heapq.heappush(heap, step(name, bits))
    return path


def allocate(
    model: nn.Module,
    calibration: Iterable[Any] | Tensor,
    found: Calibration,
    signs: Mapping[str, bool],
    *,
    observer: str,
    percentile: float,
    budget: float | None,
    cost: str,
    floor: float | None,
    evaluate: Callable[[nn.Module], float] | None,
    build: Callable[[Mapping[str, int]], Quantization],
    forward: Forward | None,
    batches: int | None,
) -> dict[str, int]:
    """Bits by name under ``budget`` or ``floor``; arguments and errors as
    :func:`actzip.quantize.quantize`."""
    if cost not in ("raw", "entropy"):
        raise InputError(f"cost must be 'raw' or 'entropy', not {cost!r}")
    limit = 4 if batches is None else min(4, batches)
    weight = sensitivities(model, calibration, found.observers, batches=limit, forward=forward)
    harms, costs = _tables(found, signs, weight, observer, percentile, cost)
    path = bit_path(harms, costs)

    def at(index: int) -> dict[str, int]:
        chosen = dict.fromkeys(harms, MAX_BITS)
        for name, b in path[:index]:
            chosen[name] = b
        return chosen

    if budget is not None:
        return at(_within(path, costs, budget, cost))
    assert floor is not None and evaluate is not None

    def good(index: int) -> bool:
        build(at(index)).attach(model)
        try:
            return float(evaluate(model)) >= floor
        finally:
            remove_quantization(model)

    return at(_farthest(good, len(path), floor))


def _tables(
    found: Calibration,
    signs: Mapping[str, bool],
    weight: Mapping[str, float],
    observer: str,
    percentile: float,
    cost: str,
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Harm and cost by name and number of bits."""
    harms: dict[str, dict[int, float]] = {}
    costs: dict[str, dict[int, float]] = {}
    for name, o in found.observers.items():
        harms[name], costs[name] = {}, {}
        for b in range(MIN_BITS, MAX_BITS + 1):
            r = QuantRange(b, signs[name])
            quality = o.quality(r, o.scales(r, observer, percentile))
            harms[name][b] = 0.5 * weight[name] * quality["mse"]
            costs[name][b] = o.positions * (b if cost == "raw" else quality["entropy"])
    return harms, costs


def _within(
    path: list[tuple[str, int]], costs: Mapping[str, Mapping[int, float]], budget: float, cost: str
) -> int:
    """How many steps of ``path`` bring the cost down to ``budget``."""
    total = sum(c[MAX_BITS] for c in costs.values())
    if total <= budget:
        return 0
    for index, (name, b) in enumerate(path, 1):
        total += costs[name][b] - costs[name][b + 1]
        if total <= budget:
            return index
    raise InputError(
        f"budget: {MIN_BITS} bits everywhere take {total:.0f} bits an image ({cost}), more than {budget:.0f}"
    )


def _farthest(good: Callable[[int], bool], steps: int, floor: float) -> int:
    """The last of ``steps`` that is good, by bisection."""
    if not good(0):
        raise InputError(f"floor: {MAX_BITS} bits everywhere do not reach {floor}")
    low, high = 0, steps + 1  # good(low); not good(high), or high past the end
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    return low
