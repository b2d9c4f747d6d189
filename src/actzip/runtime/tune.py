"""Choosing storages and kernels by measurement: densities from calibration, then short trials in
the plan itself.

A trial runs the whole plan with some assignment of kernel variants to layers and takes every
layer's own time from it, so that all layers are tried at once and each with the cache contents that
it meets in use. Winners go to the tuning cache under a key that says all that matters to the time:
shape, storages, density (in steps of 0.05), threads, batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip.runtime import ops

if TYPE_CHECKING:
    import torch

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.cache import TuningCache
from actzip.runtime.lower import Lowered, lower
from actzip.runtime.storage import choose_storage, keeps_integers
from actzip.runtime.winograd import TOLERANCE, errors, is_winograd

__all__ = ["Tuned", "tune"]

_REPEATS = 3
_MARGIN = 0.98  # another storage or kernel must be this much quicker than the simpler choice


@dataclass
class Tuned:
    """What was decided: the graph with storages and densities set, variant and reason of every
    convolution."""

    graph: g.Graph
    variants: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    trials: int = 0


class _Bench:
    """Runs plans on the calibration batch."""

    def __init__(
        self, graph: g.Graph, inputs: Sequence[np.ndarray[Any, Any]], batch: int, threads: int
    ) -> None:
        self.inputs = [np.asarray(a, np.float32, order="C") for a in inputs]
        self.batch, self.threads = batch, threads
        self.outputs = [np.empty(g.concrete(graph.shape(v), batch), np.float32) for v in graph.outputs]
        self.trials = 0

    def times(self, low: Lowered, repeats: int = _REPEATS) -> dict[str, float]:
        """Seconds of every graph node, the least of ``repeats`` runs."""
        best: dict[str, float] = {}
        for r in range(repeats + 1):
            rows = low.plan.profile(self.batch, self.inputs, self.outputs, self.threads)
            if r == 0:
                continue  # first touch of the memory
            once: dict[str, float] = {}
            for owner, row in zip(low.nodes, rows, strict=True):
                once[owner] = once.get(owner, 0.0) + row[4]
            for k, t in once.items():
                best[k] = min(best.get(k, t), t)
        self.trials += repeats
        return best

    def densities(self, low: Lowered, graph: g.Graph) -> dict[str, float]:
        d = low.plan.densities(self.batch, self.inputs, self.outputs, self.threads)
        return {v: d[i] for v, i in low.values.items() if d[i] >= 0}


def _key(graph: g.Graph, n: ops.Conv2d, threads: int, batch: int, names: Sequence[str]) -> str:
    x, y = graph.values[n.inputs[0]], graph.values[n.output]
    density = 1.0 if x.density is None or x.storage == "dense" else round(x.density * 20) / 20
    residual = graph.values[n.inputs[1]].storage if len(n.inputs) > 1 else ""
    what = [
        "conv",
        *map(int, n.weight.shape),
        n.groups,
        *n.stride,
        *n.padding,
        *n.dilation,
        *map(str, x.shape[2:]),
        x.storage,
        y.storage,
        residual,
        "" if n.act is None else n.act.kind,
        density,
        threads,
        batch,
        _parts(graph, n.inputs[0]),
        *names,
    ]
    return json.dumps(what)


def _parts(graph: g.Graph, v: str) -> list[int]:
    """Where blocks begin matters only through the channels of what is joined."""
    p = graph.producers().get(v)
    if not isinstance(p, ops.Concat):
        return []
    return [int(graph.shape(i)[1]) for i in p.inputs]  # type: ignore[arg-type]


#: Node -> the Winograd kernels that are exact enough for it, and their errors.
Exact = dict[str, dict[str, float]]


def _try_variants(
    graph: g.Graph, bench: _Bench, cache: TuningCache | None, exact: Exact
) -> tuple[dict[str, str], dict[str, float], dict[str, float]]:
    """Best variant of every convolution of ``graph`` as stored, its time, and the time of every
    other node."""
    base = lower(graph, want_variants=True)
    convs = [n for n in graph.nodes if isinstance(n, ops.Conv2d)]
    options: dict[str, list[str]] = {}
    keys: dict[str, str] = {}
    best: dict[str, str] = {}
    cost: dict[str, float] = {}
    for n in convs:
        names = [v for v in base.variants.get(n.name, []) if not is_winograd(v) or v in exact.get(n.name, {})]
        keys[n.name] = _key(graph, n, bench.threads, bench.batch, names)
        found = cache.get(keys[n.name]) if cache is not None else None
        if found and found.get("kernel") in names and isinstance(found.get("seconds"), float):
            best[n.name], cost[n.name] = str(found["kernel"]), float(found["seconds"])
            options[n.name] = [best[n.name]]
        else:
            options[n.name] = names
    rounds = max((len(o) for o in options.values()), default=1)
    others: dict[str, float] = {}
    open_layers = {n.name for n in convs if len(options[n.name]) > 1 or n.name not in cost}
    for r in range(rounds if open_layers else 1):
        chosen = {name: o[r % len(o)] for name, o in options.items() if o}
        low = base if r == 0 and not best else lower(graph, chosen)
        if r == 0 and low is base:
            chosen = {name: o[0] for name, o in options.items() if o}
        times = bench.times(low)
        for name, t in times.items():
            if name not in options:
                others[name] = min(others.get(name, t), t)
            elif name in open_layers and (name not in cost or t < cost[name] * (_MARGIN if r else 1.0)):
                cost[name], best[name] = t, chosen[name]
    if cache is not None:
        for n in convs:
            if n.name in open_layers and n.name in best:
                cache.put(keys[n.name], {"kernel": best[n.name], "seconds": cost[n.name]})
    return best, cost, others


def _free_groups(packed: g.Graph) -> dict[str, list[str]]:
    """Packed values whose storage is to be chosen, those in one memory together, by its root."""
    if packed.meta.get("pack") == "always":
        return {}
    groups: dict[str, list[str]] = {}
    for v, value in packed.values.items():
        if value.storage == "packed":
            groups.setdefault(g.root_of(packed, v)[0], []).append(v)
    return {r: m for r, m in groups.items() if not keeps_integers(packed, r)}


def _by_trials(
    packed: g.Graph,
    plain: g.Graph,
    groups: dict[str, list[str]],
    keep_dense: set[str],
    bench: _Bench,
    cache: TuningCache | None,
    exact: Exact,
) -> tuple[g.Graph, dict[str, str], dict[str, str]]:
    """The quickest of all packed, all dense, and each group as its readers and writers ran quicker;
    kernels; reasons."""
    dense = set(keep_dense)
    why: dict[str, str] = {}
    sv, sc, so = _try_variants(packed, bench, cache, exact)
    dv, dc, do = _try_variants(plain, bench, cache, exact)
    for members in groups.values():
        inside = set(members)
        readers = [n for n in packed.nodes if set(n.inputs) & inside and n.output not in inside]
        writers = [
            n for n in packed.nodes if n.output in inside and not isinstance(n, (ops.Conv2d, ops.Concat))
        ]
        names = {n.name for n in (*readers, *writers)}
        a = sum(sc.get(k, so.get(k, 0.0)) for k in names)
        b = sum(dc.get(k, do.get(k, 0.0)) for k in names)
        if b < a * _MARGIN:
            dense |= inside
    mixed = choose_storage(packed, dense)
    variants, _, _ = _try_variants(mixed, bench, cache, exact)
    for n in mixed.nodes:
        p, q = sc.get(n.name), dc.get(n.name)
        if isinstance(n, ops.Conv2d) and p is not None and q is not None:
            why[n.name] = f"trials: packed {p * 1e3:.3f} ms, dense {q * 1e3:.3f} ms"
    candidates = [(mixed, variants), (packed, sv), (plain, dv)]
    totals = [sum(bench.times(lower(gr, names), 5).values()) for gr, names in candidates]
    return (*candidates[int(np.argmin(totals))], why)


def _by_density(
    packed: g.Graph, groups: dict[str, list[str]], keep_dense: set[str]
) -> tuple[g.Graph, dict[str, str]]:
    """Packed where the calibrated density is at most 0.7; reasons."""
    dense = set(keep_dense)
    for root, members in groups.items():
        share = packed.values[root].density
        if share is not None and share > 0.7:
            dense |= set(members)
    mixed = choose_storage(packed, dense)
    convs = [n for n in mixed.nodes if isinstance(n, ops.Conv2d)]
    stored = {n.name: mixed.values[n.inputs[0]].storage for n in convs}
    return mixed, {name: "density" if s == "packed" else "dense input" for name, s in stored.items()}


def tune(
    graph: g.Graph,
    inputs: Sequence[np.ndarray[Any, Any]],
    batch: int,
    threads: int,
    *,
    cache: TuningCache | None,
    keep_dense: set[str],
    trials: bool = True,
    trial_batch: int | None = None,
    storage: Callable[[g.Graph], g.Graph] | None = None,
    winograd: bool = True,
) -> Tuned:
    """Calibrates on ``inputs`` and chooses a storage for every value and a kernel for every convolution.

    Args:
        inputs: arrays for the graph's inputs with this ``batch``.
        trial_batch: the batch that trials are timed at (None: ``batch``), of the inputs over and over.
        keep_dense: values that must not be packed (non-finite weights read them).
        trials: False: no timing; packed where the calibrated density is below 0.7, the engine's
            first choice of kernel. Either way maps that are stored as integers stay packed (they
            are rounded by that, and smaller at any density), and so does every map where
            ``graph.meta["pack"]`` is ``always``.
        storage: a last rewrite of the storages (quantized values, say), before kernels are chosen.
        winograd: Winograd kernels may be tried, where their error on the first of ``inputs`` is at most
            :data:`~actzip.runtime.winograd.TOLERANCE` of the layer's largest output.
    """
    bench = _Bench(graph, inputs, batch, threads)
    packed = choose_storage(graph, keep_dense)
    densities = bench.densities(lower(packed), packed)
    if trials and trial_batch is not None and trial_batch != batch:
        batch = trial_batch
        shapes = [g.concrete(graph.shape(v), batch) for v in graph.inputs]
        bench = _Bench(graph, [np.resize(a, s) for a, s in zip(inputs, shapes, strict=True)], batch, threads)
    for v, d in densities.items():
        packed.values[v].density = d
    _concat_densities(packed)
    groups = _free_groups(packed)
    plain = choose_storage(packed, {v for members in groups.values() for v in members} | keep_dense)
    why: dict[str, str] = {}
    variants: dict[str, str] = {}
    exact = _exact(graph, inputs, threads) if trials and winograd else {}
    whole = _plan_key(packed, threads, batch, keep_dense, exact) if trials and cache is not None else ""
    found = cache.get(whole) if cache is not None and whole else None
    known = _decision(packed, found) if found else None
    if known is not None:
        dense, variants, why = known
        mixed = choose_storage(packed, dense | keep_dense)
    elif trials:
        mixed, variants, why = _by_trials(packed, plain, groups, keep_dense, bench, cache, exact)
        if cache is not None:
            kept = sorted(
                v
                for v, w in mixed.values.items()
                if w.storage == "dense" and packed.values[v].storage == "packed"
            )
            cache.put(whole, {"dense": kept, "variants": variants, "why": why})
            cache.save()
    else:
        mixed, why = _by_density(packed, groups, keep_dense)
    for n in mixed.nodes:
        if isinstance(n, ops.Conv2d) and n.inputs[0] in keep_dense:
            why[n.name] = "weights that are not finite"
        elif variants.get(n.name, "") in exact.get(n.name, {}):
            why[n.name] = f"{why.get(n.name, 'trials')}; error {exact[n.name][variants[n.name]]:.0e}"
    if storage is not None:
        mixed = storage(mixed)
        variants = {}
    return Tuned(mixed, variants, why, bench.trials)


def _exact(graph: g.Graph, inputs: Sequence[g.Array], threads: int) -> Exact:
    """Measured on the first image of ``inputs``, where the graph takes any batch."""
    low = lower(choose_storage(graph, set(graph.values)), want_variants=True)
    wanted = {name: {v for v in names if is_winograd(v)} for name, names in low.variants.items()}
    grows = all(isinstance(graph.shape(v)[0], g.Sym) for v in graph.inputs)
    arrays = [np.asarray(a[:1] if grows else a, np.float32, order="C") for a in inputs]
    batch = len(arrays[0]) if arrays and arrays[0].ndim else 1
    found = errors(graph, low, wanted, arrays, batch, threads)
    return {n: {k: e for k, e in kernels.items() if e <= TOLERANCE} for n, kernels in found.items()}


def _plan_key(graph: g.Graph, threads: int, batch: int, keep_dense: set[str], exact: Exact) -> str:
    """Stands for the graph's structure, its densities in steps of 0.05, threads, batch and
    what is exact enough."""
    text = [
        str(graph),
        *(f"{v.name}:{v.storage}:{round((v.density or 0) * 20)}" for v in graph.values.values()),
    ]
    text += [str(threads), str(batch), *sorted(keep_dense)]
    text += [f"{name}:{','.join(sorted(kernels))}" for name, kernels in sorted(exact.items())]
    return "plan-" + hashlib.sha256("\n".join(text).encode()).hexdigest()


def _decision(
    graph: g.Graph, entry: dict[str, Any]
) -> tuple[set[str], dict[str, str], dict[str, str]] | None:
    """A cached decision, or None where it does not have the form of one for this graph."""
    dense, variants, why = entry.get("dense"), entry.get("variants"), entry.get("why")
    if not isinstance(dense, list) or not isinstance(variants, dict) or not isinstance(why, dict):
        return None
    names = {n.name for n in graph.nodes}
    if not all(isinstance(v, str) and v in graph.values for v in dense):
        return None
    if not all(k in names and isinstance(v, str) for k, v in variants.items()):
        return None
    try:
        lower(choose_storage(graph, set(dense)), variants)
    except UnsupportedError:
        return None
    return set(dense), dict(variants), {k: str(v) for k, v in why.items()}


def _concat_densities(graph: g.Graph) -> None:
    """In place: the density of a Concat that nothing computes is that of its inputs together."""
    for n in graph.nodes:
        if isinstance(n, ops.Concat) and graph.values[n.output].density is None:
            total, nonzero = 0.0, 0.0
            for v in n.inputs:
                count = float(g.numel(graph.shape(v))[0])
                d = graph.values[v].density
                total += count
                nonzero += count * (1.0 if d is None else d)
            graph.values[n.output].density = nonzero / total if total else None


def nonfinite_parameters(graph: g.Graph) -> list[g.Node]:
    """Nodes with an infinite or NaN parameter: a zero activation skipped there would hide a NaN."""
    bad = []
    for n in graph.nodes:
        for _, v in n.fields():
            if isinstance(v, np.ndarray) and v.dtype.kind == "f" and not np.isfinite(v).all():
                bad.append(n)
                break
    return bad


def calibrate(graph: g.Graph, inputs: dict[str, torch.Tensor]) -> g.Graph:
    """Densities of all maps from one run of the interpreter: ``Value.density`` set in the copy returned.

    Raises:
        InputError: inputs that do not fit.
        UnsupportedError: as :func:`interpret`.
    """
    import torch

    from actzip.runtime.interpret import interpret

    graph = graph.copy()
    wanted = [n.output for n in graph.nodes]
    if not wanted:
        raise UnsupportedError(f"graph {graph.name!r} computes nothing")
    _, kept = interpret(graph, inputs, wanted)
    for v, t in [*kept.items(), *inputs.items()]:
        if v in graph.values and t.numel():
            graph.values[v].density = float(torch.count_nonzero(t)) / t.numel()
    return graph
