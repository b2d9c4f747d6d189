"""What stands between three-dimensional layers is said of the frames that they compute on."""

from __future__ import annotations

import dataclasses

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.ops.volume import Regroup
from actzip.runtime.passes.edit import drop_dead, uses
from actzip.runtime.passes.moves import merge_moves

_SWAP = (0, 2, 1, 3, 4)


def volumes_as_frames(graph: g.Graph) -> g.Graph:
    """What a model computes on a volume (N, C, D, H, W), a view of the map (N * D, C, H, W) of its
    frames, is said of the map: elementwise nodes, BatchNorm, slices of channels, concatenations.
    Between two layers (:mod:`actzip.runtime.ops.volume`) nothing then leaves the maps' layout."""
    if not any(len(v.shape) == 5 for v in graph.values.values()):
        return graph
    graph = graph.copy()
    producers = graph.producers()
    frames: dict[str, str] = {}  # a volume -> the map
    nodes: list[g.Node] = []
    for node in graph.nodes:
        split = producers.get(node.inputs[0]) if node.inputs else None
        if isinstance(node, ops.Transpose) and isinstance(split, ops.Reshape) and node.perm == _SWAP:
            if _is_split(graph.shape(split.inputs[0]), graph.shape(split.output)):
                frames[node.output] = split.inputs[0]
        elif isinstance(node, ops.Reshape) and _is_single(
            graph.shape(node.inputs[0]), graph.shape(node.output)
        ):
            frames[node.output] = node.inputs[0]
        made = _on_frames(graph, node, frames)
        if made is None:
            nodes.append(node)
            continue
        n, c, d, h, w = graph.shape(node.output)
        made.output = graph.fresh(node.output + "_frames")
        shape = (g.times(n, g.static(d, "the depth")), c, h, w)
        graph.values[made.output] = dataclasses.replace(
            graph.values[node.output], name=made.output, shape=shape
        )
        apart = graph.fresh(node.output + "_split")
        graph.values[apart] = dataclasses.replace(
            graph.values[node.output], name=apart, shape=(n, d, c, h, w)
        )
        taken = {x.name for x in (*graph.nodes, *nodes)}
        names = [g.unused(f"{node.name}:{what}", taken) for what in ("split", "volume")]
        of = node.source
        nodes += [
            made,
            ops.Reshape(names[0], (made.output,), apart, shape=(n, d, c, h, w), source=of),
            ops.Transpose(names[1], (apart,), node.output, perm=_SWAP, source=of),
        ]
        frames[node.output] = made.output
    graph.nodes = nodes
    return sink_regroups(drop_dead(merge_moves(merge_moves(graph))))


def sink_regroups(graph: g.Graph) -> g.Graph:
    """Elementwise nodes that read a regrouped map are computed before it is regrouped, next to the
    convolution that wrote it."""
    graph = graph.copy()
    producers, read = graph.producers(), uses(graph)
    nodes: list[g.Node] = []
    for node in graph.nodes:
        r = next((p for v in node.inputs if isinstance(p := producers.get(v), Regroup)), None)
        if r is None or read[r.output] > 1 or not _before(graph, node, r):
            nodes.append(node)
            continue
        at = graph.shape(r.inputs[0])
        inputs = []
        for v in node.inputs:
            if v != r.output and v not in graph.constants:
                w = graph.fresh(v + "_regrouped")
                graph.values[w] = dataclasses.replace(graph.values[v], name=w, shape=at)
                taken = {x.name for x in (*graph.nodes, *nodes)}
                nodes.append(Regroup(g.unused(f"{node.name}:regroup", taken), (v,), w, shape=at))
                producers[w] = nodes[-1]
                v = w
            inputs.append(r.inputs[0] if v == r.output else v)
        out = graph.fresh(node.output + "_before")
        graph.values[out] = dataclasses.replace(graph.values[node.output], name=out, shape=at)
        back = dataclasses.replace(r, inputs=(out,), output=node.output, shape=graph.shape(node.output))
        nodes += [dataclasses.replace(node, inputs=tuple(inputs), output=out), back]
        producers[out], producers[node.output] = nodes[-2], back
        read[out] = 1
    graph.nodes = nodes
    return drop_dead(graph)


def _before(graph: g.Graph, node: g.Node, r: Regroup) -> bool:
    """Whether ``node`` means the same on the map before ``r``."""
    if not isinstance(node, (ops.Activation, ops.BatchNorm, ops.Binary)):
        return False
    for v in node.inputs:
        a = graph.constants.get(v)
        if a is None and not g.same_shape(graph.shape(v), r.shape):
            return False
        if a is not None and a.size > 1 and (a.ndim < 3 or a.size != a.shape[a.ndim - 3]):
            return False
    return True


def _is_split(x: g.Shape, split: g.Shape) -> bool:
    """Whether images of a map are cut into those of each volume."""
    return len(x) == 4 and len(split) == 5 and g.same_shape(x[1:], split[2:])


def _is_single(x: g.Shape, volume: g.Shape) -> bool:
    """Whether a map becomes a volume of one frame."""
    return len(x) == 4 and len(volume) == 5 and volume[2] == 1 and g.same_shape(x, volume[:2] + volume[3:])


def _on_frames(graph: g.Graph, node: g.Node, frames: dict[str, str]) -> g.Node | None:
    """``node``, of volumes, said of their frames; its output is to be set."""
    if not any(v in frames for v in node.inputs) or len(graph.shape(node.output)) != 5:
        return None
    if not isinstance(graph.shape(node.output)[2], int):
        return None
    if isinstance(node, (ops.Slice, ops.Concat)):
        if node.axis % 5 != 1 or not all(v in frames for v in node.inputs):
            return None
        made = dataclasses.replace(node, axis=1)
    elif isinstance(node, (ops.Activation, ops.Binary, ops.BatchNorm)):
        made = dataclasses.replace(node)  # type: ignore[assignment]
    else:
        return None
    inputs = [frames.get(v) or _of_frames(graph, v) for v in node.inputs]
    shapes = {graph.shape(frames[v])[0] for v in node.inputs if v in frames}
    if any(v is None for v in inputs) or len(shapes) > 1:
        return None
    made.inputs = tuple(v for v in inputs if v is not None)
    return made


def _of_frames(graph: g.Graph, constant: str) -> str | None:
    """A constant that broadcasts along (N, C, D, H, W) as one along its frames; None where it differs
    from frame to frame."""
    a = graph.constants.get(constant)
    if a is None:
        return None
    n, c, d, h, w = (1,) * (5 - a.ndim) + a.shape
    if (n, d) != (1, 1):
        return None
    return graph.add_constant(np.ascontiguousarray(a.reshape(n, c, h, w)), constant + "_frames")
