"""Thresholded ReLUs: 0 if x <= T else x, in any model, beside its ``state_dict``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations.sites import Site, check_names
from actzip.activations.tap import ActivationTap, find_sites
from actzip.checks import number, shown
from actzip.errors import DataError, InputError, LayerError
from actzip.files import read_json

__all__ = [
    "clear_thresholds",
    "get_thresholds",
    "load_thresholds",
    "set_thresholds",
    "threshold_activation",
    "without_thresholds",
]


class _Keep(torch.autograd.Function):
    """``y`` where ``y > t``, else 0, in vectorised passes: ``where`` over a broadcast mask takes
    ten times as long."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        # the sign of a rounded difference is that of the comparison, and threshold_backward keeps y
        # beside a NaN
        kept = torch.ops.aten.threshold_backward(y, y - t, 0)
        ctx.save_for_backward(kept)
        return kept  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.ops.aten.threshold_backward(grads[0], ctx.saved_tensors[0], 0), None


def threshold_activation(y: Tensor, threshold: float | Tensor) -> Tensor:
    """0 where ``y <= threshold``, else ``y`` (FATReLU: Kurtz et al., ICML 2020, section 3).

    NaN stays NaN, as through ``torch.relu`` and ``torch.nn.Threshold``: a broken input shows in the output.

    Args:
        y: output of a ReLU, ``N, C, *``.
        threshold: one number, or one a channel (shape ``C``; dimension 1 of ``y``).
    """
    if isinstance(threshold, Tensor) and threshold.dim() == 1:
        threshold = threshold.to(y.dtype).reshape(1, -1, *([1] * (y.dim() - 2)))
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        if not traced and y.requires_grad and torch.is_grad_enabled():
            return _Keep.apply(y, threshold)  # type: ignore[no-any-return,no-untyped-call]
        if not traced:  # the same without a graph
            return torch.ops.aten.threshold_backward(y, y - threshold, 0)  # type: ignore[no-any-return]
    return torch.where(y <= threshold, torch.zeros((), dtype=y.dtype, device=y.device), y)


class _Thresholds:
    """What a thresholded model carries: a permanent tap whose thresholds are looked up at each call."""

    def __init__(self, values: dict[str, float | Tensor]) -> None:
        self.values = values

    def __call__(self, site: Site, y: Tensor) -> Tensor | None:
        t = self.values.get(site.name)
        return None if t is None else threshold_activation(y, t)


def set_thresholds(model: nn.Module, thresholds: dict[str, float | Tensor], example: Any = None) -> nn.Module:
    """Makes the named ReLUs of ``model`` thresholded ones, in place: 0 if x <= T else x.

    The model's ``state_dict`` and class stay as they are: the thresholds are kept beside it in
    ``model._actzip_thresholds`` (a dict from site name to a float, or a tensor with one a channel)
    and are applied at every forward pass. Calling it again replaces them; :func:`clear_thresholds`
    removes them.

    Args:
        example: an input; where it is given the names are checked against the sites that it meets.

    Raises:
        InputError: a threshold is negative or not finite.
        LayerError: ``example`` is given and does not meet a named site, or the site is not a ReLU.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, not {shown(model)}")
    if not isinstance(thresholds, Mapping) or not all(isinstance(n, str) for n in thresholds):
        raise InputError(f"thresholds must be a mapping from names of sites, not {shown(thresholds)}")
    values: dict[str, float | Tensor] = {}
    for name, t in thresholds.items():
        if isinstance(t, Tensor):
            if t.dim() > 1 or not t.numel() or t.is_meta or t.is_complex() or t.layout != torch.strided:
                raise InputError(
                    f"threshold of {name!r} is a tensor of shape {tuple(t.shape)}, {t.dtype}, on "
                    f"{t.device}; it is one number, or one a channel, with values"
                )
            t = (t.dequantize() if t.is_quantized else t).detach().clone().to(torch.float32)
            bad = not bool(torch.isfinite(t).all()) or bool((t < 0).any())
        else:
            t = number(t, f"threshold of {name!r}", 0)
            bad = False
        if bad:
            raise InputError(f"threshold of {name!r} must be finite and >= 0")
        values[name] = t
    if example is not None:
        sites = {s.name: s for s in find_sites(model, example)[0]}
        check_names(list(values), sites.values())
        for name in values:
            if not sites[name].sparse:
                raise LayerError(
                    f"layer {name!r} is a {sites[name].kind}, which has no zeros; a threshold needs a ReLU"
                )
    clear_thresholds(model)
    if values:
        tap = ActivationTap(model, _Thresholds(values)).attach()
        model._actzip_thresholds = values  # type: ignore[assignment]
        model._actzip_threshold_tap = tap  # type: ignore[assignment]
    return model


def get_thresholds(model: nn.Module) -> dict[str, float | Tensor]:
    """The thresholds of :func:`set_thresholds`, by site name; empty where there are none."""
    return dict(getattr(model, "_actzip_thresholds", {}))


def load_thresholds(path: str | os.PathLike[str]) -> dict[str, float | Tensor]:
    """The thresholds in a JSON file, as ``actzip reproduce`` writes them
    (``NAME.thresholds.json``), for :func:`set_thresholds`.

    Raises:
        DataError: the file cannot be read, is not JSON, or is no object of numbers and lists of numbers.
        InputError: ``path`` is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path must be the path of a JSON file, not {shown(path)}")
    found = read_json(path)
    plain = isinstance(found, dict) and all(
        isinstance(t, (int, float))
        or (isinstance(t, list) and t and all(isinstance(v, (int, float)) for v in t))
        for t in found.values()
    )
    if not plain:
        raise DataError(f"{path}: an object of thresholds is needed, {{site: number or list of numbers}}")
    return {k: torch.tensor(t) if isinstance(t, list) else float(t) for k, t in found.items()}


def clear_thresholds(model: nn.Module) -> None:
    """Makes the ReLUs of ``model`` ordinary ones again."""
    tap = model.__dict__.pop("_actzip_threshold_tap", None)
    if tap is not None:
        tap.detach()
    model.__dict__.pop("_actzip_thresholds", None)


@contextmanager
def without_thresholds(model: nn.Module) -> Iterator[dict[str, float | Tensor]]:
    """The model without its thresholds (and without hooks) inside the block, which is given them as
    a dict."""
    values = get_thresholds(model)
    try:
        clear_thresholds(model)
        yield values
    finally:
        if values:
            set_thresholds(model, values)
