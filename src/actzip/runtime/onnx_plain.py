"""ONNX models in operators of ai.onnx: functions of the file's own written out where they are called,
sparse initialisers filled up, the fused operators that ONNX Runtime writes into optimized files
(``com.microsoft``) as what they were made of, and operators on quantized tensors as the same between
DequantizeLinear and QuantizeLinear. What has no rule here stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np

from actzip.errors import DataError
from actzip.runtime.onnx_defined import defined
from actzip.runtime.onnx_file import MAX_ELEMENTS, onnx_package, tensor_array

__all__ = ["plain"]

_FUSED = "com.microsoft"


def plain(model: Any) -> Any:
    """``model``, or a copy that says the same in operators of ai.onnx.

    Raises:
        DataError: a sparse initialiser that is damaged.
    """
    if model.functions:
        from onnx import inliner

        with suppress(Exception):  # of another opset than the model's: they stay calls
            model = inliner.inline_local_functions(_with_defaults(model))
    model = defined(model)
    fused = any(_rule_of(n) is not None for n in model.graph.node)
    sparse = any(a.name == "sparse_value" for n in model.graph.node for a in n.attribute)
    if not fused and not sparse and not model.graph.sparse_initializer:
        return model
    copied = type(model)()
    copied.CopyFrom(model)
    _fill(copied.graph)
    _Rewriter(copied).run()
    return copied


def _with_defaults(model: Any) -> Any:
    """A copy whose calls of functions say the attributes that have defaults, which the inliner forgets."""
    copied = type(model)()
    copied.CopyFrom(model)
    defaults = {(f.domain, f.name): list(f.attribute_proto) for f in copied.functions}
    stack: list[Any] = [copied.graph, *copied.functions]
    while stack:
        for node in stack.pop().node:
            said = {a.name for a in node.attribute}
            node.attribute.extend(
                a for a in defaults.get((node.domain, node.op_type), ()) if a.name not in said
            )
            stack += [graph for a in node.attribute for graph in (a.g, *a.graphs) if graph.node]
    return copied


def _fill(graph: Any) -> None:
    """Sparse initialisers, and constants, as plain ones."""
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse, sparse.values.name))
    del graph.sparse_initializer[:]
    for node in [n for n in graph.node if n.op_type == "Constant" and n.output]:
        for sparse in [a.sparse_tensor for a in node.attribute if a.name == "sparse_value"]:
            graph.initializer.append(_dense(sparse, node.output[0]))
            graph.node.remove(node)


def _dense(sparse: Any, name: str) -> Any:
    """A sparse tensor as a plain one of this name.

    Raises:
        DataError: it is damaged.
    """
    onnx = onnx_package()
    where = f"sparse initialiser {name!r}"
    shape = tuple(int(d) for d in sparse.dims)
    values = tensor_array(onnx, sparse.values, where).reshape(-1)
    at = tensor_array(onnx, sparse.indices, where)
    if min(shape, default=1) < 0 or math.prod(shape) > MAX_ELEMENTS or len(at) != values.size:
        raise DataError(f"{where}: {values.size} values at {at.shape} places of a tensor {shape}")
    dense = np.zeros(shape, values.dtype)
    try:
        flat = at if at.ndim == 1 else np.ravel_multi_index(tuple(at.T), shape)
        dense.reshape(-1)[flat] = values
    except (ValueError, IndexError) as error:
        raise DataError(f"{where}: a place outside of {shape}") from error
    return onnx.numpy_helper.from_array(dense, name)


class _Rewriter:
    """Takes a model's nodes one by one; a rule adds those that stand for one."""

    def __init__(self, model: Any) -> None:
        self.helper = onnx_package().helper
        self.model = model
        self.opset = max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=0)
        self.nodes: list[Any] = []
        self.node: Any = None
        self.attributes: dict[str, Any] = {}
        names = {v for n in model.graph.node for v in (*n.input, *n.output)}
        names |= {t.name for t in model.graph.initializer}
        self.taken = {n.name for n in model.graph.node}
        self.free = (name for k in range(1 << 30) if (name := f"fused_{k}") not in names)

    def run(self) -> None:
        for node in self.model.graph.node:
            rule = _rule_of(node)
            before = len(self.nodes)
            self.node = node
            self.attributes = {a.name: self.helper.get_attribute_value(a) for a in node.attribute}
            out = None if rule is None else rule(self, *node.input)
            if out is None:
                del self.nodes[before:]
                self.nodes.append(node)
            else:
                self.nodes[-1].output[0] = node.output[0]
        del self.model.graph.node[:]
        self.model.graph.node.extend(self.nodes)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node more; the name of what it gives."""
        out = next(self.free)
        base = f"{self.node.name or self.node.output[0]}:{op}"
        name = next(n for k in count() if (n := f"{base}{k or ''}") not in self.taken)
        self.taken.add(name)
        self.nodes.append(self.helper.make_node(op, list(inputs), [out], name, **attributes))
        return out

    def number(self, value: float) -> str:
        name = next(self.free)
        array = np.array(value, np.float32)
        self.model.graph.initializer.append(onnx_package().numpy_helper.from_array(array, name))
        return name

    def said(self, name: str, default: Any) -> Any:
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def activation(self, x: str, kind: str, numbers: list[float]) -> str | None:
        if kind in ("Relu", "Sigmoid", "Tanh"):
            return self.add(kind, x)
        if kind == "LeakyRelu":
            return self.add(kind, x, alpha=(numbers or [0.01])[0])
        if kind == "HardSigmoid" and len(numbers) in (0, 2):
            alpha, beta = numbers or (0.2, 0.5)
            return self.add(kind, x, alpha=alpha, beta=beta)
        if kind == "Clip" and len(numbers) == 2:
            if self.opset < 11:
                return self.add(kind, x, min=numbers[0], max=numbers[1])
            return self.add(kind, x, self.number(numbers[0]), self.number(numbers[1]))
        return None


def _conv(r: _Rewriter, *inputs: str) -> str | None:
    own = {k: v for k, v in r.attributes.items() if not k.startswith("activation")}
    out = r.add("Conv", *(v for v in inputs[:3] if v), **own)
    if len(inputs) > 3 and inputs[3]:
        out = r.add("Add", out, inputs[3])
    return r.activation(out, r.said("activation", ""), list(r.said("activation_params", ())))


def _gemm(r: _Rewriter, *inputs: str) -> str | None:
    own = {k: v for k, v in r.attributes.items() if not k.startswith("activation")}
    out = r.add("Gemm", *inputs, **own)
    numbers = [r.attributes[k] for k in ("activation_alpha", "activation_beta") if k in r.attributes]
    return r.activation(out, r.said("activation", ""), numbers)


def _gelu(r: _Rewriter, x: str, bias: str = "") -> str:
    if bias:
        x = r.add("Add", x, bias)
    erf = r.add("Erf", r.add("Div", x, r.number(math.sqrt(2))))
    return r.add("Mul", r.add("Mul", x, r.add("Add", erf, r.number(1))), r.number(0.5))


def _fast_gelu(r: _Rewriter, x: str, bias: str = "") -> str:
    if bias:
        x = r.add("Add", x, bias)
    cube = r.add("Mul", r.add("Mul", r.add("Mul", x, x), x), r.number(0.044715))
    tanh = r.add("Tanh", r.add("Mul", r.add("Add", x, cube), r.number(math.sqrt(2 / math.pi))))
    return r.add("Mul", r.add("Mul", x, r.add("Add", tanh, r.number(1))), r.number(0.5))


def _quick_gelu(r: _Rewriter, x: str) -> str:
    alpha = float(r.said("alpha", 1.702))
    return r.add("Mul", x, r.add("Sigmoid", r.add("Mul", x, r.number(alpha))))


def _skip_layer_norm(
    r: _Rewriter, x: str, skip: str, gamma: str, beta: str = "", bias: str = ""
) -> str | None:
    if r.opset < 17 or any(r.node.output[1:]):
        return None
    x = r.add("Add", x, skip)
    if bias:
        x = r.add("Add", x, bias)
    last = [beta] if beta else []
    return r.add("LayerNormalization", x, gamma, *last, epsilon=float(r.said("epsilon", 1e-12)), axis=-1)


# -- operators on quantized tensors: the same of floats between DequantizeLinear and QuantizeLinear


def _floats(r: _Rewriter, x: str, scale: str, zero: str = "", axis: int = 1) -> str:
    return r.add("DequantizeLinear", *_some(x, scale, zero), axis=axis)


def _integers(r: _Rewriter, x: str, scale: str, zero: str = "") -> str:
    return r.add("QuantizeLinear", *_some(x, scale, zero))


def _some(*names: str) -> list[str]:
    """Without those left out at the end."""
    return [n for n in names if n]


def _q_conv(r: _Rewriter, *inputs: str) -> str | None:
    x, xs, xz, w, ws, wz, ys, yz, *bias = inputs
    if r.said("channels_last", 0):
        return None
    own = {k: v for k, v in r.attributes.items() if k != "channels_last"}
    operands = [_floats(r, x, xs, xz), _floats(r, w, ws, wz, axis=0)]
    if bias and bias[0]:
        operands.append(_floats(r, bias[0], r.add("Mul", xs, ws), axis=0))
    return _integers(r, r.add("Conv", *operands, **own), ys, yz)


def _q_matmul(r: _Rewriter, a: str, a_s: str, az: str, b: str, bs: str, bz: str, *y: str) -> str:
    left, right = _floats(r, a, a_s, az, axis=-2), _floats(r, b, bs, bz, axis=-1)
    return _integers(r, r.add("MatMul", left, right), *y)


def _q_gemm(r: _Rewriter, *inputs: str) -> str | None:
    a, a_s, az, b, bs, bz, c, ys, yz = (*inputs, *[""] * (9 - len(inputs)))
    turned = r.said("transB", 0)
    operands = [_floats(r, a, a_s, az), _floats(r, b, bs, bz, axis=0 if turned else 1)]
    if c:
        if r.said("alpha", 1.0) != 1:  # in the bias already
            return None
        operands.append(_floats(r, c, r.add("Mul", a_s, bs), axis=-1))
    y = r.add("Gemm", *operands, **r.attributes)
    return _integers(r, y, ys, yz) if ys else y


def _q_of_two(op: str) -> Callable[..., str]:
    def rule(r: _Rewriter, a: str, a_s: str, az: str, b: str, bs: str, bz: str, *y: str) -> str:
        return _integers(r, r.add(op, _floats(r, a, a_s, az), _floats(r, b, bs, bz)), *y)

    return rule


def _q_of_one(op: str, *left_out: str) -> Callable[..., str | None]:
    def rule(r: _Rewriter, x: str, xs: str, xz: str, *y: str) -> str | None:
        if r.said("channels_last", 0):
            return None
        own = {k: v for k, v in r.attributes.items() if k not in ("channels_last", *left_out)}
        return _integers(r, r.add(op, _floats(r, x, xs, xz), **own), *y)

    return rule


def _q_concat(r: _Rewriter, ys: str, yz: str, *inputs: str) -> str:
    parts = [_floats(r, *three) for three in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True)]
    return _integers(r, r.add("Concat", *parts, **r.attributes), ys, yz)


def _rule_of(node: Any) -> Callable[..., str | None] | None:
    if node.domain == _FUSED:
        return _RULES.get(node.op_type) or _QUANTIZED.get(node.op_type)
    return _QUANTIZED.get(node.op_type) if node.domain in ("", "ai.onnx") else None


_QUANTIZED: dict[str, Callable[..., str | None]] = {
    "QGemm": _q_gemm,
    "QLinearAdd": _q_of_two("Add"),
    "QLinearAveragePool": _q_of_one("AveragePool"),
    "QLinearConcat": _q_concat,
    "QLinearConv": _q_conv,
    "QLinearGlobalAveragePool": _q_of_one("GlobalAveragePool"),
    "QLinearLeakyRelu": _q_of_one("LeakyRelu"),
    "QLinearMatMul": _q_matmul,
    "QLinearMul": _q_of_two("Mul"),
    "QLinearSigmoid": _q_of_one("Sigmoid"),
    "QLinearSoftmax": _q_of_one("Softmax", "opset"),
}
_RULES: dict[str, Callable[..., str | None]] = {
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "Gelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
}
