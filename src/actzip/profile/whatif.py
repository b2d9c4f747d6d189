"""What if the ReLUs had thresholds: density and effective MACs against the change of the output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, count_macs, eval_mode, threshold_activation
from actzip.profile.collect import Collection
from actzip.training.batches import arguments, batch_size, first_of

__all__ = ["what_if"]


def what_if(
    model: nn.Module,
    batches: Iterable[Any],
    collection: Collection,
    *,
    keep: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    max_images: int = 8,
) -> dict[str, Any]:
    """Runs ``model`` with every ReLU thresholded so that a share of its non-zeros is kept, and
    compares outputs.

    Thresholds come from the histograms of ``collection`` (one a map, at the same share of non-zeros
    in every map: FATReLU of Kurtz et al., ICML 2020, without any calibration of which map bears it
    best; ``sparsify`` does better). Nothing of the model is changed.

    Returns:
        ``{"images": n, "points": [...]}``, a point for each share: ``kept``, ``density`` (of all ReLU maps),
        ``theoretical_speedup``, ``output_change`` (L2 of the change / L2 of the output) and
        ``top1_agreement`` (share of rows whose largest output stays the same; None where outputs are
        not rows of scores).
    """
    inputs, images = _first(model, batches, max_images)
    sparse = {name: s for name, s in collection.maps.items() if s.site.sparse and s.nonzeros}
    if not inputs or not sparse:
        return {"images": images, "points": []}
    points = []
    reference: list[Tensor] = []
    with eval_mode(model), torch.no_grad():
        for share in keep:
            cuts = {n: s.threshold_for(share * s.density) if share < 1 else 0.0 for n, s in sparse.items()}
            counts = _Counts(cuts)
            with ActivationTap(model, counts.cut, counts.compute):
                outputs = [_scores(model(*args, **kwargs)) for args, kwargs in inputs]
            reference = reference or outputs
            points.append(
                {
                    "kept": share,
                    "density": counts.nonzeros / max(1, counts.elements),
                    "theoretical_speedup": counts.macs / counts.effective if counts.effective else None,
                    "output_change": _change(reference, outputs),
                    "top1_agreement": _agreement(reference, outputs),
                }
            )
    return {"images": images, "points": points}


Inputs = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _first(model: nn.Module, batches: Iterable[Any], most: int) -> tuple[Inputs, int]:
    """The arguments of the model for the first ``most`` images, and how many these are."""
    inputs: Inputs = []
    images = 0
    for batch in batches:
        if images >= most:
            break
        args, kwargs = arguments(model, batch)
        # a model that was exported for a fixed batch takes no part of one
        left = getattr(model, "batch", None) or most - images
        args, kwargs = first_of(args, kwargs, left)
        images += batch_size(args, kwargs)
        inputs.append((args, kwargs))
    return inputs, images


class _Counts:
    """Thresholds the maps of a pass, and counts what is left of them and of the work."""

    def __init__(self, thresholds: dict[str, float]) -> None:
        self.thresholds = thresholds
        self.nonzeros = self.elements = self.macs = self.effective = 0

    def cut(self, site: Site, y: Tensor) -> Tensor | None:
        t = self.thresholds.get(site.name)
        if t is None:
            return None
        y = threshold_activation(y, t) if t > 0 else y
        self.nonzeros += int(torch.count_nonzero(y))
        self.elements += y.numel()
        return y

    def compute(self, site: Site, call: ComputeCall) -> None:
        macs, _, effective = count_macs(call)
        self.macs += macs
        self.effective += effective


def _scores(output: Any) -> Tensor:
    """The first floating-point tensor in an output of any structure."""
    stack = [output]
    while stack:
        item = stack.pop(0)
        if isinstance(item, Tensor):
            if item.is_floating_point():
                return item.detach().float().clone()
        elif isinstance(item, dict):
            stack = [*item.values(), *stack]
        elif isinstance(item, (tuple, list)):
            stack = [*item, *stack]
        elif hasattr(item, "logits"):
            stack.insert(0, item.logits)
    return torch.zeros(0)


def _change(reference: list[Tensor], outputs: list[Tensor]) -> float | None:
    difference = sum(float(((a - b) ** 2).sum()) for a, b in zip(reference, outputs) if a.shape == b.shape)
    size = sum(float((a**2).sum()) for a in reference)
    return (difference / size) ** 0.5 if size > 0 else None


def _agreement(reference: list[Tensor], outputs: list[Tensor]) -> float | None:
    same = total = 0
    for a, b in zip(reference, outputs):
        if a.dim() != 2 or a.shape != b.shape or a.shape[1] < 2:
            return None
        same += int((a.argmax(1) == b.argmax(1)).sum())
        total += int(a.shape[0])
    return same / total if total else None
