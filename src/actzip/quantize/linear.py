"""Linear quantization with zero exactly zero: the one formula that training, the codecs and the engine share.

    q = clip(round_half_to_even(x / scale), qmin, qmax)         x' = float32(q) * scale

``scale`` is a positive float32, one a map or one a channel; the division and the product are IEEE float32
operations, so the same map gives the same integers wherever it is quantized. Unsigned maps (after
ReLU and its kin) have qmin = 0 and qmax = 2^bits - 1; signed maps are symmetric, qmax = 2^(bits-1)
- 1 and qmin = -qmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actzip.errors import InputError

__all__ = [
    "MAX_BITS",
    "MIN_BITS",
    "IntegerMap",
    "QuantRange",
    "aligned",
    "check_bits",
    "dequantize_linear",
    "fake_quantize",
    "lsq_gradients",
    "on_grid",
    "per_scale",
    "pieces",
    "quantize_linear",
]

MIN_BITS, MAX_BITS = 4, 16


def check_bits(bits: Any, where: str = "bits") -> int:
    """``bits`` as an int from 4 to 16.

    Raises:
        InputError: it is not.
    """
    if isinstance(bits, bool) or not isinstance(bits, (int, np.integer)):
        raise InputError(f"{where}: bits must be an integer from {MIN_BITS} to {MAX_BITS}, not {bits!r}")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise InputError(f"{where}: bits must be from {MIN_BITS} to {MAX_BITS}, not {bits}")
    return int(bits)


@dataclass(frozen=True)
class QuantRange:
    """The integers of a map: ``bits`` wide, signed symmetric or unsigned."""

    bits: int
    signed: bool = False

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def qmin(self) -> int:
        return -self.qmax if self.signed else 0

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The smallest of uint8, int8, uint16, int16 that holds them."""
        name = f"{'int' if self.signed else 'uint'}{8 if self.bits <= 8 else 16}"
        return np.dtype(name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """uint8, int8 or int16; int32 for unsigned ones of more than 8 bits (torch's uint16 has few
        operators)."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.signed else torch.int32


def aligned(scale: Tensor, x: Tensor) -> Tensor:
    """``scale`` (one number, or one a channel) so that it broadcasts along dimension 1 of ``x``."""
    scale = scale.to(device=x.device, dtype=torch.float32)
    if scale.numel() == 1:
        return scale.reshape((1,) * max(1, x.dim()))  # never a 0-d CPU scalar: CUDA would multiply by 1/scale
    if x.dim() < 2 or x.shape[1] != scale.numel():
        raise InputError(
            f"{scale.numel()} scales for a map of shape {tuple(x.shape)}: one a channel is needed"
        )
    return scale.reshape(1, -1, *([1] * (x.dim() - 2)))


def _rounded(x: Tensor, scale: Tensor, r: QuantRange) -> Tensor:
    return torch.div(x.to(torch.float32), scale).round_().clamp_(r.qmin, r.qmax)


def quantize_linear(x: Tensor, scale: Tensor | float, bits: int, *, signed: bool = False) -> Tensor:
    """The integers of ``x``: clip(round_half_to_even(x / scale), qmin, qmax).

    Args:
        x: any floating dtype, ``N, C, *``; computed in float32. Infinite values give qmin or qmax.
        scale: positive; one number, or a tensor with one a channel (dimension 1).

    Returns:
        uint8, int8, int16 or (unsigned, more than 8 bits) int32, of x's shape.

    Raises:
        InputError: bits out of range, a scale that is not positive and finite, NaN in ``x``, x not floating.
    """
    r = QuantRange(check_bits(bits), signed)
    if not x.is_floating_point():
        raise InputError(f"only floating-point maps are quantized, not {x.dtype}")
    s = aligned(_check_scale(scale), x)
    q = _rounded(x.detach(), s, r)
    if bool(torch.isnan(q).any()):
        raise InputError("the map has NaN, which no integer stands for")
    return q.to(r.torch_dtype)


def dequantize_linear(q: Tensor, scale: Tensor | float) -> Tensor:
    """float32(q) * scale, in float32; ``scale`` as in :func:`quantize_linear`."""
    return q.to(torch.float32) * aligned(_check_scale(scale), q)


def _check_scale(scale: Tensor | float) -> Tensor:
    s = scale.detach() if isinstance(scale, Tensor) else torch.tensor([float(scale)])
    if s.numel() == 0 or not bool(((s > 0) & torch.isfinite(s)).all()):
        raise InputError("a scale must be positive and finite")
    return s


_CHUNK = 1 << 17  # elements: on a CPU a map is worked on in pieces that stay in cache


def pieces(x: Tensor) -> list[slice]:
    """Slices of dimension 0 of about :data:`_CHUNK` elements; one on devices other than a CPU."""
    if x.device.type != "cpu" or x.dim() == 0 or x.numel() <= _CHUNK:
        return [slice(None)]
    step = max(1, _CHUNK * int(x.shape[0]) // x.numel())
    return [slice(i, i + step) for i in range(0, int(x.shape[0]), step)]


def on_grid(x: Tensor, shaped: Tensor, qmin: int, qmax: int) -> Tensor:
    """``x`` rounded to the grid, in x's dtype."""
    y = torch.empty_like(x)
    direct = x.dtype == torch.float32
    for part in pieces(x) if x.dim() else [...]:
        a = x[part]
        if direct:
            torch.div(a, shaped, out=y[part]).round_().clamp_(qmin, qmax).mul_(shaped)
        else:
            y[part] = torch.div(a.to(torch.float32), shaped).round_().clamp_(qmin, qmax).mul_(shaped)
    return y


class _Lsq(torch.autograd.Function):
    """Fake quantization: straight-through for x, learned step size for the scale (Esser et al.,
    ICLR 2020, eq. 1-5)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        s = scale.detach().clamp_min(torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(x, s)
        ctx.range = (qmin, qmax)
        return on_grid(x, aligned(s, x), qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, s = ctx.saved_tensors
        qmin, qmax = ctx.range
        return *lsq_gradients(grads[0], x, s, qmin, qmax, ctx.needs_input_grad[1]), None, None


def per_scale(values: Tensor, scale: Tensor) -> Tensor:
    """The sum of ``values`` (of a map's shape) that belongs to each number of ``scale``."""
    if scale.numel() == 1:
        return values.sum()
    return values.transpose(0, 1).reshape(scale.numel(), -1).sum(1)


def lsq_gradients(
    grad: Tensor, x: Tensor, s: Tensor, qmin: int, qmax: int, want_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and of the scale ``s`` for that of the fake-quantized map."""
    shaped = aligned(s, x)
    grad_x = torch.empty_like(x)
    total = torch.zeros(s.numel(), dtype=torch.float32, device=x.device)
    for part in pieces(x) if x.dim() else [...]:
        g = grad[part].to(torch.float32)
        v = torch.div(x[part].to(torch.float32), shaped)
        inner = torch.ops.aten.hardtanh_backward(g, v, qmin, qmax)  # g where qmin < v < qmax, else 0
        grad_x[part] = inner
        if want_scale:
            # d x'/d s = round(v) - v inside the range, the bound outside
            bounded = v.clamp(qmin, qmax)
            outer = torch.sub(g, inner).mul_(bounded)
            step = torch.round(bounded, out=bounded).sub_(v).mul_(inner).add_(outer)
            total += per_scale(step, s)
    grad_s = total.reshape(s.shape) / math.sqrt(max(1, x.numel() // s.numel()) * qmax) if want_scale else None
    return grad_x, grad_s


def fake_quantize(x: Tensor, scale: Tensor, r: QuantRange) -> Tensor:
    """``x`` on the grid of ``scale``: dequantized integers, in x's dtype.

    Gradients: of ``x``, one inside the range and zero outside (straight-through estimator); of ``scale``, the
    learned step size's, scaled by 1 / sqrt(elements a scale * qmax). NaN stays NaN; infinities
    become the bounds.
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _Lsq.apply(x, scale, r.qmin, r.qmax)  # type: ignore[no-untyped-call, no-any-return]
    return on_grid(x.detach(), aligned(scale.detach(), x), r.qmin, r.qmax)


@dataclass(frozen=True)
class IntegerMap:
    """The integers of one activation map.

    Attributes:
        name: site.
        values: ``N, C, *``, dtype as :func:`quantize_linear` gives.
        scale: float32, shape 1 or C.
        bits, signed: the range.
    """

    name: str
    values: Tensor
    scale: Tensor
    bits: int
    signed: bool

    def dequantize(self) -> Tensor:
        """The map in float32, exactly what the fake-quantized model computes with."""
        return dequantize_linear(self.values, self.scale)

    def numpy(self) -> NDArray[Any]:
        """The integers as uint8, int8, uint16 or int16: what the codecs take."""
        return self.values.cpu().numpy().astype(QuantRange(self.bits, self.signed).numpy_dtype, copy=False)
