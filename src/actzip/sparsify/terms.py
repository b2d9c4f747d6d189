"""The kinds of penalty: what each is the mean of, over one map. A new kind is one function and one
row of ``TERMS``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actzip.errors import InputError

__all__ = ["TERMS", "Term", "by_channel", "get"]


@dataclass(frozen=True)
class Term:
    """One kind of penalty.

    Attributes:
        mean: ``mean(y, scale, beta)`` of phi over a map ``y`` (``N, C, *``, the output of a ReLU):
            a float32 scalar with a gradient. ``scale`` is one number a channel (``1, C, 1 ...``,
            y's dtype), or None: maps are not normalised.
        normalised: whether maps are divided by their channels' scales unless the user says otherwise.
    """

    mean: Callable[[Tensor, Tensor | None, float], Tensor]
    normalised: bool


class _TransformedL1(torch.autograd.Function):
    """mean of (1 + b) x / (b s + x) over x >= 0, with s a constant a channel; its derivative in
    closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bs: Tensor, b: float) -> Tensor:
        r = torch.add(x, bs).reciprocal_().mul_(bs)
        ctx.save_for_backward(r, bs)
        ctx.b = b
        return (1 + b) * (1 - by_channel(r).sum() / r.numel())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        r, bs = ctx.saved_tensors
        factor = (grads[0] * (1 + ctx.b) / r.numel()).to(r.dtype)
        return torch.mul(r, r).div_(bs).mul_(factor), None, None


def _transformed_l1(y: Tensor, scale: Tensor | None, beta: float) -> Tensor:
    bs = torch.tensor(beta, dtype=y.dtype) if scale is None else beta * scale
    return _TransformedL1.apply(y, bs, beta)  # type: ignore[no-any-return, no-untyped-call]


def _l1(y: Tensor, scale: Tensor | None, beta: float) -> Tensor:
    x = y if scale is None else y / scale
    return x.abs().mean(dtype=torch.float32)


def _log(y: Tensor, scale: Tensor | None, beta: float) -> Tensor:
    x = y if scale is None else y / scale
    return torch.log1p(x.abs() / beta).mean(dtype=torch.float32) / math.log1p(1 / beta)


def _hoyer(y: Tensor, scale: Tensor | None, beta: float) -> Tensor:
    flat = y.flatten(1).float()
    top, bottom = flat.abs().sum(1).square(), flat.square().sum(1)
    return (top / bottom.clamp(min=1e-20)).mean() / flat.shape[1]


TERMS: dict[str, Term] = {
    "l1": Term(_l1, normalised=False),
    "tl1": Term(_transformed_l1, normalised=True),
    "log": Term(_log, normalised=True),
    "hoyer": Term(_hoyer, normalised=False),
}


def get(kind: str) -> Term:
    """The kind of penalty called ``kind``.

    Raises:
        InputError: there is none; the message names all there are.
    """
    if kind not in TERMS:
        near = difflib.get_close_matches(str(kind), TERMS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"penalty must be one of {', '.join(TERMS)}, not {kind!r}{hint}")
    return TERMS[kind]


def by_channel(x: Tensor) -> Tensor:
    """Sums over all but dimension 1, in float32 from the sums of single maps, which are of x's dtype."""
    if x.dtype == torch.float16:  # the sum of a large map is beyond it
        x = x.float()
    return (x.flatten(2).sum(2) if x.dim() > 2 else x).float().sum(0)
