"""What an activation or computation site is, what it is called, and how sites are chosen."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Union

from torch import Tensor, nn

from actzip.checks import shown
from actzip.errors import InputError, LayerError

__all__ = [
    "ROOT",
    "ComputeCall",
    "Selector",
    "Site",
    "as_selectors",
    "check_names",
    "matches",
    "select_sites",
]

#: Name of the root module in site names.
ROOT = "(model)"

Selector = Union[str, type[nn.Module]]


@dataclass(frozen=True)
class Site:
    """One activation or computation call of a forward pass: its name, kind and the module that runs it.

    Attributes:
        name: see "Names of sites" in the module's documentation.
        kind: ``relu``, ``relu6`` (clipped to [0, 6] or any [0, hi]), ``threshold``, or for
            activations that are not zero for half of their inputs their own name (``silu``,
            ``gelu``, ``leaky_relu`` ...); for computations ``conv1d`` .. ``conv3d``,
            ``conv_transpose1d`` .. ``conv_transpose3d`` or ``linear``.
        module: path of the innermost module (``""`` for the root).
        module_type: class name of that module.
        high: upper clip value (``relu6``), else None.
    """

    name: str
    kind: str
    module: str
    module_type: str
    high: float | None = field(default=None, compare=False)

    @property
    def sparse(self) -> bool:
        """True for activations that give exact zeros and can be made sparser (ReLU and its kin)."""
        return self.kind in ("relu", "relu6", "threshold")


@dataclass(frozen=True)
class ComputeCall:
    """The operands of one convolution or linear call, normalised.

    Attributes:
        input: ``N, C, *spatial`` (convolutions, batch dimension always there) or ``..., features`` (linear).
        weight: as the operator has it: ``OC, IC / groups, *kernel`` (transposed:
            ``IC, OC / groups, *kernel``), or ``out, in``.
        stride, padding, dilation, output_padding: one int a spatial dimension; ``padding`` holds
            (before, after).
        groups: number of groups.
        transposed: a transposed convolution.
    """

    input: Tensor
    weight: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False


def matches(site: Site, module: nn.Module | None, selector: Selector) -> bool:
    if isinstance(selector, str):
        if selector.startswith("re:"):
            return re.fullmatch(selector[3:], site.name) is not None
        if selector.startswith("type:"):
            return site.module_type == selector[5:]
        return site.name == selector or fnmatch.fnmatchcase(site.name, selector)
    return module is not None and isinstance(module, selector)


def as_selectors(selectors: Selector | Iterable[Selector] | None) -> list[Selector] | None:
    if selectors is None:
        return None
    try:
        chosen: list[Selector] = [selectors] if isinstance(selectors, (str, type)) else list(selectors)
    except (TypeError, RuntimeError):
        raise InputError(
            f"layers are chosen by a selector or a list of them, not {shown(selectors)}"
        ) from None
    for s in chosen:
        if isinstance(s, str):
            if s.startswith("re:"):
                try:
                    re.compile(s[3:])
                except re.error as error:
                    raise InputError(f"layer selector {s!r} is not a regular expression: {error}") from error
        elif not (isinstance(s, type) and issubclass(s, nn.Module)):
            raise InputError(
                f"a layer selector is a name, a glob, 're:...', 'type:...' or a module type, not {shown(s)}"
            )
    return chosen


def check_names(selectors: list[Selector] | None, sites: Iterable[Site]) -> None:
    names = [s.name for s in sites]
    for s in selectors or ():
        if not isinstance(s, str) or s.startswith(("re:", "type:")) or any(c in s for c in "*?["):
            continue
        if s not in names:
            near = difflib.get_close_matches(s, names, n=3, cutoff=0.4)
            hint = f"; near matches: {', '.join(near)}" if near else f"; there are {len(names)} sites"
            raise LayerError(f"the model has no layer {s!r}{hint}")


def select_sites(
    sites: Iterable[Site],
    model: nn.Module | None = None,
    layers: Selector | Iterable[Selector] | None = None,
    ignore: Selector | Iterable[Selector] | None = None,
) -> list[Site]:
    """The sites that ``layers`` names (all where it is None) and ``ignore`` does not.

    Raises:
        LayerError: a plain name in ``layers`` or ``ignore`` that no site has; the message names near matches.
        InputError: a selector that is neither a name, a pattern nor a module type.
    """
    all_sites = list(sites)
    modules = dict(model.named_modules()) if model is not None else {}
    wanted, unwanted = as_selectors(layers), as_selectors(ignore)
    check_names(wanted, all_sites)
    check_names(unwanted, all_sites)

    def keep(site: Site) -> bool:
        module = modules.get(site.module)
        if any(matches(site, module, s) for s in unwanted or ()):
            return False
        return wanted is None or any(matches(site, module, s) for s in wanted)

    return [s for s in all_sites if keep(s)]
