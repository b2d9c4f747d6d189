"""Branches that only training needs become one convolution; depthwise ones to several maps, several."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead, uses

__all__ = ["merge_branches", "split_multipliers"]


@dataclass
class _Term:
    """A linear function of the map ``base``: a convolution, of which ``multiplies`` is what it
    costs each output pixel (0: the map itself, or a scale and shift of it).

    ``shrink``: for both axes, by how much more than its stride says the output is smaller.
    """

    weight: g.Array
    bias: g.Array
    stride: tuple[int, int]
    top: tuple[int, int]
    shrink: tuple[int, int]
    groups: int
    multiplies: int
    convs: tuple[ops.Conv2d, ...] = ()


def merge_branches(graph: g.Graph) -> g.Graph:
    """``conv(x) + conv(x)``, ``conv(x) + x * scale + shift`` and what else is linear in ``x`` become
    one convolution, where that multiplies no more: RepVGG, MobileOne, FastViT as they are trained.

    ``A(x) + B(x)`` of kernels around the same pixel is ``(A + B)(x)``, the smaller filled up with
    zeros; weights are added in double precision.
    """
    graph = graph.copy()
    merger = _Merger(graph)
    taken: set[str] = set()  # outputs that a sum behind them has taken
    for i in reversed(range(len(graph.nodes))):
        node = graph.nodes[i]
        if isinstance(node, ops.Binary) and node.output not in taken:
            made = merger.of(node)
            if made is not None:
                graph.nodes[i] = made
                taken |= merger.inside(node, made.inputs[0])
    return drop_dead(graph)


class _Merger:
    def __init__(self, graph: g.Graph) -> None:
        self.graph = graph
        self.producers, self.readers = graph.producers(), uses(graph)

    def of(self, node: ops.Binary) -> ops.Conv2d | None:
        """The convolution that ``node`` is the sum of; None where it is of none."""
        if not _adds(node):
            return None
        for base in self._bases(node):
            term = self._term(node.output, base, first=True)
            if term is not None and term.convs:
                return self._made(node, base, term)
        return None

    def inside(self, node: g.Node, base: str) -> set[str]:
        """What stands between ``base`` and the output of ``node``."""
        found = set()
        for v in node.inputs:
            step = self.producers.get(v)
            if v != base and step is not None:
                found |= {v} | self.inside(step, base)
        return found

    def _steps(self, v: str) -> g.Node | None:
        """What makes ``v`` for one reader alone, and no quantizer rounds."""
        alone = self.readers[v] == 1 and self.graph.values[v].quant is None
        return self.producers.get(v) if alone else None

    def _bases(self, node: g.Node) -> list[str]:
        """The inputs of convolutions that are added, in order."""
        found: list[str] = []
        for v in node.inputs:
            step = self._steps(v)
            if isinstance(step, ops.Conv2d):
                found += step.inputs[:1]
            elif isinstance(step, ops.BatchNorm) or (isinstance(step, ops.Binary) and _adds(step)):
                found += self._bases(step)
        return list(dict.fromkeys(found))

    def _term(self, v: str, base: str, first: bool = False) -> _Term | None:
        if v == base:
            return _same(self.graph.shape(base))
        node = self.producers.get(v) if first else self._steps(v)
        if isinstance(node, ops.Conv2d):
            return _of_conv(node) if node.inputs == (base,) else None
        if isinstance(node, ops.BatchNorm) and node.act is None:
            inner = self._term(node.inputs[0], base)
            return None if inner is None else _scaled(inner, node.scale, node.shift)
        if isinstance(node, ops.Binary) and _adds(node):
            a, b = (self._term(u, base) for u in node.inputs)
            if b is not None and node.kind == "sub":
                b = _scaled(b, -np.ones_like(b.bias), np.zeros_like(b.bias))
            return None if a is None or b is None else _sum(a, b)
        return None

    def _made(self, node: ops.Binary, base: str, term: _Term) -> ops.Conv2d | None:
        size = term.weight.shape[2:]
        end = tuple(size[a] - term.top[a] - term.shrink[a] for a in (0, 1))
        if min(end) < 0:
            return None
        main = max(term.convs, key=lambda c: c.weight.size)
        made = ops.Conv2d(
            main.name,
            (base,),
            node.output,
            weight=np.ascontiguousarray(term.weight, np.float32),
            bias=np.ascontiguousarray(term.bias, np.float32),
            stride=term.stride,
            padding=(*term.top, *end),  # type: ignore[arg-type]
            groups=term.groups,
            source=main.source,
        )
        same = g.same_shape(made.infer([self.graph.shape(base)]), self.graph.shape(node.output))
        return made if same else None


def _adds(node: ops.Binary) -> bool:
    return node.kind in ("add", "sub") and node.act is None


def _same(shape: g.Shape) -> _Term | None:
    if len(shape) != 4 or not isinstance(shape[1], int):
        return None
    c = shape[1]
    return _Term(np.ones((c, 1, 1, 1)), np.zeros(c), (1, 1), (0, 0), (1, 1), c, 0)


def _of_conv(node: ops.Conv2d) -> _Term | None:
    kernel = node.weight.shape[2:]
    spread = any(k > 1 and d > 1 for k, d in zip(kernel, node.dilation, strict=True))
    if node.act is not None or node.pre_act is not None or spread:
        return None
    top, left, bottom, right = node.padding
    return _Term(
        node.weight.astype(np.float64),
        np.zeros(len(node.weight)) if node.bias is None else node.bias.astype(np.float64),
        node.stride,
        (top, left),
        (kernel[0] - top - bottom, kernel[1] - left - right),
        node.groups,
        int(node.weight.size),
        (node,),
    )


def _scaled(t: _Term, scale: g.Array, shift: g.Array) -> _Term:
    by = scale.astype(np.float64)
    weight, bias = t.weight * by[:, None, None, None], t.bias * by + shift
    return _Term(weight, bias, t.stride, t.top, t.shrink, t.groups, t.multiplies, t.convs)


def _sum(a: _Term, b: _Term) -> _Term | None:
    """Both in one; None where they are not of the same pixels, or that would multiply more."""
    if a.stride != b.stride or a.shrink != b.shrink or len(a.bias) != len(b.bias):
        return None
    groups = min(a.groups, b.groups)
    wide = [_in_groups(t, groups) for t in (a, b)]
    top = (max(a.top[0], b.top[0]), max(a.top[1], b.top[1]))
    size = [top[i] + max(t.weight.shape[2 + i] - t.top[i] for t in (a, b)) for i in (0, 1)]
    weight = np.zeros((len(a.bias), wide[0].shape[1], *size))
    multiplies = a.multiplies + b.multiplies
    if weight.size > multiplies and multiplies > 0:
        return None
    for t, w in zip((a, b), wide, strict=True):
        y, x = top[0] - t.top[0], top[1] - t.top[1]
        weight[:, :, y : y + w.shape[2], x : x + w.shape[3]] += w
    return _Term(weight, a.bias + b.bias, a.stride, top, a.shrink, groups, multiplies, a.convs + b.convs)


def _in_groups(t: _Term, groups: int) -> g.Array:
    """The weight in fewer groups, with zeros where groups join."""
    if t.groups == groups:
        return t.weight
    outputs, inputs = t.weight.shape[:2]
    joined = t.groups // groups  # so many old groups in a new one
    weight = np.zeros((outputs, joined, *t.weight.shape[1:]))
    old = np.arange(outputs) // (outputs // t.groups)
    weight[np.arange(outputs), old % joined] = t.weight
    return weight.reshape(outputs, joined * inputs, *t.weight.shape[2:])


def split_multipliers(graph: g.Graph) -> g.Graph:
    """A depthwise convolution to several maps a channel, which only convolutions without groups read,
    becomes as many depthwise convolutions to one, side by side: their readers' weights change places
    instead of the channels."""
    graph = graph.copy()
    nodes: list[g.Node] = []
    for node in graph.nodes:
        readers = _dense_readers(graph, node) if _multiplies(graph, node) else []
        if not readers or not isinstance(node, ops.Conv2d):
            nodes.append(node)
            continue
        nodes += _split(graph, node)
        for reader in readers:
            w = reader.weight
            by_map = w.reshape(len(w), node.groups, -1, *w.shape[2:]).swapaxes(1, 2)
            reader.weight = np.ascontiguousarray(by_map.reshape(w.shape))  # nodes are this copy's own
    graph.nodes = nodes
    return graph


def _multiplies(graph: g.Graph, n: g.Node) -> bool:
    if not isinstance(n, ops.Conv2d) or n.weight.shape[1] != 1 or n.groups == 1 or len(n.inputs) > 1:
        return False
    inside = graph.values[n.output].quant is None and n.output not in graph.outputs
    return inside and len(n.weight) > n.groups


def _dense_readers(graph: g.Graph, n: g.Node) -> list[ops.Conv2d]:
    """Who reads ``n``, if these are convolutions without groups that do not add it."""
    found: list[ops.Conv2d] = []
    for r in graph.nodes:
        if n.output in r.inputs:
            if not isinstance(r, ops.Conv2d) or r.groups != 1 or n.output in r.inputs[1:]:
                return []
            found.append(r)
    return found


def _split(graph: g.Graph, n: ops.Conv2d) -> list[g.Node]:
    times = len(n.weight) // n.groups
    batch, _, h, w = graph.shape(n.output)
    parts: list[g.Node] = []
    for k in range(times):
        v = graph.fresh(n.output + "_part")
        graph.values[v] = g.Value(v, (batch, n.groups, h, w))
        own: dict[str, Any] = {"weight": np.ascontiguousarray(n.weight[k::times])}
        if n.bias is not None:
            own["bias"] = np.ascontiguousarray(n.bias[k::times])
        for name in ("act", "pre_act"):
            act = getattr(n, name)
            if act is not None and act.param is not None and act.param.size > 1:
                own[name] = dataclasses.replace(act, param=act.param.reshape(-1)[k::times])
        parts.append(dataclasses.replace(n, name=f"{n.name}:{k}", output=v, **own))
    return [*parts, ops.Concat(n.name, tuple(p.output for p in parts), n.output, axis=1, source=n.source)]
