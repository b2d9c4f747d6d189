"""ONNX's QuantizeLinear and DequantizeLinear of one scale, in float arithmetic: one function of a
value, which its producer does as it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.passes.edit import drop_dead, replace_reads

__all__ = ["recompose_quantizers"]

_MOST = 1 << 22  # integers that the engine rounds to


def recompose_quantizers(graph: g.Graph) -> g.Graph:
    """``(clip(round(x / s) + z, lo, hi) - z) * s`` becomes the activation ``quantize``, before what only
    moves or chooses integers; a second one of the same value, or of what was rounded so before, goes."""
    graph = graph.copy()
    rewrite = _Rewrite(graph)
    for node in graph.nodes:
        rewrite.take(node)
    graph.nodes = rewrite.nodes
    return drop_dead(graph)


class _Rewrite:
    """The nodes of a graph, taken in order; in ``nodes`` those that stand for them."""

    def __init__(self, graph: g.Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.nodes: list[g.Node] = []
        self.made: dict[tuple[str, float, float, float], str] = {}  # integers, their range -> numbers

    def take(self, node: g.Node) -> None:
        chain = _Chain(self.graph, self.producers, node.output)
        act = _quantizer(chain)
        if act is None:
            self.nodes.append(node)
            return
        key = (chain.integers, act.alpha, act.lo, act.hi)
        if key not in self.made:
            self.made[key] = self._dequantized(node, chain, act)
        same = self.made[key]
        if same == node.output:
            return
        if node.output in self.graph.outputs:
            shape = self.graph.shape(node.output)
            self.add(ops.Reshape(node.name, (same,), node.output, shape=shape, source=node.source))
        else:
            replace_reads(self.graph, node.output, same)

    def add(self, node: g.Node) -> str:
        self.nodes.append(node)
        self.producers[node.output] = node
        return node.output

    def _dequantized(self, node: g.Node, chain: _Chain, act: Act) -> str:
        """What ``node`` gives, of the value that is quantized."""
        x, moves = chain.value, chain.moves[::-1]
        key = (x, act.alpha, act.lo, act.hi)
        if not _rounded(self.producers, x, act):
            if key not in self.made:
                out = self._value(node.output + "_rounded", x) if moves else node.output
                self.made[key] = out
                self.add(ops.Activation(node.name, (x,), out, act=act, source=node.source))
            x = self.made[key]
        for move in moves:
            copied = dataclasses.replace(move, name=f"{node.name}:{move.name}", inputs=(x,))
            copied.output = node.output if move is moves[-1] else self._value(move.output, move.output)
            x = self.add(copied)
        return x

    def _value(self, base: str, like: str) -> str:
        name = self.graph.fresh(base)
        self.graph.values[name] = g.Value(name, self.graph.shape(like))
        return name


def _quantizer(chain: _Chain) -> Act | None:
    """How the operand of ``chain``, a dequantized value, was quantized; it ends at what was."""
    step = chain.number("mul")
    if step is None:
        return None
    minus = chain.number("sub") or 0.0
    chain.step_over_moves()
    clip = chain.act("clip")
    plus = chain.number("add") or 0.0
    rounds = chain.act("round")
    by = chain.number("div")
    if clip is None or rounds is None or by != step or plus != minus:
        return None
    if not 0.0 < step < np.inf or max(abs(clip.lo), abs(clip.hi), abs(plus)) >= _MOST / 2:
        return None
    return Act.of("quantize", alpha=step, lo=clip.lo - plus, hi=clip.hi - plus)


class _Chain:
    """Nodes of one operand, from ``value`` backwards; ``moves``: those that move or choose
    ``integers``."""

    def __init__(self, graph: g.Graph, producers: Mapping[str, g.Node], value: str) -> None:
        self.graph, self.producers, self.value = graph, producers, value
        self.integers, self.moves = value, list[g.Node]()

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

    def step_over_moves(self) -> None:
        self.integers = self.value
        while (n := self.producers.get(self.value)) is not None and _chooses(n) and len(n.inputs) == 1:
            self.moves.append(n)
            self.value = n.inputs[0]


def _chooses(n: g.Node) -> bool:
    """Whether every number that ``n`` gives is one that it reads."""
    if isinstance(n, ops.Pool):
        return n.kind == "max" and n.bias is None and n.act is None
    if isinstance(n, ops.AdaptivePool):
        return n.kind == "max"
    return isinstance(n, (ops.Reshape, ops.Transpose, ops.Slice, ops.Concat, ops.Expand))


def _rounded(producers: Mapping[str, g.Node], value: str, act: Act) -> bool:
    """Whether all numbers in ``value`` are ones that ``act`` leaves as they are."""
    p = producers.get(value)
    if isinstance(p, ops.Activation) and p.act.kind == "quantize":
        return p.act.alpha == act.alpha and act.lo <= p.act.lo and p.act.hi <= act.hi
    return p is not None and _chooses(p) and all(_rounded(producers, v, act) for v in p.inputs)
