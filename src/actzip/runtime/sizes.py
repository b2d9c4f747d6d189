"""A compiled network at other sizes: the same weights, kernels and storages, other shapes.

The graph for a size comes from the model itself (:mod:`actzip.runtime.origin`), so that it does
there what the model does; its weights come from the graph that was compiled. Two graphs of one
origin have the same numbers in a weight where they made it the same way: that is how a weight is
found again. A number that is new at a size is kept if it does not come of a large weight.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.acts import Act
from actzip.runtime.mapped import to_file
from actzip.runtime.ops import Conv2d
from actzip.runtime.origin import Origin, Shapes
from actzip.runtime.passes import optimize
from actzip.runtime.passes.copies import add_copies, add_copy, drop_copies
from actzip.runtime.storage import choose_storage, is_map

__all__ = ["MOST_SIZES", "Resizer", "Sizes", "as_stored", "digest", "owned", "shelved", "unstored"]

#: Sizes beside the compiled one whose plans are kept, the last that were used.
MOST_SIZES = 8
#: Arrays that are worth a place in a file: bytes of one, and of all of them.
_LARGE, _LARGE_TOGETHER = 64 << 10, 8 << 20
_KEPT_META = ("storage", "pack", "winograd", "float32_maps", "call", "example_batch")


M = TypeVar("M")


class Sizes(Generic[M]):
    """What ``make(shapes)`` gave for the sizes that came last, :data:`MOST_SIZES` of them. Safe from
    several threads: one makes, the others go on with what there is."""

    def __init__(
        self,
        make: Callable[[Shapes], M],
        fits: Callable[[M, list[tuple[int, ...]]], bool],
    ) -> None:
        """``fits(model, shapes)``: whether a model takes inputs of these shapes."""
        self._make = make
        self._fits = fits
        self._made: OrderedDict[Any, M] = OrderedDict()
        self._lock, self._making = threading.Lock(), threading.Lock()

    def get(self, shapes: Shapes) -> M:
        """The model for inputs of these shapes.

        Raises:
            InputError, UnsupportedError: as ``make``.
        """
        found = self._find(shapes)
        if found is None:
            with self._making:
                found = self._find(shapes)
                if found is None:
                    found = self._make(shapes)
                    self.put(shapes, found)
        return found

    def _find(self, shapes: Shapes) -> M | None:
        with self._lock:
            for key in (tuple(s[1:] for s in shapes), tuple(shapes)):
                found = self._made.get(key)
                if found is not None and self._fits(found, list(shapes)):
                    self._made.move_to_end(key)
                    return found
        return None

    def put(self, shapes: Shapes, model: M) -> None:
        """Keeps ``model`` for these shapes, in the place of what was kept for them."""
        doubled = [(2 * s[0], *s[1:]) if s else s for s in shapes]
        any_batch = self._fits(model, doubled)
        key = tuple(s[1:] for s in shapes) if any_batch else tuple(shapes)
        with self._lock:
            self._made[key] = model
            self._made.move_to_end(key)
            while len(self._made) > MOST_SIZES:
                self._made.popitem(last=False)

    def all(self) -> list[M]:
        """Those kept, the least recently used first."""
        with self._lock:
            return list(self._made.values())


# -- arrays of a graph, by place


def _walk(value: Any, at: tuple[Any, ...], visit: Callable[[tuple[Any, ...], g.Array], g.Array]) -> Any:
    if isinstance(value, np.ndarray):
        return visit(at, value)
    if isinstance(value, Act):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: _walk(v, (*at, k), visit) for k, v in own.items()})
    if isinstance(value, tuple):
        return tuple(_walk(v, (*at, i), visit) for i, v in enumerate(value))
    return value


def _with_arrays(graph: g.Graph, visit: Callable[[tuple[Any, ...], g.Array], g.Array]) -> g.Graph:
    """``graph`` with what ``visit(place, array)`` gives in the place of every array."""
    graph = graph.copy()
    for n in graph.nodes:
        for name, value in n.fields():
            setattr(n, name, _walk(value, (n.name, name), visit))
    graph.constants = {k: visit(("", k), a) for k, a in graph.constants.items()}
    if "out_slots" in graph.meta:
        slots = enumerate(graph.meta["out_slots"])
        graph.meta["out_slots"] = [_walk_slot(s, i, visit) for i, s in slots]
    return graph


def _walk_slot(slot: Any, i: int, visit: Callable[[tuple[Any, ...], g.Array], g.Array]) -> Any:
    """An output of the model; one that is the same for every input is ``[array]``."""
    constant = not isinstance(slot, int) and isinstance(slot[0], np.ndarray)
    return type(slot)([visit((f"output {i}",), slot[0])]) if constant else slot


def _arrays(graph: g.Graph) -> dict[tuple[Any, ...], g.Array]:
    found: dict[tuple[Any, ...], g.Array] = {}

    def visit(at: tuple[Any, ...], a: g.Array) -> g.Array:
        found[at] = a
        return a

    for n in graph.nodes:
        for name, value in n.fields():
            _walk(value, (n.name, name), visit)
    found.update({("", k): a for k, a in graph.constants.items()})
    for i, slot in enumerate(graph.meta.get("out_slots", ())):
        _walk_slot(slot, i, visit)
    return found


def owned(graph: g.Graph, foreign: list[tuple[int, int]]) -> g.Graph:
    """``graph`` with copies of the arrays that lie in memory (first byte, bytes) of somebody else, who
    may write there."""

    copies: dict[int, g.Array] = {}  # an array that stands in two places stays one

    def own(_: tuple[Any, ...], a: g.Array) -> g.Array:
        at = a.__array_interface__["data"][0]
        if not any(p <= at < p + n for p, n in foreign):
            return a
        if id(a) not in copies:
            copies[id(a)] = a.copy()
        return copies[id(a)]

    return _with_arrays(graph, own)


def shelved(*graphs: g.Graph) -> list[g.Graph]:
    """``graphs`` with their large arrays in a file (:func:`~actzip.runtime.mapped.to_file`): kernels
    read weights in an order of their own, and these are there for other sizes, files and CPUs."""
    found = {id(a): a for graph in graphs for a in _arrays(graph).values() if a.nbytes >= _LARGE}
    if sum(a.nbytes for a in found.values()) < _LARGE_TOGETHER:
        return list(graphs)
    there = dict(zip(found, to_file(list(found.values())), strict=True))
    return [_with_arrays(graph, lambda _, a: there.get(id(a), a)) for graph in graphs]


def digest(a: g.Array) -> tuple[Any, ...]:
    """Shape, type and a hash of an array's numbers."""
    data = np.ascontiguousarray(a)
    return (a.shape, str(a.dtype), hashlib.sha256(data.reshape(-1).view(np.uint8).data).digest())


# -- names


def _said(graph: g.Graph) -> str:
    """The graph in words, values and nodes by number: equal for two that differ in names alone."""
    number = {v: f"%{i}" for i, v in enumerate([*graph.inputs, *(n.output for n in graph.nodes)])}
    constants = {v: f"c{g.show(a)}" for v, a in graph.constants.items()}
    lines = [str([graph.values[v].shape for v in graph.inputs])]
    for n in graph.nodes:
        copy = dataclasses.replace(n, name="", source="")
        copy.inputs = tuple(number.get(v) or constants[v] for v in n.inputs)
        copy.output = ""
        lines.append(str(copy))
    return "\n".join([*lines, str([number.get(v) for v in graph.outputs])])


def _renamed(graph: g.Graph, values: dict[str, str], nodes: dict[str, str]) -> g.Graph:
    """``graph`` with other names; those that are not in the tables get one that is in none."""
    values, nodes = dict(values), dict(nodes)
    taken, taken_nodes = set(values.values()), set(nodes.values())
    for v in graph.values:
        if v not in values:
            values[v] = v if v not in taken else f"{v}:own"
    for n in graph.nodes:
        if n.name not in nodes:
            nodes[n.name] = n.name if n.name not in taken_nodes else f"{n.name}:own"
    out = graph.copy()
    out.values = {}
    for v, value in graph.values.items():
        place = value.place and (values[value.place[0]], value.place[1])
        out.values[values[v]] = dataclasses.replace(value, name=values[v], place=place)
    for n in out.nodes:
        n.name, n.output = nodes[n.name], values[n.output]
        n.inputs = tuple(values[v] for v in n.inputs)
    out.constants = {values[v]: a for v, a in graph.constants.items()}
    out.inputs = [values[v] for v in graph.inputs]
    out.outputs = [values[v] for v in graph.outputs]
    return out


# -- storages


def as_stored(graph: g.Graph, like: g.Graph, keep_dense: set[str]) -> g.Graph:
    """``graph`` with the storages and densities of ``like``, its values by name."""
    graph = add_copies(graph, keep_dense)
    dense = set(keep_dense)
    copies = {n.output for n in graph.nodes if n.op == "copy"}
    for v, value in graph.values.items():
        known = like.values.get(v)
        if known is not None:
            value.density = known.density
        if (known is None and v in copies) or (known is not None and known.storage == "dense"):
            dense.add(v)
    return _alike(drop_copies(choose_storage(graph, dense)), like)


def unstored(graph: g.Graph) -> g.Graph:
    """``graph`` before storages were chosen."""
    graph = graph.copy()
    for value in graph.values.values():
        value.storage = "dense"
    return drop_copies(graph)


def _alike(graph: g.Graph, like: g.Graph) -> g.Graph:
    """``graph`` with a packed copy for every convolution that reads a packed map in ``like`` and a
    dense one here, so that its weights are packed in one order."""
    before = {n.name: n for n in like.nodes if isinstance(n, Conv2d)}
    for n in list(graph.nodes):
        was = before.get(n.name)
        if not isinstance(n, Conv2d) or was is None or n.inputs[0] in (*graph.inputs, *graph.constants):
            continue
        source = like.values[was.inputs[0]]
        here = graph.values[n.inputs[0]]
        if source.storage == "packed" and here.storage == "dense" and is_map(here.shape):
            copy = add_copy(graph, n.inputs[0], [n])
            copy.storage, copy.density = "packed", source.density
    return graph


@dataclass
class _Base:
    """The graph of the compiled size as the origin gives it: names, and what its arrays are."""

    values: dict[str, str]
    nodes: dict[str, str]
    digests: dict[tuple[Any, ...], tuple[Any, ...]]


class Resizer:
    """Makes a compiled graph's like for other sizes.

    Args:
        origin: where the graph came from.
        plain: the optimised graph, storages not chosen.
        shapes: of its inputs.
        passes: what made ``plain`` of the origin's graph.
    """

    def __init__(self, origin: Origin, plain: g.Graph, shapes: Shapes, passes: g.Pass = optimize) -> None:
        self.origin = origin
        self.plain = plain
        self.passes = passes
        self.shapes = [tuple(s) for s in shapes]
        self._base: _Base | None = None
        self._lock = threading.RLock()  # an origin makes one graph at a time

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def at(self, shapes: Shapes) -> g.Graph:
        """The graph for inputs of these shapes, storages not chosen.

        Raises:
            InputError, UnsupportedError: the size does not fit the model.
        """
        base, ours = self._known(), _arrays(self.plain)
        fresh: list[tuple[Any, ...]] = []
        packed = {n.name for n in self.plain.nodes if hasattr(n, "weight")}  # by name, for all sizes

        def put(at: tuple[Any, ...], a: g.Array) -> g.Array:
            if base.digests.get(at) == digest(a):
                return ours[at]
            if at[0] in packed and at in base.digests:
                raise UnsupportedError(f"the weights of {at[0]!r} are other ones at this size")
            fresh.append(at)
            return a

        graph = _with_arrays(self.outline(shapes), put)
        if fresh:
            self._check(fresh, graph, _renamed(self._made(shapes, 1), base.values, base.nodes))
        meta = self.plain.meta
        graph.meta.update({k: meta[k] for k in _KEPT_META if k in meta})
        if "batches" in meta:
            graph.meta.setdefault("batches", meta["batches"])
        return graph

    def outline(self, shapes: Shapes, *, quick: bool = False) -> g.Graph:
        """:meth:`at` with patterns in the place of large weights; ``quick``: only where that is a
        matter of a moment.

        Raises:
            InputError, UnsupportedError: the size does not fit the model.
        """
        base = self._known()
        return _renamed(self._made(shapes, 0, quick), base.values, base.nodes)

    def _made(self, shapes: Shapes, seed: int, quick: bool = False) -> g.Graph:
        # no name for the graph before the passes: its arrays go with the first of them
        return self.passes(self._raw(shapes, seed, quick))

    def _raw(self, shapes: Shapes, seed: int, quick: bool) -> g.Graph:
        with self._lock:
            graph = self.origin.graph(shapes, seed, quick=quick)
        meta = self.plain.meta
        graph.meta.update({k: meta[k] for k in ("storage", "pack", "winograd") if k in meta})
        return graph

    def _known(self) -> _Base:
        if self._base is None:
            made, plain = self._made(self.shapes, 0), self.plain
            while _said(made) != _said(plain):
                if not self.origin.simpler():
                    raise UnsupportedError("the model does not give the same network a second time")
                made = self._made(self.shapes, 0)
            values = dict(zip(made.inputs, plain.inputs, strict=True))
            nodes = {}
            for a, b in zip(made.nodes, plain.nodes, strict=True):
                values[a.output], nodes[a.name] = b.output, b.name
                values.update({v: w for v, w in zip(a.inputs, b.inputs, strict=True) if v in made.constants})
            found = _arrays(_renamed(made, values, nodes))
            ours = _arrays(self.plain)
            digests = {k: digest(a) for k, a in found.items() if k in ours and ours[k].shape == a.shape}
            self._base = _Base(values, nodes, digests)
        return self._base

    def _check(self, fresh: list[tuple[Any, ...]], graph: g.Graph, other: g.Graph) -> None:
        """
        Raises:
            UnsupportedError: numbers of this size alone come of a weight that is not kept.
        """
        mine, others = _arrays(graph), _arrays(other)
        for at in fresh:
            if at not in others or digest(mine[at]) != digest(others[at]):
                raise UnsupportedError(f"the weights of {at[0] or at[1]!r} are other ones at this size")
