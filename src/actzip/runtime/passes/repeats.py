"""Pixels repeated by hand, as nearest interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead
from actzip.runtime.passes.moves import TO_FIRST, TO_LAST, merge_moves

_SIGNAL = (0, 2, 1)


def repeats_as_resizes(graph: g.Graph) -> g.Graph:
    """A dimension of 1 behind height, width or length that is expanded and then joined with it, as
    exporters write ``repeat`` and nearest upsampling, becomes a Resize; one behind another one."""
    graph = graph.copy()
    producers = graph.producers()
    readers: dict[str, list[g.Node]] = graph.consumers()
    names = {n.name for n in graph.nodes}
    nodes: list[g.Node] = []
    for node in graph.nodes:
        found = _found(graph, node, producers, readers) if isinstance(node, ops.Reshape) else None
        if found is None:
            nodes.append(node)
            continue
        made = _Steps(graph, node, names)
        made.resize(found, producers)
        nodes += made.nodes
        producers |= {n.output: n for n in made.nodes}
    graph.nodes = nodes
    return _joined(merge_moves(graph))


@dataclass
class _Repeat:
    """Elements of ``value`` in ``shape``, each ``factors`` times along each dimension, then permuted."""

    value: str
    shape: g.Shape
    factors: tuple[int, ...]
    perm: tuple[int, ...]


def _found(
    graph: g.Graph, last: g.Node, producers: Mapping[str, g.Node], readers: Mapping[str, list[g.Node]]
) -> _Repeat | None:
    """What a reshape ends, where that is an expansion of dimensions behind those that it joins them with."""

    def alone(v: str) -> bool:
        return len(readers.get(v, ())) == 1 and v not in graph.outputs

    at = producers.get(last.inputs[0])
    perm: tuple[int, ...] | None = None
    if isinstance(at, ops.Transpose) and alone(at.output):
        perm, at = at.perm, producers.get(at.inputs[0])
    if not isinstance(at, ops.Expand) or not alone(at.output):
        return None
    before, after = graph.shape(at.inputs[0]), graph.shape(at.output)
    if len(before) != len(after) or graph.values[at.output].dtype != "float32":
        return None
    new = [k for k, (d, e) in enumerate(zip(before, after, strict=True)) if not g.same_shape((d,), (e,))]
    if not new or any(k == 0 or k - 1 in new or not isinstance(after[k], int) for k in new):
        return None
    perm = perm or tuple(range(len(after)))
    if any(perm[perm.index(k) - 1] != k - 1 or perm.index(k) == 0 for k in new):
        return None
    kept = [k for k in range(len(after)) if k not in new]
    factors = [int(after[k + 1]) if k + 1 in new else 1 for k in kept]  # type: ignore[arg-type]
    found = _Repeat(
        at.inputs[0],
        tuple(before[k] for k in kept),
        tuple(factors),
        tuple(kept.index(k) for k in perm if k not in new),
    )
    made = tuple(_times(found.shape[k], factors[k]) for k in found.perm)
    source = producers.get(found.value)
    if isinstance(source, ops.Reshape) and g.same_shape(graph.shape(source.inputs[0]), found.shape):
        found.value = source.inputs[0]
    return found if g.same_shape(_long(made), _long(graph.shape(last.output))) and _axes(found) else None


def _long(shape: g.Shape) -> g.Shape:
    return tuple(d for d in shape if d != 1)


def _times(d: g.Dim, n: int) -> g.Dim:
    return g.Sym(d.mul * n) if isinstance(d, g.Sym) else d * n


def _axes(r: _Repeat) -> tuple[int, ...]:
    """The dimensions that are repeated, where a Resize can: of a signal (N, C, L) or (N, L, C), or of
    maps; else none."""
    axes = tuple(k for k, n in enumerate(r.factors) if n > 1)
    rank, sizes = len(r.shape), r.shape[1:]
    if any(isinstance(d, g.Sym) for d in sizes):
        return ()
    fits = axes in ((1,), (2,)) if rank == 3 else rank == 4 and axes in ((1,), (2,), (3,), (1, 2), (2, 3))
    return axes if fits else ()


class _Steps:
    """The nodes that take the place of one; the last gives its value."""

    def __init__(self, graph: g.Graph, replaced: g.Node, names: set[str]) -> None:
        self.graph, self.replaced, self.names = graph, replaced, names
        self.nodes: list[g.Node] = []

    def resize(self, r: _Repeat, producers: Mapping[str, g.Node]) -> None:
        axes = _axes(r)
        source = producers.get(r.value)
        first, turn = {3: (_SIGNAL, _SIGNAL), 4: (TO_FIRST, TO_LAST)}[len(r.shape)]
        last = axes[0] == 1 or (
            axes == (2,) and len(r.shape) == 4 and isinstance(source, ops.Transpose) and source.perm == turn
        )
        x, perm, factors = self.reshape(r.value, r.shape), r.perm, r.factors
        if last:
            x, factors = self.transpose(x, first), tuple(factors[k] for k in first)
            perm = tuple(turn[k] for k in perm)
        shape: g.Shape = tuple(map(_times, self.graph.shape(x), factors))
        if len(shape) == 3:
            n, c, length = self.graph.shape(x)
            x = self.reshape(x, (n, c, 1, length))
        out: g.Shape = (*shape[:2], *(1, *shape[2:])[-2:])
        size = (int(out[2]), int(out[3]))  # type: ignore[arg-type]
        x = self.add(ops.Resize("", (x,), "", size=size), out)
        x = self.transpose(self.reshape(x, shape), perm)
        x = self.reshape(x, self.graph.shape(self.replaced.output))
        self.nodes[-1].output = self.replaced.output

    def reshape(self, x: str, shape: g.Shape) -> str:
        if g.same_shape(self.graph.shape(x), shape):
            return x
        return self.add(ops.Reshape("", (x,), "", shape=shape), shape)

    def transpose(self, x: str, perm: tuple[int, ...]) -> str:
        if perm == tuple(range(len(perm))):
            return x
        shape = tuple(self.graph.shape(x)[k] for k in perm)
        return self.add(ops.Transpose("", (x,), "", perm=perm), shape)

    def add(self, node: g.Node, shape: g.Shape) -> str:
        base, at = self.replaced.name, len(self.nodes)
        node.name = base if not at else next(n for k in count(at) if (n := f"{base}:{k}") not in self.names)
        self.names.add(node.name)
        node.source = self.replaced.source
        node.output = self.graph.fresh(f"{self.replaced.output}_{at}")
        self.graph.values[node.output] = g.Value(node.output, shape)
        self.nodes.append(node)
        return node.output


def _joined(graph: g.Graph) -> g.Graph:
    """Whole-numbered nearest interpolations in a row become one."""
    producers = graph.producers()
    readers = graph.consumers()
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, ops.Resize)
            and isinstance(before, ops.Resize)
            and len(readers[before.output]) == 1
            and before.output not in graph.outputs
            and _whole(graph, node)
            and _whole(graph, before)
        ):
            node.inputs, node.scale = before.inputs, None
    return drop_dead(graph)


def _whole(graph: g.Graph, n: ops.Resize) -> bool:
    dims = zip(n.size, graph.shape(n.inputs[0])[2:], strict=True)
    each = [out % d == 0 and out // d for out, d in dims if isinstance(d, int)]
    scaled = n.scale is None or list(map(float, n.scale)) == list(map(float, each))
    return n.mode == "nearest" and n.coordinates == "asymmetric" and len(each) == 2 and all(each) and scaled
