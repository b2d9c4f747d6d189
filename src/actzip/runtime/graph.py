"""The Graph: a small typed IR of a network at inference, made by a front end and rewritten by passes.

A :class:`Graph` is a list of nodes in execution order. Each node is a dataclass of one operator with its
parameters as numpy arrays; it reads and writes *values* by name. Every value has a type and a shape whose
first dimension is usually the symbolic batch :class:`Sym`. Maps are NCHW logically, whatever the engine
stores. ``Graph.validate()`` checks names, order, shapes and parameters and says which node is wrong.

The nodes of the operators are in :mod:`actzip.runtime.ops`, one file a family.

A pass never changes the graph that it is given: ``Graph.copy()`` copies nodes and values (parameters are
shared and are never written to), so a pass is ``def p(graph: Graph) -> Graph``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g

__all__ = [
    "Array",
    "Dim",
    "Graph",
    "Layout",
    "Node",
    "Pass",
    "Shape",
    "Sym",
    "Value",
    "concrete",
    "numel",
    "rename_reads",
    "root_of",
    "same_shape",
    "times",
    "unused",
]

Array = NDArray[Any]

#: Types of values: the engine computes in float32, inputs and outputs are converted at the border.
TYPES = (
    "float32", "float16", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
)  # fmt: skip


@dataclass(frozen=True)
class Sym:
    """A dimension of ``mul`` times the batch N, which is known only at the call."""

    mul: int = 1

    def __str__(self) -> str:
        return "N" if self.mul == 1 else f"{self.mul}N"

    __repr__ = __str__


Dim = int | Sym
Shape = tuple[Dim, ...]

#: Memory of a value of rank 4: ``map`` channels last, dense or packed; ``plain`` row-major;
#: ``either`` as the operands come.
Layout = Literal["map", "plain", "either"]


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


def unused(name: str, taken: set[str]) -> str:
    """``name``, longer where it is one of ``taken``, which gains it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def times(d: Dim, k: int) -> Dim:
    """``k`` of a dimension."""
    return Sym(d.mul * k) if isinstance(d, Sym) else d * k


def broadcast(shapes: Sequence[Shape]) -> Shape:
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

    ``dtype`` is what a caller sees: the engine computes in float32, which holds integers to 2^24
    exactly; an ``int64`` output is converted when it is handed out.

    ``storage`` is what the engine keeps: ``dense``, ``packed`` (mask and non-zero values, channels
    last) or ``band`` (some rows at a time, between a convolution and a pool). ``place`` = (parent,
    first channel): the value is no memory of its own but a channel range of ``parent``, the output
    of the :class:`Concat` that gathers it. ``density`` is the calibrated fraction of non-zeros.
    ``quant`` = (scale, bits): an unsigned linear quantizer rounds the value; the engine stores it
    as integers.
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


def show(v: Any) -> str:
    if isinstance(v, np.ndarray):
        return f"{v.dtype}{list(v.shape)}"
    if isinstance(v, tuple):
        return "(" + ", ".join(map(show, v)) + ")"
    return str(v)


def check_integers(name: str, v: tuple[int, ...], length: int, least: int) -> None:
    if len(v) != length or any(not isinstance(x, int) or x < least for x in v):
        raise InputError(f"{name} is {v}, not {length} integers of at least {least}")


def check_channels(name: str, array: Array | None, c: int) -> None:
    if array is not None and array.shape != (c,):
        raise InputError(f"{name} has shape {list(array.shape)}, not [{c}]")


def check_rank(shape: Shape, rank: int) -> None:
    if len(shape) != rank:
        raise InputError(f"input of shape {shape} has {len(shape)} dimensions, not {rank}")


def static(d: Dim, what: str) -> int:
    if isinstance(d, Sym):
        raise UnsupportedError(f"{what} depends on the batch")
    return d


def normal_axis(axis: int, rank: int) -> int:
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
    layout: ClassVar[Layout] = "plain"
    reads_packed: ClassVar[bool] = False  # whether the engine takes its inputs as packed maps too
    dtype: ClassVar[str] = "float32"  # of the output; "": that of the input, whose elements it moves

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        """The output's shape; checks parameters against the inputs' shapes.

        Raises:
            InputError: a parameter or a shape does not fit.
            UnsupportedError: right, but nothing that the engine can run.
        """
        raise NotImplementedError

    def works_on(self) -> Layout:
        """The layout of its operands: ``layout``, unless the parameters say otherwise."""
        return self.layout

    def writes_packed(self) -> bool:
        """Whether the engine can write its output as a packed map (where that is a map)."""
        return False

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
            shown.append(f"{k}={show(v)}")
        return f"{self.output} = {self.op}({', '.join([*self.inputs, *shown])})"

    def where(self) -> str:
        """For messages: node and source."""
        return f"{self.op} {self.name!r}" + (f" ({self.source})" if self.source else "")


@dataclass
class Graph:
    """Nodes in execution order, the values that they read and write, and constants.

    ``inputs`` and ``outputs`` are value names. Every constant has a value too. ``meta`` carries
    what belongs to the model but not to the computation (how to rebuild a structured output, say);
    passes keep it.
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

    def add(self, node: Node, dtype: str = "") -> str:
        """Appends ``node``, infers its output's shape and type (``dtype``: another one) and gives its name.

        Raises:
            InputError, UnsupportedError: as :meth:`Node.infer`, with the node and its source named.
        """
        shape = self.infer(node)
        if node.output in self.values:
            raise InputError(f"{node.where()}: value {node.output!r} exists already")
        dtype = dtype or node.dtype or self.values[node.inputs[0]].dtype
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
            y = self.shape(n.output)
            m = n.macs([self.shape(v) for v in n.inputs], y)
            if m:  # several maps of one image are frames of a volume
                out[n.name] = m * (y[0].mul if y and isinstance(y[0], Sym) else 1)
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
            if self.values[v].dtype not in TYPES:
                raise InputError(f"graph {self.name!r}: output {v!r} of type {self.values[v].dtype}")
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


def root_of(graph: g.Graph, value: str) -> tuple[str, int]:
    """The value whose memory ``value`` lies in, and its first channel there."""
    at = 0
    place = graph.values[value].place
    while place is not None:
        value, at = place[0], at + place[1]
        place = graph.values[value].place
    return value, at


def __getattr__(name: str) -> Any:
    """Names that once were here: pickles of compiled models say ``actzip.runtime.graph.Conv2d`` and
    the like."""
    for module in ("actzip.runtime.ops", "actzip.runtime.acts"):
        found = getattr(import_module(module), name, None) if name[:1].isupper() else None
        if found is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
