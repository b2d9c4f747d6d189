"""Calibration: one streaming pass over data, and what is known of every map after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Selector, Site, call_model, eval_mode, select_sites
from actzip.errors import DataError, InputError, LayerError
from actzip.quantize.linear import QuantRange, check_bits
from actzip.quantize.model import INPUT, WEIGHT, SiteQuantizer
from actzip.quantize.observers import MapObserver
from actzip.training.batches import arguments, batch_size, batches_in

__all__ = [
    "Batches",
    "Calibration",
    "Forward",
    "calibrate",
    "default_forward",
    "is_signed",
    "quantize_weights",
    "site_bits",
]

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for the inputs in a batch; None where it has no input."""
    args, kwargs = arguments(model, batch)
    return call_model(model, args, kwargs) if batch_size(args, kwargs) else None


@dataclass
class Calibration:
    """The observers of all maps that calibration met, by name, and their sites."""

    observers: dict[str, MapObserver]
    sites: dict[str, Site]
    images: int = 0


def calibrate(
    model: nn.Module,
    calibration: Batches | Tensor,
    *,
    per: str = "tensor",
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    inputs: Selector | Iterable[Selector] | None = None,
    batches: int | None = None,
    forward: Forward | None = None,
) -> Calibration:
    """Runs the calibration data and gives the statistics of each map; see :func:`quantize` for the
    arguments."""
    data = batches_in(calibration, "calibration")
    if isinstance(inputs, str) and inputs == "all":
        inputs = ["*"]
    elif isinstance(inputs, (list, tuple)) and not inputs:
        inputs = None
    run = forward or default_forward
    found = Calibration({}, {})

    def observe(name: str, site: Site, x: Tensor) -> None:
        observer = found.observers.get(name)
        if observer is None:
            observer = found.observers[name] = MapObserver(per)
            found.sites[name] = site
        observer.update(x, f"layer {name!r}")

    def activation(site: Site, y: Tensor) -> None:
        observe(site.name, site, y)

    def compute(site: Site, call: ComputeCall) -> None:
        observe(site.name + INPUT, site, call.input)

    tap = ActivationTap(model, activation, None, layers=layers, ignore=ignore)
    input_tap = ActivationTap(model, None, compute, layers=inputs) if inputs is not None else None
    with tap, eval_mode(model), torch.no_grad():
        if input_tap is not None:
            input_tap.attach()
        try:
            for i, batch in enumerate(data):
                if batches is not None and i >= batches:
                    break
                if run(model, batch) is not None or forward is not None:
                    found.images += 1
        finally:
            if input_tap is not None:
                input_tap.detach()
    if not found.images:
        raise DataError("the calibration data has no batch with an input")
    if not found.observers:
        raise LayerError("no activation map was met: the model has none, or `layers` and `ignore` leave none")
    return found


def site_bits(bits: Any, found: Calibration, model: nn.Module) -> dict[str, int]:
    if isinstance(bits, Mapping):
        chosen: dict[str, int] = {}
        # selectors see inputs under their own names
        named = [replace(site, name=name) for name, site in found.sites.items()]
        for selector, value in bits.items():
            value = check_bits(value, f"bits of {selector!r}")
            for site in select_sites(named, model, selector):
                chosen[site.name] = value
        missing = [n for n in found.observers if n not in chosen]
        if missing:
            raise LayerError(
                f"bits names no number for {len(missing)} layers, {missing[0]!r} among them; "
                "give '*': 8 first for the rest"
            )
        return chosen
    value = check_bits(bits)
    return dict.fromkeys(found.observers, value)


def is_signed(name: str, site: Site, observer: MapObserver) -> bool:
    """Unsigned after ReLU and its kin; elsewhere signed where a negative value was met or the
    function has them."""
    if not name.endswith(INPUT):
        return not (site.sparse or site.kind in ("sigmoid", "hardsigmoid", "softplus"))
    return observer.negative > 0


def quantize_weights(
    model: nn.Module,
    calibration: Batches | Tensor,
    bits: int,
    forward: Forward | None = None,
) -> list[SiteQuantizer]:
    """Quantizers of the weights of every convolution and linear layer: symmetric, one scale an
    output channel.

    The clip of each channel is its largest |w|; channels of zeros get scale 1.
    """
    r = QuantRange(check_bits(bits, "weights"), signed=True)
    made: dict[str, SiteQuantizer] = {}

    def compute(site: Site, call: ComputeCall) -> None:
        name = site.name + WEIGHT
        if name not in made:
            top = call.weight.detach().abs().flatten(1).amax(1).to(torch.float32)
            if not bool(torch.isfinite(top).all()):
                raise InputError(f"layer {site.name!r} has infinite or NaN weights")
            scale = torch.where(top > 0, (top / r.qmax).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
            made[name] = SiteQuantizer(name, r, scale, site.kind)

    data = batches_in(calibration, "calibration")
    with ActivationTap(model, None, compute), eval_mode(model), torch.no_grad():
        for batch in data:
            (forward or default_forward)(model, batch)
            if made:
                break
    return list(made.values())
