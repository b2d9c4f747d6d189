"""Elementwise functions: the rows of :mod:`actzip.runtime.acts`, and those spellings that need a
look at arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError
from actzip.runtime.acts import ACTS, Act, ActRow, act_fields
from actzip.runtime.graph import Node, Shape
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.registry import OnnxHandler, Ref, TorchHandler, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Activation(Node):
    """An elementwise function on its own."""

    act: Act = field(kw_only=True)

    op = "activation"
    layout = "either"
    reads_packed = True

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        p = self.act.param
        if p is not None and p.size != 1 and (len(x) < 2 or x[1] != p.size):
            raise InputError(f"{self.act.kind} has {p.size} numbers for an input of shape {x}")
        return x

    def writes_packed(self) -> bool:
        return True


def _from_torch(kind: str, row: ActRow) -> TorchHandler:
    def handler(b: Builder, a: dict[str, Any]) -> Any:
        numbers = {n: float(a[t]) for n, t in zip(row.numbers, row.torch_numbers, strict=False)}
        return b.act(a["self"], kind, **numbers)

    return handler


def _from_onnx(kind: str, row: ActRow) -> OnnxHandler:
    def handler(imp: Importer, node: OnnxNode) -> Any:
        numbers = {k: node.number(k, default) for k, default in row.onnx_numbers.items()}
        return imp.act(node.need(0), kind, **numbers)

    return handler


for _kind, _row in ACTS.items():
    torch_op(*_row.torch)(_from_torch(_kind, _row))
    if _row.onnx:
        onnx_op(_row.onnx)(_from_onnx(_kind, _row))


@torch_op("relu6")
def torch_relu6(b: Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "clip", lo=0.0, hi=6.0)


@torch_op("gelu")
def torch_gelu(b: Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "gelu_tanh" if a["approximate"] == "tanh" else "gelu")


@torch_op("clamp", "clamp_min", "clamp_max")
def torch_clamp(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    x, lo, hi = a["self"], a.get("min"), a.get("max")
    if any(isinstance(t, Ref) or (isinstance(t, torch.Tensor) and t.numel() > 1) for t in (lo, hi)):
        for limit, kind in ((lo, "max"), (hi, "min")):
            x = x if limit is None else b.emit(Binary, x, limit, kind=kind)
        return x
    return b.act(
        x,
        "clip",
        lo=-float("inf") if lo is None else float(lo),
        hi=float("inf") if hi is None else float(hi),
    )


@torch_op("elu")
def torch_elu(b: Builder, a: dict[str, Any]) -> Any:
    alpha, scale, inside = float(a["alpha"]), float(a["scale"]), float(a["input_scale"])
    if inside != 1.0:  # celu: max(0, x) + min(0, alpha * (exp(x / alpha) - 1))
        if scale == 1.0 and abs(alpha * inside - 1.0) < 1e-6:
            return b.act(a["self"], "celu", alpha=alpha)
        raise b.refuse("this form of elu is not supported")
    if scale != 1.0:
        if abs(scale - 1.0507009873554805) < 1e-6 and abs(alpha - 1.6732632423543772) < 1e-6:
            return b.act(a["self"], "selu")
        return b.emit(Binary, b.act(a["self"], "elu", alpha=alpha), scale, kind="mul")
    return b.act(a["self"], "elu", alpha=alpha)


@torch_op("prelu", "_prelu_kernel")
def torch_prelu(b: Builder, a: dict[str, Any]) -> Any:
    return b.act(a["self"], "prelu", param=b.array(a["weight"]))


@onnx_op("Gelu")
def onnx_gelu(imp: Importer, node: OnnxNode) -> Any:
    return imp.act(node.need(0), "gelu_tanh" if node.attribute("approximate", "none") == "tanh" else "gelu")


@onnx_op("Selu")
def onnx_selu(imp: Importer, node: OnnxNode) -> Any:
    alpha, gamma = (
        node.number("alpha", 1.67326319217681884765625),
        node.number("gamma", 1.05070102214813232421875),
    )
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.0507010) < 1e-6:
        return imp.act(node.need(0), "selu")
    out = imp.act(node.need(0), "elu", alpha=alpha)
    return imp.emit(Binary, out, np.array(gamma, dtype=np.float32), kind="mul")


@onnx_op("Swish")
def onnx_swish(imp: Importer, node: OnnxNode) -> Any:
    alpha = node.number("alpha", 1.0)
    x = node.need(0)
    if alpha == 1.0:
        return imp.act(x, "silu")
    scaled = imp.emit(Binary, x, np.array(alpha, dtype=np.float32), kind="mul")
    gate = imp.act(scaled, "sigmoid")
    return imp.emit(Binary, x, gate, kind="mul")


@onnx_op("PRelu")
def onnx_prelu(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    slope = node.floats(1, "the slope")
    if slope is None:
        raise node.wrong("the slope (input 1) is missing")
    shape = imp.shape(x)
    dims = [1] * (len(shape) - slope.ndim) + list(slope.shape)
    if slope.size == 1 or (len(shape) > 1 and dims[1] == slope.size == shape[1] and len(dims) == len(shape)):
        return imp.act(x, "prelu", param=slope)
    positive = imp.act(x, "relu")
    zero = np.zeros((), dtype=np.float32)
    negative = imp.emit(Binary, imp.emit(Binary, x, zero, kind="min"), slope, kind="mul")
    return imp.emit(Binary, positive, negative, kind="add")


@onnx_op("Clip")
def onnx_clip(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    lo, hi = node.floats(1, "the minimum"), node.floats(2, "the maximum")
    low = -math.inf if lo is None or lo.size == 0 else float(lo.reshape(-1)[0])
    high = math.inf if hi is None or hi.size == 0 else float(hi.reshape(-1)[0])
    if low > high:  # ONNX: min(max(x, lo), hi) = hi
        low = high
    return imp.act(x, "clip", lo=low, hi=high)


@lowers(Activation)
def lower_activation(low: Lowering, n: Activation) -> None:
    strings, floats, arrays = act_fields(n.act)
    layout = "any map" if low.kind[n.output] == "map" else "plain"
    low.simple(n, "activation", layout, floats=floats, arrays=arrays, strings=strings)
