"""Quantized models: the same module, its class and ``state_dict`` untouched, with quantizers beside it.

    quantized = actzip.quantize(model, calibration, bits=8)
    quantized(x)                                    # fake-quantized: every activation map on its grid
    integers(quantized, x)["layer1.0.relu"].values  # the integers of each map
    quantization(quantized).scales                  # the scales by site

The quantizers hang on an :class:`~actzip.activations.ActivationTap` that stays attached; thresholds
set before (``set_thresholds``) act first. Activation sites bear their own names, inputs of
convolutions and linear layers ``NAME@input``, weights ``NAME@weight``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import (
    ActivationTap,
    ComputeCall,
    Site,
    eval_mode,
    run_model,
)
from actzip.errors import ActzipWarning, InputError, LayerError
from actzip.quantize.linear import (
    IntegerMap,
    QuantRange,
    check_bits,
    fake_quantize,
    quantize_linear,
)

__all__ = [
    "INPUT",
    "WEIGHT",
    "Quantization",
    "SiteQuantizer",
    "attach",
    "capture",
    "get_quantization",
    "integers",
    "marked",
    "quantization",
    "remove_quantization",
    "visiting",
    "warn_saturated",
    "watch_saturation",
    "without_quantization",
]

INPUT, WEIGHT = "@input", "@weight"


class SiteQuantizer:
    """The quantizer of one map: its range and its scale, a float32 parameter of shape 1 or C."""

    def __init__(self, name: str, r: QuantRange, scale: Tensor, kind: str = "relu") -> None:
        scale = scale.detach().to(torch.float32).reshape(-1).clone()
        if scale.numel() == 0 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InputError(f"{name}: a scale must be positive and finite")
        check_bits(r.bits, name)
        self.name = name
        self.range = r
        self.kind = kind
        self.scale = nn.Parameter(scale)

    @property
    def bits(self) -> int:
        return self.range.bits

    @property
    def signed(self) -> bool:
        return self.range.signed

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.range)

    def integers(self, x: Tensor) -> IntegerMap:
        """The integers of a map.

        Raises:
            InputError: NaN or infinite values, with the layer's name.
        """
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise InputError(f"layer {self.name!r}: {bad} of {x.numel()} values are infinite or NaN")
        scale = self.scale.detach()
        q = quantize_linear(x, scale, self.bits, signed=self.signed)
        return IntegerMap(self.name, q, scale.to(x.device), self.bits, self.signed)

    def __repr__(self) -> str:
        per = "tensor" if self.scale.numel() == 1 else f"{self.scale.numel()} channels"
        return (
            f"SiteQuantizer({self.name!r}, {self.bits} bits, "
            f"{'signed' if self.signed else 'unsigned'}, per {per})"
        )


class Quantization:
    """What a quantized model carries: quantizers by name, and the tap that applies them.

    Attributes:
        sites: quantizers of activation maps (site name) and of inputs (``NAME@input``).
        weights: quantizers of weights (``NAME@weight``), one scale an output channel.
        enabled: False switches all of them off.
        info: what calibration found, by name (density, mse, saturated ...), for reports.
    """

    def __init__(self, sites: Iterable[SiteQuantizer] = (), weights: Iterable[SiteQuantizer] = ()) -> None:
        self.sites = {q.name: q for q in sites}
        self.weights = {q.name: q for q in weights}
        self.enabled = True
        self.info: dict[str, dict[str, float]] = {}
        self._tap: ActivationTap | None = None
        self._local = _Local()

    # -- reading

    @property
    def scales(self) -> dict[str, Tensor]:
        """float32 scales by name, detached copies."""
        return {n: q.scale.detach().clone() for n, q in self.sites.items()}

    @property
    def bits(self) -> dict[str, int]:
        return {n: q.bits for n, q in self.sites.items()}

    def parameters(self) -> list[nn.Parameter]:
        """The scales of maps and weights: learned step sizes, for an optimiser."""
        return [q.scale for q in (*self.sites.values(), *self.weights.values())]

    def clamp_scales_(self, least: float = 1e-12) -> None:
        """Keeps learned scales positive; call it after an optimiser's step."""
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(min=least)

    # -- the tap

    def _activation(self, site: Site, y: Tensor) -> Tensor | None:
        q = self.sites.get(site.name) if self.enabled else None
        return None if q is None else self._apply(q, y)

    def _compute(self, site: Site, call: ComputeCall) -> Tensor | ComputeCall | None:
        if not self.enabled:
            return None
        q, w = self.sites.get(site.name + INPUT), self.weights.get(site.name + WEIGHT)
        x = call.input if q is None else self._apply(q, call.input)
        if w is None:
            return None if q is None else x
        return replace(call, input=x, weight=w(call.weight.unsqueeze(0)).squeeze(0))

    def _apply(self, q: SiteQuantizer, y: Tensor) -> Tensor:
        visit = self._local.visit
        if visit is None:
            return q(y)
        found = visit(q, y)
        return q(y) if found is None else found

    def attach(self, model: nn.Module) -> nn.Module:
        """Puts the quantizers onto ``model``, in the place of any that it has."""
        remove_quantization(model)
        self._tap = ActivationTap(model, self._activation, self._compute if self._needs_compute else None)
        self._tap.attach()
        model.__dict__["_actzip_quantization"] = self
        return model

    @property
    def _needs_compute(self) -> bool:
        return bool(self.weights) or any(n.endswith(INPUT) for n in self.sites)

    def detach(self) -> None:
        if self._tap is not None:
            self._tap.detach()
            self._tap.model.__dict__.pop("_actzip_quantization", None)
            self._tap = None


class _Local(threading.local):
    """What visits the maps in this thread; copies and pickles as nothing."""

    visit: Callable[[SiteQuantizer, Tensor], Tensor | None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Local:
        return _Local()

    def __reduce__(self) -> tuple[type[_Local], tuple[()]]:
        return _Local, ()


def get_quantization(model: nn.Module) -> Quantization | None:
    """The quantizers of ``model``; None where it is not quantized."""
    return model.__dict__.get("_actzip_quantization")


def quantization(model: nn.Module) -> Quantization:
    """The quantizers of ``model``.

    Raises:
        InputError: it is not quantized.
    """
    found = get_quantization(model)
    if found is None:
        raise InputError(
            "the model is not quantized; actzip.quantize(model, calibration, bits=8) makes it so"
        )
    return found


def attach(model: nn.Module, quantizers: Quantization) -> nn.Module:
    """``model`` with these quantizers, in place."""
    return quantizers.attach(model)


def remove_quantization(model: nn.Module) -> Quantization | None:
    """Makes ``model`` a float model again; gives the quantizers that it had."""
    found = get_quantization(model)
    if found is not None:
        found.detach()
    return found


@contextmanager
def without_quantization(model: nn.Module) -> Iterator[Quantization | None]:
    """The model without its quantizers (and without their hooks) inside the block, which is given them."""
    found = get_quantization(model)
    try:
        remove_quantization(model)
        yield found
    finally:
        if found is not None:
            found.attach(model)


# --- integers -------------------------------------------------------------------------------------


@contextmanager
def visiting(found: Quantization, visit: Callable[[SiteQuantizer, Tensor], Tensor | None]) -> Iterator[None]:
    before = found._local.visit
    found._local.visit = visit
    try:
        yield
    finally:
        found._local.visit = before


@contextmanager
def capture(
    model: nn.Module, sink: Callable[[IntegerMap], None] | None = None
) -> Iterator[dict[str, IntegerMap]]:
    """Inside the block, forward passes (of this thread) record the integers of each quantized map.

    Args:
        sink: called with each map as it is made, so that none is kept; else they are kept in the
            dict that the block is given, by name, those of the latest pass.

    Raises:
        InputError: the model is not quantized; in the pass: NaN or infinite values, with the layer's name.
    """
    maps: dict[str, IntegerMap] = {}

    def visit(q: SiteQuantizer, y: Tensor) -> Tensor:
        m = q.integers(y)
        if sink is not None:
            sink(m)
        else:
            maps[q.name] = m
        return m.dequantize().to(y.dtype)

    with visiting(quantization(model), visit):
        yield maps


def integers(model: nn.Module, x: Any) -> dict[str, IntegerMap]:
    """The integers of each quantized map for one input, in order of execution (evaluation mode, no
    gradients).

    Args:
        x: the model's input: a tensor, a tuple of inputs or a dict of keyword arguments.

    Raises:
        InputError: the model is not quantized, or a map has NaN or infinite values.
    """
    with capture(model) as maps, eval_mode(model), torch.no_grad():
        run_model(model, x)
    return maps


@contextmanager
def watch_saturation(model: nn.Module, share: float = 0.01) -> Iterator[dict[str, float]]:
    """Counts, inside the block, the share of non-zero elements that each map clips; warns at its end.

    The dict that the block is given holds the shares by name once the block has ended. A layer
    above ``share`` is named in an :class:`~actzip.errors.ActzipWarning`. Infinite values count as
    clipped.
    """
    clipped: dict[str, list[Tensor | int]] = {}
    shares: dict[str, float] = {}

    def visit(q: SiteQuantizer, y: Tensor) -> None:
        y = y.detach()
        scale = q.scale.detach().to(y.device)
        if scale.numel() > 1:
            scale = scale.reshape(1, -1, *([1] * (y.dim() - 2)))
        over = (y.abs() > scale * (q.range.qmax + 0.5)).sum()
        if not q.signed:
            over = over + (y < -0.5 * scale).sum()
        total = clipped.setdefault(q.name, [0, 0])
        total[0], total[1] = total[0] + over, total[1] + torch.count_nonzero(y)

    with visiting(quantization(model), visit):
        yield shares
    for name, (over, count) in clipped.items():
        shares[name] = float(over) / max(1, int(count))
    warn_saturated(shares, share)


def warn_saturated(shares: Mapping[str, float], share: float) -> None:
    for name, value in shares.items():
        if value > share:
            warnings.warn(
                f"layer {name!r}: {100 * value:.2f} % of the non-zero elements saturate (more than "
                f"{100 * share:g} %); calibrate on data like these, use more bits or another observer",
                ActzipWarning,
                stacklevel=3,
            )


@torch.library.custom_op(
    "actzip::quantized_map",
    mutates_args=(),
    schema="(Tensor x, float scale, int bits) -> Tensor",  # PyTorch 2.4 reads no postponed annotations
)
def _quantized_map(x: Tensor, scale: float, bits: int) -> Tensor:
    """The identity; in an exported program the place of an unsigned quantizer."""
    return x.clone()


@_quantized_map.register_fake
def _(x: Tensor, scale: float, bits: int) -> Tensor:
    return torch.empty_like(x)


@contextmanager
def marked(model: nn.Module) -> Iterator[list[str]]:
    """For the runtime's capture: inside the block quantizers are marks in the trace, and weights
    are on their grids.

    Unsigned maps with one scale become a call of ``actzip::quantized_map``; others (signed, a scale
    a channel, inputs of convolutions) are left out, since the engine stores unsigned integers with
    one scale a block. The block is given their names once a pass has run, and a warning says how
    many. A model that is not quantized is left alone.

    Raises:
        LayerError: a quantized weight that is no parameter ``weight`` of its module.
    """
    found = get_quantization(model)
    left: list[str] = []
    if found is None or not found.enabled:
        yield left
        return

    # plain numbers before anything is traced
    scales = {
        n: float(q.scale.detach()) for n, q in found.sites.items() if not q.signed and q.scale.numel() == 1
    }

    def visit(q: SiteQuantizer, y: Tensor) -> Tensor:
        scale = scales.get(q.name)
        if scale is None:
            if q.name not in left:
                left.append(q.name)
            return y
        return torch.ops.actzip.quantized_map(y, scale, q.bits)  # type: ignore[no-any-return]

    modules = dict(model.named_modules())
    weights, found.weights = found.weights, {}
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, q in weights.items():
            path = name.removesuffix(WEIGHT).split(":")[0]
            module = modules.get("" if path == "(model)" else path)
            w = getattr(module, "weight", None)
            if not isinstance(w, nn.Parameter) or name.removesuffix(WEIGHT) != path:
                raise LayerError(
                    f"the quantized weight of {name.removesuffix(WEIGHT)!r} is no parameter of that module"
                )
            kept.append((w, w.data))
            with torch.no_grad():
                w.data = q(w.data.unsqueeze(0)).squeeze(0)
        with visiting(found, visit):
            yield left
    finally:
        found.weights = weights
        for w, data in kept:
            w.data = data
    if left:
        warnings.warn(
            f"{len(left)} quantized maps ({', '.join(left[:3])}{' ...' if len(left) > 3 else ''}) "
            "are signed or have a scale a channel: the engine keeps them as floats",
            ActzipWarning,
            stacklevel=3,
        )
