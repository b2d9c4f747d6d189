"""The Graph: a small typed IR of a network at inference, made by a front end and rewritten by passes.

A :class:`Graph` is a list of nodes in execution order. Each node is a dataclass of one operator with its
parameters as numpy arrays; it reads and writes *values* by name. Every value has a type and a shape whose
first dimension is usually the symbolic batch :class:`Sym`. Maps are NCHW logically, whatever the engine
stores. ``Graph.validate()`` checks names, order, shapes and parameters and says which node is wrong.

A pass never changes the graph that it is given: ``Graph.copy()`` copies nodes and values (parameters are
shared and are never written to), so a pass is ``def p(graph: Graph) -> Graph``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from actzip.errors import InputError, UnsupportedError

__all__ = [
    "ACT_KINDS",
    "BINARY_KINDS",
    "REDUCE_KINDS",
    "Act",
    "Activation",
    "AdaptivePool",
    "Array",
    "BatchNorm",
    "Binary",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "Dim",
    "Expand",
    "Graph",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "LocalResponseNorm",
    "MatMul",
    "Node",
    "Pad",
    "Pool",
    "Reduce",
    "Reshape",
    "Resize",
    "Shape",
    "Slice",
    "Softmax",
    "Sym",
    "Transpose",
    "Value",
    "concrete",
    "numel",
    "same_shape",
]

Array = NDArray[Any]


@dataclass(frozen=True)
class Sym:
    """A dimension of ``mul`` times the batch N, which is known only at the call."""

    mul: int = 1

    def __str__(self) -> str:
        return "N" if self.mul == 1 else f"{self.mul}N"

    __repr__ = __str__


Dim = int | Sym
Shape = tuple[Dim, ...]


def concrete(shape: Shape, batch: int) -> tuple[int, ...]:
    """``shape`` with N = ``batch``."""
    return tuple(d.mul * batch if isinstance(d, Sym) else int(d) for d in shape)


def numel(shape: Shape) -> tuple[int, int]:
    """Elements as ``(count, power)``: ``count * N**power``."""
    count, power = 1, 0
    for d in shape:
        if isinstance(d, Sym):
            count, power = count * d.mul, power + 1
        else:
            count *= int(d)
    return count, power


def same_shape(a: Shape, b: Shape) -> bool:
    """Equal for every N."""
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


def _times(d: Dim, k: int) -> Dim:
    return Sym(d.mul * k) if isinstance(d, Sym) else d * k


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(len(s) for s in shapes)
    out: list[Dim] = []
    for i in range(rank):
        dims = [s[i - (rank - len(s))] for s in shapes if i - (rank - len(s)) >= 0]
        wide = [d for d in dims if d != 1]
        if any(d != wide[0] for d in wide):
            raise InputError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
        out.append(wide[0] if wide else 1)
    return tuple(out)


@dataclass
class Value:
    """A tensor of the graph.

    ``storage`` is what the engine keeps: ``dense``, ``packed`` (mask and non-zero values, channels last) or ``band`` (some rows at a time, between a
    convolution and a pool).
    ``place`` = (parent, first channel): the value is no memory of its own but a channel range of ``parent``,
    the output of the :class:`Concat` that gathers it. ``density`` is the calibrated fraction of non-zeros.
    ``quant`` = (scale, bits): an unsigned linear quantizer rounds the value; the engine stores it as integers.
    """

    name: str
    shape: Shape
    dtype: str = "float32"
    storage: str = "dense"
    place: tuple[str, int] | None = None
    density: float | None = None
    quant: tuple[float, int] | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"
        if self.storage != "dense":
            text += f" {self.storage}"
        if self.place:
            text += f" in {self.place[0]}@{self.place[1]}"
        return text


# kind -> names of the numbers that it takes, with their defaults (PyTorch's)
ACT_KINDS: dict[str, dict[str, float]] = {
    "relu": {},
    "clip": {"lo": -math.inf, "hi": math.inf},
    "threshold": {"hi": math.inf},  # x > theta ? min(x, hi) : 0
    "leaky_relu": {"alpha": 0.01},
    "prelu": {},
    "elu": {"alpha": 1.0},
    "selu": {},
    "celu": {"alpha": 1.0},
    "softplus": {"beta": 1.0, "limit": 20.0},
    "softsign": {},
    "sigmoid": {},
    "logsigmoid": {},
    "hardsigmoid": {"alpha": 1.0 / 6.0, "beta": 0.5},
    "tanh": {},
    "hardtanh": {"lo": -1.0, "hi": 1.0},
    "silu": {},
    "gelu": {},
    "gelu_tanh": {},
    "hardswish": {},
    "mish": {},
    "exp": {},
    "log": {},
    "sqrt": {},
    "rsqrt": {},
    "reciprocal": {},
    "square": {},
    "neg": {},
    "abs": {},
    "sign": {},
    "floor": {},
    "ceil": {},
    "round": {},
    "erf": {},
    "sin": {},
    "cos": {},
}
ACT_PARAM = {"threshold", "prelu"}  # these take the array `param`: one number, or one per channel
BINARY_KINDS = ("add", "sub", "mul", "div", "max", "min", "pow")
REDUCE_KINDS = ("mean", "sum", "max", "min", "prod", "l1", "l2", "sum_square", "log_sum_exp")


@dataclass(frozen=True, eq=False)
class Act:
    """An elementwise function: ``kind`` of :data:`ACT_KINDS` with its numbers.

    ``param``: float32 array of 1 or C numbers for ``threshold`` (theta: ``x > theta ? x : 0``, NaN stays NaN)
    and ``prelu`` (slope). Channels are dimension 1.
    """

    kind: str
    alpha: float = 0.0
    beta: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf
    limit: float = 0.0
    param: Array | None = None

    @staticmethod
    def of(kind: str, *, param: Array | None = None, **numbers: float) -> Act:
        """An activation with PyTorch's defaults for the numbers not given.

        Raises:
            UnsupportedError: the kind is unknown.
            InputError: a number that the kind does not take, or a parameter array that is missing.
        """
        if kind not in ACT_KINDS:
            raise UnsupportedError(f"activation {kind!r} is not known; these are: {', '.join(ACT_KINDS)}")
        extra = set(numbers) - set(ACT_KINDS[kind])
        if extra:
            raise InputError(f"activation {kind!r} does not take {', '.join(sorted(extra))}")
        if kind == "hardtanh":
            merged = {**ACT_KINDS[kind], **numbers}
            return Act("clip", lo=merged["lo"], hi=merged["hi"])
        if (param is not None) != (kind in ACT_PARAM):
            raise InputError(f"activation {kind!r} {'needs' if kind in ACT_PARAM else 'takes no'} array")
        if param is not None:
            param = np.ascontiguousarray(param, dtype=np.float32).reshape(-1)
        return Act(kind, param=param, **{**ACT_KINDS[kind], **numbers})

    @property
    def sparsifies(self) -> bool:
        """Whether it gives exact zeros for a whole range of inputs."""
        if self.kind == "clip":
            return self.lo == 0.0 or self.hi == 0.0
        return self.kind in ("relu", "threshold", "hardsigmoid", "hardswish")

    @property
    def keeps_zero(self) -> bool:
        """Whether f(0) = 0."""
        if self.kind == "clip":
            return self.lo <= 0.0 <= self.hi
        if self.kind == "threshold":
            assert self.param is not None
            return bool((self.param >= 0).all())
        return self.kind not in (
            "sigmoid", "logsigmoid", "hardsigmoid", "softplus", "exp", "log", "rsqrt", "reciprocal", "cos",
        )  # fmt: skip

    def __str__(self) -> str:
        numbers = [f"{k}={getattr(self, k):g}" for k in ACT_KINDS[self.kind]]
        if self.param is not None:
            numbers.append(f"param={_show(self.param)}")
        return self.kind + (f"({', '.join(numbers)})" if numbers else "")


def _show(v: Any) -> str:
    if isinstance(v, np.ndarray):
        return f"{v.dtype}{list(v.shape)}"
    if isinstance(v, tuple):
        return "(" + ", ".join(map(_show, v)) + ")"
    return str(v)


def _pair(name: str, v: tuple[int, ...], length: int, least: int) -> None:
    if len(v) != length or any(not isinstance(x, int) or x < least for x in v):
        raise InputError(f"{name} is {v}, not {length} integers of at least {least}")


def _channels(name: str, array: Array | None, c: int) -> None:
    if array is not None and array.shape != (c,):
        raise InputError(f"{name} has shape {list(array.shape)}, not [{c}]")


def _rank(shape: Shape, rank: int) -> None:
    if len(shape) != rank:
        raise InputError(f"input of shape {shape} has {len(shape)} dimensions, not {rank}")


def _static(d: Dim, what: str) -> int:
    if isinstance(d, Sym):
        raise UnsupportedError(f"{what} depends on the batch")
    return d


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise InputError(f"axis {axis} of a tensor of {rank} dimensions")
    return axis % rank


@dataclass(eq=False)
class Node:
    """One operator. ``source`` says where it came from: module path, operator, line of the model's source."""

    name: str
    inputs: tuple[str, ...]
    output: str
    source: str = field(default="", kw_only=True)

    op: ClassVar[str] = "node"
    arity: ClassVar[tuple[int, int]] = (1, 1)  # least and most inputs

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        """The output's shape; checks parameters against the inputs' shapes.

        Raises:
            InputError: a parameter or a shape does not fit.
            UnsupportedError: right, but nothing that the engine can run.
        """
        raise NotImplementedError

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        """Multiply-accumulates an image (borders counted as if inside)."""
        return 0

    def fields(self) -> Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(self):
            if f.name not in ("name", "inputs", "output", "source"):
                yield f.name, getattr(self, f.name)

    def __str__(self) -> str:
        shown = []
        for k, v in self.fields():
            default = next(f for f in dataclasses.fields(self) if f.name == k).default
            if v is None or (not isinstance(v, np.ndarray) and v == default):
                continue
            shown.append(f"{k}={_show(v)}")
        return f"{self.output} = {self.op}({', '.join([*self.inputs, *shown])})"

    def where(self) -> str:
        """For messages: node and source."""
        return f"{self.op} {self.name!r}" + (f" ({self.source})" if self.source else "")


def _window(size: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool) -> int:
    span = size + before + after - dilation * (kernel - 1) - 1
    if span < 0:
        raise InputError(
            f"a window of {kernel} (dilation {dilation}) does not fit {size} + {before} + {after}"
        )
    out = (-(-span // stride) if ceil else span // stride) + 1
    if ceil and (out - 1) * stride >= size + before:  # the last window must start inside (PyTorch's rule)
        out -= 1
    return out


@dataclass(eq=False)
class Conv2d(Node):
    """Convolution. inputs: x (N, C, H, W)[, residual of the output's shape]. out = act(conv + bias + residual).

    ``weight`` (O, C / groups, KH, KW); ``padding`` (top, left, bottom, right), zeros. ``act`` is applied
    after the residual; ``pre_act`` (rare) before it. ``kernel`` is the engine variant chosen ("" = its choice).
    """

    weight: Array = field(kw_only=True)
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: Act | None = None
    pre_act: Act | None = None
    kernel: str = ""

    op = "conv2d"
    arity = (1, 2)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        _rank(x, 4)
        if self.weight.ndim != 4:
            raise InputError(f"weight of shape {list(self.weight.shape)} has not 4 dimensions")
        o, ci, kh, kw = self.weight.shape
        _pair("stride", self.stride, 2, 1)
        _pair("padding", self.padding, 4, 0)
        _pair("dilation", self.dilation, 2, 1)
        c = _static(x[1], "the number of channels")
        if self.groups < 1 or ci * self.groups != c or o % self.groups:
            raise InputError(
                f"weight {list(self.weight.shape)} in {self.groups} groups does not fit {c} channels"
            )
        _channels("bias", self.bias, o)
        t, left, b, r = self.padding
        h = _window(_static(x[2], "height"), kh, self.stride[0], t, b, self.dilation[0], False)
        w = _window(_static(x[3], "width"), kw, self.stride[1], left, r, self.dilation[1], False)
        out = (x[0], o, h, w)
        if len(shapes) > 1 and not same_shape(shapes[1], out):
            raise InputError(f"residual of shape {shapes[1]} is not of the output's shape {out}")
        return out

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.size) * _static(out[2], "height") * _static(out[3], "width")


@dataclass(eq=False)
class ConvTranspose2d(Node):
    """Transposed convolution. ``weight`` (C, O / groups, KH, KW); ``padding`` (top, left, bottom, right)
    is cut from the output, ``output_padding`` (h, w) adds to its bottom and right."""

    weight: Array = field(kw_only=True)
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: Act | None = None

    op = "conv_transpose2d"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        _rank(x, 4)
        c, og, kh, kw = self.weight.shape
        _pair("stride", self.stride, 2, 1)
        _pair("padding", self.padding, 4, 0)
        _pair("dilation", self.dilation, 2, 1)
        _pair("output_padding", self.output_padding, 2, 0)
        if x[1] != c or self.groups < 1 or c % self.groups:
            raise InputError(
                f"weight {list(self.weight.shape)} in {self.groups} groups does not fit {x[1]} channels"
            )
        _channels("bias", self.bias, og * self.groups)
        dims = []
        for i, (k, n) in enumerate(((kh, "height"), (kw, "width"))):
            size = (_static(x[2 + i], n) - 1) * self.stride[i] + self.dilation[i] * (k - 1) + 1
            size += self.output_padding[i] - self.padding[i] - self.padding[i + 2]
            if size < 1:
                raise InputError(f"the output's {n} would be {size}")
            dims.append(size)
        return (x[0], og * self.groups, dims[0], dims[1])

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.size) * _static(shapes[0][2], "height") * _static(shapes[0][3], "width")


@dataclass(eq=False)
class Linear(Node):
    """x (..., K)[, residual of the output's shape] -> act(x @ weight.T + bias + residual); ``weight`` (O, K)."""

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
        _channels("bias", self.bias, self.weight.shape[0])
        out = (*x[:-1], int(self.weight.shape[0]))
        if len(shapes) > 1 and not same_shape(shapes[1], out):
            raise InputError(f"residual of shape {shapes[1]} is not of the output's shape {out}")
        return out

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return int(self.weight.shape[1]) * numel(out)[0]


@dataclass(eq=False)
class MatMul(Node):
    """Batched matrix product of two values, leading dimensions broadcast (``torch.matmul``, both of rank >= 2)."""

    op = "matmul"
    arity = (2, 2)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        a, b = shapes
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise InputError(f"matrices of shape {a} and {b} do not multiply")
        return (*_broadcast([a[:-2], b[:-2]]), a[-2], b[-1]) if len(a) + len(b) > 4 else (a[-2], b[-1])

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return _static(shapes[0][-1], "the inner dimension") * numel(out)[0]


@dataclass(eq=False)
class BatchNorm(Node):
    """x (N, C, ...) -> x * scale + shift, per channel (statistics and eps already in them)."""

    scale: Array = field(kw_only=True)
    shift: Array = field(kw_only=True)
    act: Act | None = None

    op = "batch_norm"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if len(x) < 2:
            raise InputError(f"input of shape {x} has no channels")
        c = _static(x[1], "the number of channels")
        _channels("scale", self.scale, c)
        _channels("shift", self.shift, c)
        return x


@dataclass(eq=False)
class LayerNorm(Node):
    """Normalises over the last dimensions, those of ``shape``, or over dimension 1 with ``channels``;
    population variance."""

    shape: tuple[int, ...] = field(kw_only=True)
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    channels: bool = False

    op = "layer_norm"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        n = len(self.shape)
        if self.channels:
            if n != 1 or len(x) < 2 or x[1] != self.shape[0]:
                raise InputError(f"normalised shape {self.shape} is not dimension 1 of {x}")
        elif n < 1 or len(x) < n or tuple(x[-n:]) != tuple(self.shape):
            raise InputError(f"normalised shape {self.shape} is not the tail of {x}")
        for name, a in (("weight", self.weight), ("bias", self.bias)):
            if a is not None and a.shape != tuple(self.shape):
                raise InputError(f"{name} has shape {list(a.shape)}, not {list(self.shape)}")
        return x


@dataclass(eq=False)
class GroupNorm(Node):
    """Normalises each of ``groups`` channel groups over its channels and all further dimensions."""

    groups: int = field(kw_only=True)
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5

    op = "group_norm"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        c = _static(x[1], "the number of channels") if len(x) > 1 else 0
        if self.groups < 1 or not c or c % self.groups:
            raise InputError(f"{c} channels do not divide into {self.groups} groups")
        _channels("weight", self.weight, c)
        _channels("bias", self.bias, c)
        return x


@dataclass(eq=False)
class LocalResponseNorm(Node):
    """x / (k + alpha / size * sum over ``size`` neighbouring channels of x^2) ^ beta (``torch.nn.LocalResponseNorm``)."""

    size: int = field(kw_only=True)
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    op = "lrn"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if self.size < 1 or len(shapes[0]) < 2:
            raise InputError(f"size {self.size} on a tensor of shape {shapes[0]}")
        return shapes[0]


@dataclass(eq=False)
class Pool(Node):
    """Max or average pooling. ``padding`` (top, left, bottom, right): -inf for max, zeros for average.

    Then ``bias`` (C) is added and ``act`` applied. ``ceil_mode`` is PyTorch's; an average divides by the window's size, by what of it is inside when
    ``count_include_pad`` is false, or by ``divisor`` when that is not 0.
    """

    kind: str = field(kw_only=True)
    kernel_size: tuple[int, int] = field(kw_only=True)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0
    bias: Array | None = None
    act: Act | None = None

    op = "pool"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        _rank(x, 4)
        if self.kind not in ("max", "avg"):
            raise InputError(f"pooling kind {self.kind!r} is not 'max' or 'avg'")
        _pair("kernel_size", self.kernel_size, 2, 1)
        _pair("stride", self.stride, 2, 1)
        _pair("padding", self.padding, 4, 0)
        _pair("dilation", self.dilation, 2, 1)
        if self.kind == "avg" and self.dilation != (1, 1):
            raise UnsupportedError("average pooling with dilation")
        _channels("bias", self.bias, _static(x[1], "the number of channels"))
        t, left, b, r = self.padding
        k, s, d = self.kernel_size, self.stride, self.dilation
        h = _window(_static(x[2], "height"), k[0], s[0], t, b, d[0], self.ceil_mode)
        w = _window(_static(x[3], "width"), k[1], s[1], left, r, d[1], self.ceil_mode)
        return (x[0], x[1], h, w)


@dataclass(eq=False)
class AdaptivePool(Node):
    """Pools to a fixed ``output_size``; window i is [floor(i * H / O), ceil((i + 1) * H / O))."""

    kind: str = field(kw_only=True)
    output_size: tuple[int, int] = (1, 1)

    op = "adaptive_pool"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        _rank(x, 4)
        if self.kind not in ("max", "avg"):
            raise InputError(f"pooling kind {self.kind!r} is not 'max' or 'avg'")
        _pair("output_size", self.output_size, 2, 1)
        return (x[0], x[1], *self.output_size)


@dataclass(eq=False)
class Activation(Node):
    """An elementwise function on its own."""

    act: Act = field(kw_only=True)

    op = "activation"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        p = self.act.param
        if p is not None and p.size != 1 and (len(x) < 2 or x[1] != p.size):
            raise InputError(f"{self.act.kind} has {p.size} numbers for an input of shape {x}")
        return x


@dataclass(eq=False)
class Binary(Node):
    """``kind`` of two values with broadcasting, then ``act``. Constants are values too (``Graph.constants``)."""

    kind: str = field(kw_only=True)
    act: Act | None = None

    op = "binary"
    arity = (2, 2)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if self.kind not in BINARY_KINDS:
            raise UnsupportedError(f"elementwise {self.kind!r}; these are known: {', '.join(BINARY_KINDS)}")
        return _broadcast(shapes)


@dataclass(eq=False)
class Concat(Node):
    """Joins along ``axis``. ``placed``: each input is a channel range of the output already, nothing moves."""

    axis: int = 1
    placed: bool = False

    op = "concat"
    arity = (1, 1 << 20)

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        first = shapes[0]
        axis = _axis(self.axis, len(first))
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


@dataclass(eq=False)
class Slice(Node):
    """``x[start:stop:step]`` along ``axis``, bounds inside the tensor, step >= 1."""

    axis: int = field(kw_only=True)
    start: int = field(kw_only=True)
    stop: int = field(kw_only=True)
    step: int = 1

    op = "slice"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        axis = _axis(self.axis, len(x))
        size = _static(x[axis], "a sliced dimension")
        if not 0 <= self.start <= self.stop <= size or self.step < 1:
            raise InputError(f"slice {self.start}:{self.stop}:{self.step} of a dimension of {size}")
        return (*x[:axis], -(-(self.stop - self.start) // self.step), *x[axis + 1 :])


@dataclass(eq=False)
class Pad(Node):
    """Pads dimension i by ``before[i]`` and ``after[i]`` (negative: crops); mode constant, reflect or edge."""

    before: tuple[int, ...] = field(kw_only=True)
    after: tuple[int, ...] = field(kw_only=True)
    mode: str = "constant"
    value: float = 0.0

    op = "pad"

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
            size = _static(d, "a padded dimension")
            if size + a + b < 0 or (self.mode == "reflect" and max(a, b) >= size):
                raise InputError(f"padding {b}, {a} of a dimension of {size}")
            out.append(size + a + b)
        return tuple(out)


@dataclass(eq=False)
class Reshape(Node):
    """Same elements in the same (row-major, logical) order as ``shape``."""

    shape: Shape = field(kw_only=True)

    op = "reshape"

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

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if sorted(self.perm) != list(range(len(shapes[0]))):
            raise InputError(f"permutation {self.perm} of a tensor of {len(shapes[0])} dimensions")
        return tuple(shapes[0][i] for i in self.perm)


@dataclass(eq=False)
class Expand(Node):
    """Broadcasts to ``shape``."""

    shape: Shape = field(kw_only=True)

    op = "expand"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        if not same_shape(_broadcast([shapes[0], self.shape]), self.shape):
            raise InputError(f"shape {shapes[0]} does not broadcast to {self.shape}")
        return self.shape


@dataclass(eq=False)
class Reduce(Node):
    """Reduces ``axes`` (never the batch)."""

    kind: str = field(kw_only=True)
    axes: tuple[int, ...] = field(kw_only=True)
    keepdims: bool = False

    op = "reduce"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        if self.kind not in REDUCE_KINDS:
            raise UnsupportedError(f"reduction {self.kind!r}; these are known: {', '.join(REDUCE_KINDS)}")
        axes = {_axis(a, len(x)) for a in self.axes}
        for a in axes:
            _static(x[a], "a reduced dimension")
        if self.keepdims:
            return tuple(1 if i in axes else d for i, d in enumerate(x))
        return tuple(d for i, d in enumerate(x) if i not in axes)


@dataclass(eq=False)
class Softmax(Node):
    """Softmax (or its logarithm) along ``axis``."""

    axis: int = -1
    log: bool = False

    op = "softmax"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        _static(shapes[0][_axis(self.axis, len(shapes[0]))], "the softmax's dimension")
        return shapes[0]


@dataclass(eq=False)
class Resize(Node):
    """Interpolates (N, C, H, W) to ``size``; ``mode`` nearest or bilinear.

    ``scale`` (y, x) is output/input as the front end states it (it may differ from the sizes' ratio).
    Source coordinate of output i: half_pixel (i + 0.5) / scale - 0.5; align_corners
    i * (in - 1) / (out - 1); asymmetric i / scale. Nearest takes floor of i / scale (``torch`` "nearest"):
    with ``coordinates`` "asymmetric".
    """

    size: tuple[int, int] = field(kw_only=True)
    mode: str = "nearest"
    coordinates: str = "asymmetric"
    scale: tuple[float, float] | None = None

    op = "resize"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        _rank(shapes[0], 4)
        _pair("size", self.size, 2, 1)
        if self.mode not in ("nearest", "bilinear"):
            raise UnsupportedError(f"interpolation {self.mode!r}")
        if self.coordinates not in ("half_pixel", "align_corners", "asymmetric"):
            raise UnsupportedError(f"interpolation with coordinates {self.coordinates!r}")
        return (shapes[0][0], shapes[0][1], *self.size)


@dataclass
class Graph:
    """Nodes in execution order, the values that they read and write, and constants.

    ``inputs`` and ``outputs`` are value names. Every constant has a value too. ``meta`` carries what belongs to the
    model but not to the computation (how to rebuild a structured output, say); passes keep it.
    """

    name: str = "graph"
    nodes: list[Node] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    # building

    def fresh(self, base: str) -> str:
        """A value name that is not taken, ``base`` if that is free."""
        if base not in self.values:
            return base
        i = 1
        while f"{base}_{i}" in self.values:
            i += 1
        return f"{base}_{i}"

    def add_input(self, name: str, shape: Shape, dtype: str = "float32") -> str:
        if name in self.values:
            raise InputError(f"value {name!r} exists already")
        self.values[name] = Value(name, tuple(shape), dtype)
        self.inputs.append(name)
        return name

    def add_constant(self, array: Array, base: str = "const") -> str:
        name = self.fresh(base)
        self.constants[name] = array
        self.values[name] = Value(name, tuple(int(d) for d in array.shape), str(array.dtype))
        return name

    def add(self, node: Node, dtype: str = "float32") -> str:
        """Appends ``node``, infers its output's shape and gives its name.

        Raises:
            InputError, UnsupportedError: as :meth:`Node.infer`, with the node and its source named.
        """
        shape = self.infer(node)
        if node.output in self.values:
            raise InputError(f"{node.where()}: value {node.output!r} exists already")
        self.values[node.output] = Value(node.output, shape, dtype)
        self.nodes.append(node)
        return node.output

    def infer(self, node: Node) -> Shape:
        least, most = node.arity
        if not least <= len(node.inputs) <= most:
            raise InputError(f"{node.where()}: {len(node.inputs)} inputs, not {least} to {most}")
        for v in node.inputs:
            if v not in self.values:
                raise InputError(f"{node.where()}: reads {v!r}, which does not exist")
        try:
            return tuple(node.infer([self.values[v].shape for v in node.inputs]))
        except (InputError, UnsupportedError) as error:
            raise type(error)(f"{node.where()}: {error}") from error

    # reading

    def copy(self) -> Graph:
        """Nodes and values copied, parameters shared."""
        return Graph(
            self.name,
            [dataclasses.replace(n) for n in self.nodes],
            {k: dataclasses.replace(v) for k, v in self.values.items()},
            list(self.inputs),
            list(self.outputs),
            dict(self.constants),
            dict(self.meta),
        )

    def shape(self, value: str) -> Shape:
        return self.values[value].shape

    def producers(self) -> dict[str, Node]:
        return {n.output: n for n in self.nodes}

    def consumers(self) -> dict[str, list[Node]]:
        """value -> nodes that read it (once for each reading); graph outputs are not counted."""
        out: dict[str, list[Node]] = {v: [] for v in self.values}
        for n in self.nodes:
            for v in n.inputs:
                out[v].append(n)
        return out

    def macs(self) -> dict[str, int]:
        """node name -> multiply-accumulates an image, for the nodes that have any."""
        out = {}
        for n in self.nodes:
            m = n.macs([self.shape(v) for v in n.inputs], self.shape(n.output))
            if m:
                out[n.name] = m
        return out

    # checking

    def validate(self) -> None:
        """Checks names, order, shapes and parameters.

        Raises:
            InputError: what is wrong, and in which node.
        """
        known = set(self.inputs) | set(self.constants)
        for v in known:
            if v not in self.values:
                raise InputError(f"graph {self.name!r}: input or constant {v!r} has no value")
        for v, a in self.constants.items():
            if not same_shape(self.values[v].shape, tuple(a.shape)):
                raise InputError(
                    f"constant {v!r} of shape {list(a.shape)} is declared {self.values[v].shape}"
                )
        names: set[str] = set()
        for n in self.nodes:
            if n.name in names:
                raise InputError(f"{n.where()}: the name is taken")
            names.add(n.name)
            for v in n.inputs:
                if v not in known:
                    raise InputError(f"{n.where()}: reads {v!r} before it is written")
            if n.output in known:
                raise InputError(f"{n.where()}: writes {n.output!r} a second time")
            shape = self.infer(n)
            if n.output not in self.values:
                raise InputError(f"{n.where()}: output {n.output!r} has no value")
            if not same_shape(shape, self.values[n.output].shape):
                raise InputError(f"{n.where()}: gives {shape}, declared {self.values[n.output].shape}")
            known.add(n.output)
        for v in self.outputs:
            if v not in known:
                raise InputError(f"graph {self.name!r}: output {v!r} is never written")
        if not self.outputs:
            raise InputError(f"graph {self.name!r}: no output")
        for value in self.values.values():
            if value.place is None:
                continue
            parent, start = value.place
            if parent not in known or len(self.shape(parent)) != len(value.shape):
                raise InputError(f"value {value.name!r} is placed in {parent!r}, which is no map")
            if start < 0 or start + int(value.shape[1]) > int(self.shape(parent)[1]):  # type: ignore[arg-type]
                raise InputError(f"value {value.name!r} is placed outside {parent!r}")

    def __str__(self) -> str:
        lines = [f"graph {self.name}({', '.join(str(self.values[v]) for v in self.inputs)})"]
        lines += [f"  {n}  : {str(self.values[n.output]).partition(': ')[2]}" for n in self.nodes]
        lines.append(f"  return {', '.join(self.outputs)}")
        return "\n".join(lines)


Pass = Callable[[Graph], Graph]


def rename_reads(nodes: Iterable[Node], names: Mapping[str, str]) -> None:
    """In place: every reading of a key of ``names`` becomes one of its value (chains are followed)."""

    def last(v: str) -> str:
        while v in names:
            v = names[v]
        return v

    for n in nodes:
        n.inputs = tuple(last(v) for v in n.inputs)
