"""What the passes share: readers of values, replacing and dropping nodes."""

from __future__ import annotations

from actzip.runtime import graph as g


def uses(graph: g.Graph) -> dict[str, int]:
    """value -> number of readers, being an output of the graph counted as one."""
    n = dict.fromkeys(graph.values, 0)
    for node in graph.nodes:
        for v in node.inputs:
            n[v] += 1
    for v in graph.outputs:
        n[v] += 1
    return n


def replace_reads(graph: g.Graph, old: str, new: str) -> None:
    """In place: readers of ``old`` read ``new``."""
    for node in graph.nodes:
        if old in node.inputs:
            node.inputs = tuple(new if v == old else v for v in node.inputs)
    graph.outputs = [new if v == old else v for v in graph.outputs]


def prune(graph: g.Graph) -> None:
    """In place: values that no node, input, output or constant has any more go."""
    used = set(graph.inputs) | set(graph.outputs)
    for n in graph.nodes:
        used.update(n.inputs)
        used.add(n.output)
    graph.constants = {k: v for k, v in graph.constants.items() if k in used}
    graph.values = {k: v for k, v in graph.values.items() if k in used}


def drop_dead(graph: g.Graph) -> g.Graph:
    """Removes nodes and constants whose values reach no output. Inputs stay."""
    graph = graph.copy()
    live = set(graph.outputs)
    kept: list[g.Node] = []
    for node in reversed(graph.nodes):
        if node.output in live:
            live.update(node.inputs)
            kept.append(node)
    graph.nodes = kept[::-1]
    prune(graph)
    return graph
