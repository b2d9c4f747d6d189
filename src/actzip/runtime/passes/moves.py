"""Reshapes, transposes and concatenations: merged, sunk, or made to move nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.ops.reduce import ArgMax
from actzip.runtime.ops.volume import Regroup
from actzip.runtime.passes.edit import drop_dead, prune, uses


def merge_moves(graph: g.Graph) -> g.Graph:
    """Reshapes and transposes in a row become one, or none; those that change nothing go, as do slices
    and pads of nothing."""
    graph = graph.copy()
    producers = graph.producers()
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if isinstance(node, ops.Reshape) and isinstance(before, ops.Reshape):
            node.inputs = before.inputs
        elif isinstance(node, ops.Transpose) and isinstance(before, ops.Transpose):
            node.inputs = before.inputs
            node.perm = tuple(before.perm[p] for p in node.perm)
        elif isinstance(node, ops.Transpose):
            # moving dimensions of size 1 only is a reshape
            shape = graph.shape(node.inputs[0])
            moved = [p for p in node.perm if shape[p] != 1]
            if moved == sorted(moved):
                reshape = ops.Reshape(
                    node.name, node.inputs, node.output, shape=graph.shape(node.output), source=node.source
                )
                graph.nodes[i] = reshape
                producers[node.output] = reshape
                if isinstance(before, ops.Reshape):
                    reshape.inputs = before.inputs
    names: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = tuple(names.get(v, v) for v in node.inputs)
        same = g.same_shape(graph.shape(node.inputs[0]), graph.shape(node.output)) if node.inputs else False
        identity = (
            (isinstance(node, ops.Reshape) and same)
            or (isinstance(node, ops.Slice) and same and node.step > 0)
            or (isinstance(node, ops.Transpose) and node.perm == tuple(range(len(node.perm))))
            or (isinstance(node, ops.Pad) and not any(node.before) and not any(node.after))
        )
        if identity and node.output not in graph.outputs:
            names[node.output] = node.inputs[0]
    return drop_dead(graph)


def flatten_linear(graph: g.Graph) -> g.Graph:
    """A linear layer on a flattened map becomes a convolution whose window is the map, then a reshape.

    The engine keeps maps channels last, so that the flattening would move data; and the convolution
    skips zeros.
    """
    graph = graph.copy()
    producers = graph.producers()
    nodes: list[g.Node] = []
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, ops.Linear)
            and len(node.inputs) == 1
            and isinstance(before, ops.Reshape)
            and len(graph.shape(node.inputs[0])) == 2
            and len(graph.shape(before.inputs[0])) == 4
            and graph.shape(before.inputs[0])[0] == graph.shape(node.inputs[0])[0]
        ):
            n, c, h, w = graph.shape(before.inputs[0])
            assert isinstance(c, int) and isinstance(h, int) and isinstance(w, int)
            o = node.weight.shape[0]
            mid = graph.fresh(node.output + "_map")
            graph.values[mid] = g.Value(mid, (n, o, 1, 1))
            weight = node.weight.reshape(o, c, h, w)
            nodes.append(
                ops.Conv2d(
                    node.name,
                    before.inputs,
                    mid,
                    weight=weight,
                    bias=node.bias,
                    act=node.act,
                    source=node.source,
                )
            )
            nodes.append(
                ops.Reshape(node.name + ":reshape", (mid,), node.output, shape=(n, o), source=node.source)
            )
            producers[node.output] = nodes[-1]
            continue
        nodes.append(node)
    graph.nodes = nodes
    return drop_dead(graph)


TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def channels_last(graph: g.Graph) -> g.Graph:
    """What a model computes on maps that it transposed to (N, H, W, C) itself is said on (N, C, H, W).

    Linear layers become 1x1 convolutions, layer norms over C become norms of channels, axes and
    paddings are those of the other order; a transpose moves behind each node until it meets its
    inverse. One to (N, C, H, W) moves in front of what a model does to its input first. (The engine
    stores channels last anyway.)
    """
    graph = graph.copy()
    for move in (_sink_transpose, _raise_transpose):
        for _ in range(len(graph.nodes)):
            if not move(graph):
                break
    return merge_moves(graph)


def tokens_as_maps(graph: g.Graph) -> g.Graph:
    """Tokens (N, H * W, C) that become a map, and maps that become tokens, do so by way of (N, H, W, C).

    As models write it, (N, C, H * W) stands between, so that all is moved twice; channels last, as
    maps are kept, they lie as tokens do.
    """
    graph = graph.copy()
    producers = graph.producers()
    nodes: list[g.Node] = []
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        shape, out = graph.shape(before.inputs[0]) if before is not None else (), graph.shape(node.output)
        middle = graph.shape(node.inputs[0]) if node.inputs else ()
        if _swaps(before) and isinstance(node, ops.Reshape) and len(out) == 4 and out[:2] == middle[:2]:
            nodes += _by_way_of(graph, node, before.inputs[0], (out[0], *out[2:], out[1]), first=True)  # type: ignore[union-attr]
        elif _swaps(node) and isinstance(before, ops.Reshape) and len(shape) == 4 and shape[:2] == middle[:2]:
            nodes += _by_way_of(graph, node, before.inputs[0], (shape[0], *shape[2:], shape[1]), first=False)
        else:
            nodes.append(node)
    graph.nodes = nodes
    return drop_dead(graph)


def _swaps(node: g.Node | None) -> bool:
    return isinstance(node, ops.Transpose) and node.perm == (0, 2, 1)


def _by_way_of(graph: g.Graph, node: g.Node, x: str, shape: g.Shape, first: bool) -> list[g.Node]:
    """``node``'s output of ``x`` by way of (N, H, W, C), ``shape``: a reshape (``first``) and a transpose."""
    v = graph.fresh(node.output + "_last")
    graph.values[v] = g.Value(v, shape)
    ends = (x, v), (v, node.output)
    names = node.name + ":last", node.name
    reshape, transpose = (0, 1) if first else (1, 0)
    to = shape if first else graph.shape(node.output)
    made: list[g.Node] = [node, node]
    made[reshape] = ops.Reshape(
        names[reshape], ends[reshape][:1], ends[reshape][1], shape=to, source=node.source
    )
    made[transpose] = ops.Transpose(
        names[transpose],
        ends[transpose][:1],
        ends[transpose][1],
        perm=TO_FIRST if first else TO_LAST,
        source=node.source,
    )
    return made


def _before_transpose(graph: g.Graph, node: g.Node, source: Callable[[str], str | None]) -> g.Node | None:
    """``node`` as said of (N, C, H, W), where ``source`` knows what its inputs are views of; its
    output is to be set."""
    act = getattr(node, "act", None)
    if act is not None and act.param is not None and act.param.size > 1:
        return None  # one number a channel, of dimension 1
    rank = len(graph.shape(node.inputs[0])) if node.inputs else 0
    found = tuple(s for s in map(source, node.inputs) if s is not None)
    if isinstance(node, ops.Binary):
        if len(graph.shape(node.output)) != 4 or not found:
            return None
        if any(source(v) is None and v not in graph.constants for v in node.inputs):
            return None
        inputs = tuple(source(v) or _channels_first(graph, v) for v in node.inputs)
        return dataclasses.replace(node, inputs=inputs)
    if rank != 4 or len(found) != len(node.inputs):
        return None
    if isinstance(node, ops.Linear):
        weight = node.weight.reshape(*node.weight.shape, 1, 1)
        return ops.Conv2d(node.name, found, "", weight=weight, bias=node.bias, act=act, source=node.source)
    if isinstance(node, ops.LayerNorm):
        alone = len(node.shape) == 1 and not node.channels
        return dataclasses.replace(node, inputs=found, channels=True) if alone else None
    if isinstance(node, ops.Activation):
        return dataclasses.replace(node, inputs=found)
    if isinstance(node, (ops.Concat, ops.Slice, ops.Take, ops.Softmax)):
        return dataclasses.replace(node, inputs=found, axis=TO_LAST[node.axis % 4])
    if isinstance(node, ops.Pad):
        ends = [tuple(side[k] for k in TO_FIRST) for side in (node.before, node.after)]
        return dataclasses.replace(node, inputs=found, before=ends[0], after=ends[1])
    if isinstance(node, (ops.Reduce, ArgMax)):
        return _reduced(node, found)
    return None


def _reduced(node: ops.Reduce | ArgMax, found: tuple[str, ...]) -> g.Node | None:
    axes = [a % 4 for a in (node.axes if isinstance(node, ops.Reduce) else (node.axis,))]
    left = [TO_LAST[k] for k in range(4) if k not in axes]
    if not node.keepdims and left != sorted(left):
        return None
    if isinstance(node, ArgMax):
        return dataclasses.replace(node, inputs=found, axis=TO_LAST[axes[0]])
    return dataclasses.replace(node, inputs=found, axes=tuple(sorted(TO_LAST[a] for a in axes)))


def _channels_first(graph: g.Graph, constant: str) -> str:
    """A constant that broadcasts along (N, H, W, C) as one along (N, C, H, W)."""
    a = graph.constants[constant]
    a = a.reshape([1] * (4 - a.ndim) + list(a.shape)).transpose(TO_FIRST)
    return graph.add_constant(np.ascontiguousarray(a), constant + "_nchw")


def _turned(graph: g.Graph, node: g.Node | None) -> str | None:
    """The maps (N, C, H, W) that ``node`` gives as (N, H, W, C)."""
    if isinstance(node, ops.Transpose):
        return node.inputs[0] if node.perm == TO_LAST else None
    if isinstance(node, ops.Reshape):  # of one pixel, or one channel
        shape, out = graph.shape(node.inputs[0]), graph.shape(node.output)
        if len(shape) == 4 and (shape[1] == 1 or shape[2:] == (1, 1)):
            return node.inputs[0] if g.same_shape(tuple(shape[k] for k in TO_LAST), out) else None
    return None


def _sink_transpose(graph: g.Graph) -> bool:
    """In place: one sweep in which every node that reads (N, H, W, C) views is put before the transpose."""
    producers = graph.producers()

    def source(v: str) -> str | None:
        return _turned(graph, producers.get(v))

    changed = False
    nodes: list[g.Node] = []
    taken = {n.name for n in graph.nodes}
    for node in graph.nodes:
        new = _before_transpose(graph, node, source)
        if new is None:
            nodes.append(node)
            continue
        changed = True
        shape = graph.shape(node.output)
        if len(shape) != 4:
            new.output = node.output
            nodes.append(new)
            continue
        new.output = graph.fresh(node.output + "_nchw")
        graph.values[new.output] = dataclasses.replace(
            graph.values[node.output], name=new.output, shape=tuple(shape[k] for k in TO_FIRST)
        )
        name = g.unused(node.name + ":nhwc", taken)
        back = ops.Transpose(name, (new.output,), node.output, perm=TO_LAST, source=node.source)
        nodes += [new, back]
        producers[new.output], producers[node.output] = new, back
    graph.nodes = nodes
    prune(graph)
    return changed


def _raise_transpose(graph: g.Graph) -> bool:
    """In place: one sweep in which transposes to (N, C, H, W) are put before the node that they
    alone read."""
    producers, readers = graph.producers(), uses(graph)
    nodes: list[g.Node] = []
    changed = False
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        new = None
        if (
            isinstance(node, ops.Transpose)
            and node.perm == TO_FIRST
            and before
            and readers[before.output] == 1
        ):
            given = {v for v in before.inputs if v not in graph.constants}
            v = given.pop() if len(given) == 1 else ""
            if v and len(graph.shape(v)) == 4:
                turned = graph.fresh(v + "_nchw")
                new = _before_transpose(graph, before, {v: turned}.get)
        if new is None or before is None:
            nodes.append(node)
            continue
        changed = True
        shape = tuple(graph.shape(v)[k] for k in TO_FIRST)
        graph.values[turned] = dataclasses.replace(graph.values[v], name=turned, shape=shape)
        first = ops.Transpose(node.name, (v,), turned, perm=TO_FIRST, source=node.source)
        new.output = node.output
        nodes.remove(before)
        nodes += [first, new]
        producers[turned], producers[new.output] = first, new
    graph.nodes = nodes
    prune(graph)
    return changed


def lines_as_maps(graph: g.Graph) -> g.Graph:
    """What a model computes on (N, C, L) views of maps (N, C, 1, L), which convolutions of one
    dimension write, is said of the maps: elementwise nodes, BatchNorm, slices, pads, concatenations.
    Between two convolutions nothing then leaves the maps' layout."""
    graph = graph.copy()
    producers = graph.producers()
    maps: dict[str, str] = {}  # a view -> the map
    nodes: list[g.Node] = []
    for node in graph.nodes:
        node.inputs = tuple(node.inputs)
        if isinstance(node, ops.Reshape):
            v, shape = node.inputs[0], graph.shape(node.output)
            if isinstance(producers.get(v), _MAPS) and _is_line(graph.shape(v), shape):
                maps[node.output] = v
            elif v in maps and g.same_shape(graph.shape(maps[v]), shape):
                node.inputs = (maps[v],)  # merge_moves takes it out
            nodes.append(node)
            continue
        made = _on_map(graph, node, maps)
        if made is None:
            nodes.append(node)
            continue
        n, c, length = graph.shape(node.output)
        made.output = graph.fresh(node.output + "_line")
        graph.values[made.output] = dataclasses.replace(
            graph.values[node.output], name=made.output, shape=(n, c, 1, length)
        )
        view = ops.Reshape(
            f"{node.name}:line", (made.output,), node.output, shape=(n, c, length), source=node.source
        )
        while any(view.name == x.name for x in graph.nodes):
            view.name += "_"
        nodes += [made, view]
        maps[node.output] = made.output
    graph.nodes = nodes
    return merge_moves(graph)


_MAPS = (ops.Conv2d, ops.ConvTranspose2d, ops.Pool, ops.AdaptivePool, ops.Resize)


def _is_line(x: g.Shape, view: g.Shape) -> bool:
    return len(x) == 4 and len(view) == 3 and x[2] == 1 and g.same_shape((*x[:2], x[3]), view)


def _on_map(graph: g.Graph, node: g.Node, maps: dict[str, str]) -> g.Node | None:
    """``node``, of views, said of their maps; its output is to be set."""
    if not any(v in maps for v in node.inputs) or len(graph.shape(node.output)) != 3:
        return None
    if any(v not in maps and v not in graph.constants for v in node.inputs):
        return None
    changes: dict[str, object] = {}
    if isinstance(node, (ops.Slice, ops.Concat)):
        axis = node.axis % 3
        changes["axis"] = 3 if axis == 2 else axis
        if any(v in graph.constants for v in node.inputs):
            return None
    elif isinstance(node, ops.Pad):
        changes = {k: (*getattr(node, k)[:2], 0, getattr(node, k)[2]) for k in ("before", "after")}
    elif not isinstance(node, (ops.Activation, ops.Binary, ops.BatchNorm)):
        return None
    made = dataclasses.replace(node, **changes)  # type: ignore[arg-type]
    made.inputs = tuple(maps[v] if v in maps else _of_line(graph, v) for v in node.inputs)
    return made


def _of_line(graph: g.Graph, constant: str) -> str:
    """A constant that broadcasts along (N, C, L) as one along (N, C, 1, L)."""
    a = graph.constants[constant]
    if a.ndim < 2:
        return constant
    return graph.add_constant(np.expand_dims(a, -2), constant + "_line")


def _can_place(graph: g.Graph, node: g.Node) -> bool:
    return not isinstance(node, (ops.Reshape, ops.Transpose, ops.Slice, ops.Expand, Regroup))


def place_concats(graph: g.Graph, can_place: Callable[[g.Graph, g.Node], bool] | None = None) -> g.Graph:
    """Branches write straight into the output of the Concat (along channels) that joins them.

    Sets ``Value.place`` of the branches, nested too. A Concat whose inputs begin with those of an
    earlier Concat (as in DenseNet) takes the earlier one's output for them, so that each layer's
    maps are stored once. An input that cannot be placed (a graph input, a constant, one that is
    placed elsewhere or given twice) is copied by the Concat; ``placed`` is set where nothing is
    left to copy.
    """
    graph = graph.copy()
    can_place = can_place or _can_place
    producers = graph.producers()
    concats = [
        n
        for n in graph.nodes
        if isinstance(n, ops.Concat) and n.axis == 1 and len(graph.shape(n.output)) == 4
    ]
    done: list[ops.Concat] = []
    full: dict[str, tuple[str, ...]] = {}
    extended: set[str] = set()
    for c in concats:
        full[c.output] = c.inputs
        best: ops.Concat | None = None
        for d in done:
            k = full[d.output]
            fits = len(k) >= 2 and d.output not in extended and full[c.output][: len(k)] == k
            if fits and (best is None or len(k) > len(full[best.output])) and d.output not in graph.outputs:
                best = d
        if best is not None:
            c.inputs = (best.output, *c.inputs[len(full[best.output]) :])
            extended.add(best.output)
        done.append(c)
    for c in reversed(concats):  # parents before the concats inside them
        at, moved = 0, True
        for v in c.inputs:
            p = producers.get(v)
            value = graph.values[v]
            ok = (
                p is not None
                and can_place(graph, p)
                and v not in graph.outputs
                and value.place is None
                and c.inputs.count(v) == 1
            )
            if ok:
                value.place = (c.output, at)
            else:
                moved = False
            size = value.shape[1]
            assert isinstance(size, int)
            at += size
        c.placed = moved
    return graph
