"""Thresholds of ReLUs (x if x > T else 0) that are trained together with the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import (
    ActivationTap,
    Selector,
    Site,
    eval_mode,
    run_model,
    set_thresholds,
    threshold_activation,
)
from actzip.errors import InputError
from actzip.sparsify.costs import map_costs

__all__ = ["LearnedThresholds"]


class _Jump(torch.autograd.Function):
    """0 where y <= t, else y, and the fraction of such y; derivatives for t by a box kernel of
    width h around t."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        drop = y <= t  # as in activations.threshold_activation: NaN is kept
        ctx.save_for_backward(y, t, h)
        zero = torch.zeros((), dtype=y.dtype, device=y.device)
        return torch.where(drop, zero, y), 1 - drop.sum() / drop.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        y, t, h = ctx.saved_tensors
        grad_y, grad_density = grads
        near = ((y - t).abs() < h / 2) & (y > 0)
        dims = [d for d in range(y.dim()) if t.shape[d] == 1]
        box = near / h
        by_output = -(grad_y * t * box).sum(dims, keepdim=True)
        by_density = -(grad_density / y.numel()) * box.sum(dims, keepdim=True)
        return grad_y * (y > t), by_output + by_density, None


class LearnedThresholds:
    """One trained threshold a channel (or layer) for every ReLU of ``model``, and the density as a penalty.

    While attached, forward passes in training mode use ``y if y > T else 0``. Gradients for T come
    from a box kernel around it, as in JumpReLU (Rajamanoharan et al., arXiv:2407.14435, section 3):
    the loss pulls T down, the density's penalty pushes it up. Thresholds start at 0 and are never
    negative.

    Args:
        example: an input of the model; gives sites, sizes, scales and the MACs that each map's
            non-zeros cost.
        per: ``channel`` or ``layer``. ``width``: of the kernel, in units of the map's mean positive value.
        layers, ignore: which sites.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        per: str = "channel",
        width: float = 0.2,
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
    ) -> None:
        if per not in ("channel", "layer"):
            raise InputError(f"per must be 'channel' or 'layer', not {per!r}")
        self.model = model
        self._t: dict[str, Tensor] = {}
        self._h: dict[str, Tensor] = {}
        self._densities: list[tuple[str, Tensor]] = []
        costs = map_costs(model, example)

        def make(site: Site, y: Tensor) -> None:
            if not site.sparse or costs[site.name].share <= 0:
                return
            shape = [1] * y.dim()
            if per == "channel":
                shape[1] = int(y.shape[1])
            self._t[site.name] = torch.zeros(shape, device=y.device, requires_grad=True)
            mean = float(y.sum()) / max(1, int(torch.count_nonzero(y)))
            self._h[site.name] = torch.tensor(width * max(mean, 1e-6), device=y.device)

        with ActivationTap(model, make, layers=layers, ignore=ignore), eval_mode(model), torch.no_grad():
            run_model(model, example)
        self.shares = {name: costs[name].share for name in self._t}
        self._tap = ActivationTap(model, self._see).attach()

    def _see(self, site: Site, y: Tensor) -> Tensor | None:
        t = self._t.get(site.name)
        if t is None:
            return None
        if not self.model.training or not torch.is_grad_enabled():
            return threshold_activation(y, t.detach().to(y.dtype))
        kept, density = _Jump.apply(y, t.to(y.dtype), self._h[site.name].to(y.dtype))  # type: ignore[no-untyped-call]
        self._densities.append((site.name, density))
        return kept  # type: ignore[no-any-return]

    def parameters(self) -> list[Tensor]:
        """The thresholds, for an optimizer."""
        return list(self._t.values())

    def penalty(self, alpha: float) -> Tensor:
        """alpha * sum over maps of (share of MACs) * density, of the passes since the last call."""
        seen, self._densities = self._densities, []
        if not seen:
            return torch.zeros(())
        return alpha * torch.stack([self.shares[n] * d for n, d in seen]).sum()

    def clamp(self) -> None:
        """No threshold below 0; call after each optimizer step."""
        with torch.no_grad():
            for t in self._t.values():
                t.clamp_(min=0)

    def values(self) -> dict[str, float | Tensor]:
        """Thresholds by site name, as :func:`actzip.activations.set_thresholds` takes them."""
        return {n: float(t) if t.numel() == 1 else t.detach().flatten().clone() for n, t in self._t.items()}

    def state(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return {n: t.detach().clone() for n, t in self._t.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what :meth:`state` gave."""
        with torch.no_grad():
            for n, t in self._t.items():
                t.copy_(state[n])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Evaluation inside the block sees the thresholds (the tap applies them in eval mode too)."""
        yield

    def detach(self) -> None:
        """Stop; the model's ReLUs are ordinary ones again (see :meth:`values`)."""
        self._tap.detach()

    def set_on(self, model: nn.Module) -> nn.Module:
        """Sets the thresholds on ``model`` for good."""
        return set_thresholds(model, self.values())
