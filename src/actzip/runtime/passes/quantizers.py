"""ONNX's QuantizeLinear and DequantizeLinear of one scale, in float arithmetic: one function of a
value, which its producer does as it writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.passes.edit import drop_dead, replace_reads

__all__ = ["recompose_quantizers"]

_MOST = 1 << 22  # integers that the engine rounds to


def recompose_quantizers(graph: g.Graph) -> g.Graph:
    """``(clip(round(x / s) + z, lo, hi) - z) * s`` becomes the activation ``quantize``; a second one of
    the same value, or of what was rounded so before, goes."""
    graph = graph.copy()
    producers = graph.producers()
    made: dict[tuple[str, float, float, float], str] = {}
    for i, node in enumerate(graph.nodes):
        found = _quantizer(graph, producers, node)
        if found is None:
            continue
        x, act = found
        key = (x, act.alpha, act.lo, act.hi)
        same = x if _rounded(producers, x, act) else made.setdefault(key, node.output)
        new = ops.Activation(node.name, (x,), node.output, act=act, source=node.source)
        graph.nodes[i] = producers[node.output] = new
        if same != node.output and not (same == x and node.output in graph.outputs):
            replace_reads(graph, node.output, same)
    return drop_dead(graph)


def _quantizer(graph: g.Graph, producers: Mapping[str, g.Node], node: g.Node) -> tuple[str, Act] | None:
    """What ``node``, a multiplication, dequantizes, and how it was quantized."""
    chain = _Chain(graph, producers, node.output)
    step = chain.number("mul")
    minus = chain.number("sub") or 0.0
    clip = chain.act("clip")
    plus = chain.number("add") or 0.0
    rounds = chain.act("round")
    by = chain.number("div")
    if step is None or clip is None or rounds is None or by != step or plus != minus:
        return None
    if not 0.0 < step < np.inf or max(abs(clip.lo), abs(clip.hi), abs(plus)) >= _MOST / 2:
        return None
    return chain.value, Act.of("quantize", alpha=step, lo=clip.lo - plus, hi=clip.hi - plus)


class _Chain:
    """Nodes of one operand, from ``value`` backwards."""

    def __init__(self, graph: g.Graph, producers: Mapping[str, g.Node], value: str) -> None:
        self.graph, self.producers, self.value = graph, producers, value

    def number(self, kind: str) -> float | None:
        """Steps over arithmetic with a number; None where something else stands there."""
        n = self.producers.get(self.value)
        if not isinstance(n, ops.Binary) or n.kind != kind or n.act is not None:
            return None
        k = self.graph.constants.get(n.inputs[1])
        if k is None or k.size != 1 or not g.same_shape(*map(self.graph.shape, (n.inputs[0], n.output))):
            return None
        self.value = n.inputs[0]
        return float(k.reshape(-1)[0])

    def act(self, kind: str) -> Act | None:
        """Steps over an activation; None where something else stands there."""
        n = self.producers.get(self.value)
        if not isinstance(n, ops.Activation) or n.act.kind != kind:
            return None
        self.value = n.inputs[0]
        return n.act


def _rounded(producers: Mapping[str, g.Node], value: str, act: Act) -> bool:
    """Whether all numbers in ``value`` are ones that ``act`` leaves as they are."""
    p = producers.get(value)
    if isinstance(p, ops.Activation) and p.act.kind == "quantize":
        return p.act.alpha == act.alpha and act.lo <= p.act.lo and p.act.hi <= act.hi
    chooses = isinstance(p, (ops.Pool, ops.AdaptivePool)) and p.kind == "max"
    if isinstance(p, ops.Pool) and (p.bias is not None or p.act is not None):
        return False
    if chooses or isinstance(p, (ops.Reshape, ops.Transpose, ops.Slice, ops.Concat, ops.Expand)):
        assert p is not None
        return all(_rounded(producers, v, act) for v in p.inputs)
    return False
