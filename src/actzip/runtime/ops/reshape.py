"""The same elements in another shape or order, repeated at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import TYPES, Dim, Node, Shape, Sym, broadcast, numel, same_shape
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.select import Concat, taken
from actzip.runtime.ops.shapes import dims_of, onnx_axes
from actzip.runtime.registry import Absent, Mask, Stacked, lowers, node_classes, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Reshape(Node):
    """Same elements in the same (row-major, logical) order as ``shape``."""

    shape: Shape = field(kw_only=True)

    op = "reshape"
    dtype = ""

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if numel(shapes[0]) != numel(self.shape):
            raise InputError(f"shape {shapes[0]} cannot become {self.shape}")
        if numel(self.shape)[1] > 1:
            raise UnsupportedError(f"shape {self.shape} has the batch in two dimensions")
        return self.shape


@dataclass(eq=False)
class Transpose(Node):
    """Dimension i of the output is dimension ``perm[i]`` of the input."""

    perm: tuple[int, ...] = field(kw_only=True)

    op = "transpose"
    dtype = ""

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if sorted(self.perm) != list(range(len(shapes[0]))):
            raise InputError(f"permutation {self.perm} of a tensor of {len(shapes[0])} dimensions")
        return tuple(shapes[0][i] for i in self.perm)


@dataclass(eq=False)
class Expand(Node):
    """Broadcasts to ``shape``."""

    shape: Shape = field(kw_only=True)

    op = "expand"
    dtype = ""

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if not same_shape(broadcast([shapes[0], self.shape]), self.shape):
            raise InputError(f"shape {shapes[0]} does not broadcast to {self.shape}")
        return self.shape


@torch_op("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "unflatten")
def torch_reshape(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    if isinstance(x, Stacked) and not x.apart:
        shape = (len(x.parts), *b.shape(x.parts[0]))
        if same_shape(b.out_shape, shape):
            return Stacked(x.parts, shape, apart=True)
    return b.reshape(x, b.out_shape)


@torch_op(
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh_copy",
    "dropout",
    "feature_dropout",
    "native_dropout",
    "_to_copy",
    "to",
    "alpha_dropout",
)
def torch_same(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"] if "self" in a else a["input"]
    if b.node.target._schema.name == "aten::native_dropout":
        return x, Absent("the mask of a dropout")
    if b.is_bool(b.node):
        return b.as_bool(x)
    kind = b.node.meta["val"].dtype
    if kind.is_floating_point:
        return b.as_float(x)
    if b.is_bool(x):  # 1 and 0 in any type of integers
        return b.emit(Reshape, x, shape=b.shape(x), dtype=str(kind).removeprefix("torch."))
    return x


@torch_op("copy")
def torch_copy(b: Builder, a: dict[str, Any]) -> Any:
    if same_shape(b.shape(a["src"]), b.out_shape):
        return a["src"]
    return b.emit(Expand, a["src"], shape=b.out_shape)


@torch_op("permute", "transpose", "t", "movedim")
def torch_permute(b: Builder, a: dict[str, Any]) -> Any:
    rank = len(b.shape(a["self"]))
    perm = list(range(rank))
    if "dims" in a:
        perm = [int(d) % rank for d in a["dims"]]
    elif "dim0" in a:
        i, j = int(a["dim0"]) % rank, int(a["dim1"]) % rank
        perm[i], perm[j] = perm[j], perm[i]
    elif rank == 2:
        perm = [1, 0]
    if perm == list(range(rank)):
        return a["self"]
    return b.emit(Transpose, a["self"], perm=tuple(perm))


@torch_op("expand")
def torch_expand(b: Builder, a: dict[str, Any]) -> Any:
    if same_shape(b.shape(a["self"]), b.out_shape):
        return a["self"]
    return b.emit(Expand, a["self"], shape=b.out_shape)


@torch_op("repeat")
def torch_repeat(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    out = b.out_shape
    shape: Shape = tuple([1] * (len(out) - len(b.shape(x)))) + b.shape(x)
    wide = tuple(o if d == 1 else d for d, o in zip(shape, out, strict=True))
    x = b.reshape(x, shape)
    x = x if same_shape(shape, wide) else b.emit(Expand, x, shape=wide)
    for i, (d, o) in enumerate(zip(wide, out, strict=True)):
        if d == o:
            continue
        if isinstance(o, Sym):
            raise b.refuse("repeating along the batch is not supported")
        x = b.emit(Concat, *[x] * (o // int(d)), axis=i)  # type: ignore[arg-type]
    return x


@torch_op("pixel_shuffle")
def torch_pixel_shuffle(b: Builder, a: dict[str, Any]) -> Any:
    x, r = a["self"], int(a["upscale_factor"])
    n, c, h, w = b.shape(x)
    assert isinstance(c, int) and isinstance(h, int) and isinstance(w, int)
    x = b.reshape(x, (n, c // (r * r), r, r, h, w))
    return b.reshape(b.emit(Transpose, x, perm=(0, 1, 4, 2, 5, 3)), b.out_shape)


@torch_op("channel_shuffle")
def torch_channel_shuffle(b: Builder, a: dict[str, Any]) -> Any:
    x, k = a["self"], int(a["groups"])
    n, c, h, w = b.shape(x)
    assert isinstance(c, int)
    x = b.reshape(x, (n, k, c // k, h, w))
    return b.reshape(b.emit(Transpose, x, perm=(0, 2, 1, 3, 4)), b.out_shape)


@torch_op(
    "full",
    "zeros",
    "ones",
    "full_like",
    "zeros_like",
    "ones_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_like",
)
def torch_full(b: Builder, a: dict[str, Any]) -> Any:
    import torch

    name = b.node.target._schema.name
    fill = 1.0 if "ones" in name else 0.0 if ("zeros" in name or "empty" in name) else a["fill_value"]
    shape = b.out_shape
    if any(isinstance(d, Sym) for d in shape):
        if b.node.meta["val"].dtype != torch.float32:
            raise b.refuse(f"gives {b.node.meta['val'].dtype}; the engine computes in float32")
        return b.emit(Expand, torch.full([1] * len(shape), float(fill)), shape=shape)
    return torch.full([int(d) for d in shape], fill, dtype=b.node.meta["val"].dtype)  # type: ignore[arg-type]


@onnx_op("Reshape")
def onnx_reshape(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    wanted = dims_of(node, 1, "the shape")
    shape = imp.shape(x)
    keep = not node.integer("allowzero", 0)
    out: list[Dim] = []
    for i, d in enumerate(wanted):
        if d == 0 and keep:
            if i >= len(shape):
                raise node.wrong(f"dimension {i} is to be copied from an input of shape {shape}")
            out.append(shape[i])
        else:
            out.append(d)
    if 0 in out:
        raise node.refuse("an empty tensor")
    if sum(d == -1 for d in out) > 1:
        raise node.wrong("more than one dimension is -1")
    if any(isinstance(d, int) and d < -1 for d in out):
        raise node.wrong(f"shape {out}")
    if -1 in out:
        count, power = numel(shape)
        have, has = numel(tuple(d for d in out if d != -1))
        if have == 0 or count % have or power - has not in (0, 1):
            raise node.wrong(f"shape {shape} cannot become {tuple(out)}")
        missing: Dim = Sym(count // have) if power > has else count // have
        out[out.index(-1)] = missing
    # an exporter that fixed the batch at 1 writes it into the shape: one row more in is one row more out
    if shape and isinstance(shape[0], Sym) and not any(isinstance(d, Sym) for d in out):
        count, power = numel(shape)
        if power == 1 and out and math.prod([int(d) for d in out]) == count:  # type: ignore
            out[0] = Sym(int(out[0]))  # type: ignore[arg-type]
    return imp.reshape(x, tuple(out)) if isinstance(x, str) else np.asarray(x).reshape([int(d) for d in out])  # type: ignore[arg-type]


@onnx_op("Flatten")
def onnx_flatten(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axis = node.integer("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis = axis + len(shape) if axis < 0 else axis
    (a, p), (b, q) = numel(shape[:axis]), numel(shape[axis:])
    if p + q > 1:
        raise node.refuse("the batch in two dimensions")
    return imp.reshape(x, (Sym(a) if p else a, Sym(b) if q else b))


@onnx_op("Squeeze")
def onnx_squeeze(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axes = onnx_axes(node, 1, len(shape))
    if axes is None:
        if any(isinstance(d, Sym) for d in shape):
            raise node.refuse("the number of dimensions depends on the batch; give the axes")
        axes = [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise node.wrong(f"axes {axes} of a tensor of shape {shape} are not all 1")
    return imp.reshape(x, tuple(d for i, d in enumerate(shape) if i not in axes))


@onnx_op("Unsqueeze")
def onnx_unsqueeze(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axes = node.integers(1, "the axes") if node.has(1) else node.ints("axes")
    rank = len(shape) + len(axes or ())
    if not axes or any(not -rank <= a < rank for a in axes) or len({a % rank for a in axes}) != len(axes):
        raise node.wrong(f"axes {axes} for a tensor of {len(shape)} dimensions")
    places = {a % rank for a in axes}
    rest = iter(shape)
    return imp.reshape(x, tuple(1 if i in places else next(rest) for i in range(rank)))


@onnx_op("Transpose")
def onnx_transpose(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    rank = len(imp.shape(x))
    perm = node.ints("perm", list(range(rank))[::-1])
    return imp.emit(Transpose, x, perm=tuple(perm))


@onnx_op("Expand")
def onnx_expand(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    wanted = tuple(dims_of(node, 1, "the shape"))
    shape = imp.shape(x)
    rank = max(len(shape), len(wanted))
    a = (1,) * (rank - len(shape)) + tuple(shape)
    b = (1,) * (rank - len(wanted)) + wanted
    out = []
    for p, q in zip(a, b, strict=True):
        if p != q and p != 1 and q != 1:
            raise node.wrong(f"shape {shape} does not broadcast to {wanted}")
        out.append(q if p == 1 else p)
    imp.check_size(tuple(out), node.where)
    return imp.emit(Expand, x, shape=tuple(out))


@onnx_op("Tile")
def onnx_tile(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    repeats = node.integers(1, "the repeats")
    shape = imp.shape(x)
    if repeats is None or len(repeats) != len(shape) or min(repeats, default=1) < 1:
        raise node.wrong(f"repeats {repeats} for a tensor of shape {shape}")
    wide = tuple(n if d == 1 else d for d, n in zip(shape, repeats, strict=True))
    if not isinstance(x, np.ndarray) and not same_shape(shape, wide):
        x, shape = imp.emit(Expand, x, shape=wide), wide
        repeats = [1 if d == n else n for d, n in zip(wide, repeats, strict=True)]
    for axis, n in enumerate(repeats):
        if n == 1:
            continue
        if isinstance(shape[axis], Sym):
            raise node.refuse("repeating the batch")
        if n > 4096:
            raise node.refuse(f"{n} repeats")
        x = imp.emit(Concat, *([x] * n), axis=axis)
    return x


@onnx_op("DepthToSpace", "SpaceToDepth")
def onnx_depth_space(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    b = node.integer("blocksize", 0)
    if len(shape) != 4 or b < 1:
        raise node.wrong(f"blocksize {b} for a tensor of shape {shape}")
    n, c, h, w = shape
    if isinstance(h, Sym) or isinstance(w, Sym):
        raise node.refuse("the batch as rows or columns")
    channels = c.mul if isinstance(c, Sym) else c  # TensorFlow's dilated convolutions have the batch there

    def of(count: int) -> Dim:
        return Sym(count) if isinstance(c, Sym) else count

    if node.op == "SpaceToDepth":
        if h % b or w % b:
            raise node.wrong(f"{h} x {w} does not divide by {b}")
        t = imp.emit(Reshape, x, shape=(n, c, h // b, b, w // b, b))
        crd = node.attribute("mode", "DCR") == "CRD"
        t = imp.emit(Transpose, t, perm=(0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4))
        return imp.emit(Reshape, t, shape=(n, of(channels * b * b), h // b, w // b))
    if channels % (b * b):
        raise node.wrong(f"{c} channels do not divide by {b * b}")
    if node.attribute("mode", "DCR") == "DCR":
        t = imp.emit(Reshape, x, shape=(n, b, b, of(channels // (b * b)), h, w))
        t = imp.emit(Transpose, t, perm=(0, 3, 4, 1, 5, 2))
    else:
        t = imp.emit(Reshape, x, shape=(n, of(channels // (b * b)), b, b, h, w))
        t = imp.emit(Transpose, t, perm=(0, 1, 4, 2, 5, 3))
    return imp.emit(Reshape, t, shape=(n, of(channels // (b * b)), h * b, w * b))


@onnx_op("Identity", "Dropout")
def onnx_identity(imp: Importer, node: OnnxNode) -> Any:
    if node.op == "Dropout" and node.has(2):
        mode = node.constant(2, "training_mode")
        if mode is not None and bool(mode.reshape(-1)[0]):
            raise node.refuse("training mode")
    return node.need(0)


@onnx_op("Cast", "CastLike")
def onnx_cast(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    kinds = imp.onnx.TensorProto
    to = node.integer("to", 0) if node.op == "Cast" else None
    name = kinds.DataType.Name(to).lower() if to in kinds.DataType.values() else "unknown"
    if node.op == "CastLike":
        other = node.need(1)
        name = imp.dtype(other) if isinstance(other, str) else str(getattr(other, "dtype", "unknown"))
    name = {"float": "float32", "float16": "float32", "bfloat16": "float32"}.get(name, name)
    if isinstance(x, Mask):
        if name in ("float32", "bool"):
            return replace(x, dtype=name)
        x = imp.ref(x)
    if isinstance(x, np.ndarray) and name in TYPES:
        return x.astype(name)
    if not isinstance(x, str):
        raise node.refuse(f"a conversion to {name}")
    return x if name == imp.dtype(x) else _converted(imp, node, x, name)


#: Integer types and the numbers of bits that a value of them takes, the sign apart.
_BITS = {
    "bool": 1,
    "uint8": 8,
    "int8": 7,
    "uint16": 16,
    "int16": 15,
    "int32": 31,
    "int64": 63,
    "uint32": 32,
    "uint64": 64,
}


def _converted(imp: Importer, node: OnnxNode, x: str, to: str) -> Any:
    """Integers to float32 and to wider integers as they are; float32 to integers towards zero."""
    of, shape = imp.dtype(x), imp.shape(x)
    if to == "float32":
        return imp.emit(Reshape, x, shape=shape, dtype="float32")
    if to == "bool":
        x = imp.emit(Reshape, x, shape=shape, dtype="float32") if of != "float32" else x
        return imp.emit(node_classes()["binary"], x, np.float32(0), kind="ne", dtype="bool")
    if to not in _BITS:
        raise node.refuse(f"a conversion to {to}")
    if of == "float32":
        if _BITS[to] < 31:
            raise node.refuse(f"a conversion of float32 to {to}, which numbers outside it make undefined")
        return imp.emit(Reshape, imp.act(x, "trunc"), shape=shape, dtype=to)
    unsigned = of[0] in "ub"
    if _BITS[of] > _BITS[to] or (to[0] == "u" and not unsigned):
        raise node.refuse(f"a conversion of {of} to {to}")
    return imp.emit(Reshape, x, shape=shape, dtype=to)


@lowers(Reshape)
def lower_reshape(low: Lowering, n: Reshape) -> None:
    src = low.read(n.inputs[0], "plain")
    if n.inputs[0] in low.graph.inputs or n.output in low.graph.outputs:
        # memory of the caller: copied, flattened first so that the shapes agree
        if n.inputs[0] in low.graph.inputs:
            mid = low.add_value(n.output + ":copy", low.graph.shape(n.inputs[0]), "plain")
            low.node("copy", n.name, [src], mid, n.name)
            src = mid
        low.native[n.output] = low.add_value(n.output, n.shape, "plain", parent=src)
        low.aliased.add(n.output)
        return
    low.native[n.output] = low.add_value(n.output, n.shape, "plain", parent=src)
    low.aliased.add(n.output)


@lowers(Transpose)
def lower_transpose(low: Lowering, n: Transpose) -> None:
    low.node(
        "transpose",
        n.name,
        [low.dense(n.inputs[0])],
        low.declare(n.output),
        n.name,
        {"perm": list(n.perm)},
    )


@lowers(Expand)
def lower_expand(low: Lowering, n: Expand) -> None:
    low.node("expand", n.name, [low.dense(n.inputs[0])], low.declare(n.output), n.name)


@torch_op("unfold")
def torch_unfold(b: Builder, a: dict[str, Any]) -> Any:
    """Tensor.unfold: windows along a dimension, their elements in a last one."""
    x, size, step = a["self"], int(a["size"]), int(a["step"])
    shape = b.shape(x)
    axis = int(a["dimension"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("windows along the batch are not supported")
    starts = range(0, d - size + 1, step)
    places = taken(b, x, axis, [s + k for s in starts for k in range(size)])
    windows = b.reshape(places, (*shape[:axis], len(starts), size, *shape[axis + 1 :]))
    perm = [i for i in range(len(shape) + 1) if i != axis + 1]
    if perm[-1] == axis:
        return windows
    return b.emit(Transpose, windows, perm=(*perm, axis + 1))
