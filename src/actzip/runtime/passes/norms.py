"""Layer norms that are written out in means, differences and roots become one node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.passes.edit import drop_dead, uses

__all__ = ["recompose_norms"]


@dataclass
class _Scale:
    """1 / sqrt(mean((x - mean(x))^2) + eps) over ``axes``, times ``weight``."""

    x: str
    axes: tuple[int, ...]
    eps: float
    weight: g.Array | None = None


def recompose_norms(graph: g.Graph) -> g.Graph:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimensions, or over the channels of
    maps, as exporters of ONNX (PyTorch's before opset 17) write it, and x * scale + (bias - mean * scale),
    as TensorFlow's do, become one :class:`~actzip.runtime.ops.norm.LayerNorm`."""
    graph = graph.copy()
    norms = _Norms(graph)
    for i, node in enumerate(graph.nodes):
        made = norms.of(node)
        if made is not None:
            graph.nodes[i] = norms.producers[node.output] = made
    return drop_dead(graph)


class _Norms:
    def __init__(self, graph: g.Graph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.readers = uses(graph)

    def of(self, node: g.Node) -> ops.LayerNorm | None:
        """The norm that ``node`` is the last step of, None where it is of none."""
        if not isinstance(node, ops.Binary) or node.act is not None:
            return None
        if node.kind in ("add", "mul"):
            for v, k in (node.inputs, node.inputs[::-1]):
                norm, constant = self.producers.get(v), self.graph.constants.get(k)
                if isinstance(norm, ops.LayerNorm) and constant is not None:
                    return self._with(node, norm, constant)
        if node.kind in ("div", "mul"):
            return self._plain(node)
        return self._from_sum(node) if node.kind in ("add", "sub") else None

    def _plain(self, node: ops.Binary) -> ops.LayerNorm | None:
        """(x - mean) / sqrt(...), or times the reciprocal."""
        for d, r in (node.inputs, node.inputs[::-1])[: 1 if node.kind == "div" else 2]:
            scale = self._root(r) if node.kind == "div" else self._scale(r)
            if scale is not None and self._centred(d) == (scale.x, scale.axes):
                return self._made(node, scale, None)
        return None

    def _from_sum(self, node: ops.Binary) -> ops.LayerNorm | None:
        """x * scale + (bias - mean * scale), or with the difference written as a sum of the negative."""
        for v, rest in (node.inputs, node.inputs[::-1])[: 1 if node.kind == "sub" else 2]:
            product, shift = self._binary(v, "mul"), self.producers.get(rest)
            if product is None:
                continue
            for x, k in (product.inputs, product.inputs[::-1]):
                scale = self._scale(k)
                if scale is None or scale.x != x:
                    continue
                bias = self._bias(shift, k, scale, node.kind == "sub")
                if bias is not None:
                    return self._made(node, scale, bias[0])
        return None

    def _bias(self, shift: g.Node | None, k: str, scale: _Scale, minus: bool) -> tuple[g.Array | None] | None:
        """The bias in what is added to x * ``k``; None where that is not bias - mean * k."""
        if not isinstance(shift, ops.Binary) or shift.act is not None:
            return None
        if self._less_mean(shift, k, scale, minus):
            return (None,)
        if shift.kind == "sub" and not minus and shift.inputs[0] in self.graph.constants:
            times = self.producers.get(shift.inputs[1])
            if self._less_mean(times, k, scale, True):
                return (self.graph.constants[shift.inputs[0]],)
        if shift.kind == "add" and not minus:
            for v, c in (shift.inputs, shift.inputs[::-1]):
                if c in self.graph.constants and self._less_mean(self.producers.get(v), k, scale, False):
                    return (self.graph.constants[c],)
        return None

    def _less_mean(self, node: g.Node | None, k: str, scale: _Scale, minus: bool) -> bool:
        """Whether ``node`` is mean * k, or -mean * k where it is not subtracted."""
        if not isinstance(node, ops.Binary) or node.kind != "mul" or node.act is not None:
            return False
        for m, other in (node.inputs, node.inputs[::-1]):
            if other != k:
                continue
            if not minus:
                negative = self.producers.get(m)
                if not isinstance(negative, ops.Activation) or negative.act.kind != "neg":
                    return False
                m = negative.inputs[0]
            return self._mean(m) == (scale.x, scale.axes)
        return False

    def _scale(self, v: str) -> _Scale | None:
        """``v`` as 1 / sqrt(variance + eps), times constants."""
        node = self.producers.get(v)
        if isinstance(node, ops.Activation) and node.act.kind == "reciprocal":
            return self._root(node.inputs[0])
        if isinstance(node, ops.Activation) and node.act.kind == "rsqrt":
            return self._variance(node.inputs[0])
        if isinstance(node, ops.Binary) and node.act is None:
            for r, c in (node.inputs, node.inputs[::-1]):
                constant = self.graph.constants.get(c)
                if constant is None:
                    continue
                if node.kind == "mul":
                    found = self._scale(r)
                    if found is not None and found.weight is None:
                        return _Scale(found.x, found.axes, found.eps, constant)
                elif node.kind == "div" and c == node.inputs[0] and bool((constant == 1).all()):
                    return self._root(r)
        return None

    def _root(self, v: str) -> _Scale | None:
        node = self.producers.get(v)
        if isinstance(node, ops.Activation) and node.act.kind == "sqrt":
            return self._variance(node.inputs[0])
        return None

    def _variance(self, v: str) -> _Scale | None:
        """``v`` as mean((x - mean(x))^2) + eps."""
        total = self._binary(v, "add")
        if total is None:
            return None
        for m, c in (total.inputs, total.inputs[::-1]):
            eps, mean = self.graph.constants.get(c), self.producers.get(m)
            if eps is None or eps.size != 1 or not self._averages(mean):
                continue
            assert isinstance(mean, ops.Reduce)
            square = self.producers.get(mean.inputs[0])
            if isinstance(square, ops.Activation) and square.act.kind == "square":
                d = square.inputs[0]
            elif isinstance(square, ops.Binary) and square.kind == "mul" and square.act is None:
                d = square.inputs[0] if square.inputs[0] == square.inputs[1] else ""
            else:
                continue
            centred = self._centred(d)
            if centred is not None and centred[1] == self._axes(mean):
                return _Scale(*centred, float(eps.reshape(-1)[0]))
        return None

    def _centred(self, v: str) -> tuple[str, tuple[int, ...]] | None:
        """x and the axes of ``v`` = x - mean(x)."""
        node = self._binary(v, "sub")
        found = None if node is None else self._mean(node.inputs[1])
        return found if node is not None and found is not None and found[0] == node.inputs[0] else None

    def _mean(self, v: str) -> tuple[str, tuple[int, ...]] | None:
        node = self.producers.get(v)
        if not self._averages(node):
            return None
        assert isinstance(node, ops.Reduce)
        return node.inputs[0], self._axes(node)

    def _averages(self, node: g.Node | None) -> bool:
        return isinstance(node, ops.Reduce) and node.kind == "mean" and node.keepdims

    def _axes(self, node: ops.Reduce) -> tuple[int, ...]:
        rank = len(self.graph.shape(node.inputs[0]))
        return tuple(sorted(a % rank for a in node.axes))

    def _binary(self, v: str, kind: str) -> ops.Binary | None:
        node = self.producers.get(v)
        good = isinstance(node, ops.Binary) and node.kind == kind and node.act is None
        return node if good else None  # type: ignore[return-value]

    # what is made

    def _made(self, node: ops.Binary, scale: _Scale, bias: g.Array | None) -> ops.LayerNorm | None:
        shape = self.graph.shape(scale.x)
        rank = len(shape)
        channels = scale.axes == (1,) and rank == 4
        tail = scale.axes == tuple(range(rank - len(scale.axes), rank))
        sizes = [shape[a] for a in scale.axes]
        if not (channels or tail) or not all(isinstance(d, int) for d in sizes):
            return None
        if not g.same_shape(shape, self.graph.shape(node.output)):
            return None
        norm = ops.LayerNorm(
            node.name,
            (scale.x,),
            node.output,
            shape=tuple(int(d) for d in sizes),  # type: ignore[arg-type]
            eps=scale.eps,
            channels=channels,
            source=node.source,
        )
        arrays = [None if a is None else self._per_number(norm, a, rank) for a in (scale.weight, bias)]
        if any(
            a is None and given is not None for a, given in zip(arrays, (scale.weight, bias), strict=True)
        ):
            return None
        norm.weight, norm.bias = arrays
        return norm

    def _with(self, node: ops.Binary, norm: ops.LayerNorm, constant: g.Array) -> ops.LayerNorm | None:
        """``norm`` with a weight that follows, or a bias; None where it has one, or is read elsewhere too."""
        if self.readers[norm.output] > 1 or norm.bias is not None:  # an output counts as one
            return None
        if node.kind == "mul" and norm.weight is not None:
            return None
        if not g.same_shape(self.graph.shape(norm.output), self.graph.shape(node.output)):
            return None
        array = self._per_number(norm, constant, len(self.graph.shape(node.output)))
        if array is None:
            return None
        weight, bias = (array, None) if node.kind == "mul" else (norm.weight, array)
        return ops.LayerNorm(
            node.name,
            norm.inputs,
            node.output,
            shape=norm.shape,
            weight=weight,
            bias=bias,
            eps=norm.eps,
            channels=norm.channels,
            source=node.source,
        )

    @staticmethod
    def _per_number(norm: ops.LayerNorm, constant: g.Array, rank: int) -> g.Array | None:
        """A constant that broadcasts along the normalised dimensions alone, one number for each of them."""
        if constant.ndim > rank:
            return None
        dims = (1,) * (rank - constant.ndim) + constant.shape
        count = len(norm.shape)
        inside = dims[1:2] if norm.channels else dims[rank - count :]
        if int(np.prod(inside)) != constant.size:
            return None
        return np.ascontiguousarray(np.broadcast_to(constant.reshape(inside), norm.shape), np.float32)
