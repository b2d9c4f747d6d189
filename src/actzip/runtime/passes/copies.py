"""Packed copies of dense maps with zeros in them, for the convolutions that read them."""

from __future__ import annotations

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import prune
from actzip.runtime.storage import choose_storage, expects_zeros, is_map

__all__ = ["add_copies", "add_copy", "drop_copies"]


def add_copies(graph: g.Graph, keep_dense: set[str]) -> g.Graph:
    """A :class:`~actzip.runtime.ops.Copy` behind every map that must stay dense (a concatenation with
    dense maps, an addition or an output reads it too) although zeros are expected in it, for the
    convolutions that read it.

    A copy that is stored dense in the end costs nothing; :func:`drop_copies` takes it out again.
    """
    stored = choose_storage(graph, keep_dense)
    producers = stored.producers()
    graph = graph.copy()
    for v, value in stored.values.items():
        if value.storage != "dense" or v in keep_dense or v in graph.inputs or v in graph.constants:
            continue
        if not is_map(value.shape) or value.quant is not None or not expects_zeros(stored, producers, v):
            continue
        readers = [
            n
            for n in graph.nodes
            if isinstance(n, ops.Conv2d) and n.inputs[0] == v and (n.groups == 1 or n.weight.shape[1] >= 16)
        ]
        if readers:
            add_copy(graph, v, readers)
    return graph


def add_copy(graph: g.Graph, v: str, readers: list[ops.Conv2d]) -> g.Value:
    """In place: a copy of ``v`` that ``readers`` read in its stead."""
    name = graph.fresh(f"{v}:packed")
    value = graph.values[v]
    copy = graph.values[name] = g.Value(name, value.shape, value.dtype, density=value.density)
    for n in readers:
        n.inputs = (name, *n.inputs[1:])
    at = next(i for i, n in enumerate(graph.nodes) if n.output == v)
    graph.nodes.insert(at + 1, ops.Copy(name, (v,), name))
    return copy


def drop_copies(graph: g.Graph) -> g.Graph:
    """Without the copies that are stored dense."""
    graph = graph.copy()
    gone = {
        n.output: n.inputs[0]
        for n in graph.nodes
        if isinstance(n, ops.Copy) and graph.values[n.output].storage == "dense"
    }
    graph.nodes = [n for n in graph.nodes if n.output not in gone]
    for n in graph.nodes:
        n.inputs = tuple(gone.get(v, v) for v in n.inputs)
    prune(graph)
    return graph
