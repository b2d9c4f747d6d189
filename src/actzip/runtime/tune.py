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
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actzip import heap
from actzip._native import _engine
from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.cache import TuningCache
from actzip.runtime.lower import Lowered, lower
from actzip.runtime.passes.copies import add_copies, drop_copies
from actzip.runtime.storage import choose_storage, keeps_integers
from actzip.runtime.winograd import (
    TOLERANCE,
    errors,
    is_winograd,
    likely_cost,
    places,
    read_maps,
    tile_size,
    transforms,
    weights_share,
)

__all__ = ["Tuned", "tune"]

_REPEATS = 3
_ENOUGH = 0.15  # seconds of a run, or of runs together, that say what one takes
QUICK = 8.0  # seconds of trials that ``tune=True`` spends, beside one of each storage
_MARGIN = 0.98  # another storage or kernel must be this much quicker than the simpler choice
_WORTH = 0.96  # more weights must make a layer this much quicker
_LARGE = 0.25  # of the largest map: what an arena's size hangs on
_FAR = 0.9  # whole plans: one whose nodes take longer than that would have it is no candidate
_ALIKE = 0.99  # whole plans: the one with less memory is taken
_CLOSE, _SMALLER = 0.985, 0.8  # the one with an arena that is so much smaller


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
        self.last = 0.0  # seconds of the last run

    def times(self, low: Lowered, repeats: int = _REPEATS) -> dict[str, float]:
        """Seconds of every graph node, the least of ``repeats`` runs: of fewer, and without one that
        touches the memory first, where a run takes so long that neither shows."""
        best: dict[str, float] = {}
        repeats = max(1, min(repeats, round(_ENOUGH / max(self.last, 1e-9))))
        first = 0 if self.last < _ENOUGH else 1
        for r in range(first, repeats + 1):
            rows = low.plan.profile(self.batch, self.inputs, self.outputs, self.threads)
            self.last = sum(row[4] for row in rows)
            if r == 0:
                continue
            once: dict[str, float] = {}
            for owner, row in zip(low.nodes, rows, strict=True):
                once[owner] = once.get(owner, 0.0) + row[4]
            for k, t in once.items():
                best[k] = min(best.get(k, t), t)
        self.trials += repeats
        return best

    def arena_bytes(self, low: Lowered) -> int:
        return int(low.plan.arena_bytes(self.batch, self.threads))

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
        *([] if n.pre_act is None else [n.pre_act.kind]),
    ]
    return json.dumps(what)


def _parts(graph: g.Graph, v: str) -> list[int]:
    """Where blocks begin matters only through the channels of what is joined."""
    p = graph.producers().get(v)
    if not isinstance(p, ops.Concat):
        return []
    return [int(graph.shape(i)[1]) for i in p.inputs]  # type: ignore[arg-type]


#: ``done, all, layer``: a display of trials.
Progress = Callable[[int, int, str], None]
#: Node -> the Winograd kernels that are exact enough for it, and their errors.
Exact = dict[str, dict[str, float]]


def _promising(graph: g.Graph, n: ops.Conv2d, names: Sequence[str], exact: Mapping[str, float]) -> list[str]:
    """The engine's first choice, then the Winograd kernels that are exact enough, then the others."""
    direct = [v for v in names if not transforms(v)]
    h, w = (int(d) for d in graph.shape(n.output)[2:])  # type: ignore[arg-type]
    tiles = sorted((v for v in names if v in exact), key=lambda v: likely_cost(n, h, w, v))
    return [*direct[:1], *tiles, *direct[1:]]


class _Search:
    """The quickest variant of every convolution of ``graph`` as stored, a whole plan a step.

    Layers with one key (the same shape, storages and density) are one question: in a step each of them
    tries another variant.
    """

    def __init__(self, graph: g.Graph, bench: _Bench, cache: TuningCache | None, exact: Exact) -> None:
        self.graph, self.bench, self.cache = graph, bench, cache
        variants = lower(graph, want_variants=True, three=False).variants
        self.keys: dict[str, str] = {}
        self.options: dict[str, list[str]] = {}  # by key
        self.asked: dict[str, ops.Conv2d] = {}  # one layer a key
        self.layers: dict[str, list[str]] = {}  # of one key
        self.tried: dict[str, dict[str, float]] = {}  # key -> variant -> seconds
        self.others: dict[str, float] = {}  # seconds of what is no convolution
        self.step_no = 0
        for n in graph.nodes:
            if not isinstance(n, ops.Conv2d):
                continue
            names = _promising(graph, n, variants.get(n.name, []), exact.get(n.name, {}))
            key = _key(graph, n, bench.threads, bench.batch, names)
            self.keys[n.name] = key
            self.layers.setdefault(key, []).append(n.name)
            self.options[key] = names
            self.asked[key] = n
            self._recall(key)

    def _recall(self, key: str) -> None:
        found = self.cache.get(key) if self.cache is not None else None
        if found and found.get("kernel") in self.options[key] and isinstance(found.get("seconds"), float):
            self.options[key] = [str(found["kernel"])]
            self.tried[key] = {str(found["kernel"]): float(found["seconds"])}

    def learn(self, other: _Search) -> None:
        """Takes over what ``other`` tried for the same questions."""
        for key, tried in other.tried.items():
            if key in self.options:
                mine = self.tried.setdefault(key, {})
                mine.update({v: min(t, mine.get(v, t)) for v, t in tried.items()})

    def open(self, key: str) -> list[str]:
        """Variants still to be tried."""
        tried = self.tried.get(key, {})
        return [v for v in self.options[key] if v not in tried and not self._hopeless(key, v)]

    def _hopeless(self, key: str, variant: str) -> bool:
        """Whether smaller tiles took so long that these would not be the quickest even if their time
        fell as their products do: the weights, of which these have more, come from memory."""
        tried, n = self.tried.get(key, {}), self.asked[key]
        if not is_winograd(variant) or not tried:
            return False
        h, w = (int(d) for d in self.graph.shape(n.output)[2:])  # type: ignore[arg-type]
        mine, least = places(n, h, w, tile_size(variant)), min(tried.values())
        return any(
            t * mine > least * places(n, h, w, tile_size(v))
            for v, t in tried.items()
            if is_winograd(v) and tile_size(v) < tile_size(variant)
        )

    @property
    def left(self) -> int:
        """Steps until every variant was tried; the first is due in any case."""
        most = max((-(-len(self.open(k)) // len(n)) for k, n in self.layers.items()), default=0)
        return max(most, 0 if self.step_no else 1)

    def slowest(self) -> str:
        """The open layer that takes longest, for a progress display."""
        best = self.costs()
        names = [n for k, layers in self.layers.items() if self.open(k) for n in layers]
        return max(names, key=lambda n: best.get(n, 0.0), default="")

    def step(self) -> None:
        chosen: dict[str, str] = {}
        for key, names in self.layers.items():
            todo = self.open(key)
            for i, name in enumerate(names):
                variant = todo[i] if i < len(todo) else self.best(key)
                if variant:
                    chosen[name] = variant
        low = lower(self.graph, chosen, three=False)
        for name, t in self.bench.times(low).items():
            if name in self.keys:
                tried = self.tried.setdefault(self.keys[name], {})
                if name in chosen:
                    tried[chosen[name]] = min(tried.get(chosen[name], t), t)
            else:
                self.others[name] = min(self.others.get(name, t), t)
        self.step_no += 1

    def quickest(self, key: str) -> str:
        """Of those that were tried; one later in the list has to be quicker by a margin."""
        tried = self.tried.get(key, {})
        found = ""
        for v in self.options[key]:
            if v in tried and (not found or tried[v] < tried[found] * _MARGIN):
                found = v
        return found or next(iter(self.options[key]), "")

    def best(self, key: str) -> str:
        """The quickest, or one with fewer weights that is hardly slower."""
        tried, found = self.tried.get(key, {}), self.quickest(key)
        close = [v for v in tried if v in self.options[key] and tried[v] * _WORTH <= tried.get(found, 0.0)]
        return min([found, *close], key=weights_share)

    def notes(self) -> dict[str, str]:
        """Layers that do not take the quickest kernel, and why."""
        found = {}
        for name, key in self.keys.items():
            best, quickest = self.best(key), self.quickest(key)
            if best != quickest:
                more = weights_share(quickest) / weights_share(best)
                found[name] = f"{quickest} was hardly quicker, with {more:.1f} times the weights"
        return found

    def decides_as(self, other: _Search) -> bool:
        """Whether both came to one plan."""
        mine, theirs = ({v: w.storage for v, w in s.graph.values.items()} for s in (self, other))
        return mine == theirs and self.variants() == other.variants()

    def variants(self) -> dict[str, str]:
        return {n: v for n, k in self.keys.items() if (v := self.best(k))}

    def costs(self) -> dict[str, float]:
        """Seconds of every node by its best variant."""
        found = dict(self.others)
        for n, k in self.keys.items():
            if (t := self.tried.get(k, {}).get(self.best(k))) is not None:
                found[n] = t
        return found

    def remember(self) -> None:
        if self.cache is None:
            return
        for key in self.layers:
            if not self.open(key) and key in self.tried and (v := self.best(key)):
                self.cache.put(key, {"kernel": v, "seconds": self.tried[key][v]})


def _search(searches: Sequence[_Search], seconds: float, progress: Progress | None) -> None:
    """Steps of ``searches`` in turn, one of each in any case, until all was tried or ``seconds`` are over."""
    end = time.monotonic() + seconds
    total = sum(s.left for s in searches)
    done = 0
    while any(s.left for s in searches):
        for s in searches:
            if not s.left or (s.step_no and time.monotonic() > end):
                continue
            if progress is not None:
                progress(done, total, s.slowest())
            s.step()
            done += 1
        if time.monotonic() > end:
            break
    for s in searches:
        s.remember()


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
    search: Callable[[g.Graph], _Search],
    run: Callable[[Sequence[_Search]], None],
) -> tuple[g.Graph, dict[str, str], dict[str, str]]:
    """The quickest of all packed, all dense, each group as its readers ran quicker, the same without
    those that cost their writers more, and that with the large maps packed; kernels; reasons."""
    dense = set(keep_dense)
    why: dict[str, str] = {}
    first = [search(packed), search(plain)]
    run(first)
    sc, dc = first[0].costs(), first[1].costs()
    for members in groups.values():
        inside = set(members)
        readers = [n for n in packed.nodes if set(n.inputs) & inside and n.output not in inside]
        writers = [
            n for n in packed.nodes if n.output in inside and not isinstance(n, (ops.Conv2d, ops.Concat))
        ]
        names = {n.name for n in (*readers, *writers)}
        if sum(dc.get(k, 0.0) for k in names) < sum(sc.get(k, 0.0) for k in names) * _MARGIN:
            dense |= inside
    last = search(choose_storage(packed, dense))
    for s in first:
        last.learn(s)
    run([last])
    searches = [last, *first]
    unpaid = _unpaid(last.graph, groups, last.costs(), dc)
    if unpaid:
        searches.insert(0, search(choose_storage(packed, dense | unpaid)))
        for s in searches[1:]:
            searches[0].learn(s)
        run(searches[:1])
    small = choose_storage(packed, keep_dense | _little(searches[0].graph, groups))
    if small.values != searches[0].graph.values:
        searches.insert(0, search(small))
        for s in searches[1:]:
            searches[0].learn(s)
        run(searches[:1])
    for n in last.graph.nodes:
        p, q = sc.get(n.name), dc.get(n.name)
        if isinstance(n, ops.Conv2d) and p is not None and q is not None:
            why[n.name] = f"trials: packed {p * 1e3:.3f} ms, dense {q * 1e3:.3f} ms"
    for s in searches:  # one answer to one question, and so one copy of its weights
        for other in searches:
            s.learn(other)
    chosen = _quickest(searches)
    for name, note in chosen.notes().items():
        why[name] = f"{why.get(name, 'trials')}; {note}"
    return chosen.graph, chosen.variants(), why


def _little(graph: g.Graph, groups: Mapping[str, Sequence[str]]) -> set[str]:
    """Values that are dense in ``graph`` and no reason for a large arena."""
    sizes = {v: g.numel(graph.shape(v))[0] for members in groups.values() for v in members}
    largest = max(sizes.values(), default=0)
    return {v for v, n in sizes.items() if n < _LARGE * largest and graph.values[v].storage == "dense"}


def _unpaid(
    graph: g.Graph,
    groups: Mapping[str, Sequence[str]],
    costs: Mapping[str, float],
    plain: Mapping[str, float],
) -> set[str]:
    """Packed values whose writers and readers together took longer than with everything dense
    (``plain``): packing cost more than it spared. Only where nothing else that these nodes touch is
    packed, so that the difference is this value's."""
    found: set[str] = set()
    for members in groups.values():
        inside = set(members)
        nodes = [n for n in graph.nodes if inside & {*n.inputs, n.output}]
        touched = {v for n in nodes for v in (*n.inputs, n.output)}
        if {v for v in touched if graph.values[v].storage == "packed"} != inside:
            continue
        names = [n.name for n in nodes if n.name in costs and n.name in plain]
        if sum(plain[k] for k in names) < sum(costs[k] for k in names) * _MARGIN:
            found |= inside
    return found


def _quickest(searches: Sequence[_Search]) -> _Search:
    """Whose plan is the quickest: each against the best before it, so that two are there at a time; what
    they have in common is packed once. Those whose nodes took much longer one by one are not asked."""
    store = _engine.WeightStore()
    expected = {id(s): sum(s.costs().values()) for s in searches}
    least = min(expected.values())
    best, *others = [s for s in searches if expected[id(s)] * _FAR <= least]
    plan = lower(best.graph, best.variants(), store=store)
    for other in others:
        if other.decides_as(best):
            continue
        plans = [plan, lower(other.graph, other.variants(), store=store)]
        if _quicker(best.bench, plans):
            best = other
            plan = plans[1]
        del plans
        store.drop_idle()
    return best


def _quicker(bench: _Bench, plans: Sequence[Lowered], rounds: int = 3) -> int:
    """Which plan's nodes take least together, each by the least of its times, the plans by turns; of
    those that hardly differ the one with the least memory, or one that needs a much smaller arena."""
    least: list[dict[str, float]] = [{} for _ in plans]
    for _ in range(rounds):
        for found, low in zip(least, plans, strict=True):
            for k, t in bench.times(low).items():
                found[k] = min(found.get(k, t), t)
    times = [sum(found.values()) for found in least]
    arenas = [bench.arena_bytes(low) for low in plans]
    memory = [low.plan.weight_bytes() + arena for low, arena in zip(plans, arenas, strict=True)]
    quickest = min(times)
    best = min((i for i, t in enumerate(times) if t * _ALIKE <= quickest), key=memory.__getitem__)
    small = min((i for i, t in enumerate(times) if t * _CLOSE <= quickest), key=arenas.__getitem__)
    return small if arenas[small] <= _SMALLER * arenas[best] else best


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
    trials: bool | str | float = True,
    trial_batch: int | None = None,
    storage: Callable[[g.Graph], g.Graph] | None = None,
    winograd: bool = True,
    progress: Progress | None = None,
) -> Tuned:
    """Calibrates on ``inputs`` and chooses a storage for every value and a kernel for every convolution.

    Args:
        inputs: arrays for the graph's inputs with this ``batch``.
        trial_batch: the batch that trials are timed at (None: ``batch``), of the inputs over and over.
        keep_dense: values that must not be packed (non-finite weights read them).
        trials: True: for :data:`QUICK` seconds, the likely best kernels first; a number: for so many
            seconds; ``thorough``: until every kernel was tried that may win; False: no timing; packed
            where the calibrated density is below 0.7, the engine's first choice of kernel. Either way maps
            that are stored as integers stay packed (they are rounded by that, and smaller at any
            density), and so does every map where ``graph.meta["pack"]`` is ``always``.
        storage: a last rewrite of the storages (quantized values, say), before kernels are chosen.
        winograd: Winograd kernels may be tried, where their error on the first of ``inputs`` is at most
            :data:`~actzip.runtime.winograd.TOLERANCE` of the layer's largest output.
        progress: called with the trials done, their number, and a layer whose kernel is being looked for.
    """
    bench = _Bench(graph, inputs, batch, threads)
    graph = add_copies(graph, keep_dense)
    packed = choose_storage(graph, keep_dense)
    densities = bench.densities(lower(packed, three=False), packed)
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
    whole = (
        _plan_key(packed, threads, batch, keep_dense, exact, trials) if trials and cache is not None else ""
    )
    found = cache.get(whole) if cache is not None and whole else None
    known = _decision(packed, found) if found else None
    if known is not None:
        dense, variants, why = known
        mixed = choose_storage(packed, dense | keep_dense)
    elif trials:
        seconds = math.inf if trials == "thorough" else QUICK if trials is True else float(trials)
        mixed, variants, why = _by_trials(
            packed,
            plain,
            groups,
            keep_dense,
            lambda gr: _Search(gr, bench, cache, exact),
            lambda searches: _search(searches, seconds * len(searches) / 3, progress),
        )
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
    mixed = drop_copies(mixed)
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
    low = lower(choose_storage(graph, set(graph.values)), want_variants=True, three=False)
    wanted = {name: {v for v in names if transforms(v)} for name, names in low.variants.items()}
    grows = all(isinstance(graph.shape(v)[0], g.Sym) for v in graph.inputs)
    arrays = [np.asarray(a[:1] if grows else a, np.float32, order="C") for a in inputs]
    batch = len(arrays[0]) if arrays and arrays[0].ndim else 1
    maps = read_maps(graph, low, wanted, arrays, batch, threads)
    del low  # and its weights
    measured = errors(graph, wanted, maps, threads)
    del maps
    heap.give_back()
    return {n: {k: e for k, e in kernels.items() if e <= TOLERANCE} for n, kernels in measured.items()}


def _plan_key(
    graph: g.Graph,
    threads: int,
    batch: int,
    keep_dense: set[str],
    exact: Exact,
    trials: bool | str | float,
) -> str:
    """Stands for the graph's structure, its densities in steps of 0.05, threads, batch and
    what is exact enough."""
    text = [
        str(graph),
        *(f"{v.name}:{v.storage}:{round((v.density or 0) * 20)}" for v in graph.values.values()),
    ]
    text += [str(threads), str(batch), str(trials), *sorted(keep_dense)]
    text += [f"{name}:{','.join(sorted(kernels))}" for name, kernels in sorted(exact.items())]
    return "plan-small-" + hashlib.sha256("\n".join(text).encode()).hexdigest()


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
