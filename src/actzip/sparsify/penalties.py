"""Penalties on activation maps: what is added to the task loss so that training makes zeros."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actzip.activations import ActivationTap, Selector, Site, find_sites
from actzip.checks import flag, number, one_of, shown, whole
from actzip.errors import ActzipWarning, InputError
from actzip.sparsify import terms
from actzip.sparsify.costs import MapCost, map_costs

__all__ = ["KINDS", "WEIGHTINGS", "ActivationPenalty"]

KINDS = tuple(terms.TERMS)
WEIGHTINGS = ("macs", "mixed", "elements", "uniform", "paper")


class ActivationPenalty:
    """The penalty on the activation maps of the model's last forward pass; add it to your loss.

        penalty = ActivationPenalty(model, alpha=0.3, example=x)
        loss = criterion(model(x), y) + penalty()

    With phi and weights w_l as chosen, penalty() = alpha * sum_l w_l * mean over map l of phi(x).

    Args:
        model: any module; nothing of it changes, its ReLUs are watched (see :mod:`actzip.activations`).
        kind: ``l1``: |x| (Georgiadis, CVPR 2019, equation 3); ``tl1``: (1 + b)|x| / (b + |x|)
            (arXiv:2405.19652); ``log``: log(1 + |x| / b) / log(1 + 1 / b); ``hoyer``: (sum |x|)^2 /
            sum x^2, per sample and map, over the map's size (Kurtz et al., ICML 2020).
        alpha: strength. A number, or a number a site name (then only those sites are penalised).
            May be set at any time (``penalty.alpha = ...``). 0 switches the penalty off, its
            statistics stay.
        weighting: w_l. ``macs``: the share of the network's MACs that non-zeros of map l cost
            (needs ``example``); ``mixed``: between that and the share of elements, for networks
            that are to be stored and run (needs ``example``; ``elements_share``: how much of it is
            the share of elements); ``elements``: the share of elements; ``uniform``: 1 / number of
            maps; ``paper``: the number of elements a sample, so that alpha_l multiplies the plain
            norm, as in the paper.
        beta: b of ``tl1`` and ``log``, in units of the channel's scale.
        normalise: divide each channel by its scale, the running mean of its positive values (a
            constant for the gradient), before phi, so that shrinking a map is no way out. Default:
            for ``tl1`` and ``log``.
        example: an input of the model, for ``weighting="macs"`` and to know the sites at once.
        layers, ignore: which sites (see :mod:`actzip.activations`); default: all ReLU-like ones.
        min_share: with ``weighting="macs"``, maps of a smaller share are left alone (they cost time
            and gain nothing).
        every: the penalty is part of every n-th loss, n times as strong, and of the others not at
            all (lazy regularisation, Karras et al., arXiv:1912.04958): its gradient is the same in
            the mean, its cost in time 1/n.
        stats_every: densities and scales are renewed at every n-th training pass.
        dead_after: a map that is all zero in so many counted passes in a row is dead: warned of, no
            longer penalised.

    Attributes:
        densities: running density of each penalised map; ``dead`` the names of dead ones; ``unsuitable`` the
            activations of the model that have no zeros (SiLU, GELU ...), by name, with their kind.

    ``torch.compile``: what it has made knows nothing of a penalty that comes or goes, so attaching and
    detaching empty its cache, of all models in the process (``torch._dynamo.reset``). Reentrant
    checkpointing (``use_reentrant=True``) hides the maps inside: use ``use_reentrant=False``.

    Distributed training: scales and densities are averaged over all processes, and terms are means
    over samples, so that the gradients which DistributedDataParallel averages are those of one
    process with the whole batch.

    Raises:
        InputError: an unknown kind or weighting, a negative or non-finite alpha, ``macs`` without example.
        LayerError: a name in ``layers``, ``ignore`` or ``alpha`` that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "tl1",
        alpha: float | Mapping[str, float] = 1.0,
        *,
        weighting: str | None = None,
        beta: float = 0.5,
        normalise: bool | None = None,
        example: Any = None,
        layers: Selector | Iterable[Selector] | None = None,
        ignore: Selector | Iterable[Selector] | None = None,
        elements_share: float = 0.5,
        min_share: float = 0.003,
        every: int = 1,
        stats_every: int = 8,
        dead_after: int = 3,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, not {shown(model)}")
        term = terms.get(one_of(kind, "kind", KINDS))
        if weighting is None:
            weighting = "macs" if example is not None else "elements"
        _check(weighting, example, elements_share, min_share, beta, normalise)
        for name, count in (("every", every), ("stats_every", stats_every), ("dead_after", dead_after)):
            whole(count, name, 1)
        if isinstance(alpha, Mapping):
            if layers is None:
                layers = list(alpha)
            self._per_site: dict[str, float] | None = {
                k: _strength(v, f"alpha of {k!r}") for k, v in alpha.items()
            }
            self._alpha = 1.0
        else:
            self._per_site = None
            self._alpha = _strength(alpha)
        self.model = model
        self.kind = kind
        self.weighting = weighting
        self.beta = float(beta)
        self.normalise = term.normalised if normalise is None else normalise
        self.every = every
        self.stats_every = stats_every
        self.dead_after = dead_after
        self.densities: dict[str, float] = {}
        self.dead: set[str] = set()
        self.unsuitable: dict[str, str] = {}
        self._zero_passes: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._shares: dict[str, float] | None = None  # of all MACs, by site
        self._weights: dict[str, float] | None = None  # where they do not follow from sizes alone
        self._terms: dict[str, list[Tensor]] = {}
        self._counted: dict[str, int] = {}
        self._calls = 0
        self._last: float = 0.0
        if example is not None:
            sites, _ = find_sites(model, example, layers=layers, ignore=ignore)
            self._say_what_cannot_become_sparse(sites)
            if weighting in ("macs", "mixed"):
                costs = map_costs(model, example)
                costs = {s.name: costs[s.name] for s in sites if s.sparse and s.name in costs}
                if weighting == "macs":
                    costs = {n: c for n, c in costs.items() if c.share >= min_share}
                self._shares = {n: c.share for n, c in costs.items()}
                self._weights = _weights(costs, float(elements_share) if weighting == "mixed" else 0.0)
        self._seen = self._warned = False
        self._taken: set[str] = set()  # names of maps with a term in the last pass
        self._tap = ActivationTap(model, self._see, layers=layers, ignore=ignore, copied=False).attach()
        _compile_anew()

    def _say_what_cannot_become_sparse(self, sites: list[Site]) -> None:
        self.unsuitable = {s.name: s.kind for s in sites if not s.sparse}
        if self.unsuitable:
            names = ", ".join(f"{n} ({k})" for n, k in list(self.unsuitable.items())[:6])
            more = f" and {len(self.unsuitable) - 6} more" if len(self.unsuitable) > 6 else ""
            warnings.warn(f"these layers cannot become sparse: {names}{more}", ActzipWarning, stacklevel=3)
        if not any(s.sparse for s in sites):
            warnings.warn(
                "the model has no ReLU among the chosen layers: there is nothing to penalise",
                ActzipWarning,
                stacklevel=3,
            )

    # -- strength

    @property
    def alpha(self) -> float:
        """Strength that multiplies everything (on top of strengths given per site)."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = _strength(value)

    @property
    def last(self) -> float:
        """The value of the last call, without its gradient."""
        return self._last

    @property
    def effective_share(self) -> float:
        """Running estimate of effective MACs / MACs, from the densities of the maps that are penalised.

        Maps whose share of the work is below ``min_share`` and operands that are no penalised map
        count as dense, so this is an upper bound, close where the maps carry nearly all of the
        work.

        Raises:
            InputError: the weighting is neither ``macs`` nor ``mixed``, so that the work of the
                maps is not known.
        """
        if self._shares is None:
            raise InputError("the work of the maps is known with weighting 'macs' or 'mixed' only")
        return 1.0 - sum(share * (1.0 - self.densities.get(n, 1.0)) for n, share in self._shares.items())

    # -- watching

    def _weight(self, name: str) -> float:
        if name in self.dead:
            return 0.0
        own = 1.0 if self._per_site is None else self._per_site.get(name, 0.0)
        if self._weights is not None:
            return own * self._weights.get(name, 0.0)
        return own

    def _see(self, site: Site, y: Tensor) -> None:
        self._seen = True
        if not site.sparse:
            self.unsuitable.setdefault(site.name, site.kind)
            return
        if torch._C._current_graph_task_id() != -1:
            # checkpointing runs the pass again in the backward, and must meet the same operations
            if site.name in self._taken:
                self._term(site.name, y)
            return
        if not torch.is_grad_enabled() or not self.model.training or y.dim() < 2 or y.numel() == 0:
            return
        if self._weights is not None and site.name not in self._weights:
            return
        name = site.name
        self._sizes[name] = y.numel() // int(y.shape[0])
        count = self._counted.get(name, 0)
        self._counted[name] = count + 1
        if count % self.stats_every == 0:
            self._count(name, y.detach())
        weight = self._weight(name)
        self._taken.discard(name)
        if weight > 0 and self._alpha > 0 and y.requires_grad and self._calls % self.every == 0:
            self._terms.setdefault(name, []).append(self._term(name, y))
            self._taken.add(name)

    def _count(self, name: str, y: Tensor) -> None:
        # sums in y's own dtype: one in another first makes a copy of y in it, ten times as slow
        total, nonzero = terms.by_channel(y), terms.by_channel((y != 0).to(y.dtype))
        packed = torch.cat([total, nonzero, torch.tensor([float(y.numel())], device=y.device)])
        if _distributed():
            dist.all_reduce(packed)
        channels = total.numel()
        total, nonzero, elements = packed[:channels], packed[channels:-1], float(packed[-1])
        density = float(nonzero.sum()) / elements
        old = self.densities.get(name)
        self.densities[name] = density if old is None else 0.7 * old + 0.3 * density
        if density == 0:
            self.densities[name] = 0.0
            self._zero_passes[name] = self._zero_passes.get(name, 0) + 1
            if self._zero_passes[name] >= self.dead_after and name not in self.dead:
                self.dead.add(name)
                warnings.warn(
                    f"activation map {name!r} is all zero: it died, and is no longer penalised",
                    ActzipWarning,
                    stacklevel=2,
                )
        else:
            self._zero_passes[name] = 0
        if self.normalise:
            scale = total / nonzero.clamp(min=1)
            known = self._scales.get(name)
            # channels without a positive value keep what they had; the smallest scale is tied to
            # the map's mean
            floor = 0.01 * float(total.sum()) / max(1.0, float(nonzero.sum())) + 1e-12
            scale = scale.clamp(min=floor)
            self._scales[name] = (
                scale if known is None else torch.where(nonzero > 0, 0.8 * known + 0.2 * scale, known)
            )

    def _term(self, name: str, y: Tensor) -> Tensor:
        scale = None
        if self.normalise:
            scale = self._scales[name].to(y.dtype).reshape(1, -1, *([1] * (y.dim() - 2)))
        return terms.get(self.kind).mean(y, scale, self.beta)

    # -- the value

    def __call__(self) -> Tensor:
        """The penalty of the forward passes since the last call (their mean), as a scalar with a gradient.

        A plain zero where nothing was penalised: no pass in training mode with gradients, alpha 0,
        no ReLU, or between two losses of ``every``.
        """
        seen, self._terms = self._terms, {}
        self._calls += 1
        if not seen and not self._seen and self._alpha > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "the penalty saw no pass of its model: it is 0. Is another object called (a copy, a "
                "compiled or exported program of before)?",
                ActzipWarning,
                stacklevel=2,
            )
        if not seen:
            self._last = 0.0
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            return torch.zeros((), device=device)
        if self.weighting == "elements":
            whole = sum(self._sizes.values())
            norm = {n: self._sizes[n] / whole for n in seen}
        elif self.weighting == "uniform":
            norm = {n: 1 / len(self._sizes) for n in seen}
        elif self.weighting == "paper":
            norm = {n: float(self._sizes[n]) for n in seen}
        else:
            norm = dict.fromkeys(seen, 1.0)
        total = sum(norm[n] * self._weight(n) * torch.stack(t).mean() for n, t in seen.items())
        value = self._alpha * self.every * total
        assert isinstance(value, Tensor)
        self._last = float(value.detach())
        return value

    def discard(self) -> None:
        """Forget the passes since the last call (after a skipped step)."""
        self._terms = {}

    def detach(self) -> None:
        """Stop watching; the model is as it was before."""
        self._tap.detach()
        _compile_anew()

    def __enter__(self) -> ActivationPenalty:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: alpha, running scales and densities, dead maps."""
        return {
            "alpha": self._alpha,
            "scales": dict(self._scales),
            "densities": dict(self.densities),
            "dead": sorted(self.dead),
            "counted": dict(self._counted),
            "zero_passes": dict(self._zero_passes),
            "calls": self._calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self._alpha = float(state["alpha"])
        self._scales = dict(state["scales"])
        self.densities = dict(state["densities"])
        self.dead = set(state["dead"])
        self._counted = dict(state["counted"])
        self._zero_passes = dict(state["zero_passes"])
        self._calls = int(state.get("calls", 0))


def _check(
    weighting: Any, example: Any, elements_share: Any, min_share: Any, beta: Any, normalise: Any
) -> None:
    one_of(weighting, "weighting", WEIGHTINGS)
    if weighting in ("macs", "mixed") and example is None:
        raise InputError(f"weighting={weighting!r} needs example=, an input of the model")
    number(elements_share, "elements_share", 0, 1)
    number(min_share, "min_share", 0, 1)
    number(beta, "beta", 0, above=True)
    if normalise is not None:
        flag(normalise, "normalise")


def _weights(costs: Mapping[str, MapCost], elements_share: float) -> dict[str, float]:
    """Between the share of the work that each map costs and, with ``elements_share`` 1, that of elements."""
    if elements_share == 0:
        return {n: c.share for n, c in costs.items()}
    e, elements = elements_share, sum(c.elements for c in costs.values())
    return {n: (1 - e) * c.share + e * c.elements / elements for n, c in costs.items()}


def _strength(value: float, name: str = "alpha") -> float:
    return number(value, name, 0)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _compile_anew() -> None:
    """What torch.compile made before knows nothing of a penalty that came, or went, since."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
