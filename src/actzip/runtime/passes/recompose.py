"""Activations that are written out in arithmetic, or in several nodes, become one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.passes.edit import drop_dead, uses


def merge_acts(first: Act, second: Act) -> Act | None:
    """One function for ``second(first(x))``, None where there is none in the table."""
    if first.kind == "relu":
        first = Act.of("clip", lo=0.0)
    if second.kind == "relu":
        second = Act.of("clip", lo=0.0)
    if first.kind == "clip" and second.kind == "clip":
        lo, hi = max(first.lo, second.lo), min(first.hi, second.hi)
        if lo > hi:
            return None
        return Act.of("relu") if (lo, hi) == (0.0, math.inf) else Act.of("clip", lo=lo, hi=hi)
    if first.kind == "clip" and second.kind == "quantize":  # which never falls: bounds may be rounded instead
        return _bounded(second, first.lo, first.hi)
    if first.kind == "quantize" and second.kind == "clip":
        lo, hi = first.alpha * first.lo, first.alpha * first.hi
        if (second.lo <= lo or second.lo == 0.0) and (second.hi >= hi or second.hi == 0.0):
            return _bounded(first, second.lo, second.hi)
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


def _bounded(quantize: Act, lo: float, hi: float) -> Act | None:
    """The quantizer of numbers that are cut to ``lo`` and ``hi`` before."""
    step = np.float32(quantize.alpha)
    low, high = (float(np.round(np.float32(v) / step)) for v in (lo, hi))
    low, high = max(low, quantize.lo), min(high, quantize.hi)
    return None if low > high else dataclasses.replace(quantize, lo=low, hi=high)


def recompose_activations(graph: g.Graph) -> g.Graph:
    """Activations written out in arithmetic get their node: x * sigmoid(x), x * clip(x / 6 + 0.5, 0, 1),
    x * clip(x + 3, 0, 6) / 6, x * (1 + erf(x / sqrt(2))) / 2, its approximation by tanh, and
    clip(x * a + b, 0, 1) alone."""
    graph = graph.copy()
    for _ in range(3):
        producers = graph.producers()
        for i, node in enumerate(graph.nodes):
            new = _recomposed(graph, producers, node)
            if new is not None:
                graph.nodes[i] = new
                producers[new.output] = new
    return drop_dead(graph)


def scale_activations(graph: g.Graph) -> g.Graph:
    """A BatchNorm of one scale and one shift for all channels goes into the h-swish that it follows."""
    graph = graph.copy()
    producers, readers = graph.producers(), uses(graph)
    for i, node in enumerate(graph.nodes):
        before = producers.get(node.inputs[0]) if node.inputs else None
        if (
            isinstance(node, ops.BatchNorm)
            and node.act is None
            and isinstance(before, ops.Activation)
            and before.act.kind == "hardswish"
            and readers[before.output] == 1
            and float(np.ptp(node.scale)) == float(np.ptp(node.shift)) == 0.0
        ):
            act = Act.of("scaled_hardswish", alpha=float(node.scale[0]), beta=float(node.shift[0]))
            new = ops.Activation(node.name, before.inputs, node.output, act=act, source=node.source)
            graph.nodes[i] = producers[node.output] = new
    return drop_dead(graph)


def _number(graph: g.Graph, name: str) -> float | None:
    a = graph.constants.get(name)
    return float(a.reshape(-1)[0]) if a is not None and a.size == 1 else None


def _affine_of(
    graph: g.Graph, producers: dict[str, g.Node], v: str, stop: str = ""
) -> tuple[str, float, float]:
    """``v`` as a * x + b of some x, by following scalar arithmetic, not beyond ``stop``."""
    a, b = 1.0, 0.0
    while True:
        n = producers.get(v)
        if v == stop or not isinstance(n, ops.Binary) or n.act is not None:
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
        isinstance(node, ops.Activation)
        and node.act.kind == "clip"
        and (node.act.lo, node.act.hi) == (0.0, 6.0)
    ):
        return None
    if (
        isinstance(node, ops.Activation)
        and node.act.kind == "clip"
        and (node.act.lo, node.act.hi) == (0.0, 1.0)
    ):
        x, a, b = _affine_of(graph, producers, node.inputs[0])
        if x != node.inputs[0] and a > 0:
            act = Act.of("hardsigmoid", alpha=a, beta=b)
            return ops.Activation(node.name, (x,), node.output, act=act, source=node.source)
        return None
    if not isinstance(node, ops.Binary) or node.act is not None or node.kind not in ("mul", "div"):
        return None
    if node.kind == "div" or any(v in graph.constants for v in node.inputs):
        # clip(x + 3, 0, 6) / 6
        x, a, b = _affine_of(graph, producers, node.output)
        p = producers.get(x)
        if isinstance(p, ops.Activation) and p.act.kind == "clip" and b == 0.0:
            lo, hi = p.act.lo * a, p.act.hi * a
            if _near(lo, 0.0) and _near(hi, 1.0):
                z, c, d = _affine_of(graph, producers, p.inputs[0])
                act = Act.of("hardsigmoid", alpha=a * c, beta=a * d)
                return ops.Activation(node.name, (z,), node.output, act=act, source=node.source)
        if isinstance(p, ops.Binary) and p.kind == "mul" and b == 0.0 and p.act is None:
            return _gated(graph, producers, node, p, a)
        return None
    return _gated(graph, producers, node, node, 1.0)


def _gated(
    graph: g.Graph, producers: dict[str, g.Node], node: g.Node, product: g.Node, scale: float
) -> g.Node | None:
    """The activation that ``node``, ``scale`` times the ``product`` of some x and a gate of x, is."""
    for side, y0 in (product.inputs, product.inputs[::-1]):
        y, a, b = _affine_of(graph, producers, y0, side)
        q = producers.get(y)
        if not isinstance(q, ops.Activation):
            continue
        z, c, d = _affine_of(graph, producers, q.inputs[0], side)
        under, s, t = _affine_of(graph, producers, side)
        for x, k in ((side, scale), (under, scale * s if t == 0.0 else 0.0)):
            kind = _gate_kind(q.act, a * k, b * k, c, d) if z == x else ""
            if q.act.kind == "tanh" and _all_near((a * k, 0.5), (b * k, 0.5), (d, 0.0)):
                kind = "gelu_tanh" if _is_cubic(graph, producers, z, x, c) else ""
            if kind:
                return ops.Activation(node.name, (x,), node.output, act=Act.of(kind), source=node.source)
    return None


def _gate_kind(gate: Act, a: float, b: float, c: float, d: float) -> str:
    """The activation that x * (a * gate(c * x + d) + b) is, "" where it is none of them."""
    if gate.kind == "sigmoid" and _all_near((a, 1.0), (b, 0.0), (c, 1.0), (d, 0.0)):
        return "silu"
    if gate.kind == "hardsigmoid" and _all_near((a, 1.0), (b, 0.0)):
        if _all_near((gate.alpha * c, 1 / 6), (gate.alpha * d + gate.beta, 0.5)):
            return "hardswish"
    elif gate.kind == "clip" and gate.lo == 0 and _all_near((gate.hi * a, 1.0), (b, 0.0)):
        if _all_near((a * c, 1 / 6), (a * d, 0.5)):
            return "hardswish"
    elif gate.kind == "erf" and _all_near((a, 0.5), (b, 0.5), (c, math.sqrt(0.5)), (d, 0.0)):
        return "gelu"
    return ""


def _is_cubic(graph: g.Graph, producers: dict[str, g.Node], z: str, x: str, c: float) -> bool:
    """Whether ``c`` times ``z`` is sqrt(2 / pi) * (x + 0.044715 * x^3), of which GELU takes tanh."""
    found = _polynomial(graph, producers, z, x, 8)
    if found is None or any(k and degree not in (1, 3) for degree, k in found.items()):
        return False
    want = math.sqrt(2 / math.pi)
    return _all_near((c * found.get(1, 0.0), want), (c * found.get(3, 0.0), 0.044715 * want))


def _polynomial(
    graph: g.Graph, producers: dict[str, g.Node], v: str, x: str, depth: int
) -> dict[int, float] | None:
    """The coefficients, by degree, of ``v`` as a polynomial of ``x``; None where it is none of at most
    ``depth`` operations."""
    if v == x:
        return {1: 1.0}
    if (k := _number(graph, v)) is not None:
        return {0: k}
    n = producers.get(v)
    if depth == 0 or not g.same_shape(graph.shape(v), graph.shape(x)):
        return None
    if isinstance(n, ops.Activation) and n.act.kind == "square":
        p = _polynomial(graph, producers, n.inputs[0], x, depth - 1)
        return None if p is None else _product(p, p)
    if not isinstance(n, ops.Binary) or n.act is not None:
        return None
    p, q = (_polynomial(graph, producers, i, x, depth - 1) for i in n.inputs)
    if p is None or q is None:
        return None
    if n.kind == "mul":
        return _product(p, q)
    if n.kind == "div" and q.keys() == {0} and q[0] != 0:
        return _product(p, {0: 1 / q[0]})
    if n.kind == "pow" and q.keys() == {0} and q[0] in (2, 3):
        return _product(p, p if q[0] == 2 else _product(p, p))
    if n.kind not in ("add", "sub"):
        return None
    sign = 1 if n.kind == "add" else -1
    return {d: p.get(d, 0.0) + sign * q.get(d, 0.0) for d in p.keys() | q.keys()}


def _product(p: dict[int, float], q: dict[int, float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for i, a in p.items():
        for j, b in q.items():
            found[i + j] = found.get(i + j, 0.0) + a * b
    return found


def _all_near(*pairs: tuple[float, float]) -> bool:
    return all(_near(x, y) for x, y in pairs)
