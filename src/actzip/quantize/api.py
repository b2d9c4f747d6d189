"""``actzip.quantize``: calibrate, choose bits, put quantizers onto the model."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from actzip.activations import Selector
from actzip.checks import flag, function, number, one_of, whole
from actzip.errors import ActzipWarning, InputError
from actzip.quantize.allocate import allocate
from actzip.quantize.calibrate import (
    Batches,
    Calibration,
    Forward,
    calibrate,
    is_signed,
    quantize_weights,
    site_bits,
)
from actzip.quantize.linear import QuantRange, check_bits
from actzip.quantize.model import Quantization, SiteQuantizer, remove_quantization, warn_saturated
from actzip.quantize.observers import OBSERVERS
from actzip.training.batches import batches_in

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    calibration: Batches | Tensor,
    bits: int | Mapping[str, int] | str = 8,
    per: str = "tensor",
    observer: str = "mse",
    *,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
    inputs: Selector | Iterable[Selector] | None = None,
    weights: int | None = None,
    widen: float = 1.0,
    percentile: float = 99.99,
    saturation: float = 0.01,
    budget: float | None = None,
    cost: str = "raw",
    floor: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    batches: int | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A fake-quantized copy of ``model``: each activation map is rounded to integers of 4 to 16
    bits and back.

    Same class, same ``state_dict``; zero stays exactly zero. Maps after ReLU and its kin are
    unsigned, others signed and symmetric. It can be evaluated and trained (straight-through
    estimator; the scales of ``quantization(model).parameters()`` are learned step sizes).

    Args:
        model: any module, thresholded or not; a quantized one is quantized anew from float.
        calibration: batches, as :func:`actzip.training.batches.arguments` takes them (tensors,
            arrays, tuples with or without labels, dicts); or one tensor. A pass over it, streaming.
        bits: 4 to 16; or one a layer, as {selector: bits}, later ones win
            (``{"*": 8, "layer4.*": 6}``); or ``"auto"`` with ``budget`` or with ``floor`` and
            ``evaluate``.
        per: ``tensor`` or ``channel``: one scale a map, or one a channel.
        observer: ``minmax``, ``percentile``, ``mse`` or ``entropy`` (see :mod:`actzip.quantize.observers`).
        layers, ignore: which activation sites (see :mod:`actzip.activations`).
        inputs: convolutions and linear layers whose input is quantized too, signed where it has
            negatives: the network's input, residual sums, pooled maps. ``"all"`` for every one.
            None by default.
        weights: bits of weights, per output channel and symmetric; None leaves them float.
        widen: steps so many times as wide as ``observer`` has them, 1 or more. Fewer integers are
            used, which codecs gain from: about log2(widen) bits for each value that is not zero.
        percentile: for ``observer="percentile"``, of the non-zero elements.
        saturation: share of non-zero elements of a layer above which its clipping is warned of.
        budget: bits an image that all quantized maps together may take, for ``bits="auto"``.
        cost: how ``budget`` counts: ``raw`` (elements times bits) or ``entropy`` (order-0 entropy
            of the integers).
        floor: least value of ``evaluate(quantized model)`` for ``bits="auto"``: the fewest bits that keep it.
        batches: how many calibration batches to use at most.
        forward: ``f(model, batch)`` where the model is not called with a batch's first item.
        inplace: quantize ``model`` itself instead of a copy.

    Raises:
        InputError: an option out of range, infinite values or NaN in a map (the layer is named), a
            budget that 4 bits everywhere exceed, a floor that 16 bits do not reach.
        LayerError: a layer named that the model does not have; no activation map.
        DataError: no calibration batch.

    Warns:
        ActzipWarning: a layer that the calibration data never activates, one that saturates, one
            whose values mostly vanish because an outlier sets the scale.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    _check(bits, per, observer, percentile, saturation, weights)
    _check_target(bits, budget, floor, evaluate)
    number(widen, "widen", 1)
    if isinstance(bits, str) and widen != 1:
        raise InputError("bits='auto' chooses the steps itself: give widen with bits of your own")
    one_of(cost, "cost", ("raw", "entropy"))
    if batches is not None:
        whole(batches, "batches", 1)
    function(forward, "forward")
    flag(inplace, "inplace")
    calibration = batches_in(calibration, "calibration")
    model = model if inplace else copy.deepcopy(model)
    remove_quantization(model)
    first: Batches | Tensor = calibration  # what later passes over a few batches read
    if isinstance(calibration, Iterator):
        first = list(itertools.islice(calibration, 4))
        calibration = itertools.chain(first, calibration)
    found = calibrate(
        model,
        calibration,
        per=per,
        layers=layers,
        ignore=ignore,
        inputs=inputs,
        batches=batches,
        forward=forward,
    )
    signs = {n: is_signed(n, found.sites[n], o) for n, o in found.observers.items()}
    weight_quantizers = quantize_weights(model, first, weights, forward) if weights else []

    def build(chosen: Mapping[str, int]) -> Quantization:
        sites = []
        for name, o in found.observers.items():
            r = QuantRange(chosen[name], signs[name])
            scales = o.scales(r, observer, percentile) * widen
            sites.append(SiteQuantizer(name, r, scales, found.sites[name].kind))
        return Quantization(sites, weight_quantizers)

    if isinstance(bits, str):
        chosen = allocate(
            model,
            first,
            found,
            signs,
            observer=observer,
            percentile=percentile,
            budget=budget,
            cost=cost,
            floor=floor,
            evaluate=evaluate,
            build=build,
            forward=forward,
            batches=batches,
        )
    else:
        chosen = site_bits(bits, found, model)
    result = build(chosen)
    _report(result, found, saturation)
    return result.attach(model)


def _check(
    bits: Any, per: str, observer: str, percentile: float, saturation: float, weights: int | None
) -> None:
    one_of(observer, "observer", OBSERVERS)
    one_of(per, "per", ("tensor", "channel"))
    number(percentile, "percentile", 0, 100, above=True)
    number(saturation, "saturation", 0, 1)
    if not isinstance(bits, (Mapping, str)):
        check_bits(bits)
    if weights is not None:
        check_bits(weights, "weights")


def _check_target(bits: Any, budget: float | None, floor: float | None, evaluate: Any) -> None:
    """``bits="auto"`` comes with one thing to reach, and nothing else does."""
    auto = isinstance(bits, str)
    if auto and bits != "auto":
        raise InputError(f"bits must be an integer, a mapping or 'auto', not {bits!r}")
    if budget is not None:
        number(budget, "budget", 0, above=True)
    if floor is not None:
        number(floor, "floor")
    function(evaluate, "evaluate")
    if auto and (budget is None) == (floor is None):
        raise InputError("bits='auto' needs either a budget (bits an image) or a floor with evaluate")
    if floor is not None and evaluate is None:
        raise InputError("floor needs evaluate: a function that gives the quantized model's accuracy")
    if not auto and (budget is not None or floor is not None):
        raise InputError("budget and floor choose the bits: give them with bits='auto'")


def _report(result: Quantization, found: Calibration, saturation: float) -> None:
    """Keeps what calibration found and warns of what is unsound."""
    shares = {}
    for name, q in result.sites.items():
        o = found.observers[name]
        quality = o.quality(q.range, q.scale.detach())
        result.info[name] = {"density": o.density, "elements": float(o.positions), **quality}
        if o.dead:
            warnings.warn(
                f"layer {name!r} was never activated by the calibration data (all zeros): its scale is 1.0; "
                "calibrate on more data, or remove the layer",
                ActzipWarning,
                stacklevel=4,
            )
            continue
        shares[name] = quality["saturated"]
        if quality["vanished"] > 0.9:
            warnings.warn(
                f"layer {name!r}: {100 * quality['vanished']:.1f} % of the non-zero elements "
                "become zero, since the "
                f"largest value ({float(o.maximum.max()):.3g}) sets the scale; "  # type: ignore[union-attr]
                "observer='percentile' or 'mse' leaves outliers out",
                ActzipWarning,
                stacklevel=4,
            )
    warn_saturated(shares, saturation)
