"""Elementwise arithmetic of two values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import UnsupportedError
from actzip.runtime.acts import Act, act_fields
from actzip.runtime.graph import Node, Shape, broadcast
from actzip.runtime.onnx_node import OnnxNode, floats_only
from actzip.runtime.ops.reshape import Reshape
from actzip.runtime.ops.threshold import onnx_threshold
from actzip.runtime.registry import Mask, Ref, TorchHandler, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering

#: Comparisons give 1 or 0; ``keep`` is b where a is not 0, else 0, ``drop`` is b where a is 0, else 0.
BINARY_KINDS = (
    *("add", "sub", "mul", "div", "max", "min", "pow"),
    *("gt", "ge", "lt", "le", "eq", "ne", "keep", "drop"),
)


@dataclass(eq=False)
class Binary(Node):
    """``kind`` of two values with broadcasting, then ``act``. Constants are values too
    (``Graph.constants``)."""

    kind: str = field(kw_only=True)
    act: Act | None = None

    op = "binary"
    arity = (2, 2)
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if self.kind not in BINARY_KINDS:
            raise UnsupportedError(f"elementwise {self.kind!r}; these are known: {', '.join(BINARY_KINDS)}")
        return broadcast(shapes)


def torch_binary(kind: str) -> TorchHandler:
    def handler(b: Builder, a: dict[str, Any]) -> Any:
        x, y = (b.compared(v) for v in (a["self"], a["other"]))
        if b.is_bool(b.node):
            return b.emit(Binary, x, y, kind={"mul": "mul", "add": "max"}.get(kind, kind), dtype="bool")
        alpha = a.get("alpha")
        mode = a.get("rounding_mode")
        if mode:
            number = float(y) if not isinstance(y, Ref) and getattr(y, "numel", lambda: 1)() == 1 else 0.0
            if abs(math.frexp(number)[0]) != 0.5:  # PyTorch rounds the exact quotient
                raise b.refuse(f"division with rounding mode {mode!r} by anything but a power of two")
            return b.act(b.emit(Binary, x, number, kind="div"), mode)
        if alpha is not None and alpha != 1:
            y = b.emit(Binary, y, float(alpha), kind="mul") if isinstance(y, Ref) else y * alpha
        if kind in ("add", "sub") and _all_are(y, 0.0, b.shape(x) if isinstance(x, Ref) else None):
            return x
        if kind in ("mul", "div") and _all_are(y, 1.0, b.shape(x) if isinstance(x, Ref) else None):
            return x
        return b.emit(Binary, x, y, kind=kind)

    return handler


_TORCH = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "true_divide": "div",
    "maximum": "max",
    "minimum": "min",
}
for _name, _kind in _TORCH.items():
    torch_op(_name)(torch_binary(_kind))


@torch_op("rsub")
def torch_rsub(b: Builder, a: dict[str, Any]) -> Any:
    if a.get("alpha", 1) != 1:
        raise b.refuse("rsub with alpha is not supported")
    return b.emit(Binary, a["other"], a["self"], kind="sub")


@torch_op("pow")
def torch_pow(b: Builder, a: dict[str, Any]) -> Any:
    x, e = a["self"], a["exponent"]
    powered = _powered(b, x, float(e)) if isinstance(e, (int, float)) else None
    return b.emit(Binary, x, e, kind="pow") if powered is None else powered


_POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


def _powered(builder: Builder | Importer, x: Any, e: float) -> Any:
    """``x`` to the power of a number that multiplications or one function make; None of others."""
    if e == 1.0:
        return x
    if e in _POWERS:
        return builder.act(x, _POWERS[e])
    if e not in (3.0, 4.0):
        return None
    square = builder.act(x, "square")
    return builder.emit(Binary, square, x if e == 3.0 else square, kind="mul")


def _all_are(y: Any, number: float, shape: Any) -> bool:
    """Whether ``y`` is that number and nothing would be broadcast."""
    import torch

    if shape is None:
        return False
    if isinstance(y, (int, float)):
        return float(y) == number
    return isinstance(y, torch.Tensor) and y.numel() == 1 and y.ndim <= len(shape) and float(y) == number


_ONNX = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow"}


@onnx_op(*_ONNX)
def onnx_binary(imp: Importer, node: OnnxNode) -> Any:
    a, b = node.need(0), node.need(1)
    if node.op == "Mul" and (isinstance(a, Mask) or isinstance(b, Mask)):
        mask, x = (a, b) if isinstance(a, Mask) else (b, a)
        found = onnx_threshold(imp, mask, x, ())
        if found is not None:
            return found
    if node.op != "Pow":
        floats_only(node, a, b)
    elif isinstance(a, str) and isinstance(b, np.ndarray) and b.size == 1 and b.ndim <= len(imp.shape(a)):
        powered = _powered(imp, a, float(b.reshape(-1)[0]))
        if powered is not None:
            return powered
    return imp.emit(Binary, a, b, kind=_ONNX[node.op])


@onnx_op("Max", "Min", "Sum", "Mean")
def onnx_variadic(imp: Importer, node: OnnxNode) -> Any:
    values = [node.need(i) for i in range(len(node.proto.input))]
    if not values:
        raise node.wrong("has no input")
    floats_only(node, *values)
    kind = {"Max": "max", "Min": "min"}.get(node.op, "add")
    out = values[0] if len(values) > 1 else imp.emit(Reshape, values[0], shape=imp.shape(values[0]))
    for v in values[1:]:
        out = imp.emit(Binary, out, v, kind=kind)
    if node.op == "Mean" and len(values) > 1:
        out = imp.emit(Binary, out, np.array(len(values), dtype=np.float32), kind="div")
    return out


@lowers(Binary)
def lower_binary(low: Lowering, n: Binary) -> None:
    """Any mix of dense layouts; an activation with numbers per channel is a node of its own."""
    strings, floats, arrays = act_fields(n.act)
    per_channel = n.act is not None and n.act.param is not None and n.act.param.size > 1
    out = low.declare(n.output)
    inputs = [_operand(low, n, v) for v in n.inputs]
    if low.graph.values[n.output].storage == "packed" and low.kind[n.output] == "map":
        raise UnsupportedError(f"{n.where()}: written packed")
    if not per_channel:
        low.node("binary", n.name, inputs, out, n.name, None, floats, arrays, {**strings, "kind": n.kind})
        return
    mid = low.add_value(n.output + ":raw", low.graph.shape(n.output), low.layout_of(n.output))
    low.node("binary", n.name + ":raw", inputs, mid, n.name, strings={"kind": n.kind})
    low.node("activation", n.name, [mid], out, n.name, None, floats, arrays, strings)


def _operand(low: Lowering, n: Binary, v: str) -> int:
    """The operand in its own layout, unless that is another one than the output's and as large: taken
    along another direction, every number would cost a cache line."""
    shape = low.graph.shape(v)
    apart = low.kind[n.output] == "map" and low.kind[v] == "plain"
    if apart and shape[1:] == low.graph.shape(n.output)[1:] and shape[1] != 1 and shape[2:] != (1, 1):
        return low.read(v, "map")
    return low.dense(v)


@onnx_op("tf2onnx.Erfc")
def onnx_erfc(imp: Importer, node: OnnxNode) -> Any:
    """What TensorFlow's exporter leaves as it is of Keras' GELU: no operator of ONNX."""
    return imp.emit(Binary, np.array(1, np.float32), imp.act(node.need(0), "erf"), kind="sub")
