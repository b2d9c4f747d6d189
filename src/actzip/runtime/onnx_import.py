"""The ONNX front end: a model file, its bytes or a ``ModelProto`` -> :class:`~actzip.runtime.graph.Graph`.

Opset 11 and newer. Shapes may be static or dynamic: a dynamic first dimension of an input becomes the symbolic
batch, other dynamic dimensions are taken from an example. What depends on initialisers alone is computed here;
shape arithmetic (Shape, Gather, Concat ... Reshape) is followed symbolically. Quantized graphs (QuantizeLinear,
DequantizeLinear) become the same arithmetic in float32.

Nothing in a file is trusted: sizes are checked before memory is taken, external data must lie in the model's
folder, and whatever does not fit raises a typed error that names the node.
"""

from __future__ import annotations

import heapq
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actzip.errors import ActzipError, DataError, InputError, UnsupportedError
from actzip.runtime import graph as g

__all__ = ["MAX_ELEMENTS", "OPERATORS", "NeedsConstant", "from_onnx", "load_onnx"]

Array = NDArray[Any]

#: No tensor of a graph, constant or computed, may have more elements than this (for one image).
MAX_ELEMENTS = 1 << 28

_MIN_OPSET = 11


class NeedsConstant(UnsupportedError):
    """An operand that must be known when the graph is made is an input of the graph; ``value`` names it."""

    def __init__(self, message: str, value: str) -> None:
        super().__init__(message)
        self.value = value


class Dims(tuple[g.Dim, ...]):
    """A one-dimensional integer tensor whose elements may depend on the batch: the value of a Shape."""


@dataclass(frozen=True)
class Mask:
    """``x > limit``, kept until the Where or Mul that makes a threshold of it; ``inverse``: where that is false."""

    x: str
    limit: Array
    inverse: bool


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise DataError(
            "reading ONNX models needs the onnx package; `pip install actzip[onnx]` brings it"
        ) from error
    return onnx


def load_onnx(source: Any) -> Any:
    """A checked ``ModelProto`` from a path, bytes or a ``ModelProto``, external data included.

    Raises:
        DataError: no such file, not an ONNX model, damaged or truncated; external data that is missing, outside the
            model's folder, or shorter than the tensor needs.
    """
    onnx = _onnx()
    folder: Path | None = None
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise DataError(f"no ONNX file {path}")
        folder = path.resolve().parent
        data = path.read_bytes()
        name = str(path)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "the ONNX bytes"
    elif isinstance(source, onnx.ModelProto):
        model, name = source, "the ONNX model"
        _external(onnx, model, None, name)
        return model
    else:
        raise InputError(f"an ONNX model is a path, bytes or a ModelProto, not {type(source).__name__}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise DataError(f"{name} is not an ONNX model, or is damaged: {error}") from error
    if not model.HasField("graph") or (not model.graph.node and not model.graph.output):
        raise DataError(f"{name} holds no ONNX graph; it is another kind of file, or damaged")
    _external(onnx, model, folder, name)
    return model


def _tensors(graph: Any) -> Any:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _external(onnx: Any, model: Any, folder: Path | None, name: str) -> None:
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = {e.key: e.value for e in tensor.external_data}
        where = f"{name}: tensor {tensor.name!r}"
        location = info.get("location", "")
        if folder is None:
            raise DataError(f"{where} has external data, which needs the model's path")
        try:
            target = (folder / location).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
            raise DataError(f"{where}: external data at {location!r}: {error}") from error
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise DataError(f"{where}: external data at {location!r} lies outside the model's folder")
        size = _elements(tensor, where) * _item_size(onnx, tensor, where)
        try:
            offset = int(info.get("offset", 0))
            length = int(info.get("length", size))
        except ValueError as error:
            raise DataError(f"{where}: external data has a malformed offset or length") from error
        if not target.is_file():
            raise DataError(f"{where}: external data file {location!r} is missing")
        if offset < 0 or length != size or offset + length > target.stat().st_size:
            raise DataError(f"{where}: {size} bytes are needed; {location!r} does not hold them at {offset}")
        try:
            with target.open("rb") as f:
                f.seek(offset)
                tensor.raw_data = f.read(length)
        except OSError as error:
            raise DataError(f"{where}: external data at {location!r} cannot be read: {error}") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _elements(tensor: Any, where: str) -> int:
    n = 1
    for d in tensor.dims:
        if d < 0:
            raise DataError(f"{where} has a negative dimension {d}")
        n *= d
        if n > MAX_ELEMENTS:
            raise DataError(f"{where} of shape {list(tensor.dims)} has more than {MAX_ELEMENTS} elements")
    return n


def _item_size(onnx: Any, tensor: Any, where: str) -> int:
    try:
        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    except Exception as error:
        raise DataError(f"{where} has the unknown element type {tensor.data_type}") from error


def _array(onnx: Any, tensor: Any, where: str) -> Array:
    n = _elements(tensor, where)
    if tensor.HasField("raw_data") and tensor.data_type not in (onnx.TensorProto.STRING, 0):
        item = _item_size(onnx, tensor, where)
        if tensor.data_type < 17 and len(tensor.raw_data) != n * item:
            raise DataError(f"{where}: {len(tensor.raw_data)} bytes for {n} elements of {item} bytes")
    try:
        a: Array = onnx.numpy_helper.to_array(tensor)
    except Exception as error:
        raise DataError(f"{where} cannot be read: {error}") from error
    if a.size != n:
        raise DataError(f"{where}: {a.size} elements for the shape {list(tensor.dims)}")
    return a


Handler = Callable[["_Importer", "_Node"], Any]
_HANDLERS: dict[str, Handler] = {}


def _op(*names: str) -> Callable[[Handler], Handler]:
    def register(f: Handler) -> Handler:
        for n in names:
            _HANDLERS[n] = f
        return f

    return register


class _Node:
    """One ONNX node: typed access to its attributes and inputs, and where it is."""

    def __init__(self, importer: _Importer, proto: Any, index: int) -> None:
        self.importer = importer
        self.proto = proto
        self.op = proto.op_type
        self.name = proto.name or f"{proto.op_type}_{index}"
        self.attributes = {a.name: a for a in proto.attribute}

    @property
    def where(self) -> str:
        return f"{self.op} node {self.name!r}"

    def refuse(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"{self.where}: {why}")

    def wrong(self, why: str) -> InputError:
        return InputError(f"{self.where}: {why}")

    def attribute(self, name: str, default: Any = None) -> Any:
        a = self.attributes.get(name)
        if a is None:
            return default
        value = _onnx().helper.get_attribute_value(a)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return list(value) if isinstance(value, (list, tuple)) or hasattr(value, "append") else value

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        value = self.attribute(name)
        if value is None:
            return list(default or ())
        if not isinstance(value, list) or any(not isinstance(v, int) for v in value):
            raise self.wrong(f"attribute {name!r} is not a list of integers")
        return [int(v) for v in value]

    def number(self, name: str, default: float) -> float:
        value = self.attribute(name, default)
        if not isinstance(value, (int, float)):
            raise self.wrong(f"attribute {name!r} is not a number")
        return float(value)

    def integer(self, name: str, default: int) -> int:
        value = self.attribute(name, default)
        if not isinstance(value, int):
            raise self.wrong(f"attribute {name!r} is not an integer")
        return value

    def has(self, i: int) -> bool:
        return i < len(self.proto.input) and self.proto.input[i] != ""

    def input(self, i: int) -> Any:
        """A value of the graph (its name as ``str``), an array, or :class:`Dims`; None where it is left out."""
        if not self.has(i):
            return None
        name = self.proto.input[i]
        if name not in self.importer.env:
            raise self.wrong(
                f"reads {name!r}, which nothing before it writes (missing initialiser, or a cycle)"
            )
        return self.importer.env[name]

    def need(self, i: int) -> Any:
        value = self.input(i)
        if value is None:
            raise self.wrong(f"input {i} is missing")
        return value

    def constant(self, i: int, what: str) -> Array | None:
        value = self.input(i)
        if value is None:
            return None
        if isinstance(value, Dims):
            if any(isinstance(d, g.Sym) for d in value):
                raise self.refuse(f"{what} depends on the batch")
            return np.array(value, dtype=np.int64)
        if isinstance(value, Mask):
            raise self.refuse(f"{what} is the result of a comparison")
        if isinstance(value, str):
            raise NeedsConstant(
                f"{self.where}: {what} must be known when the graph is made", self.proto.input[i]
            )
        return np.asarray(value)

    def required(self, i: int, what: str) -> Array:
        value = self.constant(i, what)
        if value is None:
            raise self.wrong(f"{what} (input {i}) is missing")
        return value

    def floats(self, i: int, what: str) -> Array | None:
        value = self.constant(i, what)
        return None if value is None else _float32(value, self.where)

    def integers(self, i: int, what: str) -> list[int] | None:
        value = self.constant(i, what)
        if value is None:
            return None
        if value.dtype.kind not in "iu":
            raise self.wrong(f"{what} is of type {value.dtype}, not integer")
        return [int(v) for v in value.reshape(-1)]


def _float32(a: Array, where: str) -> Array:
    if a.dtype.kind not in "fiub" and a.dtype.name not in ("bfloat16", "float8_e4m3fn"):
        raise UnsupportedError(f"{where}: a constant of type {a.dtype}")
    return np.asarray(a, dtype=np.float32, order="C")


def from_onnx(
    source: Any,
    shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None,
    *,
    constants: Mapping[str, Array] | None = None,
    name: str | None = None,
) -> g.Graph:
    """A Graph from an ONNX model.

    Args:
        source: path, bytes or ``ModelProto``.
        shapes: shapes of the inputs, by name or in order; they fill in dynamic dimensions that are not the batch.
        constants: inputs of the graph to be taken as constants.

    Raises:
        DataError: the file is missing, damaged or unsafe (:func:`load_onnx`).
        InputError: the graph is malformed: cycles, missing initialisers, shapes that do not fit.
        UnsupportedError: an operator, type or opset that the engine does not have; the node is named.
    """
    model = load_onnx(source)
    title = name or model.graph.name or "onnx"
    try:
        return _Importer(model, shapes, constants or {}, title).build()
    except ActzipError:
        raise
    except RecursionError as error:
        raise InputError(f"ONNX graph {title!r} is nested too deeply") from error
    except (MemoryError, OverflowError) as error:
        raise InputError(f"ONNX graph {title!r} asks for absurd sizes: {error}") from error
    except Exception as error:  # malformed in a way that no check above names
        raise InputError(f"ONNX graph {title!r} is malformed: {type(error).__name__}: {error}") from error


class _Importer:
    def __init__(self, model: Any, shapes: Any, constants: Mapping[str, Array], name: str) -> None:
        self.onnx = _onnx()
        self.model = model
        self.given = shapes
        self.bound = constants
        self.graph = g.Graph(name)
        self.env: dict[str, Any] = {}
        self.node_names: set[str] = set()
        self.opset = 0
        self.interned: dict[int, tuple[Array, str]] = {}
        self.current: _Node | None = None

    # -- set-up

    def build(self) -> g.Graph:
        for entry in self.model.opset_import:
            if entry.domain in ("", "ai.onnx"):
                self.opset = entry.version
        if self.opset == 0:
            domains = ", ".join(e.domain or "ai.onnx" for e in self.model.opset_import) or "none"
            raise UnsupportedError(f"the model imports no opset of ai.onnx (it imports {domains})")
        if self.opset < _MIN_OPSET:
            raise UnsupportedError(f"opset {self.opset}; {_MIN_OPSET} or newer is needed")
        proto = self.model.graph
        for tensor in proto.initializer:
            self.env[tensor.name] = _array(self.onnx, tensor, f"initialiser {tensor.name!r}")
        if len(proto.sparse_initializer):
            raise UnsupportedError("sparse initialisers")
        names = [v.name for v in proto.input if v.name not in self.env and v.name not in self.bound]
        for key, value in self.bound.items():
            self.env[key] = np.asarray(value)
        given: dict[str, Sequence[int]] = {}
        if isinstance(self.given, Mapping):
            given = dict(self.given)
        elif self.given is not None:
            given = dict(zip(names, self.given, strict=False))
        for value in proto.input:
            if value.name in names:
                self.env[value.name] = self.add_input(value, given.get(value.name))
        for index, node in enumerate(self._order(proto.node)):
            self.run(_Node(self, node, index))
        for value in proto.output:
            if value.name not in self.env:
                raise InputError(f"output {value.name!r} is written by no node")
            out = self.env[value.name]
            if isinstance(out, (Dims, Mask)):
                what = "a shape" if isinstance(out, Dims) else "a comparison"
                raise UnsupportedError(f"output {value.name!r} is {what}, not a float32 tensor")
            if not isinstance(out, str) and np.asarray(out).dtype != np.float32:
                raise UnsupportedError(
                    f"output {value.name!r} is a constant of type {np.asarray(out).dtype}, not float32"
                )
            name = out if isinstance(out, str) else self.ref(np.asarray(out))
            if name in self.graph.inputs or name in self.graph.constants or name in self.graph.outputs:
                name = self.emit(g.Reshape, name, shape=self.graph.shape(name))  # the engine owns its outputs
            self.graph.outputs.append(name)
        self.graph.meta["out_names"] = [v.name for v in proto.output]
        self.graph.meta["in_names"] = names
        self.graph.validate()
        return self.graph

    def _order(self, nodes: Any) -> list[Any]:
        """Topological order, the file's where that is one; in time linear in the nodes."""
        known = set(self.env) | {""}
        waiting: dict[str, list[int]] = {}  # value -> nodes that wait for it
        missing = [len({i for i in node.input if i not in known}) for node in nodes]
        for k, node in enumerate(nodes):
            for i in {i for i in node.input if i not in known}:
                waiting.setdefault(i, []).append(k)
        ready = [k for k, m in enumerate(missing) if m == 0]
        heapq.heapify(ready)
        out: list[Any] = []
        while ready:
            node = nodes[heapq.heappop(ready)]
            out.append(node)
            for o in node.output:
                if o not in known:
                    known.add(o)
                    for k in waiting.pop(o, ()):
                        missing[k] -= 1
                        if missing[k] == 0:
                            heapq.heappush(ready, k)
        if len(out) < len(nodes):
            written = {o for n in nodes for o in n.output}
            stuck = [n for k, n in enumerate(nodes) if missing[k]]
            for node in stuck:
                lost = ", ".join(repr(i) for i in node.input if i not in known and i not in written)
                if lost:
                    raise InputError(
                        f"{node.op_type} node {node.name!r} reads {lost}, which nothing writes: an initialiser is missing"
                    )
            node = stuck[0]
            names = ", ".join(i for i in node.input if i not in known)
            raise InputError(
                f"{node.op_type} node {node.name!r} is part of a cycle, or waits for one ({names})"
            )
        return out

    def add_input(self, value: Any, given: Sequence[int] | None) -> str:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise UnsupportedError(f"input {value.name!r} is a {kind or 'value of no type'}, not a tensor")
        tensor = value.type.tensor_type
        if tensor.elem_type != self.onnx.TensorProto.FLOAT:
            known = self.onnx.TensorProto.DataType.values()
            label = (
                self.onnx.TensorProto.DataType.Name(tensor.elem_type)
                if tensor.elem_type in known
                else "unknown"
            )
            raise NeedsConstant(
                f"input {value.name!r} is of type {label}; the engine takes float32", value.name
            )
        if not tensor.HasField("shape"):
            if given is None:
                raise InputError(f"input {value.name!r} has no shape; give one (an example)")
            return self.graph.add_input(value.name, tuple(int(d) for d in given))
        dims: list[g.Dim] = []
        declared = list(tensor.shape.dim)
        if given is not None and len(given) != len(declared):
            raise InputError(f"input {value.name!r} has {len(declared)} dimensions, not {len(given)}")
        for i, d in enumerate(declared):
            if d.HasField("dim_value"):
                if d.dim_value < 0:
                    raise InputError(f"input {value.name!r} has a negative dimension")
                if given is not None and given[i] != d.dim_value and i > 0:
                    raise InputError(f"input {value.name!r}: dimension {i} is {d.dim_value}, not {given[i]}")
                dims.append(int(d.dim_value))
            elif i == 0:
                dims.append(g.Sym())
            elif given is not None:
                dims.append(int(given[i]))
            else:
                label = d.dim_param or "?"
                raise InputError(
                    f"input {value.name!r}: dimension {i} ({label}) is dynamic; give an example input"
                )
        self.check_size(tuple(dims), f"input {value.name!r}")
        if 0 in dims:
            raise UnsupportedError(f"input {value.name!r} of shape {tuple(dims)} is empty")
        return self.graph.add_input(value.name, tuple(dims))

    # -- building

    def check_size(self, shape: g.Shape, where: str) -> None:
        n = 1
        for d in shape:
            n *= d.mul if isinstance(d, g.Sym) else int(d)
            if n == 0:
                raise UnsupportedError(f"{where}: a tensor of shape {shape}, which is empty")
            if n > MAX_ELEMENTS:
                raise InputError(f"{where}: shape {shape} has more than {MAX_ELEMENTS} elements")

    def ref(self, x: Any) -> str:
        if isinstance(x, str):
            return x
        where = self.current.where if self.current else "the graph"
        if isinstance(x, (Dims, Mask)):
            what = "a shape" if isinstance(x, Dims) else "a comparison"
            raise UnsupportedError(f"{where}: {what} is used as a tensor of numbers")
        a = np.asarray(x)
        known = self.interned.get(id(x))
        if known is None:
            known = (a, self.graph.add_constant(_float32(a, where), "const"))
            self.interned[id(x)] = known
        return known[1]

    def shape(self, x: Any) -> g.Shape:
        if isinstance(x, str):
            return self.graph.shape(x)
        if isinstance(x, Dims):
            return (len(x),)
        if isinstance(x, Mask):
            return self.graph.shape(x.x)
        return tuple(int(d) for d in np.asarray(x).shape)

    def emit(self, cls: type[g.Node], *inputs: Any, **fields: Any) -> str:
        names = tuple(self.ref(x) for x in inputs)
        base = self.current.name if self.current else "output"
        name, i = base, 1
        while name in self.node_names:
            name, i = f"{base}:{i}", i + 1
        self.node_names.add(name)
        source = self.current.where if self.current else ""
        node = cls(name, names, self.graph.fresh(f"v_{name}"), source=source, **fields)
        out = self.graph.add(node)
        self.check_size(self.graph.shape(out), source)
        return out

    def reshape(self, x: Any, shape: g.Shape) -> Any:
        if isinstance(x, np.ndarray):
            return x.reshape([int(d) for d in shape])  # type: ignore[arg-type]
        return x if g.same_shape(self.shape(x), shape) else self.emit(g.Reshape, x, shape=shape)

    # -- running

    def run(self, node: _Node) -> None:
        self.current = node
        if node.proto.domain not in ("", "ai.onnx"):
            raise node.refuse(f"operators of domain {node.proto.domain!r} are not known")
        for a in node.attributes.values():
            if a.HasField("g") or len(a.graphs):
                raise node.refuse("control flow is not supported by the engine")
        inputs = [node.input(i) for i in range(len(node.proto.input))]
        folded = self.fold(node, inputs)
        if folded is None:
            handler = _HANDLERS.get(node.op)
            if handler is None:
                raise node.refuse("this operator is not supported")
            folded = handler(self, node)
        results = folded if isinstance(folded, list) else [folded]
        for name, value in zip(node.proto.output, results, strict=False):
            if name:
                self.env[name] = value
        for name in node.proto.output[len(results) :]:
            if name and self._is_read(name):
                raise node.refuse(f"its output {name!r} is not computed by the engine")

    def _is_read(self, name: str) -> bool:
        proto = self.model.graph
        return any(name in n.input for n in proto.node) or any(o.name == name for o in proto.output)

    def fold(self, node: _Node, inputs: list[Any]) -> list[Any] | None:
        """The outputs of a node that reads constants alone, computed by ONNX's own reference implementation."""
        if node.op in _SHAPE_OPS or not all(x is None or isinstance(x, np.ndarray) for x in inputs):
            return None
        if node.op in _GROWING and not self._small(node, inputs):
            raise node.wrong(f"asks for more than {MAX_ELEMENTS} elements")
        plain = _dequantized(node, *inputs) if node.op == "DequantizeLinear" else None
        if plain is not None:
            return [plain]
        if node.op in (
            "RandomNormal",
            "RandomUniform",
            "RandomNormalLike",
            "RandomUniformLike",
            "Multinomial",
            "Bernoulli",
        ):
            raise node.refuse("random numbers")
        from onnx.reference import ReferenceEvaluator

        helper = self.onnx.helper
        names = [n for n in node.proto.input if n]
        graph = helper.make_graph(
            [node.proto],
            "fold",
            [helper.make_value_info(n, self.onnx.TypeProto()) for n in dict.fromkeys(names)],
            [helper.make_value_info(n, self.onnx.TypeProto()) for n in node.proto.output if n],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version or 8
        )
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                values = ReferenceEvaluator(model).run(
                    None, {n: x for n, x in zip(node.proto.input, inputs, strict=True) if n}
                )
        except Exception as error:
            raise node.wrong(f"its constants do not fit: {type(error).__name__}: {error}") from error
        out: list[Any] = []
        results = iter(values)
        for n in node.proto.output:
            out.append(np.asarray(next(results)) if n else None)
        return out

    def _small(self, node: _Node, inputs: list[Any]) -> bool:
        """Whether an operator whose output's size is data (Expand, Tile ...) asks for something reasonable."""
        try:
            if node.op in ("ConstantOfShape", "Expand"):
                wanted = inputs[0] if node.op == "ConstantOfShape" else inputs[1]
                return (
                    math.prod(max(1, int(d)) for d in wanted.reshape(-1))
                    * (inputs[0].size if node.op == "Expand" else 1)
                    <= MAX_ELEMENTS
                )
            if node.op == "Tile":
                return bool(
                    inputs[0].size * math.prod(max(1, int(d)) for d in inputs[1].reshape(-1)) <= MAX_ELEMENTS
                )
            if node.op == "Range":
                start, limit, delta = (float(v.reshape(())) for v in inputs)
                return delta != 0 and abs((limit - start) / delta) <= MAX_ELEMENTS
            if node.op == "Pad":
                pads = inputs[1].reshape(-1)
                rank = inputs[0].ndim
                sizes = [
                    inputs[0].shape[i] + int(pads[i]) + int(pads[i + len(pads) // 2])
                    for i in range(min(rank, len(pads) // 2))
                ]
                return bool(math.prod(max(1, s) for s in sizes) * max(1, inputs[0].size) <= MAX_ELEMENTS)
            if node.op == "OneHot":
                return bool(inputs[0].size * int(inputs[1].reshape(-1)[0]) <= MAX_ELEMENTS)
        except (ValueError, IndexError, OverflowError):
            return True  # malformed: the evaluation says how
        return True


_SHAPE_OPS = {"Shape", "Size"}
_GROWING = {"ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot", "Resize"}


# --- shapes ---------------------------------------------------------------------------------------------------------


@_op("Shape")
def _shape(self: _Importer, node: _Node) -> Any:
    shape = self.shape(node.need(0))
    start = node.integer("start", 0)
    end = node.attribute("end")
    dims = shape[slice(start, end)]
    if any(isinstance(d, g.Sym) for d in dims):
        return Dims(dims)
    return np.array(dims, dtype=np.int64)


@_op("Size")
def _size(self: _Importer, node: _Node) -> Any:
    count, power = g.numel(self.shape(node.need(0)))
    if power == 0:
        return np.array(count, dtype=np.int64)
    raise node.refuse("the number of elements depends on the batch")


def _dims_of(node: _Node, i: int, what: str) -> list[g.Dim]:
    value = node.need(i)
    if isinstance(value, Dims):
        return list(value)
    array = node.required(i, what)
    if array.dtype.kind not in "iuf":
        raise node.wrong(f"{what} is of type {array.dtype}, not a number")
    return [int(v) for v in array.reshape(-1)]


def _dims_result(values: Sequence[g.Dim], like: Any = None) -> Any:
    return Dims(values) if any(isinstance(v, g.Sym) for v in values) else np.array(values, dtype=np.int64)


def _times(a: g.Dim, b: g.Dim, node: _Node) -> g.Dim:
    if isinstance(a, g.Sym) and isinstance(b, g.Sym):
        raise node.refuse("a dimension would grow with the square of the batch")
    if isinstance(a, g.Sym):
        return g.Sym(a.mul * int(b)) if int(b) else 0  # type: ignore[arg-type]
    if isinstance(b, g.Sym):
        return _times(b, a, node)
    return a * b


def _shape_arithmetic(self: _Importer, node: _Node) -> Any:
    a, b = (_dims_of(node, i, "an operand") for i in (0, 1))
    n = max(len(a), len(b))
    if len(a) not in (1, n) or len(b) not in (1, n):
        raise node.wrong(f"shapes of {len(a)} and {len(b)} dimensions do not broadcast")
    a, b = a * (n // len(a)), b * (n // len(b))
    out: list[g.Dim] = []
    for x, y in zip(a, b, strict=True):
        if node.op == "Mul":
            out.append(_times(x, y, node))
        elif node.op == "Div" and isinstance(x, g.Sym) and isinstance(y, int) and y and x.mul % y == 0:
            out.append(g.Sym(x.mul // y))
        elif node.op in ("Add", "Sub") and y == 0:
            out.append(x)
        elif node.op == "Div" and isinstance(x, g.Sym) and isinstance(y, g.Sym) and x.mul % y.mul == 0:
            out.append(x.mul // y.mul)
        else:
            raise node.refuse("this arithmetic on a dimension that depends on the batch")
    return _dims_result(out)


# --- elementwise ----------------------------------------------------------------------------------------------------

_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow"}


def _same_type(node: _Node, *values: Any) -> None:
    for v in values:
        if isinstance(v, np.ndarray) and v.dtype.kind not in "f" and v.dtype.name != "bfloat16":
            raise node.refuse(f"an operand of type {v.dtype}")


@_op(*_BINARY)
def _binary(self: _Importer, node: _Node) -> Any:
    a, b = node.need(0), node.need(1)
    if isinstance(a, Dims) or isinstance(b, Dims):
        return _shape_arithmetic(self, node)
    if node.op == "Mul" and (isinstance(a, Mask) or isinstance(b, Mask)):
        return _masked(self, node, *((a, b) if isinstance(a, Mask) else (b, a)))
    if node.op != "Pow":
        _same_type(node, a, b)
    return self.emit(g.Binary, a, b, kind=_BINARY[node.op])


@_op("Max", "Min", "Sum", "Mean")
def _variadic(self: _Importer, node: _Node) -> Any:
    values = [node.need(i) for i in range(len(node.proto.input))]
    if not values:
        raise node.wrong("has no input")
    _same_type(node, *values)
    kind = {"Max": "max", "Min": "min"}.get(node.op, "add")
    out = values[0] if len(values) > 1 else self.emit(g.Reshape, values[0], shape=self.shape(values[0]))
    for v in values[1:]:
        out = self.emit(g.Binary, out, v, kind=kind)
    if node.op == "Mean" and len(values) > 1:
        out = self.emit(g.Binary, out, np.array(len(values), dtype=np.float32), kind="div")
    return out


_UNARY: dict[str, Callable[[_Node], g.Act]] = {
    "Relu": lambda n: g.Act.of("relu"),
    "LeakyRelu": lambda n: g.Act.of("leaky_relu", alpha=n.number("alpha", 0.01)),
    "Elu": lambda n: g.Act.of("elu", alpha=n.number("alpha", 1.0)),
    "Celu": lambda n: g.Act.of("celu", alpha=n.number("alpha", 1.0)),
    "Softplus": lambda n: g.Act.of("softplus"),
    "Softsign": lambda n: g.Act.of("softsign"),
    "Sigmoid": lambda n: g.Act.of("sigmoid"),
    "HardSigmoid": lambda n: g.Act.of(
        "hardsigmoid", alpha=n.number("alpha", 0.2), beta=n.number("beta", 0.5)
    ),
    "HardSwish": lambda n: g.Act.of("hardswish"),
    "Tanh": lambda n: g.Act.of("tanh"),
    "Mish": lambda n: g.Act.of("mish"),
    "Gelu": lambda n: g.Act.of("gelu_tanh" if n.attribute("approximate", "none") == "tanh" else "gelu"),
    "Exp": lambda n: g.Act.of("exp"),
    "Log": lambda n: g.Act.of("log"),
    "Sqrt": lambda n: g.Act.of("sqrt"),
    "Reciprocal": lambda n: g.Act.of("reciprocal"),
    "Neg": lambda n: g.Act.of("neg"),
    "Abs": lambda n: g.Act.of("abs"),
    "Sign": lambda n: g.Act.of("sign"),
    "Floor": lambda n: g.Act.of("floor"),
    "Ceil": lambda n: g.Act.of("ceil"),
    "Round": lambda n: g.Act.of("round"),
    "Erf": lambda n: g.Act.of("erf"),
    "Sin": lambda n: g.Act.of("sin"),
    "Cos": lambda n: g.Act.of("cos"),
}


@_op(*_UNARY)
def _unary(self: _Importer, node: _Node) -> Any:
    return self.emit(g.Activation, node.need(0), act=_UNARY[node.op](node))


@_op("Selu")
def _selu(self: _Importer, node: _Node) -> Any:
    alpha, gamma = (
        node.number("alpha", 1.67326319217681884765625),
        node.number("gamma", 1.05070102214813232421875),
    )
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.0507010) < 1e-6:
        return self.emit(g.Activation, node.need(0), act=g.Act.of("selu"))
    out = self.emit(g.Activation, node.need(0), act=g.Act.of("elu", alpha=alpha))
    return self.emit(g.Binary, out, np.array(gamma, dtype=np.float32), kind="mul")


@_op("Swish")
def _swish(self: _Importer, node: _Node) -> Any:
    alpha = node.number("alpha", 1.0)
    x = node.need(0)
    if alpha == 1.0:
        return self.emit(g.Activation, x, act=g.Act.of("silu"))
    scaled = self.emit(g.Binary, x, np.array(alpha, dtype=np.float32), kind="mul")
    gate = self.emit(g.Activation, scaled, act=g.Act.of("sigmoid"))
    return self.emit(g.Binary, x, gate, kind="mul")


@_op("ThresholdedRelu")
def _thresholded(self: _Importer, node: _Node) -> Any:
    theta = np.array([node.number("alpha", 1.0)], dtype=np.float32)
    return self.emit(g.Activation, node.need(0), act=g.Act.of("threshold", param=theta))


@_op("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
def _compare(self: _Importer, node: _Node) -> Any:
    """``x > t`` of a value and a constant; ``x >= t`` is ``x >`` the next lower number."""
    x, limit, op = node.need(0), node.need(1), node.op
    if isinstance(limit, str) and not isinstance(x, str):
        x, limit = limit, x
        op = op.replace("Greater", "?").replace("Less", "Greater").replace("?", "Less")
    if not isinstance(x, str) or not isinstance(limit, np.ndarray):
        raise node.refuse(
            "a comparison of two values (of a value and a constant is supported, for a threshold)"
        )
    t = _float32(limit, node.where)
    if op in ("GreaterOrEqual", "Less"):
        t = np.nextafter(t, np.float32(-np.inf))
    return Mask(x, t, op.startswith("Less"))


@_op("Where")
def _where(self: _Importer, node: _Node) -> Any:
    mask, yes, no = node.need(0), node.need(1), node.need(2)
    if not isinstance(mask, Mask):
        raise node.refuse("a condition that is no comparison with a constant")
    if mask.inverse:
        yes, no = no, yes
    if not isinstance(no, np.ndarray) or no.size == 0 or bool((no != 0).any()):
        raise node.refuse("only a threshold is supported: Where(x > t, x, 0)")
    return _masked(self, node, Mask(mask.x, mask.limit, False), yes)


def _masked(self: _Importer, node: _Node, mask: Mask, x: Any) -> Any:
    """``x`` where the mask is, else 0: a thresholded ReLU."""
    shape = self.shape(x)
    dims = [1] * (len(shape) - mask.limit.ndim) + list(mask.limit.shape)
    channels = len(dims) == len(shape) > 1 and dims == [1, mask.limit.size, *[1] * (len(shape) - 2)]
    if mask.inverse or x != mask.x or not (mask.limit.size == 1 or channels):
        raise node.refuse(
            "only a threshold is supported: x where x > t (one number, or one a channel), else 0"
        )
    return self.emit(g.Activation, x, act=g.Act.of("threshold", param=mask.limit.reshape(-1)))


@_op("PRelu")
def _prelu(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    slope = node.floats(1, "the slope")
    if slope is None:
        raise node.wrong("the slope (input 1) is missing")
    shape = self.shape(x)
    dims = [1] * (len(shape) - slope.ndim) + list(slope.shape)
    if slope.size == 1 or (len(shape) > 1 and dims[1] == slope.size == shape[1] and len(dims) == len(shape)):
        return self.emit(g.Activation, x, act=g.Act.of("prelu", param=slope))
    positive = self.emit(g.Activation, x, act=g.Act.of("relu"))
    zero = np.zeros((), dtype=np.float32)
    negative = self.emit(g.Binary, self.emit(g.Binary, x, zero, kind="min"), slope, kind="mul")
    return self.emit(g.Binary, positive, negative, kind="add")


@_op("Clip")
def _clip(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    lo, hi = node.floats(1, "the minimum"), node.floats(2, "the maximum")
    low = -math.inf if lo is None or lo.size == 0 else float(lo.reshape(-1)[0])
    high = math.inf if hi is None or hi.size == 0 else float(hi.reshape(-1)[0])
    if low > high:  # ONNX: min(max(x, lo), hi) = hi
        low = high
    return self.emit(g.Activation, x, act=g.Act.of("clip", lo=low, hi=high))


@_op("Identity", "Dropout")
def _identity(self: _Importer, node: _Node) -> Any:
    if node.op == "Dropout" and node.has(2):
        mode = node.constant(2, "training_mode")
        if mode is not None and bool(mode.reshape(-1)[0]):
            raise node.refuse("training mode")
    return node.need(0)


@_op("Cast", "CastLike")
def _cast(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    if isinstance(x, Dims):
        return x
    if isinstance(x, Mask) and node.op == "Cast" and node.integer("to", 0) == self.onnx.TensorProto.FLOAT:
        return x
    to = node.integer("to", 0) if node.op == "Cast" else None
    if node.op == "CastLike":
        other = node.need(1)
        to = self.onnx.TensorProto.FLOAT if isinstance(other, str) else None
    if to != self.onnx.TensorProto.FLOAT:
        raise node.refuse("a conversion to another type than float32")
    return x


# --- convolution, matrix product ----------------------------------------------------------------------------------


def _auto_pads(
    node: _Node,
    spatial: Sequence[g.Dim],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    n = len(kernel)
    auto = node.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = node.ints("pads", [0] * (2 * n))
    elif auto == "VALID":
        pads = [0] * (2 * n)
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * n)
        for i in range(n):
            size = spatial[i]
            if isinstance(size, g.Sym):
                raise node.refuse("a spatial dimension depends on the batch")
            out = -(-size // strides[i])
            total = max(0, (out - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size)
            small, large = total // 2, total - total // 2
            pads[i], pads[i + n] = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        raise node.wrong(f"auto_pad {auto!r}")
    if len(pads) != 2 * n:
        raise node.wrong(f"{len(pads)} pads for {n} spatial dimensions")
    return pads


def _spatial(node: _Node, name: str, n: int, default: int) -> list[int]:
    values = node.ints(name, [default] * n)
    if len(values) != n:
        raise node.wrong(f"attribute {name!r} has {len(values)} numbers for {n} spatial dimensions")
    return values


def _two_d(pads: list[int]) -> tuple[int, int, int, int]:
    """ONNX order (begins, ends) -> (top, left, bottom, right); one dimension becomes a row of height 1."""
    if len(pads) == 2:
        return (0, pads[0], 0, pads[1])
    return (pads[0], pads[1], pads[2], pads[3])


def _pair(values: list[int], fill: int = 1) -> tuple[int, int]:
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def _as_map(self: _Importer, x: Any, n: int) -> Any:
    """(N, C, L) -> (N, C, 1, L)."""
    shape = self.shape(x)
    return self.reshape(x, (shape[0], shape[1], 1, shape[2])) if n == 1 else x


def _from_map(self: _Importer, y: Any, n: int) -> Any:
    shape = self.shape(y)
    return self.reshape(y, (shape[0], shape[1], shape[3])) if n == 1 else y


@_op("Conv", "ConvTranspose")
def _conv(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    weight = node.floats(1, "the weight")
    bias = node.floats(2, "the bias")
    if weight is None:
        raise node.wrong("the weight (input 1) is missing")
    shape = self.shape(x)
    n = len(shape) - 2
    if n not in (1, 2):
        raise node.refuse(f"{n} spatial dimensions (1 and 2 are supported)")
    if weight.ndim != n + 2:
        raise node.wrong(f"weight of shape {list(weight.shape)} for an input of shape {shape}")
    kernel = node.ints("kernel_shape", list(weight.shape[2:]))
    if kernel != list(weight.shape[2:]):
        raise node.wrong(f"kernel_shape {kernel} does not fit the weight's shape {list(weight.shape)}")
    strides, dilations = _spatial(node, "strides", n, 1), _spatial(node, "dilations", n, 1)
    groups = node.integer("group", 1)
    if n == 1:
        weight = weight.reshape(*weight.shape[:2], 1, weight.shape[2])
    x2 = _as_map(self, x, n)
    if node.op == "Conv":
        pads = _auto_pads(node, shape[2:], kernel, strides, dilations)
        if min(pads, default=0) < 0:
            raise node.refuse("negative padding")
        out = self.emit(
            g.Conv2d,
            x2,
            weight=weight,
            bias=bias,
            stride=_pair(strides),
            padding=_two_d(pads),
            dilation=_pair(dilations),
            groups=groups,
        )
        return _from_map(self, out, n)
    extra = _spatial(node, "output_padding", n, 0)
    wanted = node.ints("output_shape")
    auto = node.attribute("auto_pad", "NOTSET")
    pads = node.ints("pads", [0] * (2 * n))
    if len(pads) != 2 * n:
        raise node.wrong(f"{len(pads)} pads for {n} spatial dimensions")
    if wanted or auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = wanted[-n:]
        for i in range(n):
            size = shape[2 + i]
            if isinstance(size, g.Sym):
                raise node.refuse("a spatial dimension depends on the batch")
            target = wanted[i] if wanted else size * strides[i]
            total = strides[i] * (size - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - target
            if total < 0:
                extra[i] -= total
                total = 0
            small, large = total // 2, total - total // 2
            pads[i], pads[i + n] = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto == "VALID":
        pads = [0] * (2 * n)
    if min(pads, default=0) < 0:
        raise node.refuse("negative padding")
    out = self.emit(
        g.ConvTranspose2d,
        x2,
        weight=weight,
        bias=bias,
        stride=_pair(strides),
        padding=_two_d(pads),
        output_padding=_pair(extra, 0),
        dilation=_pair(dilations),
        groups=groups,
    )
    return _from_map(self, out, n)


@_op("Gemm")
def _gemm(self: _Importer, node: _Node) -> Any:
    a, c = node.need(0), node.input(2)
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    if len(self.shape(a)) != 2:
        raise node.wrong(f"A has the shape {self.shape(a)}, not two dimensions")
    if node.integer("transA", 0):
        a = self.emit(g.Transpose, a, perm=(1, 0))
    b = node.need(1)
    transposed = bool(node.integer("transB", 0))
    if isinstance(b, np.ndarray):
        w = _float32(b, node.where)
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
            bias, c = _float32(c, node.where) * np.float32(beta), None
        out = self.emit(g.Linear, a, weight=w, bias=bias)
    else:
        if transposed:
            b = self.emit(g.Transpose, b, perm=(1, 0))
        out = self.emit(g.MatMul, a, b)
        if alpha != 1.0:
            out = self.emit(g.Binary, out, np.array(alpha, dtype=np.float32), kind="mul")
    if c is None:
        return out
    if beta != 1.0:
        c = (
            c * np.float32(beta)
            if isinstance(c, np.ndarray)
            else self.emit(g.Binary, c, np.array(beta, dtype=np.float32), kind="mul")
        )
    return self.emit(g.Binary, out, c, kind="add")


@_op("MatMul")
def _matmul(self: _Importer, node: _Node) -> Any:
    a, b = node.need(0), node.need(1)
    sa, sb = self.shape(a), self.shape(b)
    if isinstance(b, np.ndarray) and b.ndim == 2 and len(sa) >= 2:
        return self.emit(g.Linear, a, weight=np.ascontiguousarray(_float32(b, node.where).T))
    if len(sa) == 0 or len(sb) == 0:
        raise node.wrong("a factor has no dimension")
    left = self.reshape(a, (1, *sa)) if len(sa) == 1 else a
    right = self.reshape(b, (*sb, 1)) if len(sb) == 1 else b
    out = self.emit(g.MatMul, left, right)
    shape = list(self.shape(out))
    if len(sa) == 1:
        del shape[-2]
    if len(sb) == 1:
        del shape[-1]
    return self.reshape(out, tuple(shape))


# --- pooling, normalisation ---------------------------------------------------------------------------------------


@_op("MaxPool", "AveragePool")
def _pool(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    n = len(shape) - 2
    if n not in (1, 2):
        raise node.refuse(f"{n} spatial dimensions (1 and 2 are supported)")
    kernel = node.ints("kernel_shape")
    if len(kernel) != n:
        raise node.wrong(f"kernel_shape {kernel} for {n} spatial dimensions")
    strides, dilations = _spatial(node, "strides", n, 1), _spatial(node, "dilations", n, 1)
    pads = _auto_pads(node, shape[2:], kernel, strides, dilations)
    if any(p < 0 for p in pads):
        raise node.refuse("negative padding")
    if len(node.proto.output) > 1 and node.proto.output[1] and self._is_read(node.proto.output[1]):
        raise node.refuse("the indices of the maxima")
    kind = "max" if node.op == "MaxPool" else "avg"
    include = bool(node.integer("count_include_pad", 0)) or kind == "max"
    ceil = bool(node.integer("ceil_mode", 0)) and node.attribute("auto_pad", "NOTSET") in ("NOTSET", "")
    if kind == "avg" and any(d != 1 for d in dilations):
        raise node.refuse("average pooling with dilation")
    out = self.emit(
        g.Pool,
        _as_map(self, x, n),
        kind=kind,
        kernel_size=_pair(kernel),
        stride=_pair(strides),
        padding=_two_d(pads),
        dilation=_pair(dilations),
        ceil_mode=ceil,
        count_include_pad=include,
    )
    return _from_map(self, out, n)


@_op("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    if len(shape) == 4:
        kind = "avg" if node.op == "GlobalAveragePool" else "max"
        return self.emit(g.AdaptivePool, x, kind=kind, output_size=(1, 1))
    axes = tuple(range(2, len(shape)))
    if not axes:
        raise node.wrong(f"an input of shape {shape} has no spatial dimension")
    return self.emit(
        g.Reduce, x, kind="mean" if node.op == "GlobalAveragePool" else "max", axes=axes, keepdims=True
    )


@_op("BatchNormalization")
def _batch_norm(self: _Importer, node: _Node) -> Any:
    if node.integer("training_mode", 0):
        raise node.refuse("training mode")
    x = node.need(0)
    values = [
        node.floats(i, w)
        for i, w in ((1, "the scale"), (2, "the bias"), (3, "the mean"), (4, "the variance"))
    ]
    if any(v is None for v in values):
        raise node.wrong("it needs scale, bias, mean and variance")
    weight, bias, mean, variance = (v.astype(np.float64) for v in values if v is not None)
    scale = weight / np.sqrt(variance + node.number("epsilon", 1e-5))
    shift = bias - mean * scale
    return self.emit(g.BatchNorm, x, scale=scale.astype(np.float32), shift=shift.astype(np.float32))


@_op("InstanceNormalization", "GroupNormalization")
def _group_norm(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    channels = self.shape(x)[1]
    weight, bias = node.floats(1, "the scale"), node.floats(2, "the bias")
    groups = int(channels) if node.op == "InstanceNormalization" else node.integer("num_groups", 1)  # type: ignore[arg-type]
    if node.op == "GroupNormalization" and self.opset < 21 and weight is not None and bias is not None:
        if groups < 1 or int(channels) % groups:  # type: ignore[arg-type]
            raise node.wrong(f"{channels} channels do not divide into {groups} groups")
        per = int(channels) // groups  # type: ignore[arg-type]
        weight, bias = np.repeat(weight, per), np.repeat(bias, per)
    return self.emit(
        g.GroupNorm, x, groups=groups, weight=weight, bias=bias, eps=node.number("epsilon", 1e-5)
    )


@_op("LayerNormalization")
def _layer_norm(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    axis = node.integer("axis", -1) % max(1, len(shape))
    tail = shape[axis:]
    if any(isinstance(d, g.Sym) for d in tail):
        raise node.refuse("the normalised dimensions depend on the batch")
    sizes = tuple(int(d) for d in tail)  # type: ignore[arg-type]
    parts = [node.floats(1, "the scale"), node.floats(2, "the bias")]
    weight, bias = (None if p is None else np.ascontiguousarray(np.broadcast_to(p, sizes)) for p in parts)
    eps = node.number("epsilon", 1e-5)
    out = self.emit(g.LayerNorm, x, shape=sizes, weight=weight, bias=bias, eps=eps)
    if not any(o and self._is_read(o) for o in node.proto.output[1:]):
        return out
    axes = tuple(range(axis, len(shape)))
    mean = self.emit(g.Reduce, x, kind="mean", axes=axes, keepdims=True)
    off = self.emit(g.Binary, x, mean, kind="sub")
    square = self.emit(g.Binary, off, off, kind="mul")
    variance = self.emit(g.Reduce, square, kind="mean", axes=axes, keepdims=True)
    shifted = self.emit(g.Binary, variance, np.array(eps, dtype=np.float32), kind="add")
    root = self.emit(g.Activation, shifted, act=g.Act.of("sqrt"))
    return [out, mean, self.emit(g.Activation, root, act=g.Act.of("reciprocal"))]


@_op("LRN")
def _lrn(self: _Importer, node: _Node) -> Any:
    size = node.integer("size", 0)
    return self.emit(
        g.LocalResponseNorm,
        node.need(0),
        size=size,
        alpha=node.number("alpha", 1e-4),
        beta=node.number("beta", 0.75),
        k=node.number("bias", 1.0),
    )


# --- moving -------------------------------------------------------------------------------------------------------


def _axes(node: _Node, i: int, rank: int, *, name: str = "axes") -> list[int] | None:
    """Axes from an input (newer opsets) or an attribute (older), normalised; None where none are given."""
    axes = (
        node.integers(i, "the axes")
        if node.has(i)
        else (node.ints(name) if name in node.attributes else None)
    )
    if axes is None:
        return None
    for a in axes:
        if not -rank <= a < rank:
            raise node.wrong(f"axis {a} of a tensor of {rank} dimensions")
    return [a % rank for a in axes]


@_op("Concat")
def _concat(self: _Importer, node: _Node) -> Any:
    values = [node.need(i) for i in range(len(node.proto.input))]
    if any(isinstance(v, Dims) for v in values):
        out: list[g.Dim] = []
        for i in range(len(values)):
            out += _dims_of(node, i, "an operand")
        return _dims_result(out)
    _same_type(node, *values)
    if "axis" not in node.attributes:
        raise node.wrong("attribute 'axis' is missing")
    return self.emit(g.Concat, *values, axis=node.integer("axis", 0))


@_op("Split")
def _split(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    axis = node.integer("axis", 0)
    if not -len(shape) <= axis < len(shape):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis %= len(shape)
    size = shape[axis]
    if isinstance(size, g.Sym):
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
        out.append(self.emit(g.Slice, x, axis=axis, start=start, stop=start + p))
        start += p
    return out


@_op("Slice")
def _slice(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    starts, ends = node.integers(1, "the starts"), node.integers(2, "the ends")
    if starts is None or ends is None:
        raise node.wrong("starts and ends are needed")
    rank = len(self.shape(x))
    axes = _axes(node, 3, rank)
    axes = list(range(len(starts))) if axes is None else axes
    steps = node.integers(4, "the steps") or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        raise node.wrong("starts, ends, axes and steps are not of one length")
    if isinstance(x, Dims):
        return _dims_result(list(x[slice(starts[0], ends[0], steps[0])]))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = self.shape(x)[axis]
        if isinstance(size, g.Sym):
            if start == 0 and end >= 1 << 31 and step == 1:
                continue
            raise node.refuse("a part of the batch")
        if step < 1:
            raise node.refuse(f"a step of {step}") if step else node.wrong("a step of 0")
        first, last, _ = slice(start, end, step).indices(size)
        x = self.emit(g.Slice, x, axis=axis, start=first, stop=max(first, last), step=step)
    return x


@_op("Gather")
def _gather(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    indices = node.required(1, "the indices")
    if indices.dtype.kind not in "iu":
        raise node.wrong(f"indices of type {indices.dtype}")
    if isinstance(x, Dims):
        flat = [x[int(i)] for i in indices.reshape(-1)]
        return _dims_result(flat)
    shape = self.shape(x)
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
    if not at or len(at) > 4096:
        raise node.refuse(f"{len(at)} indices")
    parts, start = [], 0
    while start < len(at):  # runs of neighbours are one slice
        stop = start + 1
        while stop < len(at) and at[stop] == at[stop - 1] + 1:
            stop += 1
        parts.append(self.emit(g.Slice, x, axis=axis, start=at[start], stop=at[stop - 1] + 1))
        start = stop
    out = parts[0] if len(parts) == 1 else self.emit(g.Concat, *parts, axis=axis)
    return self.reshape(out, (*shape[:axis], *(int(d) for d in indices.shape), *shape[axis + 1 :]))


@_op("Pad")
def _pad(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    rank = len(self.shape(x))
    pads = node.integers(1, "the pads")
    if pads is None:
        raise node.wrong("the pads (input 1) are missing")
    axes = _axes(node, 3, rank)
    axes = list(range(rank)) if axes is None else axes
    if len(pads) != 2 * len(axes):
        raise node.wrong(f"{len(pads)} pads for {len(axes)} axes")
    before, after = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    value = node.floats(2, "the value")
    mode = node.attribute("mode", "constant")
    if mode not in ("constant", "reflect", "edge"):
        raise node.refuse(f"mode {mode!r}")
    number = 0.0 if value is None or value.size == 0 else float(value.reshape(-1)[0])
    return self.emit(g.Pad, x, before=tuple(before), after=tuple(after), mode=mode, value=number)


@_op("Reshape")
def _reshape(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    wanted = _dims_of(node, 1, "the shape")
    shape = self.shape(x)
    keep = not node.integer("allowzero", 0)
    out: list[g.Dim] = []
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
        count, power = g.numel(shape)
        have, has = g.numel(tuple(d for d in out if d != -1))
        if have == 0 or count % have or power - has not in (0, 1):
            raise node.wrong(f"shape {shape} cannot become {tuple(out)}")
        missing: g.Dim = g.Sym(count // have) if power > has else count // have
        out[out.index(-1)] = missing
    if isinstance(x, Dims):
        return x
    # an exporter that fixed the batch at 1 writes it into the shape: one row more in is one row more out
    if shape and isinstance(shape[0], g.Sym) and not any(isinstance(d, g.Sym) for d in out):
        count, power = g.numel(shape)
        if power == 1 and out and math.prod([int(d) for d in out]) == count:  # type: ignore
            out[0] = g.Sym(int(out[0]))  # type: ignore[arg-type]
    return self.reshape(x, tuple(out)) if isinstance(x, str) else np.asarray(x).reshape([int(d) for d in out])  # type: ignore[arg-type]


@_op("Flatten")
def _flatten(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    axis = node.integer("axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis = axis + len(shape) if axis < 0 else axis
    (a, p), (b, q) = g.numel(shape[:axis]), g.numel(shape[axis:])
    if p + q > 1:
        raise node.refuse("the batch in two dimensions")
    return self.reshape(x, (g.Sym(a) if p else a, g.Sym(b) if q else b))


@_op("Squeeze")
def _squeeze(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    if isinstance(x, Dims):
        return x
    shape = self.shape(x)
    axes = _axes(node, 1, len(shape))
    if axes is None:
        axes = [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise node.wrong(f"axes {axes} of a tensor of shape {shape} are not all 1")
    return self.reshape(x, tuple(d for i, d in enumerate(shape) if i not in axes))


@_op("Unsqueeze")
def _unsqueeze(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    if isinstance(x, Dims):
        return x
    shape = self.shape(x)
    axes = node.integers(1, "the axes") if node.has(1) else node.ints("axes")
    rank = len(shape) + len(axes or ())
    if not axes or any(not -rank <= a < rank for a in axes) or len({a % rank for a in axes}) != len(axes):
        raise node.wrong(f"axes {axes} for a tensor of {len(shape)} dimensions")
    places = {a % rank for a in axes}
    rest = iter(shape)
    return self.reshape(x, tuple(1 if i in places else next(rest) for i in range(rank)))


@_op("Transpose")
def _transpose(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    rank = len(self.shape(x))
    perm = node.ints("perm", list(range(rank))[::-1])
    return self.emit(g.Transpose, x, perm=tuple(perm))


@_op("Expand")
def _expand(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    wanted = tuple(_dims_of(node, 1, "the shape"))
    shape = self.shape(x)
    rank = max(len(shape), len(wanted))
    a = (1,) * (rank - len(shape)) + tuple(shape)
    b = (1,) * (rank - len(wanted)) + wanted
    out = []
    for p, q in zip(a, b, strict=True):
        if p != q and p != 1 and q != 1:
            raise node.wrong(f"shape {shape} does not broadcast to {wanted}")
        out.append(q if p == 1 else p)
    self.check_size(tuple(out), node.where)
    return self.emit(g.Expand, x, shape=tuple(out))


@_op("Tile")
def _tile(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    repeats = node.integers(1, "the repeats")
    shape = self.shape(x)
    if repeats is None or len(repeats) != len(shape) or min(repeats, default=1) < 1:
        raise node.wrong(f"repeats {repeats} for a tensor of shape {shape}")
    for axis, n in enumerate(repeats):
        if n == 1:
            continue
        if isinstance(shape[axis], g.Sym):
            raise node.refuse("repeating the batch")
        if n > 4096:
            raise node.refuse(f"{n} repeats")
        x = self.emit(g.Concat, *([x] * n), axis=axis)
    return x


@_op("DepthToSpace", "SpaceToDepth")
def _depth_space(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    b = node.integer("blocksize", 0)
    if len(shape) != 4 or b < 1:
        raise node.wrong(f"blocksize {b} for a tensor of shape {shape}")
    n = shape[0]
    c, h, w = (int(d) for d in shape[1:])  # type: ignore[arg-type]
    if node.op == "SpaceToDepth":
        if h % b or w % b:
            raise node.wrong(f"{h} x {w} does not divide by {b}")
        t = self.emit(g.Reshape, x, shape=(n, c, h // b, b, w // b, b))
        crd = node.attribute("mode", "DCR") == "CRD"
        t = self.emit(g.Transpose, t, perm=(0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4))
        return self.emit(g.Reshape, t, shape=(n, c * b * b, h // b, w // b))
    if c % (b * b):
        raise node.wrong(f"{c} channels do not divide by {b * b}")
    if node.attribute("mode", "DCR") == "DCR":
        t = self.emit(g.Reshape, x, shape=(n, b, b, c // (b * b), h, w))
        t = self.emit(g.Transpose, t, perm=(0, 3, 4, 1, 5, 2))
    else:
        t = self.emit(g.Reshape, x, shape=(n, c // (b * b), b, b, h, w))
        t = self.emit(g.Transpose, t, perm=(0, 1, 4, 2, 5, 3))
    return self.emit(g.Reshape, t, shape=(n, c // (b * b), h * b, w * b))


@_op("Resize")
def _resize(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    if len(shape) != 4:
        raise node.refuse(f"an input of shape {shape} (N, C, H, W is supported)")
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear"):
        raise node.refuse(f"mode {mode!r}")
    if node.integer("antialias", 0):
        raise node.refuse("antialiasing")
    if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise node.refuse("keep_aspect_ratio_policy")
    axes = node.ints("axes") or list(range(4))
    scales = node.floats(2, "the scales")
    sizes = node.integers(3, "the sizes")
    hw = [int(d) for d in shape[2:]]  # type: ignore[arg-type]
    factors, out = [1.0, 1.0], list(hw)
    for i, axis in enumerate(a % 4 for a in axes):
        if sizes:
            if axis < 2:
                if sizes[i] != shape[axis] and not isinstance(shape[axis], g.Sym):
                    raise node.refuse("resizing channels")
                continue
            out[axis - 2] = sizes[i]
            factors[axis - 2] = sizes[i] / hw[axis - 2]
        elif scales is not None and scales.size:
            if axis < 2:
                if scales[i] != 1:
                    raise node.refuse("resizing channels")
                continue
            factors[axis - 2] = float(scales[i])
            out[axis - 2] = math.floor(hw[axis - 2] * float(scales[i]))
        else:
            raise node.wrong("neither scales nor sizes are given")
    self.check_size((1, shape[1], *out), node.where)
    if min(out) < 1:
        raise node.wrong(f"an output of {out[0]} x {out[1]}")
    if coordinates == "align_corners" and any(
        abs(s * f - o) > 1e-6 for s, f, o in zip(hw, factors, out, strict=True)
    ):
        raise node.refuse("align_corners with a scale that does not give a whole size")
    if coordinates == "pytorch_half_pixel":
        if min(out) == 1:
            raise node.refuse("pytorch_half_pixel to a size of 1")
        coordinates = "half_pixel"
    if mode == "nearest":
        rounding = node.attribute("nearest_mode", "round_prefer_floor")
        if coordinates == "asymmetric" and rounding == "floor":
            return self.emit(
                g.Resize,
                x,
                size=(out[0], out[1]),
                mode="nearest",
                coordinates="asymmetric",
                scale=(factors[0], factors[1]),
            )
        for axis in (2, 3):
            x = _nearest(
                self, node, x, axis, hw[axis - 2], out[axis - 2], factors[axis - 2], coordinates, rounding
            )
        return x
    if coordinates not in ("half_pixel", "align_corners", "asymmetric"):
        raise node.refuse(f"coordinates {coordinates!r}")
    return self.emit(
        g.Resize,
        x,
        size=(out[0], out[1]),
        mode="bilinear",
        coordinates=coordinates,
        scale=(factors[0], factors[1]),
    )


def _nearest(
    self: _Importer,
    node: _Node,
    x: Any,
    axis: int,
    size: int,
    out: int,
    scale: float,
    coordinates: str,
    rounding: str,
) -> Any:
    """Nearest-neighbour along one axis as slices of runs and a concatenation (rare conventions)."""
    indices = []
    for i in range(out):
        if coordinates == "half_pixel":
            c = (i + 0.5) / scale - 0.5
        elif coordinates == "half_pixel_symmetric":
            c = size / 2 * (1 - out / (scale * size)) + (i + 0.5) / scale - 0.5
        elif coordinates == "align_corners":
            c = 0.0 if out == 1 else i * (size - 1) / (out - 1)
        elif coordinates == "asymmetric":
            c = i / scale
        else:
            raise node.refuse(f"coordinates {coordinates!r}")
        if rounding == "round_prefer_floor":
            j = math.ceil(c - 0.5)
        elif rounding == "round_prefer_ceil":
            j = math.floor(c + 0.5)
        elif rounding == "floor":
            j = math.floor(c)
        else:
            j = math.ceil(c)
        indices.append(min(max(j, 0), size - 1))
    if indices == list(range(size)):
        return x
    if out > 1024:
        raise node.refuse(f"nearest-neighbour with {coordinates}/{rounding} to a size of {out}")
    parts, start = [], 0
    while start < len(indices):
        stop = start + 1
        while stop < len(indices) and indices[stop] == indices[stop - 1] + 1:
            stop += 1
        parts.append(self.emit(g.Slice, x, axis=axis, start=indices[start], stop=indices[stop - 1] + 1))
        start = stop
    return parts[0] if len(parts) == 1 else self.emit(g.Concat, *parts, axis=axis)


# --- reductions, softmax ------------------------------------------------------------------------------------------

_REDUCE = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceSumSquare": "sum_square",
    "ReduceLogSumExp": "log_sum_exp",
    "ReduceLogSum": "sum",
}


@_op(*_REDUCE)
def _reduce(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    axes = _axes(node, 1, len(shape))
    if not axes:
        if node.integer("noop_with_empty_axes", 0):
            return self.emit(g.Reshape, x, shape=shape)
        axes = list(range(len(shape)))
    if any(isinstance(shape[a], g.Sym) for a in axes):
        raise node.refuse("a reduction over the batch")
    keep = bool(node.integer("keepdims", 1))
    out = self.emit(g.Reduce, x, kind=_REDUCE[node.op], axes=tuple(sorted(set(axes))), keepdims=keep)
    return self.emit(g.Activation, out, act=g.Act.of("log")) if node.op == "ReduceLogSum" else out


@_op("Softmax", "LogSoftmax")
def _softmax(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    shape = self.shape(x)
    log = node.op == "LogSoftmax"
    axis = node.integer("axis", -1 if self.opset >= 13 else 1)
    if not -len(shape) <= axis < max(1, len(shape)):
        raise node.wrong(f"axis {axis} of a tensor of {len(shape)} dimensions")
    axis %= len(shape)
    if self.opset >= 13 or axis == len(shape) - 1:
        return self.emit(g.Softmax, x, axis=axis, log=log)
    (a, p), (b, q) = (
        g.numel(shape[:axis]),
        g.numel(shape[axis:]),
    )  # older opsets: over all dimensions from axis on
    if q:
        raise node.refuse("a softmax over the batch")
    flat = self.reshape(x, (g.Sym(a) if p else a, b))
    return self.reshape(self.emit(g.Softmax, flat, axis=1, log=log), shape)


# --- quantized graphs ---------------------------------------------------------------------------------------------


def _scale_and_zero(node: _Node, shape: g.Shape) -> tuple[Array, Array, int, int]:
    scale = node.floats(1, "the scale")
    if scale is None:
        raise node.wrong("the scale (input 1) is missing")
    zero = node.constant(2, "the zero point")
    dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    if zero is None and node.integer("output_dtype", 0):
        dtype = np.dtype(_onnx().helper.tensor_dtype_to_np_dtype(node.integer("output_dtype", 0)))
    if dtype.kind not in "iu":
        raise node.refuse(f"quantization to {dtype}")
    offset = np.zeros(scale.shape, np.float32) if zero is None else zero.astype(np.float32)
    if node.integer("block_size", 0):
        raise node.refuse("blocked quantization")
    if scale.size > 1:
        axis = node.integer("axis", 1) % max(1, len(shape))
        dims = [1] * len(shape)
        dims[axis] = scale.size
        scale, offset = scale.reshape(dims), offset.reshape(dims)
    else:
        scale, offset = scale.reshape(()), offset.reshape(())
    names = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}
    low, high = names.get(dtype.name) or (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return scale, offset, low, high


def _dequantized(node: _Node, x: Any, scale: Any = None, zero: Any = None) -> Array | None:
    """(x - zero) * scale of integer constants, which ONNX's reference has from opset 19 on alone; None of other types."""
    if (
        scale is None
        or x.dtype.kind not in "iu"
        or scale.dtype != np.float32
        or node.integer("block_size", 0)
    ):
        return None
    if zero is not None and (zero.dtype.kind not in "iu" or zero.size != scale.size):
        return None
    if scale.size > 1:
        axis = node.integer("axis", 1)
        if not -x.ndim <= axis < x.ndim or scale.shape != (x.shape[axis],):
            raise node.wrong(f"{scale.size} scales for axis {axis} of a tensor of shape {list(x.shape)}")
        dims = [1] * x.ndim
        dims[axis] = scale.size
        scale, zero = scale.reshape(dims), None if zero is None else zero.reshape(dims)
    elif scale.size != 1:
        return None
    else:
        scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
    whole = x.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))
    return np.asarray(whole.astype(np.float32) * scale, np.float32)


@_op("QuantizeLinear")
def _quantize(self: _Importer, node: _Node) -> Any:
    """clip(round_half_even(x / scale) + zero): integers, held as float32 until they are dequantized."""
    x = node.need(0)
    scale, zero, low, high = _scale_and_zero(node, self.shape(x))
    out = self.emit(g.Binary, x, scale, kind="div")
    out = self.emit(g.Activation, out, act=g.Act.of("round"))
    if np.any(zero != 0):
        out = self.emit(g.Binary, out, zero, kind="add")
    return self.emit(g.Activation, out, act=g.Act.of("clip", lo=float(low), hi=float(high)))


@_op("DequantizeLinear")
def _dequantize(self: _Importer, node: _Node) -> Any:
    x = node.need(0)
    scale, zero, _, _ = _scale_and_zero(node, self.shape(x))
    if np.any(zero != 0):
        x = self.emit(g.Binary, x, zero, kind="sub")
    return self.emit(g.Binary, x, scale, kind="mul")


#: ONNX operators that the front end knows.
OPERATORS = tuple(sorted([*_HANDLERS, "Constant", "ConstantOfShape", "Range"]))
