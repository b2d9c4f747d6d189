"""Predicted and measured time of a model in the engine, layer by layer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from actzip.errors import UnsupportedError
from actzip.profile.cost import Conv, CostModel, areas_of, elements, is_light, is_small
from actzip.runtime.winograd import is_winograd, tile_size
from actzip.training.batches import arguments

__all__ = ["IMPOSED", "impose", "measure_engine", "predict_nodes"]

#: Densities of the what-if with imposed density.
IMPOSED = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


def measure_engine(
    model: nn.Module,
    batch: Any,
    rows: list[dict[str, Any]],
    *,
    threads: int,
    runs: int = 15,
    cost: CostModel | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compiles ``model``, times it at batch 1, and fills ``measured_ms``, ``predicted_ms``,
    ``kernel``, ``why`` into ``rows``.

    Args:
        batch: a batch of the loader; its first image is used.
        rows: the report's layers; matched by name (a layer that the compiler has merged away keeps None).
        threads: of the engine.
        cost: the cost model; this machine's where it is None (calibrated the first time, which
            ``on_step`` follows).

    Returns:
        ``latency_ms`` (median of ``runs`` calls), ``predicted_ms`` (the cost model's, of the whole network),
        ``threads``, ``peak_gflops``, ``arena_bytes``, ``advice``, ``layers`` (all rows of
            ``explain()``, each with
        ``predicted_ms``) and ``imposed`` (:func:`impose`).

    Raises:
        UnsupportedError, InputError: the engine cannot run this model.
    """
    from actzip.runtime import compile
    from actzip.runtime.models import GraphNet

    args, kwargs = arguments(model, batch)
    least = getattr(model, "batch", None) or 1  # a model exported with a fixed batch
    first = [a[:least] if isinstance(a, Tensor) and a.dim() else a for a in args]
    named = {k: v[:least] if isinstance(v, Tensor) and v.dim() else v for k, v in kwargs.items()}
    if not all(isinstance(v, Tensor) for v in (*first, *named.values())):
        raise UnsupportedError("an input that is no tensor")
    fast = compile(model, named or tuple(first), threads=threads, parts=False)
    call: Callable[[], Any] = (lambda: fast(**named)) if named else (lambda: fast(*first))
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    explained = fast.explain(runs=max(5, runs // 2)).to_dict()
    cost = cost or CostModel.of_this_machine(threads, on_step=on_step)
    nodes = predict_nodes(fast.graph, explained["rows"], cost)
    by_name = {r["name"]: r for r in explained["rows"]}
    names = model.names if isinstance(model, GraphNet) else {}
    for row in rows:
        found = by_name.get(names.get(row["module"], row["name"]))
        if found is None:
            continue
        row["measured_ms"] = found["milliseconds"]
        row["predicted_ms"] = found["predicted_ms"]
        row["kernel"] = found["kernel"] or found["kind"]
        row["why"] = found["why"]
    return {
        "latency_ms": statistics.median(times),
        "predicted_ms": cost.predict_call(
            sum(r["predicted_ms"] for r in explained["rows"]), small=any(n["size"]["small"] for n in nodes)
        ),
        "threads": threads,
        "batch": least,
        "peak_gflops": explained["peak_gflops"],
        "arena_bytes": explained["arena_bytes"],
        "advice": explained["advice"],
        "layers": explained["rows"],
        "imposed": impose(nodes, cost),
    }


def predict_nodes(graph: Any, rows: list[dict[str, Any]], cost: CostModel) -> list[dict[str, Any]]:
    """Sets ``predicted_ms`` in the engine's rows; gives what :func:`impose` needs, a dict a node."""
    from actzip.runtime import graph as g
    from actzip.runtime.lower import choose_storage

    stored = choose_storage(graph)
    sizes = elements(graph)
    nodes = {n.name: n for n in graph.nodes}
    geometry = {n.name: _geometry(graph, n) for n in graph.nodes}
    convs = [c for c in geometry.values() if c is not None]
    size = {"small": is_small(convs), "light": is_light(convs)}
    pools = {n.inputs[0]: n for n in graph.nodes if isinstance(n, g.Pool)}
    out = []
    for row in rows:
        n = nodes.get(row["name"])
        conv = geometry.get(row["name"])
        entry: dict[str, Any] = {"name": row["name"], "conv": conv, "size": size, "pool": 0.0}
        row["predicted_kernel"] = ""
        if n is None or conv is None:
            row["predicted_ms"] = entry["ms"] = cost.predict_other(row["op"], sizes.get(row["name"], 0.0))
        else:
            value = n.inputs[0]
            entry["packed"] = stored.values[value].storage == "packed"
            entry["density"] = 1.0 if row["density"] is None else row["density"]
            entry["inside"] = row["macs"]
            entry["areas"] = _areas(row)
            kinds = cost.kinds(conv, entry["density"], packed=entry["packed"], areas=entry["areas"], **size)
            row["predicted_kernel"] = min(kinds, key=kinds.__getitem__)
            if row["output_storage"] == "band" and n.output in pools:  # the pool's time is this row's
                pool = pools[n.output]
                entry["pool"] = cost.predict_other(pool.op, sizes.get(pool.name, 0.0))
            row["predicted_ms"] = kinds[row["predicted_kernel"]] + entry["pool"]
        out.append(entry)
    return out


def _areas(row: dict[str, Any]) -> float:
    """How scattered the zeros of a layer's input are, where its tiles are counted."""
    if row["tile_density"] is None or row["density"] is None:
        return 1.0
    size = tile_size(row["kernel"]) if is_winograd(row["kernel"]) else 4
    return areas_of(row["density"], size, row["tile_density"])


def _geometry(graph: Any, n: Any) -> Conv | None:
    """The shape of a convolution or linear node, None for other nodes and where it depends on the batch."""
    from actzip.runtime import graph as g

    shape, out = graph.shape(n.inputs[0]), graph.shape(n.output)
    if isinstance(n, g.Linear):
        o, i = n.weight.shape
        positions = math.prod(d for d in out[1:-1] if isinstance(d, int))
        return Conv(int(i), int(o), 1, max(1, int(positions)))
    if not isinstance(n, g.Conv2d):
        return None
    kernel = (int(n.weight.shape[2]), int(n.weight.shape[3]))
    return Conv(
        int(shape[1]),
        int(n.weight.shape[0]),
        int(out[2]),
        int(out[3]),
        kernel,
        int(n.stride[0]),
        int(n.groups),
        int(n.dilation[0]),
    )


def impose(
    nodes: Sequence[dict[str, Any]], cost: CostModel, densities: Sequence[float] = IMPOSED
) -> list[dict[str, Any]]:
    """What if every map that can be sparse had this density: predicted time, and MACs over effective MACs.

    Inputs of convolutions that no ReLU makes (the image, sums without one) keep the density that
    they have. Nothing is run: sparser maps than the network's own would need other weights or
    thresholds.

    Returns:
        A dict a density: ``density``, ``predicted_ms``, ``theoretical_speedup``.
    """
    points = []
    for density in densities:
        ms = macs = effective = 0.0
        for n in nodes:
            conv = n["conv"]
            if conv is None:
                ms += n["ms"]
                continue
            d = density if n["packed"] else n["density"]
            ms += cost.predict(conv, d, packed=n["packed"], areas=n["areas"], **n["size"]) + n["pool"]
            macs += conv.macs
            effective += d * n["inside"]
        points.append(
            {
                "density": density,
                "predicted_ms": cost.predict_call(ms, small=any(n["size"]["small"] for n in nodes)),
                "theoretical_speedup": macs / effective if effective else None,
            }
        )
    return points
