"""Constants computed beforehand; batch norms and padding folded into the nodes beside them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead, prune, uses
from actzip.runtime.storage import expects_zeros

_FOLD_LIMIT = 64 << 20  # bytes of a folded constant


def fold_constants(graph: g.Graph) -> g.Graph:
    """Computes nodes whose inputs are all constants, unless the result has the batch in it or is
    over 64 MB."""
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
    prune(graph)
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
    """Adding, subtracting, multiplying or dividing by constants per channel becomes a BatchNorm
    node, to be folded.

    Only maps (N, C, H, W) are touched, and only finite constants.
    """
    graph = graph.copy()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, ops.Binary) or node.kind not in ("add", "sub", "mul", "div"):
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
        graph.nodes[i] = ops.BatchNorm(
            node.name, (x,), node.output, scale=scale, shift=shift, act=node.act, source=node.source
        )
    prune(graph)
    return graph


def _scaled(w: g.Array, scale: g.Array, axis: int) -> g.Array:
    shape = [1] * w.ndim
    shape[axis] = -1
    return (w.astype(np.float64) * scale.astype(np.float64).reshape(shape)).astype(np.float32)


def fold_batch_norm(graph: g.Graph) -> g.Graph:
    """A BatchNorm behind a convolution (transposed too), a linear layer of rank 2, or another
    BatchNorm goes into it.

    Only where that node has no other reader, activation or residual yet.
    """
    graph = graph.copy()
    producers = graph.producers()
    readers = uses(graph)
    gone: set[str] = set()
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, ops.BatchNorm):
            continue
        before = producers.get(node.inputs[0])
        if before is None or readers[before.output] != 1 or len(before.inputs) > 1:
            continue
        s, t = node.scale.astype(np.float64), node.shift.astype(np.float64)
        merged: g.Node
        if isinstance(before, ops.BatchNorm) and before.act is None:
            shift = (before.shift * s + t).astype(np.float32)
            merged = dataclasses.replace(
                before, scale=(before.scale * s).astype(np.float32), shift=shift, act=node.act
            )
        elif isinstance(before, (ops.Conv2d, ops.ConvTranspose2d, ops.Linear)) and before.act is None:
            if isinstance(before, ops.Linear) and len(graph.shape(node.output)) != 2:
                continue
            if isinstance(before, ops.Conv2d) and before.pre_act is not None:
                continue
            bias = (0.0 if before.bias is None else before.bias.astype(np.float64)) * s + t
            if isinstance(before, ops.ConvTranspose2d):
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
    prune(graph)
    return graph


def spread_batch_norm(graph: g.Graph) -> g.Graph:
    """A BatchNorm of a sum of convolutions becomes one of each, the shift in the first:
    :func:`fold_batch_norm` then takes them in."""
    graph = graph.copy()
    producers, readers = graph.producers(), uses(graph)
    behind: dict[str, list[g.Node]] = {}  # a convolution's output -> what is to stand behind it
    for i, node in enumerate(graph.nodes):
        if not isinstance(node, ops.BatchNorm):
            continue
        leaves = _leaves_of_sum(graph, node.inputs[0], producers, readers)
        if len(leaves) < 2:
            continue
        top = producers[node.inputs[0]]
        for k, leaf in enumerate(leaves):
            made = graph.fresh(leaf + "_normal")
            graph.values[made] = dataclasses.replace(graph.values[leaf], name=made)
            shift = node.shift if k == 0 else np.zeros_like(node.shift)
            name = node.name if k == 0 else f"{node.name}:{k}"
            norm = ops.BatchNorm(name, (leaf,), made, scale=node.scale, shift=shift, source=node.source)
            behind.setdefault(producers[leaf].output, []).append(norm)
            reader = next(n for n in graph.nodes if leaf in n.inputs)
            reader.inputs = tuple(made if v == leaf else v for v in reader.inputs)
        graph.nodes[i] = dataclasses.replace(top, output=node.output, act=node.act)  # type: ignore[call-arg]
        graph.nodes[graph.nodes.index(top)] = graph.nodes[i]
        producers[node.output] = graph.nodes[i]
        del producers[top.output]
    if not behind:
        return graph
    nodes: dict[str, g.Node] = {}
    for n in graph.nodes:
        for m in (n, *behind.get(n.output, [])):
            nodes.setdefault(m.output, m)
    graph.nodes = list(nodes.values())
    prune(graph)
    return graph


def _leaves_of_sum(
    graph: g.Graph, v: str, producers: dict[str, g.Node], readers: dict[str, int]
) -> list[str]:
    """The convolutions' outputs that ``v`` is the sum of, where nothing else reads them; [] where it
    is the sum of other things."""
    p = producers.get(v)
    if p is None or readers[v] != 1:
        return []
    if isinstance(p, ops.Conv2d):
        return [v] if p.act is None and p.pre_act is None and len(p.inputs) == 1 else []
    if not isinstance(p, ops.Binary) or p.kind != "add" or p.act is not None:
        return []
    parts = [_leaves_of_sum(graph, i, producers, readers) for i in p.inputs]
    whole = all(g.same_shape(graph.shape(i), graph.shape(v)) for i in p.inputs)
    return [leaf for part in parts for leaf in part] if whole and all(parts) else []


def _windows_inside(node: ops.Pool, shape: g.Shape, padding: tuple[int, ...]) -> bool:
    """Whether every window of a pool with this padding touches the map: padding that is no less
    than a window may not."""
    t, left, b, r = padding
    (kh, kw), (dh, dw) = node.kernel_size, node.dilation
    return (
        len(shape) == 4
        and max(t, b) <= dh * (kh - 1)
        and max(left, r) <= dw * (kw - 1)
        and not node.ceil_mode
    )


def fold_padding(graph: g.Graph) -> g.Graph:
    """Zeros padded around a map go into the padding of the convolution or average pool that alone
    reads it."""
    graph = graph.copy()
    producers = graph.producers()
    readers = uses(graph)
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if not isinstance(before, ops.Pad) or readers[before.output] != 1 or before.mode != "constant":
            continue
        if len(before.before) != 4 or any(before.before[:2]) or any(before.after[:2]):
            continue
        p = (before.before[2], before.before[3], before.after[2], before.after[3])
        if min(p) < 0:
            continue
        pool = isinstance(node, ops.Pool) and node.kind == "max" and before.value == -math.inf
        if not pool and not (isinstance(node, ops.Conv2d) and before.value == 0.0):
            continue
        assert isinstance(node, (ops.Conv2d, ops.Pool))
        padding = tuple(a + b for a, b in zip(node.padding, p, strict=True))
        if isinstance(node, ops.Pool) and not _windows_inside(node, graph.shape(before.inputs[0]), padding):
            continue
        merged = dataclasses.replace(node, padding=padding)  # type: ignore[arg-type]
        merged.inputs = (before.inputs[0], *node.inputs[1:])
        if not g.same_shape(merged.infer([graph.shape(v) for v in merged.inputs]), graph.shape(node.output)):
            continue  # ceil_mode counts what is padded by a rule of its own
        graph.nodes[i] = merged
    return drop_dead(graph)


def fold_crops(graph: g.Graph) -> g.Graph:
    """What is cut from the borders of a transposed convolution's output goes into its padding."""
    graph = graph.copy()
    producers = graph.producers()
    readers = uses(graph)
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if (
            not isinstance(before, ops.ConvTranspose2d)
            or readers[before.output] != 1
            or not isinstance(node, ops.Slice)
            or node.axis % 4 < 2
            or node.step != 1
            or node.start == node.stop
        ):
            continue
        padding, at, size = list(before.padding), node.axis % 4 - 2, graph.shape(before.output)[node.axis]
        assert isinstance(size, int)
        padding[at] += node.start
        padding[at + 2] += size - node.stop
        whole = dataclasses.replace(before, padding=tuple(padding), output=node.output)  # type: ignore[arg-type]
        graph.nodes[i] = producers[node.output] = whole
    return drop_dead(graph)


def fold_affine_forward(graph: g.Graph) -> g.Graph:
    """A BatchNorm that only convolutions without padding read goes into them: their weights are scaled and
    its shift, seen through them, is added to their bias."""
    graph = graph.copy()
    readers = graph.consumers()
    for node in list(graph.nodes):
        behind = readers.get(node.output, [])
        plain = isinstance(node, ops.BatchNorm) and node.act is None and node.output not in graph.outputs
        if not plain or not behind or not all(_takes_affine(n, node.output) for n in behind):
            continue
        assert isinstance(node, ops.BatchNorm)
        for n in behind:
            assert isinstance(n, ops.Conv2d)
            merged = _with_affine(n, node)
            graph.nodes[graph.nodes.index(n)] = merged
            for v in merged.inputs:
                readers[v] = [merged if r is n else r for r in readers.get(v, [])] or [merged]
        graph.nodes.remove(node)
        before = [r for r in readers[node.inputs[0]] if r is not node]
        readers[node.inputs[0]] = before + readers[node.output]
    prune(graph)
    return graph


def sink_affine(graph: g.Graph) -> g.Graph:
    """``maxpool(a * x + b)`` becomes ``a * maxpool(x) + b`` where no ``a`` is negative and zeros are
    expected in ``x``: a map with zeros is pooled, and the affine comes to stand before a convolution."""
    graph = graph.copy()
    producers, readers = graph.producers(), uses(graph)
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if isinstance(node, ops.Pool) else None
        if (
            not isinstance(node, ops.Pool)
            or node.kind != "max"
            or node.act is not None
            or node.bias is not None
            or not isinstance(before, ops.BatchNorm)
            or before.act is not None
            or readers[before.output] != 1
            or (before.scale < 0).any()
            or not expects_zeros(graph, producers, before.inputs[0])
        ):
            continue
        mid = graph.fresh(before.output + "_pool")
        graph.values[mid] = dataclasses.replace(graph.values[node.output], name=mid)
        at = graph.nodes.index(before)
        pool, affine = dataclasses.replace(node), dataclasses.replace(before)
        pool.inputs, pool.output = before.inputs, mid
        affine.inputs, affine.output = (mid,), node.output
        graph.nodes[at], graph.nodes[i] = pool, affine
        producers.update({mid: pool, node.output: affine})
    prune(graph)
    return graph


def fold_affine_at_borders(graph: g.Graph) -> g.Graph:
    """A BatchNorm between a map in which zeros are expected and convolutions with padding goes into
    them. Its shift does not reach into the padding: what the weights make of it, other numbers at
    the border than inside, is a second convolution, of a map of ones with one channel, which is
    added to the first."""
    graph = graph.copy()
    producers = graph.producers()
    for node in list(graph.nodes):
        if not isinstance(node, ops.BatchNorm) or node.act is not None or node.output in graph.outputs:
            continue
        behind = [n for n in graph.nodes if node.output in n.inputs]
        x = graph.shape(node.inputs[0])
        known = behind and len(x) == 4 and expects_zeros(graph, producers, node.inputs[0])
        if not known or not all(_takes_affine(n, node.output, padded=True) for n in behind):
            continue
        for n in behind:
            assert isinstance(n, ops.Conv2d)
            merged = _with_affine(n, node)
            if any(n.padding):
                merged = _with_affine(n, dataclasses.replace(node, shift=np.zeros_like(node.shift)))
                merged.inputs = (merged.inputs[0], _of_ones(graph, n, node))
            graph.nodes[graph.nodes.index(n)] = merged
        graph.nodes.remove(node)
    prune(graph)
    return graph


def _of_ones(graph: g.Graph, n: ops.Conv2d, affine: ops.BatchNorm) -> str:
    """In place, before ``n``: what its weights make of the shift, plus its residual."""
    batch, _, h, w = graph.shape(affine.inputs[0])
    weight = n.weight.astype(np.float64) * affine.shift.astype(np.float64)[None, :, None, None]
    ones = graph.add_constant(np.ones((1, 1, int(h), int(w)), np.float32), f"{n.name}_ones")  # type: ignore[arg-type]
    grown = ops.Expand(f"{n.name}:ones", (ones,), graph.fresh(f"{n.output}_ones"), shape=(batch, 1, h, w))
    shift = dataclasses.replace(
        n,
        name=f"{n.name}:shift",
        weight=weight.sum(1, keepdims=True).astype(np.float32),
        bias=None,
        act=None,
    )
    shift.inputs = (grown.output, *n.inputs[1:])
    shift.output = graph.fresh(f"{n.output}_shift")
    graph.values[grown.output] = g.Value(grown.output, grown.shape)
    graph.values[shift.output] = g.Value(shift.output, graph.shape(n.output))
    at = graph.nodes.index(n)
    graph.nodes[at:at] = [grown, shift]
    return shift.output


def _takes_affine(n: g.Node, v: str, padded: bool = False) -> bool:
    if not isinstance(n, ops.Conv2d) or n.inputs[0] != v or v in n.inputs[1:]:
        return False
    return (n.groups == 1 and n.pre_act is None) if padded else not any(n.padding)


def _with_affine(n: ops.Conv2d, affine: ops.BatchNorm) -> ops.Conv2d:
    o, each = n.weight.shape[:2]
    of_group = np.repeat(np.arange(n.groups), o // n.groups)[:, None] * each + np.arange(each)[None]
    weight = n.weight.astype(np.float64)
    shift = (weight.sum((2, 3)) * affine.shift.astype(np.float64)[of_group]).sum(1)
    bias = shift if n.bias is None else n.bias + shift
    weight *= affine.scale.astype(np.float64)[of_group][:, :, None, None]
    merged = dataclasses.replace(n, weight=weight.astype(np.float32), bias=bias.astype(np.float32))
    merged.inputs, merged.output = (affine.inputs[0], *n.inputs[1:]), n.output
    return merged
