"""Activations, residuals and pools go into, or past, the nodes that they follow."""

from __future__ import annotations

import dataclasses
import math

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.passes.edit import prune, uses
from actzip.runtime.passes.recompose import merge_acts

_WITH_ACT = (ops.Conv2d, ops.ConvTranspose2d, ops.Linear, ops.Binary, ops.BatchNorm)


def fuse_activations(graph: g.Graph) -> g.Graph:
    """An activation goes into the epilogue of the node that it follows, where nothing else reads that value.

    Two activations in a row (ReLU and threshold, say) become one where there is one for both.
    """
    graph = graph.copy()
    producers = graph.producers()
    readers = uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, ops.Activation):
            continue
        before = producers.get(node.inputs[0])
        if before is None or readers[before.output] != 1:
            continue
        act: Act | None = node.act
        if isinstance(before, ops.Activation):
            act = merge_acts(before.act, node.act)
        elif isinstance(before, _WITH_ACT):
            if before.act is not None:
                act = merge_acts(before.act, node.act)
            p = node.act.param
            if (
                isinstance(before, ops.Linear)
                and p is not None
                and p.size > 1
                and len(graph.shape(node.output)) != 2
            ):
                continue  # per channel of dimension 1, which is not the linear's output then
        else:
            continue
        if act is None:
            continue
        merged = dataclasses.replace(before, act=act)
        merged.output = node.output
        graph.nodes[i] = merged
        gone.add(before.output)
        producers[node.output] = merged
    graph.nodes = [n for n in graph.nodes if n.output not in gone]
    prune(graph)
    return graph


def _adds_last(node: ops.Conv2d | ops.Linear) -> bool:
    """Whether something may be added to what the node computes, behind a quantizer at most."""
    if node.act is None:
        return True
    return isinstance(node, ops.Conv2d) and node.act.kind == "quantize" and node.pre_act is None


def fuse_residuals(graph: g.Graph) -> g.Graph:
    """``conv(x) + y`` (then an activation) becomes the convolution's epilogue; also for linear layers.

    Of two, that with more taps takes the other one as its residual, else the one that is computed
    last. It moves to the place of the addition: a 3x3 convolution, whose kernels need most scratch,
    runs when what the 1x1 one beside it reads is gone.
    """
    graph = graph.copy()
    producers = graph.producers()
    at = {n.output: i for i, n in enumerate(graph.nodes)}
    readers = uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, ops.Binary) or node.kind != "add" or node.inputs[0] == node.inputs[1]:
            continue
        out = graph.shape(node.output)
        best: tuple[tuple[int, int], ops.Conv2d | ops.Linear, str] | None = None
        for v, other in (node.inputs, node.inputs[::-1]):
            p = producers.get(v)
            if (
                not isinstance(p, (ops.Conv2d, ops.Linear))
                or not _adds_last(p)
                or len(p.inputs) > 1
                or readers[v] != 1
            ):
                continue
            if not g.same_shape(graph.shape(other), out) or other in graph.constants:
                continue
            rank = (math.prod(p.weight.shape[2:]), at[v])
            if best is None or rank > best[0]:
                best = (rank, p, other)
        if best is None:
            continue
        _, conv, other = best
        merged = dataclasses.replace(conv, act=node.act)
        if isinstance(merged, ops.Conv2d):
            merged.pre_act = conv.act
        merged.inputs = (conv.inputs[0], other)
        merged.output = node.output
        graph.nodes[i] = merged
        gone.add(conv.output)
        producers[node.output] = merged
        at[node.output] = i
    graph.nodes = [n for n in graph.nodes if n.output not in gone]
    prune(graph)
    return graph


def pool_means(graph: g.Graph) -> g.Graph:
    """The mean (or maximum) over height and width becomes a global pool; a global Pool too.

    ``Reduce`` without ``keepdims`` gets a Reshape behind it.
    """
    graph = graph.copy()
    nodes: list[g.Node] = []
    for node in graph.nodes:
        x = graph.shape(node.inputs[0]) if node.inputs else ()
        if (
            isinstance(node, ops.Reduce)
            and node.kind in ("mean", "max")
            and len(x) == 4
            and sorted(a % 4 for a in node.axes) == [2, 3]
        ):
            pooled = node.output if node.keepdims else graph.fresh(node.output + "_pool")
            if not node.keepdims:
                graph.values[pooled] = g.Value(pooled, (x[0], x[1], 1, 1))
            kind = "avg" if node.kind == "mean" else "max"
            nodes.append(ops.AdaptivePool(node.name, node.inputs, pooled, kind=kind, source=node.source))
            if not node.keepdims:
                shape = graph.shape(node.output)
                nodes.append(
                    ops.Reshape(
                        node.name + ":reshape", (pooled,), node.output, shape=shape, source=node.source
                    )
                )
            continue
        if (
            isinstance(node, ops.Pool)
            and not any(node.padding)
            and tuple(x[2:]) == node.kernel_size
            and node.dilation == (1, 1)
            and not node.divisor
        ):
            nodes.append(
                ops.AdaptivePool(node.name, node.inputs, node.output, kind=node.kind, source=node.source)
            )
            continue
        nodes.append(node)
    graph.nodes = nodes
    return graph


def sink_average_pools(graph: g.Graph) -> g.Graph:
    """``1x1 conv(avgpool(x))`` becomes ``avgpool(1x1 conv(x))`` where the convolution narrows the map.

    Both are linear and act on different dimensions, so they commute; the bias and the activation go
    behind the pool. The convolution then reads the sparse map instead of its dense average, and the
    pool has fewer channels.
    """
    graph = graph.copy()
    producers = graph.producers()
    readers = uses(graph)
    nodes: list[g.Node] = []
    gone: set[str] = set()
    for node in graph.nodes:
        pool = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, ops.Conv2d)
            and isinstance(pool, ops.Pool)
            and pool.kind == "avg"
            and pool.stride == (1, 1)
            and pool.bias is None
            and pool.act is None
            and readers[pool.output] == 1
            and node.weight.shape[2:] == (1, 1)
            and node.stride == (1, 1)
            and not any(node.padding)
            and node.groups == 1
            and node.weight.shape[0] <= node.weight.shape[1]
            and len(node.inputs) == 1
            and node.pre_act is None
        ):
            x = pool.inputs[0]
            n, _, h, w = graph.shape(x)
            mid = graph.fresh(node.output + "_raw")
            graph.values[mid] = g.Value(mid, (n, int(node.weight.shape[0]), h, w))
            conv = dataclasses.replace(node, bias=None, act=None)
            conv.inputs, conv.output = (x,), mid
            moved = dataclasses.replace(pool, bias=node.bias, act=node.act)
            moved.inputs, moved.output = (mid,), node.output
            nodes += [conv, moved]
            gone.add(pool.output)
            continue
        nodes.append(node)
    graph.nodes = [n for n in nodes if n.output not in gone]
    prune(graph)
    return graph
