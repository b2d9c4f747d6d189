"""mixup: samples between the samples (Zhang et al., ICLR 2018, arXiv:1710.09412)."""

from __future__ import annotations

import torch
from torch import Tensor

from actzip.errors import InputError

__all__ = ["mixed"]


def mixed(x: Tensor, y: Tensor | None, mixup: float) -> tuple[Tensor, Tensor | None, float]:
    """The batch mixed with a permutation of itself: l x + (1 - l) x', and what the labels of x and x' count.

    Permutation and l, drawn from Beta(mixup, mixup), are of torch's global generator.

    Args:
        x: samples, ``N, *``, floating point. y: their labels, ``N``, or None.

    Returns:
        the mixed samples; the labels of x' (None without labels), which count with 1 - l; l.

    Raises:
        InputError: samples that are not of floating point.
    """
    if not x.is_floating_point():
        raise InputError(f"mixup mixes samples of floating point, not of {x.dtype}")
    strength = torch.tensor(float(mixup))
    share = float(torch.distributions.Beta(strength, strength).sample())  # type: ignore[no-untyped-call]
    order = torch.randperm(x.shape[0]).to(x.device)
    return torch.lerp(x[order], x, share), None if y is None else y[order], share
