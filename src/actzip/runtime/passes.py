"""Rewrites of the Graph, each a function Graph -> Graph that keeps its meaning (within float rounding).

``optimize`` runs all of those that need no measurement, in order. None changes the graph that it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime import graph as g

if TYPE_CHECKING:
    import torch

__all__ = [
    "PASSES",
    "channel_affine",
    "channels_last",
    "drop_dead",
    "flatten_linear",
    "fold_batch_norm",
    "fold_constants",
    "fold_padding",
    "fuse_activations",
    "fuse_residuals",
    "merge_moves",
    "optimize",
    "place_concats",
    "pool_means",
    "recompose_activations",
    "sink_average_pools",
]

_FOLD_LIMIT = 64 << 20  # bytes of a folded constant

Pass = Callable[[g.Graph], g.Graph]


def _uses(graph: g.Graph) -> dict[str, int]:
    """value -> number of readers, being an output of the graph counted as one."""
    n = dict.fromkeys(graph.values, 0)
    for node in graph.nodes:
        for v in node.inputs:
            n[v] += 1
    for v in graph.outputs:
        n[v] += 1
    return n


def _replace(graph: g.Graph, old: str, new: str) -> None:
    """In place: readers of ``old`` read ``new``."""
    for node in graph.nodes:
        if old in node.inputs:
            node.inputs = tuple(new if v == old else v for v in node.inputs)
    graph.outputs = [new if v == old else v for v in graph.outputs]


def _prune(graph: g.Graph) -> None:
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
    _prune(graph)
    return graph


def fold_constants(graph: g.Graph) -> g.Graph:
    """Computes nodes whose inputs are all constants, unless the result has the batch in it or is over 64 MB."""
    graph = graph.copy()
    kept: list[g.Node] = []
    for node in graph.nodes:
        out = graph.values[node.output]
        count, power = g.numel(out.shape)
        if all(v in graph.constants for v in node.inputs) and power == 0 and count * 4 <= _FOLD_LIMIT:
            one = g.Graph(
                nodes=[node],
                values={v: graph.values[v] for v in (*node.inputs, node.output)},
                outputs=[node.output],
                constants={v: graph.constants[v] for v in node.inputs},
            )
            from actzip.runtime.interpret import interpret

            (y,), _ = interpret(one, {})
            graph.constants[node.output] = np.asarray(y.numpy(), order="C")
        else:
            kept.append(node)
    graph.nodes = kept
    _prune(graph)
    return graph


def _per_channel(graph: g.Graph, constant: str, other: g.Shape) -> g.Array | None:
    """The constant as C numbers if it broadcasts along ``other`` (N, C, ...) per channel only."""
    a = graph.constants.get(constant)
    if a is None or len(other) < 2 or not isinstance(other[1], int) or a.ndim > len(other):
        return None
    c = other[1]
    full: g.Array = a.reshape([1] * (len(other) - a.ndim) + list(a.shape))
    if any(d != 1 for i, d in enumerate(full.shape) if i != 1) or full.shape[1] not in (1, c):
        return None
    return np.broadcast_to(full.reshape(-1), (c,)).astype(np.float32)


def channel_affine(graph: g.Graph) -> g.Graph:
    """Adding, subtracting, multiplying or dividing by constants per channel becomes a BatchNorm node, to be folded.

    Only maps (N, C, H, W) are touched, and only finite constants.
    """
    graph = graph.copy()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, g.Binary) or node.kind not in ("add", "sub", "mul", "div"):
            continue
        a, b = node.inputs
        swapped = a in graph.constants
        x, k = (b, a) if swapped else (a, b)
        shape = graph.shape(x)
        if x in graph.constants or len(shape) != 4 or not g.same_shape(shape, graph.shape(node.output)):
            continue
        v = _per_channel(graph, k, shape)
        if v is None or not np.isfinite(v).all() or (swapped and node.kind == "div"):
            continue
        one, zero = np.ones_like(v), np.zeros_like(v)
        if node.kind == "add":
            scale, shift = one, v
        elif node.kind == "sub":
            scale, shift = (-one, v) if swapped else (one, -v)
        elif node.kind == "mul":
            scale, shift = v, zero
        else:
            with np.errstate(divide="ignore"):
                scale, shift = (1.0 / v.astype(np.float64)).astype(np.float32), zero
            if not np.isfinite(scale).all():
                continue
        graph.nodes[i] = g.BatchNorm(
            node.name, (x,), node.output, scale=scale, shift=shift, act=node.act, source=node.source
        )
    _prune(graph)
    return graph


def _scaled(w: g.Array, scale: g.Array, axis: int) -> g.Array:
    shape = [1] * w.ndim
    shape[axis] = -1
    return (w.astype(np.float64) * scale.astype(np.float64).reshape(shape)).astype(np.float32)


def fold_batch_norm(graph: g.Graph) -> g.Graph:
    """A BatchNorm behind a convolution (transposed too), a linear layer of rank 2, or another BatchNorm goes into it.

    Only where that node has no other reader, activation or residual yet.
    """
    graph = graph.copy()
    producers = graph.producers()
    uses = _uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, g.BatchNorm):
            continue
        before = producers.get(node.inputs[0])
        if before is None or uses[before.output] != 1 or len(before.inputs) > 1:
            continue
        s, t = node.scale.astype(np.float64), node.shift.astype(np.float64)
        merged: g.Node
        if isinstance(before, g.BatchNorm) and before.act is None:
            shift = (before.shift * s + t).astype(np.float32)
            merged = dataclasses.replace(
                before, scale=(before.scale * s).astype(np.float32), shift=shift, act=node.act
            )
        elif isinstance(before, (g.Conv2d, g.ConvTranspose2d, g.Linear)) and before.act is None:
            if isinstance(before, g.Linear) and len(graph.shape(node.output)) != 2:
                continue
            if isinstance(before, g.Conv2d) and before.pre_act is not None:
                continue
            bias = (0.0 if before.bias is None else before.bias.astype(np.float64)) * s + t
            if isinstance(before, g.ConvTranspose2d):
                c, og = before.weight.shape[:2]
                k = before.groups
                w = before.weight.reshape(k, c // k, og, *before.weight.shape[2:]).astype(np.float64)
                w = w * s.reshape(k, 1, og, 1, 1)
                weight = w.reshape(before.weight.shape).astype(np.float32)
            else:
                weight = _scaled(before.weight, node.scale, 0)
            merged = dataclasses.replace(before, weight=weight, bias=bias.astype(np.float32), act=node.act)
        else:
            continue
        merged.output = node.output
        graph.nodes[i] = merged
        gone.add(before.output)
        producers[node.output] = merged
    graph.nodes = [n for n in graph.nodes if n.output not in gone]
    _prune(graph)
    return graph


def merge_acts(first: g.Act, second: g.Act) -> g.Act | None:
    """One function for ``second(first(x))``, None where there is none in the table."""
    if first.kind == "relu":
        first = g.Act.of("clip", lo=0.0)
    if second.kind == "relu":
        second = g.Act.of("clip", lo=0.0)
    if first.kind == "clip" and second.kind == "clip":
        lo, hi = max(first.lo, second.lo), min(first.hi, second.hi)
        if lo > hi:
            return None
        return g.Act.of("relu") if (lo, hi) == (0.0, math.inf) else g.Act.of("clip", lo=lo, hi=hi)
    if first.kind == "clip" and second.kind == "threshold":
        assert second.param is not None
        # above theta >= lo the lower bound has no effect; at theta and below both give 0 if theta >= lo
        if bool((second.param >= max(first.lo, 0.0)).all()) and bool((second.param < first.hi).all()):
            return dataclasses.replace(second, hi=min(first.hi, second.hi))
    if first.kind == "threshold" and second.kind == "clip" and second.lo <= 0.0 <= second.hi:
        assert first.param is not None
        return (
            dataclasses.replace(first, hi=min(first.hi, second.hi))
            if bool((first.param >= 0).all())
            else None
        )
    if first.kind == "threshold" and second.kind == "threshold":
        assert first.param is not None and second.param is not None
        if math.isinf(first.hi) and bool((first.param >= 0).all()) and bool((second.param >= 0).all()):
            return dataclasses.replace(second, param=np.maximum(first.param, second.param))
    return None


def recompose_activations(graph: g.Graph) -> g.Graph:
    """Activations written out in arithmetic get their node: x * sigmoid(x), x * clip(x / 6 + 0.5, 0, 1),
    x * clip(x + 3, 0, 6) / 6, and clip(x * a + b, 0, 1) alone."""
    graph = graph.copy()
    for _ in range(3):
        producers = graph.producers()
        for i, node in enumerate(graph.nodes):
            new = _recomposed(graph, producers, node)
            if new is not None:
                graph.nodes[i] = new
                producers[new.output] = new
    return drop_dead(graph)


def _number(graph: g.Graph, name: str) -> float | None:
    a = graph.constants.get(name)
    return float(a.reshape(-1)[0]) if a is not None and a.size == 1 else None


def _affine_of(graph: g.Graph, producers: dict[str, g.Node], v: str) -> tuple[str, float, float]:
    """``v`` as a * x + b of some x, by following scalar arithmetic."""
    a, b = 1.0, 0.0
    while True:
        n = producers.get(v)
        if not isinstance(n, g.Binary) or n.act is not None:
            return v, a, b
        left, right = n.inputs
        k, x = _number(graph, right), left
        if k is None:
            k, x = _number(graph, left), right
            if n.kind not in ("add", "mul"):
                return v, a, b
        if k is None or not g.same_shape(graph.shape(x), graph.shape(v)):
            return v, a, b
        if n.kind == "add":
            b += a * k
        elif n.kind == "sub":
            b -= a * k
        elif n.kind == "mul":
            a *= k
        elif n.kind == "div" and k != 0:
            a /= k
        else:
            return v, a, b
        v = x


def _near(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-6 * max(1.0, abs(y))


def _recomposed(graph: g.Graph, producers: dict[str, g.Node], node: g.Node) -> g.Node | None:
    if (
        isinstance(node, g.Activation)
        and node.act.kind == "clip"
        and (node.act.lo, node.act.hi) == (0.0, 6.0)
    ):
        return None
    if (
        isinstance(node, g.Activation)
        and node.act.kind == "clip"
        and (node.act.lo, node.act.hi) == (0.0, 1.0)
    ):
        x, a, b = _affine_of(graph, producers, node.inputs[0])
        if x != node.inputs[0] and a > 0:
            act = g.Act.of("hardsigmoid", alpha=a, beta=b)
            return g.Activation(node.name, (x,), node.output, act=act, source=node.source)
        return None
    if not isinstance(node, g.Binary) or node.act is not None or node.kind not in ("mul", "div"):
        return None
    if node.kind == "div" or any(v in graph.constants for v in node.inputs):
        # clip(x + 3, 0, 6) / 6
        x, a, b = _affine_of(graph, producers, node.output)
        p = producers.get(x)
        if isinstance(p, g.Activation) and p.act.kind == "clip" and b == 0.0:
            lo, hi = p.act.lo * a, p.act.hi * a
            if _near(lo, 0.0) and _near(hi, 1.0):
                z, c, d = _affine_of(graph, producers, p.inputs[0])
                act = g.Act.of("hardsigmoid", alpha=a * c, beta=a * d)
                return g.Activation(node.name, (z,), node.output, act=act, source=node.source)
        if isinstance(p, g.Binary) and p.kind == "mul" and b == 0.0 and p.act is None:
            # (x * clip(x + 3, 0, 6)) / 6
            for x0, y0 in (p.inputs, p.inputs[::-1]):
                q = producers.get(y0)
                if (
                    isinstance(q, g.Activation)
                    and q.act.kind == "clip"
                    and q.act.lo == 0
                    and _near(q.act.hi * a, 1)
                ):
                    z, c, d = _affine_of(graph, producers, q.inputs[0])
                    if z == x0 and _near(a * c, 1 / 6) and _near(a * d, 0.5):
                        act = g.Act.of("hardswish")
                        return g.Activation(node.name, (x0,), node.output, act=act, source=node.source)
        return None
    for x0, y0 in (node.inputs, node.inputs[::-1]):
        q = producers.get(y0)
        if not isinstance(q, g.Activation) or q.inputs[0] != x0:
            continue
        if q.act.kind == "sigmoid":
            return g.Activation(node.name, (x0,), node.output, act=g.Act.of("silu"), source=node.source)
        if q.act.kind == "hardsigmoid" and _near(q.act.alpha, 1 / 6) and _near(q.act.beta, 0.5):
            return g.Activation(node.name, (x0,), node.output, act=g.Act.of("hardswish"), source=node.source)
    return None


_WITH_ACT = (g.Conv2d, g.ConvTranspose2d, g.Linear, g.Binary, g.BatchNorm)


def fuse_activations(graph: g.Graph) -> g.Graph:
    """An activation goes into the epilogue of the node that it follows, where nothing else reads that value.

    Two activations in a row (ReLU and threshold, say) become one where there is one for both.
    """
    graph = graph.copy()
    producers = graph.producers()
    uses = _uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, g.Activation):
            continue
        before = producers.get(node.inputs[0])
        if before is None or uses[before.output] != 1:
            continue
        act: g.Act | None = node.act
        if isinstance(before, g.Activation):
            act = merge_acts(before.act, node.act)
        elif isinstance(before, _WITH_ACT):
            if before.act is not None:
                act = merge_acts(before.act, node.act)
            p = node.act.param
            if (
                isinstance(before, g.Linear)
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
    _prune(graph)
    return graph


def fuse_residuals(graph: g.Graph) -> g.Graph:
    """``conv(x) + y`` (then an activation) becomes the convolution's epilogue; also for linear layers.

    The operand that is computed last takes the other one as its residual. It moves to the place of the addition.
    """
    graph = graph.copy()
    producers = graph.producers()
    at = {n.output: i for i, n in enumerate(graph.nodes)}
    uses = _uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, g.Binary) or node.kind != "add" or node.inputs[0] == node.inputs[1]:
            continue
        out = graph.shape(node.output)
        best: tuple[int, g.Conv2d | g.Linear, str] | None = None
        for v, other in (node.inputs, node.inputs[::-1]):
            p = producers.get(v)
            if (
                not isinstance(p, (g.Conv2d, g.Linear))
                or p.act is not None
                or len(p.inputs) > 1
                or uses[v] != 1
            ):
                continue
            if not g.same_shape(graph.shape(other), out) or other in graph.constants:
                continue
            if best is None or at[v] > best[0]:
                best = (at[v], p, other)
        if best is None:
            continue
        _, conv, other = best
        merged = dataclasses.replace(conv, act=node.act)
        merged.inputs = (conv.inputs[0], other)
        merged.output = node.output
        graph.nodes[i] = merged
        gone.add(conv.output)
        producers[node.output] = merged
        at[node.output] = i
    graph.nodes = [n for n in graph.nodes if n.output not in gone]
    _prune(graph)
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
            isinstance(node, g.Reduce)
            and node.kind in ("mean", "max")
            and len(x) == 4
            and sorted(a % 4 for a in node.axes) == [2, 3]
        ):
            pooled = node.output if node.keepdims else graph.fresh(node.output + "_pool")
            if not node.keepdims:
                graph.values[pooled] = g.Value(pooled, (x[0], x[1], 1, 1))
            kind = "avg" if node.kind == "mean" else "max"
            nodes.append(g.AdaptivePool(node.name, node.inputs, pooled, kind=kind, source=node.source))
            if not node.keepdims:
                shape = graph.shape(node.output)
                nodes.append(
                    g.Reshape(node.name + ":reshape", (pooled,), node.output, shape=shape, source=node.source)
                )
            continue
        if (
            isinstance(node, g.Pool)
            and not any(node.padding)
            and tuple(x[2:]) == node.kernel_size
            and node.dilation == (1, 1)
            and not node.divisor
        ):
            nodes.append(
                g.AdaptivePool(node.name, node.inputs, node.output, kind=node.kind, source=node.source)
            )
            continue
        nodes.append(node)
    graph.nodes = nodes
    return graph


def fold_padding(graph: g.Graph) -> g.Graph:
    """Zeros padded around a map go into the padding of the convolution or average pool that alone reads it."""
    graph = graph.copy()
    producers = graph.producers()
    uses = _uses(graph)
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if not isinstance(before, g.Pad) or uses[before.output] != 1 or before.mode != "constant":
            continue
        if len(before.before) != 4 or any(before.before[:2]) or any(before.after[:2]):
            continue
        p = (before.before[2], before.before[3], before.after[2], before.after[3])
        if min(p) < 0:
            continue
        if (isinstance(node, g.Conv2d) and before.value == 0.0) or (
            isinstance(node, g.Pool) and node.kind == "max" and before.value == -math.inf
        ):
            pass
        else:
            continue
        padding = tuple(a + b for a, b in zip(node.padding, p, strict=True))
        merged = dataclasses.replace(node, padding=padding)  # type: ignore[arg-type]
        merged.inputs = (before.inputs[0], *node.inputs[1:])
        graph.nodes[i] = merged
    return drop_dead(graph)


def sink_average_pools(graph: g.Graph) -> g.Graph:
    """``1x1 conv(avgpool(x))`` becomes ``avgpool(1x1 conv(x))`` where the convolution narrows the map.

    Both are linear and act on different dimensions, so they commute; the bias and the activation go behind the pool. The
    convolution then reads the sparse map instead of its dense average, and the pool has fewer channels.
    """
    graph = graph.copy()
    producers = graph.producers()
    uses = _uses(graph)
    nodes: list[g.Node] = []
    gone: set[str] = set()
    for node in graph.nodes:
        pool = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, g.Conv2d)
            and isinstance(pool, g.Pool)
            and pool.kind == "avg"
            and pool.stride == (1, 1)
            and pool.bias is None
            and pool.act is None
            and uses[pool.output] == 1
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
    _prune(graph)
    return graph


def merge_moves(graph: g.Graph) -> g.Graph:
    """Reshapes and transposes in a row become one, or none; those that change nothing go."""
    graph = graph.copy()
    producers = graph.producers()
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if isinstance(node, g.Reshape) and isinstance(before, g.Reshape):
            node.inputs = before.inputs
        elif isinstance(node, g.Transpose) and isinstance(before, g.Transpose):
            node.inputs = before.inputs
            node.perm = tuple(before.perm[p] for p in node.perm)
        elif isinstance(node, g.Transpose):
            # moving dimensions of size 1 only is a reshape
            shape = graph.shape(node.inputs[0])
            moved = [p for p in node.perm if shape[p] != 1]
            if moved == sorted(moved):
                reshape = g.Reshape(
                    node.name, node.inputs, node.output, shape=graph.shape(node.output), source=node.source
                )
                graph.nodes[i] = reshape
                producers[node.output] = reshape
                if isinstance(before, g.Reshape):
                    reshape.inputs = before.inputs
    names: dict[str, str] = {}
    for node in graph.nodes:
        node.inputs = tuple(names.get(v, v) for v in node.inputs)
        same = g.same_shape(graph.shape(node.inputs[0]), graph.shape(node.output)) if node.inputs else False
        identity = (isinstance(node, g.Reshape) and same) or (
            isinstance(node, g.Transpose) and node.perm == tuple(range(len(node.perm)))
        )
        if identity and node.output not in graph.outputs:
            names[node.output] = node.inputs[0]
    return drop_dead(graph)


def flatten_linear(graph: g.Graph) -> g.Graph:
    """A linear layer on a flattened map becomes a convolution whose window is the map, then a reshape.

    The engine keeps maps channels last, so that the flattening would move data; and the convolution skips zeros.
    """
    graph = graph.copy()
    producers = graph.producers()
    nodes: list[g.Node] = []
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, g.Linear)
            and len(node.inputs) == 1
            and isinstance(before, g.Reshape)
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
                g.Conv2d(
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
                g.Reshape(node.name + ":reshape", (mid,), node.output, shape=(n, o), source=node.source)
            )
            producers[node.output] = nodes[-1]
            continue
        nodes.append(node)
    graph.nodes = nodes
    return drop_dead(graph)


_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def channels_last(graph: g.Graph) -> g.Graph:
    """What a model computes on maps that it transposed to (N, H, W, C) itself is said on (N, C, H, W).

    Linear layers become 1x1 convolutions, layer norms over C become norms of channels, elementwise nodes stay; a transpose
    moves behind each until it meets its inverse. (The engine stores channels last anyway.)
    """
    graph = graph.copy()
    for _ in range(len(graph.nodes)):
        if not _sink_transpose(graph):
            break
    return merge_moves(graph)


def _sink_transpose(graph: g.Graph) -> bool:
    """In place: one sweep in which every node that reads (N, H, W, C) views is put before the transpose."""
    producers = graph.producers()

    def source(v: str) -> str | None:
        p = producers.get(v)
        return p.inputs[0] if isinstance(p, g.Transpose) and p.perm == _TO_LAST else None

    changed = False
    nodes: list[g.Node] = []
    for node in graph.nodes:
        new: g.Node | None = None
        if isinstance(node, g.Linear) and len(graph.shape(node.inputs[0])) == 4:
            srcs = [source(v) for v in node.inputs]
            if all(s is not None for s in srcs):
                w = node.weight.reshape(*node.weight.shape, 1, 1)
                p = node.act.param if node.act else None
                if p is None or p.size == 1:
                    new = g.Conv2d(
                        node.name, tuple(s for s in srcs if s), "", weight=w, bias=node.bias, act=node.act,
                        source=node.source,
                    )  # fmt: skip
        elif isinstance(node, g.LayerNorm) and len(node.shape) == 1 and not node.channels:
            s = source(node.inputs[0])
            if s is not None and len(graph.shape(s)) == 4:
                new = dataclasses.replace(node, inputs=(s,), channels=True)
        elif isinstance(node, g.Activation):
            s = source(node.inputs[0])
            if s is not None and (node.act.param is None or node.act.param.size == 1):
                new = dataclasses.replace(node, inputs=(s,))
        elif isinstance(node, g.Binary):
            shape = graph.shape(node.output)
            ins: list[str] = []
            for v in node.inputs:
                s = source(v)
                if s is not None and len(shape) == 4:
                    ins.append(s)
                elif v in graph.constants and len(shape) == 4 and graph.constants[v].ndim <= 4:
                    a = graph.constants[v]
                    a = a.reshape([1] * (4 - a.ndim) + list(a.shape)).transpose(_TO_FIRST)
                    ins.append(graph.add_constant(np.ascontiguousarray(a), v + "_nchw"))
            plain = node.act is None or node.act.param is None or node.act.param.size == 1
            if len(ins) == 2 and plain and any(source(v) is not None for v in node.inputs):
                new = dataclasses.replace(node, inputs=tuple(ins))
        if new is None:
            nodes.append(node)
            continue
        n, h, w_, c = graph.shape(node.output)
        mid = graph.fresh(node.output + "_nchw")
        graph.values[mid] = g.Value(mid, (n, c, h, w_))
        new.output = mid
        back = g.Transpose(node.name + ":nhwc", (mid,), node.output, perm=_TO_LAST, source=node.source)
        while any(back.name == x.name for x in nodes):
            back.name += "_"
        nodes += [new, back]
        producers[mid], producers[node.output] = new, back
        changed = True
    graph.nodes = nodes
    _prune(graph)
    return changed


def place_concats(graph: g.Graph, can_place: Callable[[g.Graph, g.Node], bool] | None = None) -> g.Graph:
    """Branches write straight into the output of the Concat (along channels) that joins them.

    Sets ``Value.place`` of the branches, nested too. A Concat whose inputs begin with those of an earlier Concat (as in
    DenseNet) takes the earlier one's output for them, so that each layer's maps are stored once. An input
    that cannot be placed (a graph input, a constant, one that is placed elsewhere or given twice) is copied by the
    Concat; ``placed`` is set where nothing is left to copy.
    """
    graph = graph.copy()
    if can_place is None:
        can_place = lambda graph, node: not isinstance(node, (g.Reshape, g.Transpose, g.Slice, g.Expand))  # noqa: E731
    producers = graph.producers()
    concats = [
        n for n in graph.nodes if isinstance(n, g.Concat) and n.axis == 1 and len(graph.shape(n.output)) == 4
    ]
    done: list[g.Concat] = []
    full: dict[str, tuple[str, ...]] = {}
    extended: set[str] = set()
    for c in concats:
        full[c.output] = c.inputs
        best: g.Concat | None = None
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


def root_of(graph: g.Graph, value: str) -> tuple[str, int]:
    """The value whose memory ``value`` lies in, and its first channel there."""
    at = 0
    place = graph.values[value].place
    while place is not None:
        value, at = place[0], at + place[1]
        place = graph.values[value].place
    return value, at


PASSES: tuple[Pass, ...] = (
    fold_constants,
    drop_dead,
    merge_moves,
    recompose_activations,
    channels_last,
    channel_affine,
    fold_padding,
    fold_batch_norm,
    fuse_activations,
    fuse_residuals,
    fuse_activations,
    sink_average_pools,
    pool_means,
    merge_moves,
    flatten_linear,
    merge_moves,
    place_concats,
    drop_dead,
)


def optimize(graph: g.Graph, passes: Sequence[Pass] = PASSES) -> g.Graph:
    """``graph`` after every pass of ``passes``; validated."""
    for p in passes:
        graph = p(graph)
    graph.validate()
    return graph


def nonfinite_parameters(graph: g.Graph) -> list[g.Node]:
    """Nodes with an infinite or NaN parameter: a zero activation skipped there would hide a NaN."""
    bad = []
    for n in graph.nodes:
        for _, v in n.fields():
            if isinstance(v, np.ndarray) and v.dtype.kind == "f" and not np.isfinite(v).all():
                bad.append(n)
                break
    return bad


def calibrate(graph: g.Graph, inputs: dict[str, torch.Tensor]) -> g.Graph:
    """Densities of all maps from one run of the interpreter: ``Value.density`` set in the copy returned.

    Raises:
        InputError: inputs that do not fit.
        UnsupportedError: as :func:`interpret`.
    """
    import torch

    from actzip.runtime.interpret import interpret

    graph = graph.copy()
    wanted = [n.output for n in graph.nodes]
    if not wanted:
        raise UnsupportedError(f"graph {graph.name!r} computes nothing")
    _, kept = interpret(graph, inputs, wanted)
    for v, t in [*kept.items(), *inputs.items()]:
        if v in graph.values and t.numel():
            graph.values[v].density = float(torch.count_nonzero(t)) / t.numel()
    return graph
