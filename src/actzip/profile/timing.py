"""The engine's time for a model, layer by layer: measured, and predicted by a cost model calibrated on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from actzip.errors import UnsupportedError
from actzip.profile.collect import split_inputs
from actzip.profile.cost import CostModel

__all__ = ["measure_engine"]


def measure_engine(
    model: nn.Module, batch: Any, rows: list[dict[str, Any]], *, threads: int, runs: int = 15
) -> dict[str, Any]:
    """Compiles ``model``, times it at batch 1, and fills ``measured_ms``, ``predicted_ms``, ``kernel``, ``why`` into ``rows``.

    Args:
        batch: a batch of the loader; its first image is used.
        rows: the report's layers; matched by name (a layer that the compiler has merged away keeps None).
        threads: of the engine.

    Returns:
        ``latency_ms`` (median of ``runs`` calls), ``threads``, ``peak_gflops``, ``arena_bytes``, ``advice`` and
        ``layers``, all rows of ``explain()``.

    Raises:
        UnsupportedError, InputError: the engine cannot run this model.
    """
    from actzip.runtime import compile

    args, kwargs = split_inputs(model, batch)
    first = [a[:1] if isinstance(a, Tensor) and a.dim() else a for a in args]
    named = {k: v[:1] if isinstance(v, Tensor) and v.dim() else v for k, v in kwargs.items()}
    if not all(isinstance(v, Tensor) for v in (*first, *named.values())):
        raise UnsupportedError("an input that is no tensor")
    fast = compile(model, named or tuple(first), threads=threads)
    call: Callable[[], Any] = (lambda: fast(**named)) if named else (lambda: fast(*first))
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    explained = fast.explain(runs=max(5, runs // 2)).to_dict()
    cost = CostModel.of_this_machine(threads)
    by_name = {r["name"]: r for r in explained["rows"]}
    for row in rows:
        found = by_name.get(row["name"])
        if found is None:
            continue
        row["measured_ms"] = found["milliseconds"]
        row["kernel"] = found["kernel"] or found["kind"]
        row["why"] = found["why"]
        if row["kind"] == "conv2d":
            row["predicted_ms"] = cost.predict(
                row["input_shape"],
                row["weight_shape"],
                row["stride"],
                row["groups"],
                row["input_density"],
                macs=row["macs"] - row["border_macs"],
                effective_macs=row["effective_macs"],
            )
    return {
        "latency_ms": statistics.median(times),
        "threads": threads,
        "peak_gflops": explained["peak_gflops"],
        "arena_bytes": explained["arena_bytes"],
        "advice": explained["advice"],
        "layers": explained["rows"],
    }
