"""How every value of a graph is stored: its layout, dense, packed, or some rows at a time."""

from __future__ import annotations

from collections.abc import Mapping

from actzip.runtime import graph as g
from actzip.runtime import ops

__all__ = [
    "banded",
    "can_pack",
    "choose_storage",
    "expects_zeros",
    "is_map",
    "keeps_integers",
    "layouts",
    "packable",
    "projections",
]

#: A map that was filled up with zeros to so many times its size is worth a packed copy.
_FILLED = 1.25
#: Bytes of a map between two convolutions, one of them depthwise, from which on they run by turns.
BAND_PAYS = 2 << 20
#: Channels of an input so few that its convolution costs little more than writing its output.
_FEW = 16


def is_map(shape: g.Shape) -> bool:
    return len(shape) == 4 and all(isinstance(d, int) for d in shape[1:])


def layouts(graph: g.Graph) -> dict[str, str]:
    """value -> "map" or "plain": maps where a map operator writes or reads them, and on from there
    through elementwise ones."""
    kind = dict.fromkeys(graph.values, "plain")
    read_as_maps = {v for n in graph.nodes if n.works_on() == "map" for v in n.inputs}
    copies = [n for n in graph.nodes if isinstance(n, ops.Copy) and n.output in read_as_maps]
    read_as_maps |= {v for n in copies for v in n.inputs}
    for n in graph.nodes:
        layout = n.works_on()
        # channels last are a map as they lie
        turned = isinstance(n, ops.Transpose) and n.perm == (0, 3, 1, 2)
        moved = (turned or isinstance(n, ops.Copy)) and n.output in read_as_maps
        if layout == "map" or (moved and is_map(graph.shape(n.output))):
            kind[n.output] = "map"
        elif layout == "either" and is_map(graph.shape(n.output)):
            kind[n.output] = "map" if any(kind[v] == "map" for v in n.inputs) else "plain"
    return kind


def packable(graph: g.Graph, node: g.Node) -> bool:
    """Whether the engine can write ``node``'s output packed."""
    return node.writes_packed() and is_map(graph.shape(node.output))


def expects_zeros(graph: g.Graph, producers: Mapping[str, g.Node], v: str) -> bool:
    """Whether exact zeros are to be expected in ``v``."""
    p = producers.get(v)
    if p is None:
        return False
    if isinstance(p, ops.Concat):
        return any(expects_zeros(graph, producers, i) for i in p.inputs)
    if isinstance(p, ops.Copy):
        return expects_zeros(graph, producers, p.inputs[0])
    if isinstance(p, (ops.Reshape, ops.Transpose)):
        return _filled_up(graph, producers, v)
    act = getattr(p, "act", None)
    if act is not None:
        return bool(act.sparsifies)
    if isinstance(p, ops.Pool) and p.kind == "max" and p.bias is None:
        return expects_zeros(graph, producers, p.inputs[0])
    return False


def _filled_up(graph: g.Graph, producers: Mapping[str, g.Node], v: str) -> bool:
    """Whether ``v`` is, in another order, what was filled up with zeros to a fixed length."""
    p = producers.get(v)
    while isinstance(p, (ops.Reshape, ops.Transpose, ops.Pad)):
        (x,) = p.inputs
        if isinstance(p, ops.Pad) and p.mode == "constant" and p.value == 0:
            before, after = g.numel(graph.shape(x)), g.numel(graph.shape(p.output))
            if before[1] == after[1] and after[0] >= _FILLED * before[0]:
                return True
        p = producers.get(x)
    return False


def can_pack(graph: g.Graph, value: str) -> bool:
    """Whether ``value`` may be stored packed: every writer can write it so, and every reader can
    read it so."""
    if value in graph.inputs or value in graph.constants or value in graph.outputs:
        return False
    producers = graph.producers()
    p = producers.get(value)
    if p is None or not packable(graph, p):
        return False
    for c in graph.nodes:
        if value not in c.inputs:
            continue
        if not c.reads_packed and not (isinstance(c, ops.Concat) and graph.values[value].place is not None):
            return False
    if isinstance(p, ops.Concat):
        return all(can_pack(graph, v) for v in p.inputs)
    return True


def keeps_integers(graph: g.Graph, name: str) -> bool:
    """Whether all that is written into a value is quantized, so that it is stored as integers once
    it is packed."""
    return _quantized(graph, graph.producers(), name)


def _quantized(graph: g.Graph, producers: Mapping[str, g.Node], v: str) -> bool:
    p = producers.get(v)
    if isinstance(p, ops.Concat):
        return all(_quantized(graph, producers, i) for i in p.inputs)
    if isinstance(p, ops.Pool) and p.kind == "max":
        return _quantized(graph, producers, p.inputs[0])
    return graph.values[v].quant is not None


def banded(graph: g.Graph) -> set[str]:
    """Values that one convolution writes and one pool, or depthwise convolution, reads, and nothing
    else: they need never be there in whole."""
    producers = graph.producers()
    found = set()
    for v, nodes in graph.consumers().items():
        p, value = producers.get(v), graph.values[v]
        if not isinstance(p, ops.Conv2d) or len(nodes) != 1 or v in graph.outputs or value.place is not None:
            continue
        pool = nodes[0]
        if isinstance(pool, ops.Conv2d) and _expands(graph, p, pool):
            found.add(v)
        if not isinstance(pool, ops.Pool):
            continue
        # integers: the greatest of them is the integer of the greatest, but something has to round it
        rounded = value.quant is None or (
            pool.kind == "max" and graph.values[pool.output].storage == "packed"
        )
        if rounded and pool.bias is None and pool.act is None and p.groups == 1 and packable(graph, p):
            found.add(v)
    return found


def _expands(graph: g.Graph, p: ops.Conv2d, depthwise: ops.Conv2d) -> bool:
    """Whether ``p`` is a 1x1 convolution, or one of few channels, to a map beyond the caches, and
    ``depthwise`` the depthwise one that reads it."""
    value = graph.values[p.output]
    channels = p.weight.shape[0]
    if not is_map(value.shape) or value.quant is not None or p.pre_act is not None or p.groups != 1:
        return False
    count, _ = g.numel(value.shape[1:])
    return (
        4 * count > BAND_PAYS
        and (p.weight.shape[2:] == (1, 1) or p.weight.shape[1] < _FEW)
        and channels == depthwise.groups == depthwise.weight.shape[0]
        and len(depthwise.inputs) == 1
        and depthwise.pre_act is None
    )


def projections(graph: g.Graph) -> dict[str, ops.Conv2d]:
    """What depthwise convolutions write that run by turns with the one before them -> the 1x1 convolution
    that alone reads it, where the three may run by turns: it is dense, beyond the caches, and a residual
    is there before them."""
    when = {n.output: i for i, n in enumerate(graph.nodes)}
    producers = graph.producers()
    readers = graph.consumers()
    found: dict[str, ops.Conv2d] = {}
    for n in graph.nodes:
        value = graph.values[n.output]
        if not isinstance(n, ops.Conv2d) or graph.values[n.inputs[0]].storage != "band":
            continue
        last = readers[n.output]
        begin = producers[n.inputs[0]]
        if (
            len(last) == 1
            and isinstance(last[0], ops.Conv2d)
            and last[0].inputs[0] == n.output
            and _one_tap(last[0])
            and graph.values[last[0].output].storage != "band"  # it begins with another
            and len(begin.inputs) == 1
            and all(when.get(v, -1) < when[begin.output] for v in last[0].inputs[1:])
            and n.output not in graph.outputs
            and value.storage == "dense"
            and value.place is None
            and 4 * g.numel(value.shape[1:])[0] > BAND_PAYS
        ):
            found[n.output] = last[0]
    return found


def _one_tap(n: ops.Conv2d) -> bool:
    """Whether a convolution reads one pixel for each that it writes."""
    return (
        n.weight.shape[2:] == n.stride == (1, 1)
        and not any(n.padding)
        and n.groups == 1
        and n.pre_act is None
    )


def choose_storage(graph: g.Graph, dense: frozenset[str] | set[str] = frozenset()) -> g.Graph:
    """Sets ``Value.storage``: packed where zeros are expected, the engine can, and nobody said
    ``dense``; band between a convolution and a pool.

    What is placed in one Concat is stored alike. Maps that only pools and the like read are packed
    where they are quantized, or where ``meta["pack"]`` is ``always``.
    """
    graph = graph.copy()
    producers = graph.producers()
    groups: dict[str, list[str]] = {}
    for v in graph.values:
        groups.setdefault(g.root_of(graph, v)[0], []).append(v)
    for root, members in groups.items():
        read = any(isinstance(n, ops.Conv2d) and set(n.inputs) & set(members) for n in graph.nodes)
        quantized = any(graph.values[v].quant is not None for v in members)  # only packed maps are rounded
        ok = (
            (read or quantized or graph.meta.get("pack") == "always")
            and not any(v in dense for v in members)
            and all(can_pack(graph, v) for v in members)
            and expects_zeros(graph, producers, root)
        )
        for v in members:
            graph.values[v].storage = "packed" if ok else "dense"
    for v in banded(graph):
        graph.values[v].storage = "band"
    return graph
