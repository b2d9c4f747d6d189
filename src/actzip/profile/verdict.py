"""Whether a network has anything to gain from its zeros, in one line: the start of every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from actzip.activations import find_sites
from actzip.profile.cost import CostModel
from actzip.profile.work import measure_work

__all__ = ["Verdict", "quick_look", "verdict_of"]

#: Predicted speed-ups from which zeros pay, and from which there is something.
PAYS, SOME = 1.2, 1.05


@dataclass(frozen=True)
class Verdict:
    """Anything to gain?

    Attributes:
        line: the verdict, a sentence or two.
        density: of all ReLU outputs; theoretical_speedup: MACs / MACs that meet a non-zero.
        predicted_speedup: predicted time of the layers, were no zero skipped, over that with zeros
            skipped; None where no time is predicted.
        predicted_ms: of the layers, with zeros skipped.
        relus: activations that can give exact zeros; others: those that cannot.
    """

    line: str
    density: float
    theoretical_speedup: float
    predicted_speedup: float | None
    predicted_ms: float | None
    relus: int
    others: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dict(self.__dict__)


def quick_look(model: nn.Module, batches: list[Any], threads: int) -> Verdict:
    """The verdict on ``model`` from a few inputs, in seconds: nothing is compiled.

    Args:
        batches: inputs (N, C, H, W), a tuple where there are several; one or two batches.
        threads: of the engine.
    """
    first = batches[0]
    one = isinstance(first, Tensor) and getattr(model, "batch", None) is None
    sites = find_sites(model, first[:1] if one else first)[0]
    relus = sum(s.sparse for s in sites)
    work = measure_work(model, batches, CostModel.quick(threads))
    gain = work.dense_ms / work.ms if work.ms and work.dense_ms else None
    line = _line(work.density, work.theoretical_speedup, gain, relus)
    return Verdict(line, work.density, work.theoretical_speedup, gain, work.ms, relus, len(sites) - relus)


def verdict_of(report: Mapping[str, Any]) -> str:
    """The verdict on a report's network, from its totals and the what-if of the cost model."""
    totals = report["totals"]
    relus = sum(bool(m["can_be_sparse"]) for m in report["maps"])
    engine = report.get("engine") or {}
    dense = next((p["predicted_ms"] for p in engine.get("imposed") or () if p["density"] == 1.0), None)
    now = engine.get("predicted_ms")
    return _line(
        totals.get("density") or 1.0,
        totals.get("theoretical_speedup") or 1.0,
        dense / now if dense and now else None,
        relus,
    )


def _line(density: float, theoretical: float, predicted: float | None, relus: int) -> str:
    told = f"density {density:.2f}, theoretical speed-up {theoretical:.2f}x"
    if predicted is not None:
        told += f", predicted {predicted:.2f}x against no zeros skipped"
    if not relus:
        return f"Nothing to gain from zeros: no activation gives exact zeros ({told})."
    if predicted is None:
        return f"Zeros: {told}."
    if predicted >= PAYS:
        return f"Zeros pay here: {told}. `actzip accelerate` makes more of them, without training."
    if predicted >= SOME:
        return f"Zeros pay a little: {told}. `actzip accelerate` makes more of them, without training."
    return (
        f"Zeros gain next to nothing as they are: {told}. `actzip accelerate` may make enough of them; "
        "where it cannot, another engine is as quick."
    )
