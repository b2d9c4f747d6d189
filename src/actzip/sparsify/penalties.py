"""Penalties on activation maps: what is added to the task loss so that maps become sparser.

Two lines in anybody's training loop::

    penalty = ActivationPenalty(model, "l1", alpha=1e-6)
    loss = criterion(model(x), y) + penalty()
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Selector, Site, count_macs, run_model
from actzip.errors import ActzipWarning, InputError, LayerError

__all__ = ["PENALTIES", "ActivationPenalty", "mac_weights", "penalty_value"]


def _l1(x: Tensor, beta: float) -> Tensor:
    return x.abs().sum()


def _transformed_l1(x: Tensor, beta: float) -> Tensor:
    b = beta * _scale(x)
    a = x.abs()
    return ((1 + b) * a / (b + a)).sum() / (1 + b)


def _log(x: Tensor, beta: float) -> Tensor:
    b = beta * _scale(x)
    return torch.log1p(x.abs() / b).sum() / math.log1p(1 / beta)


def _hoyer(x: Tensor, beta: float) -> Tensor:
    a = x.abs()
    return a.sum() ** 2 / (a.square().sum() + torch.finfo(x.dtype).tiny)


def _scale(x: Tensor) -> Tensor:
    """Mean magnitude of the non-zeros, without gradient: makes a penalty indifferent to the map's scale."""
    d = x.detach()
    n = torch.count_nonzero(d).clamp(min=1)
    return (d.abs().sum() / n).clamp(min=torch.finfo(x.dtype).tiny)


#: name -> (function of a map and beta, what it is)
PENALTIES: dict[str, tuple[Callable[[Tensor, float], Tensor], str]] = {
    "l1": (_l1, "sum |x| (Georgiadis, CVPR 2019, equation 3)"),
    "tl1": (
        _transformed_l1,
        "transformed L1: sum |x| / (b + |x|), b = beta * mean of the non-zeros (arXiv:2405.19652)",
    ),
    "log": (_log, "sum log(1 + |x| / b) / log(1 + 1 / beta), b as in tl1"),
    "hoyer": (
        _hoyer,
        "Hoyer-square: (sum |x|)^2 / sum x^2, between 1 and the number of non-zeros (Kurtz et al., ICML 2020)",
    ),
}


def penalty_value(kind: str, x: Tensor, beta: float = 1.0) -> Tensor:
    """The penalty of one activation map summed over all its elements; see :data:`PENALTIES`.

    ``tl1``, ``log`` and ``hoyer`` are near the number of non-zeros, ``l1`` is the sum of magnitudes.

    Raises:
        InputError: unknown kind, or beta <= 0.
    """
    if kind not in PENALTIES:
        raise InputError(f"penalty {kind!r} is not known; these are: {', '.join(PENALTIES)}")
    if not beta > 0:
        raise InputError(f"beta must be > 0, not {beta}")
    return PENALTIES[kind][0](x, beta)


def mac_weights(model: nn.Module, example: Any) -> dict[str, float]:
    """MACs that one element of each activation map costs when it is not zero, on average over the map.

    Found by one pass in which every map starts a graph of its own: the gradient of (sum over convolution and linear
    inputs of element times MACs an element) with respect to a map counts its direct readers, through pooling,
    concatenation and addition, and nothing beyond the next convolution. Maps that nothing reads get 0.
    """
    leaves: dict[str, Tensor] = {}
    costs: list[Tensor] = []

    def activation(site: Site, y: Tensor) -> Tensor | None:
        if not site.sparse or not y.is_floating_point():
            return None
        leaf = torch.ones_like(y).requires_grad_()
        leaves[site.name] = leaf
        return leaf

    def compute(site: Site, call: ComputeCall) -> None:
        if not call.input.requires_grad or not call.input.numel():
            return
        ones = ComputeCall(
            torch.ones_like(call.input[:1]),
            call.weight,
            call.stride,
            call.padding,
            call.dilation,
            call.output_padding,
            call.groups,
            call.transposed,
        )
        inside = count_macs(ones)[2]
        costs.append(call.input.sum() * (inside / call.input[:1].numel()))

    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with ActivationTap(model, activation, compute), torch.enable_grad():
            run_model(model, example)
        if not costs:
            return dict.fromkeys(leaves, 0.0)
        wanted = list(leaves.values())
        grads = torch.autograd.grad(
            torch.stack([c for c in costs if c.requires_grad]).sum(), wanted, allow_unused=True
        )
    finally:
        for m, training in was.items():
            m.training = training
    return {n: 0.0 if gr is None else float(gr.mean()) for n, gr in zip(leaves, grads, strict=True)}


class ActivationPenalty:
    """The sum over activation maps of alpha_l times a penalty, per image: add it to the loss of your own loop.

    ``penalty()`` after a forward pass in training mode gives a scalar with gradient (0 where no map was seen) and
    forgets the maps. Every use of a shared ReLU counts as a map of its own. Under DistributedDataParallel give the
    inner module; the mean over processes of the penalties is that of the global batch, as for any mean loss.

    Args:
        model: any ``nn.Module``; its ReLUs, module, functional or in place, are found as it runs.
        kind: ``l1`` (the paper's), ``tl1``, ``log`` or ``hoyer``, see :data:`PENALTIES`.
        alpha: weight; a number for all maps, or a mapping from site name to number (others get 0).
        beta: shape of ``tl1`` and ``log``, relative to each map's mean non-zero magnitude.
        weighting: ``uniform``: each map counts as it is (the paper); ``macs``: each element counts by the MACs that it
            costs when it is not zero, as a share of the network's MACs, so the penalty is near alpha times the share
            of MACs that are effective (needs ``example``, or the first batch is used).
        layers, ignore: which maps (:mod:`actzip.activations`).
        example: an input, for ``weighting="macs"``.

    Attributes:
        density: site name -> density in the last forward pass.
        dead: names of maps that were all zero for ``patience`` passes; they are warned about and no longer penalised.

    Raises:
        InputError: unknown kind or weighting, negative alpha.
        LayerError: an alpha is given for a name that the model does not have (after the first pass).
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "l1",
        *,
        alpha: float | Mapping[str, float] = 1e-6,
        beta: float = 1.0,
        weighting: str = "uniform",
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
        example: Any = None,
        patience: int = 20,
    ) -> None:
        if kind not in PENALTIES:
            raise InputError(f"penalty {kind!r} is not known; these are: {', '.join(PENALTIES)}")
        if weighting not in ("uniform", "macs"):
            raise InputError(f"weighting must be 'uniform' or 'macs', not {weighting!r}")
        values = alpha.values() if isinstance(alpha, Mapping) else [alpha]
        if any(not (0 <= a < math.inf) for a in values):
            raise InputError(f"alpha must be finite and >= 0, not {alpha}")
        if not beta > 0:
            raise InputError(f"beta must be > 0, not {beta}")
        self.model = model
        self.kind = kind
        self.alpha: float | Mapping[str, float] = alpha
        self.beta = beta
        self.weighting = weighting
        self.patience = patience
        self.weights: dict[str, float] | None = None
        self.density: dict[str, float] = {}
        self.dead: list[str] = []
        self.not_sparse: list[str] = []
        self._empty: dict[str, int] = {}
        self._terms: list[Tensor] = []
        self._checked = False
        if weighting == "macs" and example is not None:
            self._weigh(example)
        self._tap = ActivationTap(model, self._see, layers=layers, ignore=ignore).attach()
        self._handle = model.register_forward_pre_hook(self._start, with_kwargs=True)

    def detach(self) -> None:
        """Leaves the model as it was."""
        self._tap.detach()
        self._handle.remove()
        self._terms = []

    def __enter__(self) -> ActivationPenalty:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _weigh(self, example: Any) -> None:
        costs = mac_weights(self.model, example)
        first = example[0] if isinstance(example, (tuple, list)) else example
        if isinstance(first, dict):
            first = next(iter(first.values()))
        totals = {"macs": 0}

        def count(site: Site, call: ComputeCall) -> None:
            totals["macs"] += count_macs(call)[0]

        was = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            with ActivationTap(self.model, compute=count), torch.no_grad():
                run_model(self.model, example)
        finally:
            for m, training in was.items():
                m.training = training
        per_image = totals["macs"] / max(1, int(first.shape[0]))
        self.weights = {n: c / per_image for n, c in costs.items()} if per_image else costs

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._terms = []
            if self.weighting == "macs" and self.weights is None:
                first = (
                    kwargs
                    if kwargs
                    else tuple(a[:1] if isinstance(a, Tensor) and a.dim() else a for a in args)
                )
                self._handle.remove()
                self._tap.detach()
                try:
                    self._weigh(first)
                finally:
                    self._tap.attach()
                    self._handle = self.model.register_forward_pre_hook(self._start, with_kwargs=True)

    def _see(self, site: Site, y: Tensor) -> None:
        if not site.sparse:
            if site.name not in self.not_sparse:
                self.not_sparse.append(site.name)
            return
        if not torch.is_grad_enabled() or not self.model.training or y.dim() < 1 or not y.numel():
            return
        alpha = self.alpha.get(site.name, 0.0) if isinstance(self.alpha, Mapping) else self.alpha
        density = float(torch.count_nonzero(y.detach())) / y.numel()
        self.density[site.name] = density
        if density == 0:
            self._empty[site.name] = self._empty.get(site.name, 0) + 1
            if self._empty[site.name] == self.patience:
                self.dead.append(site.name)
                warnings.warn(
                    f"activation map {site.name!r} was all zero in {self.patience} batches in a row; its penalty stops",
                    ActzipWarning,
                    stacklevel=2,
                )
        else:
            self._empty[site.name] = 0
        weight = 1.0 if self.weights is None else self.weights.get(site.name, 0.0)
        if alpha == 0 or weight == 0 or site.name in self.dead:
            return
        value = penalty_value(self.kind, y.float(), self.beta) / y.shape[0]
        self._terms.append(value * (alpha * weight))

    def __call__(self) -> Tensor:
        """The penalty of the last forward pass, a float32 scalar."""
        if not self._checked and self._tap.sites:
            self._checked = True
            if isinstance(self.alpha, Mapping):
                unknown = sorted(set(self.alpha) - set(self._tap.sites))
                if unknown:
                    have = ", ".join(self._tap.sites)
                    raise LayerError(f"alpha is given for {', '.join(unknown)}; the model has {have}")
            if self.not_sparse:
                names = ", ".join(self.not_sparse[:5]) + (" ..." if len(self.not_sparse) > 5 else "")
                warnings.warn(
                    f"{len(self.not_sparse)} activations have no exact zeros and cannot become sparse: {names}",
                    ActzipWarning,
                    stacklevel=2,
                )
        terms, self._terms = self._terms, []
        if not terms:
            first = next(self.model.parameters(), None)
            return torch.zeros((), device=first.device if first is not None else None)
        return torch.stack(terms).sum()
