"""Linear layers, matrix products and attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError
from actzip.runtime.acts import Act, act_fields
from actzip.runtime.graph import (
    Array,
    Dim,
    Node,
    Shape,
    Sym,
    broadcast,
    check_channels,
    numel,
    same_shape,
    static,
)  # fmt: skip
from actzip.runtime.onnx_node import OnnxNode, float32_of
from actzip.runtime.ops.arithmetic import Binary
from actzip.runtime.ops.reduce import Reduce, Softmax
from actzip.runtime.ops.reshape import Expand, Transpose
from actzip.runtime.registry import Ref, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Linear(Node):
    """x (..., K)[, residual of the output's shape] -> act(x @ weight.T + bias + residual);
    ``weight`` (O, K)."""

    weight: Array = field(kw_only=True)
    bias: Array | None = None
    act: Act | None = None
    kernel: str = ""

    op = "linear"
    arity = (1, 2)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if self.weight.ndim != 2 or len(x) < 1 or x[-1] != self.weight.shape[1]:
            raise InputError(f"weight {list(self.weight.shape)} does not fit an input of shape {x}")
        check_channels("bias", self.bias, self.weight.shape[0])
        out = (*x[:-1], int(self.weight.shape[0]))
        if len(shapes) > 1 and not same_shape(shapes[1], out):
            raise InputError(f"residual of shape {shapes[1]} is not of the output's shape {out}")
        return out

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.shape[1]) * numel(out)[0]


@dataclass(eq=False)
class MatMul(Node):
    """Batched matrix product of two values, leading dimensions broadcast (``torch.matmul``, both of
    rank >= 2)."""

    op = "matmul"
    arity = (2, 2)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        a, b = shapes
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise InputError(f"matrices of shape {a} and {b} do not multiply")
        return (*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]) if len(a) + len(b) > 4 else (a[-2], b[-1])

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return static(shapes[0][-1], "the inner dimension") * numel(out)[0]


@torch_op("linear")
def torch_linear(b: Builder, a: dict[str, Any]) -> Any:
    if isinstance(a["weight"], Ref):
        raise b.refuse("a weight that is computed from the input")
    return b.emit(Linear, a["input"], weight=b.array(a["weight"]), bias=b.maybe(a["bias"]))


@torch_op("addmm")
def torch_addmm(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    if (
        a["beta"] == 1
        and a["alpha"] == 1
        and isinstance(a["mat2"], torch.Tensor)
        and isinstance(a["self"], torch.Tensor)
    ):
        bias = a["self"]
        if bias.ndim == 1:
            return b.emit(Linear, a["mat1"], weight=b.array(a["mat2"].t()), bias=b.array(bias))
    y = torch_matmul(b, {"self": a["mat1"], "mat2": a["mat2"]})
    if a["alpha"] != 1:
        y = b.emit(Binary, y, float(a["alpha"]), kind="mul")
    z = a["self"]
    if a["beta"] != 1:
        z = b.emit(Binary, z, float(a["beta"]), kind="mul")
    return b.emit(Binary, z, y, kind="add")


@torch_op("mm", "bmm", "matmul")
def torch_matmul(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    x = a["self"]
    y = a["mat2"] if "mat2" in a else a["other"]
    if isinstance(y, torch.Tensor) and y.ndim == 2 and isinstance(x, Ref):
        return b.emit(Linear, x, weight=b.array(y.t()), bias=None)
    if len(b.shape(x)) < 2 or len(b.shape(y)) < 2:
        raise b.refuse("a matrix product with a vector is not supported")
    return b.emit(MatMul, x, y)


@torch_op("baddbmm")
def torch_baddbmm(b: Builder, a: dict[str, Any]) -> Any:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise b.refuse("baddbmm with beta or alpha is not supported")
    return b.emit(Binary, a["self"], b.emit(MatMul, a["batch1"], a["batch2"]), kind="add")


@torch_op("scaled_dot_product_attention")
def torch_attention(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a.get("enable_gqa"):
        k, v = (_repeated_heads(b, t, b.shape(q)[-3]) for t in (k, v))
    head = b.shape(q)[-1]
    assert isinstance(head, int)
    scale = float(a["scale"]) if a["scale"] is not None else head**-0.5
    perm = list(range(len(b.shape(k))))
    perm[-1], perm[-2] = perm[-2], perm[-1]
    s = b.emit(MatMul, b.emit(Binary, q, scale, kind="mul"), b.emit(Transpose, k, perm=tuple(perm)))
    if a["is_causal"]:
        rows, columns = b.shape(s)[-2:]
        if not isinstance(rows, int) or not isinstance(columns, int):
            raise b.refuse("causal attention over the batch is not supported")
        mask = torch.ones(rows, columns, dtype=torch.bool).tril()
    if mask is None:
        return b.emit(MatMul, b.emit(Softmax, s, axis=-1), v)
    if not b.is_bool(mask):
        return b.emit(MatMul, b.emit(Softmax, b.emit(Binary, s, mask, kind="add"), axis=-1), v)
    if isinstance(mask, torch.Tensor) and bool(mask.any(-1).all()):
        closed = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        return b.emit(MatMul, b.emit(Softmax, b.emit(Binary, s, closed, kind="add"), axis=-1), v)
    rest = b.emit(Binary, mask, float("-inf"), kind="drop")
    s = b.emit(Binary, b.emit(Binary, mask, s, kind="keep"), rest, kind="add")
    # where nothing may be seen PyTorch gives 0
    return b.emit(MatMul, b.emit(Binary, mask, b.emit(Softmax, s, axis=-1), kind="keep"), v)


def _repeated_heads(b: Builder, x: Any, heads: Any) -> Any:
    """Keys or values (..., H, L, E) of grouped attention, each head for some of the queries'."""
    *before, own, length, size = b.shape(x)
    if not isinstance(own, int) or not isinstance(heads, int):
        raise b.refuse("the batch in the place of heads is not supported")
    wide = b.emit(
        Expand,
        b.reshape(x, (*before, own, 1, length, size)),
        shape=(*before, own, heads // own, length, size),
    )
    return b.reshape(wide, (*before, heads, length, size))


@onnx_op("Gemm")
def onnx_gemm(imp: Importer, node: OnnxNode) -> Any:
    a, c = node.need(0), node.input(2)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    if len(imp.shape(a)) != 2:
        raise node.wrong(f"A has the shape {imp.shape(a)}, not two dimensions")
    if node.integer("transA", 0):
        a = imp.emit(Transpose, a, perm=(1, 0))
    b = node.need(1)
    transposed = bool(node.integer("transB", 0))
    if isinstance(b, np.ndarray):
        w = float32_of(b, node.where)
        if w.ndim != 2:
            raise node.wrong(f"B has the shape {list(w.shape)}, not two dimensions")
        w = np.ascontiguousarray(w if transposed else w.T)
        if alpha != 1.0:
            w = w * np.float32(alpha)
        out_features = w.shape[0]
        bias = None
        if (
            isinstance(c, np.ndarray)
            and c.size == out_features
            and c.reshape(-1).shape == c.shape[-1:]
            and c.ndim <= 1
        ):
            bias, c = float32_of(c, node.where) * np.float32(beta), None
        out = imp.emit(Linear, a, weight=w, bias=bias)
    else:
        if transposed:
            b = imp.emit(Transpose, b, perm=(1, 0))
        out = imp.emit(MatMul, a, b)
        if alpha != 1.0:
            out = imp.emit(Binary, out, np.array(alpha, dtype=np.float32), kind="mul")
    if c is None:
        return out
    if beta != 1.0:
        c = (
            c * np.float32(beta)
            if isinstance(c, np.ndarray)
            else imp.emit(Binary, c, np.array(beta, dtype=np.float32), kind="mul")
        )
    return imp.emit(Binary, out, c, kind="add")


@onnx_op("MatMul")
def onnx_matmul(imp: Importer, node: OnnxNode) -> Any:
    return _matmul(imp, node, node.need(0), node.need(1))


@onnx_op("com.microsoft.FusedMatMul")
def onnx_fused_matmul(imp: Importer, node: OnnxNode) -> Any:
    """ONNX Runtime's product of transposed operands, times a number."""
    a, b = (
        _turned(imp, node, node.need(i), node.integer(f"trans{k}", 0), node.integer(f"transBatch{k}", 0))
        for i, k in enumerate("AB")
    )
    out = _matmul(imp, node, a, b)
    alpha = node.number("alpha", 1.0)
    return out if alpha == 1 else imp.emit(Binary, out, np.array(alpha, np.float32), kind="mul")


def _turned(imp: Importer, node: OnnxNode, x: Any, last: int, batch: int) -> Any:
    """A factor with its last two dimensions exchanged, and (``batch``) the first moved behind the others
    but the last, before that."""
    rank = len(imp.shape(x))
    perm = list(range(rank))
    if batch and rank > 2:
        perm.insert(rank - 2, perm.pop(0))
    if last and rank > 1:
        perm[-2:] = perm[:-3:-1]
    if perm == list(range(rank)):
        return x
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x.transpose(perm))
    return imp.emit(Transpose, x, perm=tuple(perm))


def _matmul(imp: Importer, node: OnnxNode, a: Any, b: Any) -> Any:
    sa, sb = imp.shape(a), imp.shape(b)
    if isinstance(b, np.ndarray) and b.ndim == 2 and len(sa) >= 2:
        return imp.emit(Linear, a, weight=np.ascontiguousarray(float32_of(b, node.where).T))
    if len(sa) == 0 or len(sb) == 0:
        raise node.wrong("a factor has no dimension")
    left = imp.reshape(a, (1, *sa)) if len(sa) == 1 else a
    right = imp.reshape(b, (*sb, 1)) if len(sb) == 1 else b
    out = imp.emit(MatMul, left, right)
    shape = list(imp.shape(out))
    if len(sa) == 1:
        del shape[-2]
    if len(sb) == 1:
        del shape[-1]
    return imp.reshape(out, tuple(shape))


def _without_dots(terms: list[str], out: str, ranks: list[int], arrow: bool) -> tuple[list[str], str]:
    """Terms of an equation with labels in the place of their dots, the last dimensions together."""
    free = [c for c in map(chr, range(ord("A"), ord("z") + 1)) if c.isalpha() and c not in "".join(terms)]
    most = max((r - len(t) + 3 for t, r in zip(terms, ranks) if "..." in t), default=0)
    labels = "".join(free[: max(0, most)])
    named = [t.replace("...", labels[len(labels) - max(0, r - len(t) + 3) :]) for t, r in zip(terms, ranks)]
    return named, out.replace("...", labels) if arrow else labels + out.replace(".", "")


@onnx_op("Einsum")
def onnx_einsum(imp: Importer, node: OnnxNode) -> Any:
    """Sums of products of one or two tensors, as sums, transpositions and one product of matrices."""
    left, arrow, out = node.attribute("equation", "").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:  # every label that stands once, in alphabetical order
        out = "".join(sorted(c for c in left if c != "," and left.count(c) == 1))
    values = [node.need(i) for i in range(len(node.proto.input))]
    if "..." in left:
        terms, out = _without_dots(terms, out, [len(imp.shape(v)) for v in values], bool(arrow))
        left = ",".join(terms)
    if "." in left + out or any(len(set(t)) < len(t) for t in [*terms, out]):
        raise node.refuse(f"equation {node.attribute('equation', '')!r}")
    if len(terms) != len(values) or any(
        len(t) != len(imp.shape(v)) for t, v in zip(terms, values, strict=True)
    ):
        raise node.wrong(f"equation {left!r} for operands of shapes {[imp.shape(v) for v in values]}")
    size: dict[str, Dim] = {}
    for t, v in zip(terms, values, strict=True):
        for label, d in zip(t, imp.shape(v), strict=True):
            if size.setdefault(label, d) != d:
                raise node.refuse(f"label {label!r} of sizes {size[label]} and {d}")
    if len(values) > 2 or not set(out) <= set(size):
        raise node.refuse(f"equation {node.attribute('equation', '')!r}")
    if len(values) == 1:
        x, have = _summed(imp, values[0], terms[0], out)
        return _in_order(imp, x, have, out)
    a, ta = _summed(imp, values[0], terms[0], terms[1] + out)
    b, tb = _summed(imp, values[1], terms[1], terms[0] + out)
    shared = [c for c in ta if c in tb and c in out]
    inner = [c for c in ta if c in tb and c not in out]
    rows, columns = [c for c in ta if c not in tb], [c for c in tb if c not in ta]

    def merged(labels: list[str]) -> Dim:
        count, power = numel(tuple(size[c] for c in labels))
        if power > 1:
            raise node.refuse("the batch in two dimensions")
        return Sym(count) if power else count

    batch = [size[c] for c in shared]
    a = imp.reshape(_in_order(imp, a, ta, [*shared, *rows, *inner]), (*batch, merged(rows), merged(inner)))
    b = imp.reshape(
        _in_order(imp, b, tb, [*shared, *inner, *columns]), (*batch, merged(inner), merged(columns))
    )
    product = imp.emit(MatMul, a, b)
    labels = [*shared, *rows, *columns]
    return _in_order(imp, imp.reshape(product, tuple(size[c] for c in labels)), labels, out)


def _summed(imp: Importer, x: Any, labels: str, kept: str) -> tuple[Any, str]:
    """``x`` summed over the labels that nothing else has, and what labels are left."""
    axes = tuple(i for i, c in enumerate(labels) if c not in kept)
    if axes:
        x = imp.emit(Reduce, x, kind="sum", axes=axes)
    return x, "".join(c for c in labels if c in kept)


def _in_order(imp: Importer, x: Any, labels: Sequence[str], wanted: Sequence[str]) -> Any:
    perm = tuple(list(labels).index(c) for c in wanted)
    if isinstance(x, np.ndarray):
        return x.transpose(perm)
    return x if perm == tuple(range(len(perm))) else imp.emit(Transpose, x, perm=perm)


@lowers(Linear)
def lower_linear(low: Lowering, n: Linear) -> None:
    strings, floats, arrays = act_fields(n.act)
    arrays["weight"] = np.ascontiguousarray(n.weight, np.float32)
    if n.bias is not None:
        arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
    strings["weights"] = low.keeper(n)
    low.simple(n, "linear", "plain", floats=floats, arrays=arrays, strings=strings)


@lowers(MatMul)
def lower_matmul(low: Lowering, n: MatMul) -> None:
    low.simple(n, "matmul", "plain")
