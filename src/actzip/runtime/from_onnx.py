"""The ONNX front end: a model file, its bytes or a ``ModelProto`` -> :class:`~actzip.runtime.graph.Graph`.

Opset 11 and newer. Shapes may be static or dynamic: a dynamic first dimension of an input becomes
the symbolic batch, other dynamic dimensions are taken from an example. What depends on initialisers
alone is computed here; shape arithmetic (Shape, Gather, Concat ... Reshape) is followed
symbolically. Quantized graphs (QuantizeLinear, DequantizeLinear) become the same arithmetic in
float32.

Nothing in a file is trusted: sizes are checked before memory is taken, external data must lie in the model's
folder, and whatever does not fit raises a typed error that names the node.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actzip.errors import ActzipError, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.graph import Array
from actzip.runtime.onnx_file import MAX_ELEMENTS, NeedsConstant, load_onnx, onnx_package, tensor_array
from actzip.runtime.onnx_node import OnnxNode, dequantized, float32_of
from actzip.runtime.ops.shapes import SHAPE_OPS
from actzip.runtime.registry import ONNX, Dims, Mask

__all__ = ["MAX_ELEMENTS", "OPERATORS", "NeedsConstant", "from_onnx", "load_onnx"]


_MIN_OPSET = 11


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
        shapes: shapes of the inputs, by name or in order; they fill in dynamic dimensions that are
            not the batch.
        constants: inputs of the graph to be taken as constants.

    Raises:
        DataError: the file is missing, damaged or unsafe (:func:`load_onnx`).
        InputError: the graph is malformed: cycles, missing initialisers, shapes that do not fit.
        UnsupportedError: an operator, type or opset that the engine does not have; the node is named.
    """
    model = load_onnx(source)
    title = name or model.graph.name or "onnx"
    try:
        return Importer(model, shapes, constants or {}, title).build()
    except ActzipError:
        raise
    except RecursionError as error:
        raise InputError(f"ONNX graph {title!r} is nested too deeply") from error
    except (MemoryError, OverflowError) as error:
        raise InputError(f"ONNX graph {title!r} asks for absurd sizes: {error}") from error
    except Exception as error:  # malformed in a way that no check above names
        raise InputError(f"ONNX graph {title!r} is malformed: {type(error).__name__}: {error}") from error


class Importer:
    """A Graph as it is built from an ONNX model: what :data:`~actzip.runtime.registry.ONNX`'s
    functions work with."""

    def __init__(self, model: Any, shapes: Any, constants: Mapping[str, Array], name: str) -> None:
        self.onnx = onnx_package()
        self.model = model
        self.given = shapes
        self.bound = constants
        self.graph = g.Graph(name)
        self.env: dict[str, Any] = {}
        self.node_names: set[str] = set()
        self.opset = 0
        self.interned: dict[int, tuple[Array, str]] = {}
        self.current: OnnxNode | None = None

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
            self.env[tensor.name] = tensor_array(self.onnx, tensor, f"initialiser {tensor.name!r}")
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
            self.run(OnnxNode(self, node, index))
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
                name = self.emit(
                    ops.Reshape, name, shape=self.graph.shape(name)
                )  # the engine owns its outputs
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
                        f"{node.op_type} node {node.name!r} reads {lost}, which nothing writes: an "
                        "initialiser is missing"
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
            known = (a, self.graph.add_constant(float32_of(a, where), "const"))
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

    def dtype(self, x: str) -> str:
        """Type of a value of the graph: float32 or int64."""
        return self.graph.values[x].dtype

    def emit(self, cls: type[g.Node], *inputs: Any, dtype: str = "", **fields: Any) -> str:
        names = tuple(self.ref(x) for x in inputs)
        kinds = {self.graph.values[v].dtype for v in names}
        if kinds != {"float32"} and (cls.dtype or len(kinds) > 1):
            where = self.current.where if self.current else "the graph"
            raise UnsupportedError(
                f"{where}: an operand of type {max(kinds)}; the engine computes in float32"
            )
        base = self.current.name if self.current else "output"
        name, i = base, 1
        while name in self.node_names:
            name, i = f"{base}:{i}", i + 1
        self.node_names.add(name)
        source = self.current.where if self.current else ""
        node = cls(name, names, self.graph.fresh(f"v_{name}"), source=source, **fields)
        out = self.graph.add(node, dtype)
        self.check_size(self.graph.shape(out), source)
        return out

    def act(self, x: Any, kind: str, **numbers: Any) -> str:
        """An elementwise function; arguments as :meth:`Act.of`."""
        return self.emit(ops.Activation, x, act=Act.of(kind, **numbers))

    def reshape(self, x: Any, shape: g.Shape) -> Any:
        if isinstance(x, np.ndarray):
            return x.reshape([int(d) for d in shape])  # type: ignore[arg-type]
        return x if g.same_shape(self.shape(x), shape) else self.emit(ops.Reshape, x, shape=shape)

    # -- running

    def run(self, node: OnnxNode) -> None:
        self.current = node
        if node.proto.domain not in ("", "ai.onnx"):
            raise node.refuse(f"operators of domain {node.proto.domain!r} are not known")
        for a in node.attributes.values():
            if a.HasField("g") or len(a.graphs):
                raise node.refuse("control flow is not supported by the engine")
        inputs = [node.input(i) for i in range(len(node.proto.input))]
        folded = self.fold(node, inputs)
        if folded is None:
            handler = ONNX.get(node.op)
            if handler is None:
                raise node.refuse("this operator is not supported")
            folded = handler(self, node)
        results = folded if isinstance(folded, list) else [folded]
        for name, value in zip(node.proto.output, results, strict=False):
            if name:
                self.env[name] = value
        for name in node.proto.output[len(results) :]:
            if name and self.is_read(name):
                raise node.refuse(f"its output {name!r} is not computed by the engine")

    def is_read(self, name: str) -> bool:
        proto = self.model.graph
        return any(name in n.input for n in proto.node) or any(o.name == name for o in proto.output)

    def fold(self, node: OnnxNode, inputs: list[Any]) -> list[Any] | None:
        """The outputs of a node that reads constants alone, computed by ONNX's own reference
        implementation."""
        if node.op in SHAPE_OPS or not all(x is None or isinstance(x, np.ndarray) for x in inputs):
            return None
        if node.op in _GROWING and not self._small(node, inputs):
            raise node.wrong(f"asks for more than {MAX_ELEMENTS} elements")
        plain = dequantized(node, *inputs) if node.op == "DequantizeLinear" else None
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

    def _small(self, node: OnnxNode, inputs: list[Any]) -> bool:
        """Whether an operator whose output's size is data (Expand, Tile ...) asks for something
        reasonable."""
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


_GROWING = {"ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot", "Resize"}


#: ONNX operators that the front end knows.
OPERATORS = tuple(sorted([*ONNX, "Constant", "ConstantOfShape", "Range"]))
