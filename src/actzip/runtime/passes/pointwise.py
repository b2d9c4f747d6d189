"""1x1 convolutions behind what is linear, too: joined with a convolution, or before a map is enlarged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead, uses

__all__ = ["merge_pointwise", "split_upsampled"]


def merge_pointwise(graph: g.Graph) -> g.Graph:
    """``1x1 conv(conv(x))`` without an activation between becomes one convolution, where that multiplies
    less; ``1x1 conv(concat(conv(x), y))`` becomes ``1x1 conv(y) + conv(x)``."""
    graph = graph.copy()
    readers = uses(graph)
    nodes: list[g.Node] = []
    made: dict[str, g.Node] = {}

    def pays(node: ops.Conv2d, v: str) -> bool:
        first = made.get(v)
        if not isinstance(first, ops.Conv2d) or not _linear(first):
            return False
        if readers[v] != 1 or graph.values[v].quant is not None:
            return False
        outputs, middle = node.weight.shape[0], first.weight.shape[0]
        taps = int(np.prod(first.weight.shape[1:]))
        return bool(outputs * taps < middle * taps + outputs * middle)

    for node in graph.nodes:
        new = [node]
        if isinstance(node, ops.Conv2d) and _pointwise(node):
            concat = made.get(node.inputs[0])
            if pays(node, node.inputs[0]):
                new = [_merged(node, made[node.inputs[0]])]
            elif isinstance(concat, ops.Concat):
                part = _one_part(concat, readers, lambda v, n=node: pays(n, v))  # type: ignore[misc]
                if part is not None:
                    new = _split_merged(graph, node, concat, part, made)
        nodes += new
        made.update((n.output, n) for n in new)
    graph.nodes = nodes
    return drop_dead(graph)


def split_upsampled(graph: g.Graph) -> g.Graph:
    """``1x1 conv(concat(resize(x), y))`` becomes ``1x1 conv(y) + resize(1x1 conv(x))``.

    Both are linear and act on different dimensions, so they commute. The convolution of ``x`` has
    fewer pixels, and ``y`` (the map of a skip connection) is read as it is stored elsewhere, with
    its zeros.
    """
    graph = graph.copy()
    producers, readers = graph.producers(), uses(graph)
    nodes: list[g.Node] = []
    for node in graph.nodes:
        new = [node]
        if isinstance(node, ops.Conv2d) and _pointwise(node):
            concat = producers.get(node.inputs[0])
            if isinstance(concat, ops.Concat):
                part = _one_part(
                    concat, readers, lambda v: readers[v] == 1 and _enlarges(graph, producers.get(v))
                )
                # not where what is enlarged would have many more channels
                if part is not None and node.weight.shape[0] <= 2 * _channels(graph, part):
                    new = _split_resized(graph, node, concat, producers[part])
        nodes += new
    graph.nodes = nodes
    return drop_dead(graph)


def _pointwise(n: ops.Conv2d) -> bool:
    plain = n.weight.shape[2:] == (1, 1) and n.stride == (1, 1) and not any(n.padding) and n.groups == 1
    return plain and len(n.inputs) == 1 and n.pre_act is None


def _linear(n: ops.Conv2d) -> bool:
    return n.act is None and n.pre_act is None and len(n.inputs) == 1 and n.groups == 1


def _enlarges(graph: g.Graph, n: g.Node | None) -> bool:
    """To twice the pixels at least."""
    if not isinstance(n, ops.Resize):
        return False
    if graph.values[n.output].quant is not None:
        return False
    before, after = (g.numel(graph.shape(v)[1:])[0] for v in (n.inputs[0], n.output))
    return after >= 2 * before


def _one_part(concat: ops.Concat, readers: Mapping[str, int], wanted: Callable[[str], bool]) -> str | None:
    """The one input of a concatenation along channels that is ``wanted``, if it is one of several and
    nobody else reads the concatenation."""
    if concat.axis != 1 or readers[concat.output] != 1 or len(concat.inputs) < 2:
        return None
    found = [v for v in concat.inputs if wanted(v)]
    return found[0] if len(found) == 1 else None


def _merged(node: ops.Conv2d, first: g.Node) -> ops.Conv2d:
    """The 1x1 convolution ``node`` of the convolution ``first``, in one."""
    assert isinstance(first, ops.Conv2d)
    outer = node.weight[:, :, 0, 0].astype(np.float64)
    weight = np.tensordot(outer, first.weight.astype(np.float64), 1).astype(np.float32)
    bias = node.bias
    if first.bias is not None:
        through = outer @ first.bias.astype(np.float64)
        bias = (through if bias is None else through + bias).astype(np.float32)
    whole = dataclasses.replace(
        node,
        weight=np.ascontiguousarray(weight),
        bias=bias,
        stride=first.stride,
        padding=first.padding,
        dilation=first.dilation,
    )
    whole.inputs = first.inputs
    return whole


def _split_merged(
    graph: g.Graph, node: ops.Conv2d, concat: ops.Concat, part: str, made: Mapping[str, g.Node]
) -> list[g.Node]:
    inside, rest = _parts(graph, node, concat, part)
    total = graph.fresh(node.output + "_part")
    graph.values[total] = g.Value(total, graph.shape(node.output))
    whole = _merged(inside, made[part])
    whole.output = total
    return [whole, *_with_residual(graph, rest, concat, part, total)]


def _split_resized(graph: g.Graph, node: ops.Conv2d, concat: ops.Concat, resize: g.Node) -> list[g.Node]:
    before, rest = _parts(graph, node, concat, resize.output)
    small, large = graph.fresh(node.output + "_small"), graph.fresh(node.output + "_large")
    batch, _, h, w = graph.shape(resize.inputs[0])
    graph.values[small] = g.Value(small, (batch, int(node.weight.shape[0]), h, w))
    graph.values[large] = g.Value(large, graph.shape(node.output))
    before.inputs, before.output = resize.inputs, small
    resized = dataclasses.replace(resize)
    resized.inputs, resized.output = (small,), large
    return [before, resized, *_with_residual(graph, rest, concat, resize.output, large)]


def _parts(graph: g.Graph, node: ops.Conv2d, concat: ops.Concat, part: str) -> tuple[ops.Conv2d, ops.Conv2d]:
    """``node`` over one input of the concatenation, without bias and activation, and over the others."""
    at = concat.inputs.index(part)
    first = sum(_channels(graph, v) for v in concat.inputs[:at])
    last = first + _channels(graph, part)
    inside = np.ascontiguousarray(node.weight[:, first:last])
    others = np.delete(node.weight, np.s_[first:last], axis=1)
    return (
        dataclasses.replace(node, name=node.name + ":part", weight=inside, bias=None, act=None),
        dataclasses.replace(node, weight=others),
    )


def _with_residual(
    graph: g.Graph, rest: ops.Conv2d, concat: ops.Concat, part: str, residual: str
) -> list[g.Node]:
    """``rest`` over the inputs other than ``part``, concatenated where there are several."""
    inputs = tuple(v for v in concat.inputs if v != part)
    if len(inputs) == 1:
        rest.inputs = (inputs[0], residual)
        return [rest]
    batch, _, *size = graph.shape(concat.output)
    joined = dataclasses.replace(concat)
    joined.inputs, joined.output = inputs, graph.fresh(concat.output + "_rest")
    channels = sum(_channels(graph, v) for v in inputs)
    graph.values[joined.output] = g.Value(joined.output, (batch, channels, *size))
    rest.inputs = (joined.output, residual)
    return [joined, rest]


def _channels(graph: g.Graph, v: str) -> int:
    c = graph.shape(v)[1]
    assert isinstance(c, int)
    return c
