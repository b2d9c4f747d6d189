"""Parts of a tensor, joined, cut out or padded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Array, Dim, Node, Shape, Sym, concrete, normal_axis, same_shape, static
from actzip.runtime.onnx_node import OnnxNode, floats_only
from actzip.runtime.ops.shapes import dims_of, onnx_axes, probed_shape
from actzip.runtime.registry import PROBES, Probed, Ref, Stacked, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering


@dataclass(eq=False)
class Concat(Node):
    """Joins along ``axis``. ``placed``: each input is a channel range of the output already,
    nothing moves."""

    axis: int = 1
    placed: bool = False

    op = "concat"
    dtype = ""
    arity = (1, 1 << 20)
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        first = shapes[0]
        axis = normal_axis(self.axis, len(first))
        size: Dim = 0
        for s in shapes:
            if len(s) != len(first) or any(
                a != b for i, (a, b) in enumerate(zip(s, first, strict=True)) if i != axis
            ):
                raise InputError(f"shapes {', '.join(map(str, shapes))} do not join along axis {axis}")
            if isinstance(s[axis], Sym):
                raise UnsupportedError("joining along the batch")
            size = int(size) + int(s[axis])  # type: ignore[arg-type]
        return (*first[:axis], size, *first[axis + 1 :])

    def writes_packed(self) -> bool:
        return self.axis == 1 and self.placed


@dataclass(eq=False)
class Slice(Node):
    """``x[start:stop]`` along ``axis``, bounds inside the tensor: every ``step``-th element, from the
    last one backwards where that is negative."""

    axis: int = field(kw_only=True)
    start: int = field(kw_only=True)
    stop: int = field(kw_only=True)
    step: int = 1

    op = "slice"
    dtype = ""
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        axis = normal_axis(self.axis, len(x))
        size = static(x[axis], "a sliced dimension")
        if not 0 <= self.start <= self.stop <= size or self.step == 0:
            raise InputError(f"slice {self.start}:{self.stop}:{self.step} of a dimension of {size}")
        return (*x[:axis], -(-(self.stop - self.start) // abs(self.step)), *x[axis + 1 :])


@dataclass(eq=False)
class Take(Node):
    """Elements ``index`` (int64) along ``axis``, in that order."""

    axis: int = field(kw_only=True)
    index: Array = field(kw_only=True)

    op = "take"
    dtype = ""
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        axis = normal_axis(self.axis, len(x))
        size = static(x[axis], "a dimension that is indexed")
        at = np.asarray(self.index)
        if at.ndim != 1 or at.dtype != np.int64 or not at.size or at.min() < 0 or at.max() >= size:
            raise InputError(f"indices of type {at.dtype} and shape {at.shape} of a dimension of {size}")
        return (*x[:axis], at.size, *x[axis + 1 :])


@dataclass(eq=False)
class Pad(Node):
    """Pads dimension i by ``before[i]`` and ``after[i]`` (negative: crops); mode constant, reflect
    or edge."""

    before: tuple[int, ...] = field(kw_only=True)
    after: tuple[int, ...] = field(kw_only=True)
    mode: str = "constant"
    value: float = 0.0

    op = "pad"
    layout = "either"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if len(self.before) != len(x) or len(self.after) != len(x):
            raise InputError(f"padding {self.before}, {self.after} of a tensor of {len(x)} dimensions")
        if self.mode not in ("constant", "reflect", "edge"):
            raise UnsupportedError(f"padding mode {self.mode!r}")
        out: list[Dim] = []
        for d, b, a in zip(x, self.before, self.after, strict=True):
            if (b, a) == (0, 0):
                out.append(d)
                continue
            size = static(d, "a padded dimension")
            if size + a + b < 0 or (self.mode == "reflect" and max(a, b) >= size):
                raise InputError(f"padding {b}, {a} of a dimension of {size}")
            out.append(size + a + b)
        return tuple(out)


@torch_op("cat", "concat")
def torch_cat(b: Builder, a: dict[str, Any]) -> Any:
    parts = [t for t in a["tensors"] if 0 not in b.shape(t)]
    axis = int(a["dim"]) % len(b.out_shape)
    if len(parts) > 1 and axis == 0 and all(isinstance(t, Ref) for t in parts):
        first = b.shape(parts[0])
        same = isinstance(first[0], Sym) and all(same_shape(first, b.shape(t)) for t in parts)
        if same and isinstance(first[0], Sym) and _taken_apart(b.node, len(parts)):
            return Stacked(tuple(parts), (Sym(len(parts) * first[0].mul), *first[1:]))
    return parts[0] if len(parts) == 1 else b.emit(Concat, *parts, axis=axis)


_VIEWS = {"view", "reshape", "_unsafe_view"}
_APART = {"sum", "mean", "amax", "amin", "prod", "select", "unbind"}


def _taken_apart(node: Any, count: int) -> bool:
    """Whether values joined along the batch are only ever seen as ``count`` in front of it, and there
    reduced over themselves or picked."""

    def name(n: Any) -> str:
        return getattr(getattr(n.target, "_schema", None), "name", "").removeprefix("aten::")

    rank = node.meta["val"].ndim
    for view in node.users:
        shape: Any = getattr(view.meta.get("val"), "shape", ())
        if name(view) not in _VIEWS or len(shape) != rank + 1 or shape[0] != count:
            return False
        for reader in view.users:
            dim = reader.args[1] if len(reader.args) > 1 else reader.kwargs.get("dim")
            dim = 0 if dim is None and name(reader) == "unbind" else dim
            if name(reader) not in _APART or dim not in (0, [0], (0,)):
                return False
    return True


@torch_op("slice")
def torch_slice(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    if same_shape(shape, b.out_shape) and (a["step"] or 1) == 1:
        return x
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("slicing the batch is not supported")
    if isinstance(a["start"], Sym) or isinstance(a["end"], Sym):
        raise b.refuse("a slice whose bounds depend on the batch is not supported")
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(d)
    return _slice_of(b, x, axis, start, max(start, stop), step)


@torch_op("select")
def torch_select(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("choosing one image of the batch is not supported")
    i = int(a["index"]) % d
    if isinstance(x, Stacked) and x.apart and axis == 0:
        return x.parts[i]
    return b.reshape(_slice_of(b, x, axis, i, i + 1), b.out_shape)


@torch_op("split", "split_with_sizes", "chunk", "unsafe_split", "tensor_split", "unsafe_chunk")
def torch_split(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    axis = int(a["dim"]) % len(b.shape(x))
    out, at = [], 0
    for val in b.node.meta["val"]:
        d = b.dim(val.shape[axis])
        if not isinstance(d, int):
            raise b.refuse("splitting the batch is not supported")
        out.append(_slice_of(b, x, axis, at, at + d))
        at += d
    return out


@torch_op("unbind")
def torch_unbind(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    axis = int(a["dim"]) % len(shape)
    d = shape[axis]
    if not isinstance(d, int):
        raise b.refuse("splitting the batch is not supported")
    if isinstance(x, Stacked) and x.apart and axis == 0:
        return list(x.parts)
    rest = (*shape[:axis], *shape[axis + 1 :])
    return [b.reshape(_slice_of(b, x, axis, i, i + 1), rest) for i in range(d)]


@torch_op("roll")
def torch_roll(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    if not a["dims"]:
        raise b.refuse("rolling the flattened tensor is not supported")
    for s, axis in zip(a["shifts"], a["dims"], strict=True):
        d = shape[axis]
        if not isinstance(d, int):
            raise b.refuse("rolling the batch is not supported")
        s = int(s) % d
        if s:
            parts = [
                _slice_of(b, x, axis % len(shape), d - s, d),
                _slice_of(b, x, axis % len(shape), 0, d - s),
            ]
            x = b.emit(Concat, *parts, axis=axis % len(shape))
    return x


@torch_op("index", "index_select")
def torch_index(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    shape = b.shape(x)
    if "dim" in a:
        used = [(int(a["dim"]) % len(shape), a["index"])]
    else:
        used = [(i, t) for i, t in enumerate(a["indices"]) if t is not None]
    first, last = used[0][0], used[-1][0]
    if not isinstance(x, Ref) or last - first + 1 != len(used):
        raise b.refuse("indexing by tensors of dimensions that are apart is not supported")
    sizes = shape[first : last + 1]
    if not all(isinstance(d, int) for d in sizes):
        raise b.refuse("indexing the batch is not supported")
    at = _flat_index(b, [t for _, t in used], [int(d) for d in sizes])  # type: ignore[arg-type]
    if len(used) > 1:
        x = b.reshape(x, (*shape[:first], math.prod(map(int, sizes)), *shape[last + 1 :]))  # type: ignore
    out = taken(b, x, first, at.reshape(-1).tolist())
    return b.reshape(out, (*shape[:first], *at.shape, *shape[last + 1 :]))


def _flat_index(b: Builder, tensors: Sequence[Any], sizes: Sequence[int]) -> Array:
    """Indices of neighbouring dimensions of these sizes as those of one dimension."""
    import torch

    if not all(isinstance(t, torch.Tensor) for t in tensors):
        raise b.refuse("indexing by what depends on the input is not supported")
    if any(t.dtype == torch.bool for t in tensors):
        raise b.refuse("indexing by a mask is not supported")
    parts = np.broadcast_arrays(*(t.numpy() % d for t, d in zip(tensors, sizes, strict=True)))
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    found: Array = sum(p.astype(np.int64) * s for p, s in zip(parts, strides, strict=True))  # type: ignore
    return found


@torch_op("flip")
def torch_flip(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    for axis in a["dims"]:
        d = b.shape(x)[axis]
        if not isinstance(d, int):
            raise b.refuse("turning the batch round is not supported")
        x = b.emit(Slice, x, axis=int(axis) % len(b.shape(x)), start=0, stop=d, step=-1)
    return x


_MOST_RUNS = 4  # slices that are joined again; of more each element is taken


def taken(b: Builder | Importer, x: Any, axis: int, at: list[int]) -> Any:
    """Elements ``at`` of a dimension, in that order: slices where they are few runs of neighbours."""
    whole = b.shape(x)[axis]
    if at == list(range(int(whole))):  # type: ignore[arg-type]
        return x
    runs: list[list[int]] = []
    for i in at:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    if len(runs) > _MOST_RUNS:
        return b.emit(Take, x, axis=axis, index=np.array(at, np.int64))
    parts = [b.emit(Slice, x, axis=axis, start=s, stop=e) for s, e in runs]
    return parts[0] if len(parts) == 1 else b.emit(Concat, *parts, axis=axis)


@torch_op(
    "constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d"
)
def torch_pad(b: Builder, a: dict[str, Any]) -> Any:
    x = a["self"]
    name = b.node.target._schema.name
    mode = a.get("mode") or (
        "reflect" if "reflection" in name else "edge" if "replication" in name else "constant"
    )
    mode = {"replicate": "edge"}.get(mode, mode)
    rank = len(b.shape(x))
    flat = a["pad"] if "pad" in a else a["padding"]
    before, after = [0] * rank, [0] * rank
    for i in range(len(flat) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = int(flat[2 * i]), int(flat[2 * i + 1])
    if not any(before) and not any(after):
        return x
    if mode == "circular":
        for axis, (front, behind) in enumerate(zip(before, after, strict=True)):
            if front or behind:
                d = static(b.shape(x)[axis], "a padded dimension")
                at = [(i - front) % d for i in range(d + front + behind)]
                x = taken(b, x, axis, at)
        return x
    value = float(a.get("value") or 0.0)
    return b.emit(Pad, x, before=tuple(before), after=tuple(after), mode=mode, value=value)


def _slice_of(b: Builder, x: Any, axis: int, start: int, stop: int, step: int = 1) -> Any:
    d = b.shape(x)[axis]
    if isinstance(d, int) and (start, stop, step) == (0, d, 1):
        return x
    return b.emit(Slice, x, axis=axis, start=start, stop=stop, step=step)


@onnx_op("Concat")
def onnx_concat(imp: Importer, node: OnnxNode) -> Any:
    values = [node.need(i) for i in range(len(node.proto.input))]
    values = [v for v in values if not isinstance(v, np.ndarray) or v.size] or values
    floats_only(node, *values)
    if "axis" not in node.attributes:
        raise node.wrong("attribute 'axis' is missing")
    if len(values) == 1 and isinstance(values[0], str):
        return values[0]
    return imp.emit(Concat, *values, axis=node.integer("axis", 0))


@onnx_op("Split")
def onnx_split(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    shape = imp.shape(x)
    axis = node.integer("axis", 0)
    if not -len(shape) <= axis < len(shape):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis %= len(shape)
    size = shape[axis]
    if isinstance(size, Sym):
        raise node.refuse("splitting the batch")
    parts = (
        node.integers(1, "the sizes")
        if node.has(1)
        else (node.ints("split") if "split" in node.attributes else None)
    )
    if parts is None:
        n = node.integer("num_outputs", len(node.proto.output))
        if n < 1:
            raise node.wrong(f"{n} parts")
        each = -(-size // n)
        parts = [each] * (n - 1) + [size - each * (n - 1)]
    if sum(parts) != size or min(parts, default=0) < 0:
        raise node.wrong(f"parts {parts} of a dimension of {size}")
    out, start = [], 0
    for p in parts:
        out.append(imp.emit(Slice, x, axis=axis, start=start, stop=start + p))
        start += p
    return out


@onnx_op("Slice")
def onnx_slice(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    starts, ends = dims_of(node, 1, "the starts"), dims_of(node, 2, "the ends")
    rank = len(imp.shape(x))
    axes = onnx_axes(node, 3, rank)
    axes = list(range(len(starts))) if axes is None else axes
    steps = node.integers(4, "the steps") or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise node.wrong("starts, ends, axes and steps are not of one length")
    if len(set(axes)) < len(axes) or len(starts) > rank:
        raise node.wrong(f"axes {axes} for a tensor of {rank} dimensions")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            raise node.wrong("a step of 0")
        x = _onnx_slice(imp, node, x, axis, start, end, step)
    return x


#: An end of this or more is the end of any dimension: exporters write each integer type's greatest.
_NO_END = (1 << 31) - 1


def _onnx_slice(imp: Importer, node: OnnxNode, x: Any, axis: int, start: Dim, end: Dim, step: int) -> Any:
    size = imp.shape(x)[axis]
    if isinstance(size, Sym):
        if (
            (start == 0 or (isinstance(start, int) and start <= -_NO_END))
            and step == 1
            and (end == size or (isinstance(end, int) and end >= _NO_END))
        ):
            return x
        raise node.refuse("a part of the batch")
    if isinstance(start, Sym) or isinstance(end, Sym):
        raise node.refuse("bounds that depend on the batch")
    first, last, _ = slice(start, end, step).indices(size)
    if step < 0:
        count = len(range(first, last, step))
        if not count:
            raise node.refuse("an empty tensor")
        least = first + (count - 1) * step
        return imp.emit(Slice, x, axis=axis, start=least, stop=first + 1, step=step)
    if len(range(first, last, step)) == size:
        return x
    return imp.emit(Slice, x, axis=axis, start=first, stop=max(first, last), step=step)


def take(imp: Importer, node: OnnxNode, x: Any, axis: int, at: list[int]) -> Any:
    """Elements ``at`` of a dimension, in that order."""
    if not at:
        raise node.refuse("no indices")
    return taken(imp, x, axis, at)


@onnx_op("ReverseSequence")
def onnx_reverse_sequence(imp: Importer, node: OnnxNode) -> Any:
    """Sequences of the full length, turned round; TensorFlow's exporter writes every flip so."""
    x = node.need(0)
    shape, lengths = imp.shape(x), node.need(1)
    time, batch = node.integer("time_axis", 0), node.integer("batch_axis", 1)
    if sorted((time, batch)) != [0, 1] or len(shape) < 2:
        raise node.wrong(f"time axis {time} and batch axis {batch} of a tensor of shape {shape}")
    steps = shape[time]
    if not isinstance(steps, int):
        raise node.refuse("turning the batch round")
    values = lengths.values if isinstance(lengths, Probed) else (node.required(1, "the lengths"),)
    if any((v != steps).any() for v in values):
        raise node.refuse("sequences of several lengths")
    return take(imp, node, x, time, list(range(steps))[::-1])


def _all_in_order(shape: Shape, indices: Probed) -> bool:
    """Whether indices that depend on the batch take all numbers of a tensor of one dimension in their
    order, as torch.onnx writes ``as_strided``."""
    if len(shape) != 1:
        return False
    sizes = [concrete(shape, n)[0] for n in PROBES]
    return all(
        np.array_equal(v.reshape(-1), np.arange(n)) for v, n in zip(indices.values, sizes, strict=True)
    )


@onnx_op("Gather")
def onnx_gather(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    given = node.input(1)
    if isinstance(given, Probed) and _all_in_order(imp.shape(x), given):
        return imp.reshape(x, probed_shape(given))
    indices = node.required(1, "the indices")
    if indices.dtype.kind not in "iu":
        raise node.wrong(f"indices of type {indices.dtype}")
    shape = imp.shape(x)
    rank = len(shape)
    axis = node.integer("axis", 0)
    if not -rank <= axis < rank:
        raise node.wrong(f"axis {axis} of a tensor of {rank} dimensions")
    axis %= rank
    whole = shape[axis]
    if not isinstance(whole, int):
        raise node.refuse("a part of the batch")
    size: int = whole
    at: list[int] = [int(i) + (size if i < 0 else 0) for i in indices.reshape(-1)]
    if any(not 0 <= i < size for i in at):
        raise node.wrong(f"an index outside a dimension of {size}")
    out = take(imp, node, x, axis, at)
    return imp.reshape(out, (*shape[:axis], *(int(d) for d in indices.shape), *shape[axis + 1 :]))


@onnx_op("GatherND")
def onnx_gather_nd(imp: Importer, node: OnnxNode) -> Any:
    """Elements of the first dimensions together, by constant indices."""
    x, indices = node.need(0), node.required(1, "the indices")
    shape, batch = imp.shape(x), node.integer("batch_dims", 0)
    if indices.dtype.kind != "i" or indices.ndim == 0 or not 0 <= batch < min(indices.ndim, len(shape)):
        raise node.wrong(f"indices of type {indices.dtype} and shape {indices.shape}, batch_dims {batch}")
    count = batch + indices.shape[-1]
    if not batch < count <= len(shape):
        raise node.wrong(f"{indices.shape[-1]} indices into a tensor of shape {shape}, batch_dims {batch}")
    if not all(isinstance(d, int) for d in shape[:count]):
        raise node.refuse("a part of the batch")
    sizes = [int(d) for d in shape[:count]]  # type: ignore[arg-type]
    if list(indices.shape[:batch]) != sizes[:batch]:
        raise node.wrong(f"indices of shape {indices.shape} for batches of a tensor of shape {shape}")
    own = np.indices(indices.shape[:-1])[:batch]
    parts = [*own, *np.moveaxis(indices, -1, 0)]
    if any(((p < -d) | (p >= d)).any() for p, d in zip(parts, sizes, strict=True)):
        raise node.wrong(f"an index outside dimensions of {sizes}")
    at = np.ravel_multi_index(tuple(p % d for p, d in zip(parts, sizes, strict=True)), sizes)
    x = imp.reshape(x, (math.prod(sizes), *shape[count:]))
    out = take(imp, node, x, 0, [int(i) for i in at.reshape(-1)])
    return imp.reshape(out, (*(int(d) for d in at.shape), *shape[count:]))


@onnx_op("Compress")
def onnx_compress(imp: Importer, node: OnnxNode) -> Any:
    """Elements of a dimension, or of all in order, where a constant condition says so."""
    x, condition = node.need(0), node.required(1, "the condition")
    shape = imp.shape(x)
    if "axis" not in node.attributes:
        if not all(isinstance(d, int) for d in shape):
            raise node.refuse("a part of the batch")
        x, shape = imp.reshape(x, (math.prod(map(int, shape)),)), (math.prod(map(int, shape)),)  # type: ignore[arg-type]
    axis = node.integer("axis", 0)
    if condition.ndim != 1 or not -len(shape) <= axis < len(shape):
        raise node.wrong(f"a condition of shape {condition.shape}, axis {axis} of a tensor of shape {shape}")
    size = shape[axis]
    if not isinstance(size, int):
        raise node.refuse("a part of the batch")
    if condition.size > size:
        raise node.wrong(f"a condition of {condition.size} for a dimension of {size}")
    return take(imp, node, x, axis % len(shape), [int(i) for i in np.flatnonzero(condition)])


@onnx_op("Pad")
def onnx_pad(imp: Importer, node: OnnxNode) -> Any:
    x = node.need(0)
    rank = len(imp.shape(x))
    pads = node.integers(1, "the pads")
    if pads is None:
        raise node.wrong("the pads (input 1) are missing")
    axes = onnx_axes(node, 3, rank)
    axes = list(range(rank)) if axes is None else axes
    if len(pads) != 2 * len(axes):
        raise node.wrong(f"{len(pads)} pads for {len(axes)} axes")
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    value = node.floats(2, "the value")
    mode = node.attribute("mode", "constant")
    if mode == "wrap":
        for axis, (b, a) in enumerate(zip(before, after, strict=True)):
            size = imp.shape(x)[axis]
            if (b, a) != (0, 0):
                if isinstance(size, Sym):
                    raise node.refuse("padding along the batch")
                x = take(imp, node, x, axis, [(i - b) % size for i in range(size + b + a)])
        return x
    if mode not in ("constant", "reflect", "edge"):
        raise node.refuse(f"mode {mode!r}")
    number = 0.0 if value is None or value.size == 0 else float(value.reshape(-1)[0])
    return imp.emit(Pad, x, before=tuple(before), after=tuple(after), mode=mode, value=number)


@lowers(Concat)
def lower_concat(low: Lowering, n: Concat) -> None:
    out = low.declare(n.output)
    values = low.graph.values
    packed = values[n.output].storage == "packed"
    if n.axis != 1 or low.kind[n.output] != "map":
        low.node(
            "concat",
            n.name,
            [low.dense(v) for v in n.inputs],
            out,
            n.name,
            {"axis": [n.axis % len(values[n.output].shape)]},
        )
        return
    left, offsets, at = [], [], 0
    for v in n.inputs:
        place = values[v].place
        c = values[v].shape[1]
        assert isinstance(c, int)
        same = (
            place is not None
            and place[0] == n.output
            and low.kind[v] == "map"
            and (values[v].storage == "packed") == packed
        )
        if not same:
            left.append(v)
            offsets.append(at)
        at += c
    if not left:
        return
    if packed:
        raise UnsupportedError(f"{n.where()}: copying into a packed map")
    low.node("concat", n.name, [low.dense(v) for v in left], out, n.name, {"axis": [1], "offsets": offsets})


@lowers(Slice)
def lower_slice(low: Lowering, n: Slice) -> None:
    shape = low.graph.shape(n.inputs[0])
    axis = n.axis % len(shape)
    values = low.graph.values
    x = values[n.inputs[0]]
    dense_map = (
        low.kind[n.inputs[0]] == "map" and x.storage == "dense" and n.inputs[0] not in low.graph.inputs
    )
    y = values[n.output]
    free = low.kind[n.output] == "map" and y.place is None and y.storage == "dense"
    if dense_map and axis == 1 and n.step == 1 and free:
        # a view of its input's channels
        low.views.add(n.output)
        low.native[n.output] = low.add_value(
            n.output, y.shape, "map", parent=low.declare(n.inputs[0]), offset=n.start
        )
        return
    starts, steps = [0] * len(shape), [1] * len(shape)
    starts[axis], steps[axis] = n.start if n.step > 0 else n.stop - 1, n.step
    low.node(
        "slice",
        n.name,
        [low.dense(n.inputs[0])],
        low.declare(n.output),
        n.name,
        {"starts": starts, "steps": steps},
    )


@lowers(Take)
def lower_take(low: Lowering, n: Take) -> None:
    axis = n.axis % len(low.graph.shape(n.inputs[0]))
    ints = {"axis": [axis], "index": [int(i) for i in n.index]}
    low.node("take", n.name, [low.dense(n.inputs[0])], low.declare(n.output), n.name, ints)


@lowers(Pad)
def lower_pad(low: Lowering, n: Pad) -> None:
    low.node(
        "pad",
        n.name,
        [low.dense(n.inputs[0])],
        low.declare(n.output),
        n.name,
        {"before": list(n.before)},
        {"value": [n.value]},
        None,
        {"mode": n.mode},
    )
