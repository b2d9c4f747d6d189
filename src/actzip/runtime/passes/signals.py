"""Long strided windows of a signal, as the transforms of audio networks have them: so many numbers that
follow each other are the channels of one position, as they lie."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead

_LEAST = 8  # channels that are worth it, and a stride that gives them
_OUTPUTS = 16  # kernels for fewer output channels read one channel well


def signals_as_channels(graph: g.Graph) -> g.Graph:
    """A convolution of one channel along one axis by ``taps``, stride s, becomes one of c channels by
    ``taps`` / c, stride s / c: c divides s, and the weights are filled up with zeros to whole c."""
    graph = graph.copy()
    nodes: list[g.Node] = []
    taken = {n.name for n in graph.nodes}
    for node in graph.nodes:
        along = _axis(graph, node)
        if along is None or not isinstance(node, ops.Conv2d):
            nodes.append(node)
            continue
        nodes += _in_channels(graph, node, along, taken)
    graph.nodes = nodes
    return drop_dead(graph)


def _axis(graph: g.Graph, node: g.Node) -> int | None:
    """0 where the windows of ``node`` lie along the height, 1 along the width; None where they are others."""
    if not isinstance(node, ops.Conv2d) or node.groups != 1 or node.dilation != (1, 1):
        return None
    o, c, *kernel = node.weight.shape
    if c != 1 or o < _OUTPUTS:
        return None
    for along in (0, 1):
        across = 1 - along
        flat = kernel[across] == 1 and graph.shape(node.inputs[0])[2 + across] == 1
        still = node.padding[across] == node.padding[across + 2] == 0
        if flat and still and node.stride[along] >= _LEAST and kernel[along] > node.stride[along]:
            return along
    return None


def _channels(taps: int, stride: int) -> int:
    found = math.gcd(taps, stride)
    return found if found >= _LEAST else stride


def _in_channels(graph: g.Graph, node: ops.Conv2d, along: int, taken: set[str]) -> list[g.Node]:
    (x, *rest), stride = node.inputs, node.stride[along]
    n, _, *sizes = graph.shape(x)
    o, taps = int(node.weight.shape[0]), int(node.weight.shape[2 + along])
    c = _channels(taps, stride)
    windows = -(-taps // c)
    out = g.static(graph.shape(node.output)[2 + along], "the length")
    length, front = g.static(sizes[along], "the length"), node.padding[along]
    wanted = (out - 1) * stride + windows * c

    def value(what: str, shape: g.Shape) -> str:
        name = graph.fresh(f"{node.output}_{what}")
        graph.values[name] = g.Value(name, shape)
        return name

    def called(what: str) -> str:
        return g.unused(f"{node.name}:{what}", taken)

    def placed(size: int) -> tuple[int, int]:
        return (size, 1) if along == 0 else (1, size)

    made: list[g.Node] = []
    of = node.source
    if front or wanted != length:
        whole = value("whole", (n, 1, *placed(wanted)))
        before, after = [0] * 4, [0] * 4
        before[2 + along], after[2 + along] = front, wanted - length - front
        pad = ops.Pad(called("pad"), (x,), whole, before=tuple(before), after=tuple(after), source=of)
        made.append(pad)
        x = whole
    last = value("last", (n, *placed(wanted // c), c))
    first = value("first", (n, c, *placed(wanted // c)))
    made.append(ops.Reshape(called("cut"), (x,), last, shape=graph.shape(last), source=of))
    made.append(ops.Transpose(called("channels"), (last,), first, perm=(0, 3, 1, 2), source=of))
    weight = np.zeros((o, windows * c), node.weight.dtype)
    weight[:, :taps] = node.weight.reshape(o, taps)
    weight = weight.reshape(o, windows, c).transpose(0, 2, 1).reshape(o, c, *placed(windows))
    conv = dataclasses.replace(
        node,
        inputs=(first, *rest),
        weight=np.ascontiguousarray(weight),
        stride=placed(stride // c),
        padding=(0, 0, 0, 0),
    )
    return [*made, conv]
