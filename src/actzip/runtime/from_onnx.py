"""The ONNX front end: a model file, its bytes or a ``ModelProto`` -> :class:`~actzip.runtime.graph.Graph`.

Opset 7 and newer. Shapes may be static or dynamic: a first dimension becomes the symbolic batch
where the model allows it, other dynamic dimensions are taken from an example. What depends on
initialisers alone is
computed here; shape arithmetic (Shape, Gather, Concat ... Reshape) is worked out at a few batches.
Quantized graphs
(QuantizeLinear,
DequantizeLinear) become the same arithmetic in float32; so do those in float16, and in bfloat16, whose
inputs and outputs are float32 too.

Nothing in a file is trusted: sizes are checked before memory is taken, external data must lie in the model's
folder, and whatever does not fit raises a typed error that names the node.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actzip.errors import ActzipError, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.graph import Array
from actzip.runtime.onnx_file import MAX_ELEMENTS, NeedsConstant, load_onnx, onnx_package, tensor_array
from actzip.runtime.onnx_loop import unrolled
from actzip.runtime.onnx_node import OnnxNode, dequantized, float32_of, reads
from actzip.runtime.onnx_plain import plain
from actzip.runtime.onnx_quantized import is_quantized
from actzip.runtime.ops.shapes import SHAPE_OPS, probed, probed_shape, repeated
from actzip.runtime.registry import ONNX, PROBES, Mask, Probed

__all__ = ["MAX_ELEMENTS", "OPERATORS", "NeedsConstant", "from_onnx", "load_onnx"]


_OLDEST, _OLDEST_READ = 7, 11  # opsets: converted from, read as they are

#: Integer types that float32 holds, and those that it holds to 2^24 only.
_NARROW, _WIDE = {"bool", "uint8", "int8", "uint16", "int16"}, {"int32", "uint32", "int64", "uint64"}
#: Channels of an image.
_CHANNELS = (1, 3, 4)
_FLOATS = {"float32", "float16", "bfloat16"}


def from_onnx(
    source: Any,
    shapes: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None,
    *,
    constants: Mapping[str, Array] | None = None,
    name: str | None = None,
    dynamic: bool = True,
) -> g.Graph:
    """A Graph from an ONNX model.

    Args:
        source: path, bytes or ``ModelProto``.
        shapes: shapes of the inputs, by name or in order; they fill in dynamic dimensions that are
            not the batch, and overrule what the file declares.
        constants: inputs of the graph to be taken as constants.
        dynamic: keep the batch symbolic where the model allows it, also that of a file with a fixed
            batch. Where it does not (a reshape to a constant, say) the graph is for the batch of
            ``shapes``, else the
            declared, else 1.

    Raises:
        DataError: the file is missing, damaged or unsafe (:func:`load_onnx`).
        InputError: the graph is malformed: cycles, missing initialisers, shapes that do not fit.
        UnsupportedError: operators, types or an opset that the engine does not have; every such
        node is named.
    """
    model = at_least_opset(load_onnx(source))
    title = name or model.graph.name or "onnx"
    try:
        importer = Importer(model, shapes, constants or {}, title, dynamic)
        try:
            return importer.build()
        except NeedsConstant:
            raise
        except Exception:  # a reader of nodes that meets the batch where it wants a number, too
            if not importer.assumed:
                raise
        finally:
            importer.release()
        importer = Importer(model, shapes, constants or {}, title, False)
        try:
            return importer.build()
        finally:
            importer.release()
    except ActzipError:
        raise
    except RecursionError as error:
        raise InputError(f"ONNX graph {title!r} is nested too deeply") from error
    except (MemoryError, OverflowError) as error:
        raise InputError(f"ONNX graph {title!r} asks for absurd sizes: {error}") from error
    except Exception as error:  # malformed in a way that no check above names
        raise InputError(f"ONNX graph {title!r} is malformed: {type(error).__name__}: {error}") from error


def at_least_opset(model: Any) -> Any:
    """``model`` in an opset that is read as it is, converted by onnx's own converter where it is older,
    and in operators of ai.onnx where that can be (:mod:`actzip.runtime.onnx_plain`).

    Raises:
        UnsupportedError: no opset of ai.onnx, one that is too old, or one that cannot be converted.
    """
    versions = [e.version for e in model.opset_import if e.domain in ("", "ai.onnx")]
    if not versions:
        domains = ", ".join(e.domain or "ai.onnx" for e in model.opset_import) or "none"
        raise UnsupportedError(f"the model imports no opset of ai.onnx (it imports {domains})")
    model = plain(model)
    if versions[-1] >= _OLDEST_READ:
        return model
    if versions[-1] < _OLDEST:
        raise UnsupportedError(f"opset {versions[-1]}; {_OLDEST} or newer is needed")
    for node in model.graph.node:
        if node.op_type == "Scan":  # which opset 9 made another operator of
            raise UnsupportedError(f"Scan node {node.name!r}: not converted from opset {versions[-1]}")
    from onnx import version_converter

    try:
        converted = version_converter.convert_version(model, _OLDEST_READ)
    except Exception as error:
        why = f"onnx.version_converter cannot make {_OLDEST_READ} of it: {str(error).splitlines()[0]}"
        raise UnsupportedError(f"opset {versions[-1]}, and {why}") from error
    _resize_as_before(converted)
    return converted


def _resize_as_before(model: Any) -> None:
    """In place: Resize nodes that were Upsample, or Resize of opset 10, say how these interpolated; the
    converter leaves them to the defaults of 11, which are others. Nearest pixels are ONNX Runtime's."""
    onnx = onnx_package()
    known = {t.name: t for t in model.graph.initializer}
    known |= {n.output[0]: a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute}
    for node in model.graph.node:
        if node.op_type != "Resize" or any(
            a.name == "coordinate_transformation_mode" for a in node.attribute
        ):
            continue
        scales = known.get(node.input[2]) if len(node.input) > 2 else None
        smaller = scales is not None and (tensor_array(onnx, scales, "the scales") < 1).any()
        for name, value in (
            ("coordinate_transformation_mode", "asymmetric"),
            ("nearest_mode", "ceil" if smaller else "floor"),
        ):
            node.attribute.append(onnx.helper.make_attribute(name, value))


@dataclass(frozen=True)
class Foreign:
    """A value that the engine does not compute: a blocker's output, or what is computed of one."""


@dataclass
class Blocker:
    """A node that the engine does not have, and why."""

    node: OnnxNode
    error: UnsupportedError


class Importer:
    """A Graph as it is built from an ONNX model: what :data:`~actzip.runtime.registry.ONNX`'s
    functions work with.

    ``blockers`` collects what is refused; ``assumed`` says that an input's batch was taken to be symbolic.
    """

    def __init__(
        self, model: Any, shapes: Any, constants: Mapping[str, Array], name: str, dynamic: bool = True
    ) -> None:
        self.onnx = onnx_package()
        self.model = model
        self.given = shapes
        self.bound = constants
        self.dynamic = dynamic
        self.graph = g.Graph(name)
        self.env: dict[str, Any] = {}
        self.node_names: set[str] = set()
        self.opset = max((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), default=0)
        self.interned: dict[int, tuple[Array, str]] = {}
        self.masks: dict[int, tuple[Mask, str]] = {}
        self.current: OnnxNode | None = None
        self.blockers: list[Blocker] = []
        self.assumed = self.strict = False
        self._reference_of: tuple[OnnxNode, Any] | None = None
        self.inexact: set[str] = set()  # integers moved from inputs that may exceed 2^24

    # -- set-up

    def build(self) -> g.Graph:
        self.read_inputs()
        proto = self.model.graph
        for index, node in enumerate(self.order(proto.node)):
            self.run(OnnxNode(self, node, index))
        slots: list[Any] = []
        for value in proto.output:
            try:
                slots.append(self._output(value))
            except UnsupportedError as error:
                self.refused(self._producer(value.name), error)
        if self.blockers:
            raise refusal(self.blockers)
        if not self.graph.outputs:
            raise UnsupportedError("nothing is left for the engine to compute: the outputs are constants")
        if slots != list(range(len(slots))):
            self.graph.meta["out_slots"] = slots
        self.graph.meta["out_names"] = [v.name for v in proto.output]
        self.graph.meta["in_names"] = list(self.graph.inputs)
        if is_quantized(self.model):
            self.graph.meta["quantized"] = True
        self.graph.validate()
        loose = [
            v for v in self.graph.outputs if not any(isinstance(d, g.Sym) for d in self.graph.shape(v)[:1])
        ]
        if self.strict and loose:
            raise UnsupportedError(f"output {loose[0]!r} does not grow with the batch")
        return self.graph

    def release(self) -> None:
        """Lets go of arrays, which nodes that know the importer would keep until the collector comes."""
        self.env.clear()
        self.interned.clear()
        self.masks.clear()
        self.graph = g.Graph(self.graph.name)

    def read_inputs(self) -> None:
        """Initialisers and inputs into ``env`` and ``graph``."""
        proto = self.model.graph
        for tensor in proto.initializer:
            self.env[tensor.name] = tensor_array(self.onnx, tensor, f"initialiser {tensor.name!r}")
        if len(proto.sparse_initializer):
            raise UnsupportedError("sparse initialisers")
        for key, value in self.bound.items():
            self.env[key] = np.asarray(value)
        inputs = [v for v in proto.input if v.name not in self.env]
        given: dict[str, Sequence[int]] = {}
        if isinstance(self.given, Mapping):
            given = dict(self.given)
        elif self.given is not None:
            given = dict(zip((v.name for v in inputs), self.given, strict=False))
        for value in inputs:
            self.env[value.name] = self.add_input(value, given.get(value.name), alone=len(inputs) == 1)

    def _output(self, value: Any) -> Any:
        """An output of the model as an output of the graph: its number, or ``(array,)`` where it is
        a constant."""
        if value.name not in self.env:
            raise InputError(f"output {value.name!r} is written by no node")
        out = self.env[value.name]
        if isinstance(out, np.ndarray):
            return (out,)
        if isinstance(out, Foreign):
            return -1  # its blocker is known
        if isinstance(out, Probed):
            raise UnsupportedError(f"output {value.name!r} is a shape that depends on the batch")
        if isinstance(out, Mask):
            out = self.ref(out)
        if out in self.inexact:
            raise UnsupportedError(
                f"output {value.name!r}: integers of an input, which float32 does not hold above 2^24"
            )
        if out in self.graph.inputs or out in self.graph.constants or out in self.graph.outputs:
            out = self.emit(ops.Reshape, out, shape=self.graph.shape(out))  # the engine owns its outputs
        declared = self._type(value.type.tensor_type.elem_type)
        if self.graph.values[out].dtype in _FLOATS and declared in _FLOATS - {"bfloat16"}:
            self.graph.values[out].dtype = declared
        self.graph.outputs.append(out)
        return len(self.graph.outputs) - 1

    def _producer(self, name: str) -> OnnxNode:
        for index, node in enumerate(self.model.graph.node):
            if name in node.output:
                return OnnxNode(self, node, index)
        raise UnsupportedError(f"output {name!r} is an input or a constant")

    def _type(self, elem_type: int) -> str:
        """The name of an element type as numpy has it; what it is called in ONNX for one that numpy lacks."""
        kinds = self.onnx.TensorProto.DataType
        if elem_type not in kinds.values() or elem_type == 0:
            return "unknown"
        label = str(kinds.Name(elem_type)).lower()
        return {"float": "float32", "double": "float64"}.get(label, label)

    def order(self, nodes: Any) -> list[Any]:
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

    def add_input(self, value: Any, given: Sequence[int] | None, alone: bool) -> str:
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type":
            raise UnsupportedError(f"input {value.name!r} is a {kind or 'value of no type'}, not a tensor")
        tensor = value.type.tensor_type
        dtype = self._type(tensor.elem_type)
        if dtype not in _FLOATS | _NARROW | _WIDE:
            raise UnsupportedError(f"input {value.name!r} is of type {dtype}; the engine computes in float32")
        if dtype == "bfloat16":  # which NumPy does not have: given and computed in float32, as outputs are
            dtype = "float32"
        dims: list[g.Dim]
        if not tensor.HasField("shape"):
            if given is None:
                raise InputError(f"input {value.name!r} has no shape; give one (an example)")
            dims = [int(d) for d in given]
        else:
            dims = self._dims(value.name, list(tensor.shape.dim), given, alone)
        self.check_size(tuple(dims), f"input {value.name!r}")
        name = self.graph.add_input(value.name, tuple(dims), dtype)
        if dtype in _WIDE:
            self.inexact.add(name)
        return name

    def _dims(self, name: str, declared: list[Any], given: Sequence[int] | None, alone: bool) -> list[g.Dim]:
        """Dimensions of an input: those given, else those declared; the batch symbolic where it may be."""
        if given is not None and len(given) != len(declared):
            raise InputError(f"input {name!r} has {len(declared)} dimensions, not {len(given)}")
        # exporters write 0 and -1 for what is dynamic
        sizes = [int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in declared]
        last = len(sizes) == 4 and sizes[3] in _CHANNELS and sizes[1] not in _CHANNELS
        channels = 3 if last else 1  # the one that no example may change
        dims: list[g.Dim] = []
        for i, size in enumerate(sizes):
            if i == 0 and self.dynamic and (size is None or (alone and len(sizes) > 1)):
                self.assumed = True
                self.strict = self.strict or size is not None
                dims.append(g.Sym())
            elif given is not None:
                if i == channels and size not in (None, given[i]):
                    order = ": the file has its channels last (N, H, W, C)" if last else ""
                    raise InputError(f"input {name!r}: dimension {i} is {size}, not {given[i]}{order}")
                if given[i] < 1:
                    raise UnsupportedError(f"input {name!r} of shape {tuple(given)} is empty")
                dims.append(int(given[i]))
            elif size is not None or i == 0:
                dims.append(size or 1)
            else:
                label = declared[i].dim_param or "?"
                raise InputError(f"input {name!r}: dimension {i} ({label}) is dynamic; give an example input")
        return dims

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
        if isinstance(x, Mask):
            return self._compared(x)
        if isinstance(x, Probed):
            return self._expanded(x)
        a = np.asarray(x)
        known = self.interned.get(id(x))
        if known is None:
            known = (a, self.graph.add_constant(float32_of(a, where), "const"))
            self.interned[id(x)] = known
        return known[1]

    def _compared(self, x: Mask) -> str:
        """A comparison as the engine's value of 1 and 0."""
        known = self.masks.get(id(x))
        if known is None:
            kind = "le" if x.inverse else "gt"
            known = self.masks[id(x)] = (x, self.emit(ops.Binary, x.x, x.limit, kind=kind, dtype=x.dtype))
        return known[1]

    def _expanded(self, x: Probed) -> str:
        """A value that depends on the batch by its size alone, as the engine's: the same numbers
        all along that dimension."""
        shape = probed_shape(x)
        found = repeated(x.values, shape)
        if found is None:
            where = self.current.where if self.current else "the graph"
            raise UnsupportedError(f"{where}: numbers that depend on the batch are used as a tensor")
        made = found[0] if found[0].shape == shape else self.emit(ops.Expand, found[0], shape=found[1])
        return self.ref(self.reshape(made, shape))

    def shape(self, x: Any) -> g.Shape:
        if isinstance(x, str):
            return self.graph.shape(x)
        if isinstance(x, Probed):
            return probed_shape(x)
        if isinstance(x, Mask):
            return g.broadcast([self.graph.shape(x.x), tuple(x.limit.shape)])
        return tuple(int(d) for d in np.asarray(x).shape)

    def dtype(self, x: str) -> str:
        """Type of a value of the graph: float32 or an integer's. float16 is float32 within."""
        dtype = self.graph.values[x].dtype
        return "float32" if dtype in _FLOATS else dtype

    def emit(self, cls: type[g.Node], *inputs: Any, dtype: str = "", **fields: Any) -> str:
        names = tuple(self.ref(x) for x in inputs)
        kinds = {self.dtype(v) for v in names}
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
        out = self.graph.add(node, dtype or cls.dtype or kinds.pop())
        if self.graph.values[out].dtype in _WIDE and self.inexact.intersection(names):
            self.inexact.add(out)
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
        """One node's outputs into ``env``; where it is refused, into ``blockers``."""
        self.current = node
        inputs = [node.input(i) for i in range(len(node.proto.input))]
        try:
            if any(isinstance(x, Foreign) for x in inputs):
                if not self.knows(node):
                    raise node.refuse(self._unknown(node))
                results: list[Any] = [self.foreign(name) for name in node.proto.output]
            else:
                results = self.results(node, inputs)
        except NeedsConstant as error:
            if error.value in self.graph.inputs:
                raise
            self.refused(node, error)
            return
        except UnsupportedError as error:
            self.refused(node, error)
            return
        for name, value in zip(node.proto.output, results, strict=False):
            if name:
                self.env[name] = value

    def refused(self, node: OnnxNode, error: UnsupportedError) -> None:
        """Notes a blocker; what it would have given is foreign."""
        self.blockers.append(Blocker(node, error))
        for name in node.proto.output:
            if name:
                self.env[name] = self.foreign(name)

    def foreign(self, name: str) -> Any:
        """What stands in ``env`` for a value that the engine does not compute."""
        return Foreign()

    def knows(self, node: OnnxNode) -> bool:
        return node.op in ONNX or node.op in ("Constant", "ConstantOfShape", "Range", "If", "Loop")

    def _unknown(self, node: OnnxNode) -> str:
        if node.proto.domain == "com.microsoft.nchwc":
            return (
                "ONNX Runtime has optimized this file for one kind of CPU; give the file that it was made "
                "of, or optimize at ORT_ENABLE_EXTENDED"
            )
        if node.foreign:
            return f"operators of domain {node.proto.domain!r} are not known"
        return "this operator is not supported"

    def results(self, node: OnnxNode, inputs: list[Any]) -> list[Any]:
        """What a node gives for its outputs, in order."""
        if node.foreign and (node.op not in ONNX or all(isinstance(x, np.ndarray) for x in inputs)):
            raise node.refuse(self._unknown(node))
        if node.op == "If" and isinstance(inputs[0], np.ndarray):
            return self._branch(node, bool(inputs[0].reshape(-1)[0]))
        if node.op == "Loop":
            return unrolled(self, node, inputs)
        for a in node.attributes.values():
            if a.HasField("g") or len(a.graphs):
                raise node.refuse("control flow is not supported by the engine")
        folded = None if node.foreign else self.fold(node, inputs)
        if folded is None:
            handler = ONNX.get(node.op)
            if handler is None:
                raise node.refuse(self._unknown(node))
            folded = handler(self, node)
        results = folded if isinstance(folded, list) else [folded]
        for name in node.proto.output[len(results) :]:
            if name and self.is_read(name):
                raise node.refuse(f"its output {name!r} is not computed by the engine")
        return results

    def _branch(self, node: OnnxNode, taken: bool) -> list[Any]:
        """An If whose condition is known: the nodes of its branch, as if they stood here."""
        branch = node.attributes["then_branch" if taken else "else_branch"].g
        for tensor in branch.initializer:
            self.env[tensor.name] = tensor_array(
                self.onnx, tensor, f"{node.where}: initialiser {tensor.name!r}"
            )
        for index, inner in enumerate(self.order(branch.node)):
            self.run(OnnxNode(self, inner, index, f"{node.name}/"))
        self.current = node
        missing = [v.name for v in branch.output if v.name not in self.env]
        if missing:
            raise node.wrong(f"its branch does not write {missing[0]!r}")
        return [self.env[v.name] for v in branch.output]

    def is_read(self, name: str) -> bool:
        proto = self.model.graph
        return any(name in reads(n) for n in proto.node) or any(o.name == name for o in proto.output)

    def fold(self, node: OnnxNode, inputs: list[Any]) -> list[Any] | None:
        """The outputs of a node that reads constants, or what depends on the batch alone, computed
        by ONNX's own reference."""
        if node.op in SHAPE_OPS or not all(x is None or isinstance(x, (np.ndarray, Probed)) for x in inputs):
            return None
        if node.op in _RANDOM:
            raise node.refuse("random numbers")
        if not any(isinstance(x, Probed) for x in inputs):
            return self._folded(node, inputs)
        runs = []
        for k in range(len(PROBES)):
            try:
                runs.append(self._folded(node, [x.values[k] if isinstance(x, Probed) else x for x in inputs]))
            except InputError as error:
                raise node.refuse(f"at batch {PROBES[k]}: {error}") from error
        return [None if values[0] is None else probed(values) for values in zip(*runs, strict=True)]

    def _folded(self, node: OnnxNode, inputs: list[Any]) -> list[Any]:
        if not _elements(node.op, inputs) <= MAX_ELEMENTS:  # NaN too
            raise node.wrong(f"asks for more than {MAX_ELEMENTS} elements")
        plain = dequantized(node, *inputs) if node.op == "DequantizeLinear" else None
        if plain is not None:
            return [plain]
        if node.op == "Div" and inputs[0].dtype.kind in "iu" and np.all(inputs[1] != 0):
            # towards zero, exact at every size: the reference divides in floating point
            return [
                np.asarray(
                    np.sign(inputs[0]) * np.sign(inputs[1]) * (abs(inputs[0]) // abs(inputs[1])),
                    inputs[0].dtype,
                )
            ]
        names = list(dict.fromkeys(n for n in node.proto.input if n))
        values = {n: x for n, x in zip(node.proto.input, inputs, strict=True) if n}
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                results = iter(self._reference(node, names).run(None, values))
        except Exception as error:
            found = self._by_runtime(node, values)
            if found is None:
                raise node.wrong(f"its constants do not fit: {type(error).__name__}: {error}") from error
            results = iter(found)
        return [np.asarray(next(results)) if n else None for n in node.proto.output]

    def _by_runtime(self, node: OnnxNode, values: Mapping[str, Array]) -> list[Any] | None:
        """What ONNX Runtime makes of a node that the reference fails at (it has faults of its own);
        None where that fails too or is not installed."""
        helper = self.onnx.helper
        types = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in values.items()}
        graph = helper.make_graph(
            [node.proto],
            "fold",
            [helper.make_tensor_value_info(n, t, values[n].shape) for n, t in types.items()],
            [helper.make_value_info(n, self.onnx.TypeProto()) for n in node.proto.output if n],
        )
        opset = self.model.opset_import
        model = helper.make_model(graph, opset_imports=opset, ir_version=min(self.model.ir_version or 8, 10))
        try:
            import onnxruntime as ort

            options = ort.SessionOptions()
            options.log_severity_level = 4
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            found: list[Any] = session.run(None, dict(values))
        except Exception:
            return None
        return found

    def _reference(self, node: OnnxNode, names: list[str]) -> Any:
        """ONNX's reference of one node, made once."""
        if self._reference_of is not None and self._reference_of[0] is node:
            return self._reference_of[1]
        from onnx.reference import ReferenceEvaluator

        helper = self.onnx.helper
        untyped = self.onnx.TypeProto()
        graph = helper.make_graph(
            [node.proto],
            "fold",
            [helper.make_value_info(n, untyped) for n in names],
            [helper.make_value_info(n, untyped) for n in node.proto.output if n],
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version or 8
        )
        made = ReferenceEvaluator(model)
        self._reference_of = (node, made)
        return made


def refusal(blockers: Sequence[Blocker], most: int = 12) -> UnsupportedError:
    """One error that names every blocker."""
    if len(blockers) == 1:
        return blockers[0].error
    lines = [str(b.error) for b in blockers[:most]]
    rest = [f"and {len(blockers) - most} more"] if len(blockers) > most else []
    return UnsupportedError(f"{len(blockers)} nodes are not for the engine: " + "; ".join(lines + rest))


_RANDOM = {
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli",
}  # fmt: skip


def _product(sizes: Iterable[Any]) -> int:
    """Of sizes, those of zero counted as one."""
    return math.prod(max(1, int(d)) for d in sizes)


def _broadcast(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The greater of both in every dimension, the last ones together."""
    rank = max(len(a), len(b))
    return [
        max(x, y) for x, y in zip([1] * (rank - len(a)) + [*a], [1] * (rank - len(b)) + [*b], strict=True)
    ]


def _range(start: Array, limit: Array, delta: Array) -> float:
    first, last, step = (float(v.reshape(())) for v in (start, limit, delta))
    return abs((last - first) / step) if step else math.inf


def _padded(x: Array, pads: Array, *more: Array) -> int:
    ends = pads.reshape(-1)
    half = len(ends) // 2
    sizes = [x.shape[i] + int(ends[i]) + int(ends[i + half]) for i in range(min(x.ndim, half))]
    return _product(sizes) * max(1, x.size)


#: Elements of a constant whose size is data: a small file must not ask for all memory.
_SIZES: dict[str, Callable[..., float]] = {
    "ConstantOfShape": lambda shape: _product(shape.reshape(-1)),
    "Expand": lambda x, shape: _product(_broadcast([int(d) for d in shape.reshape(-1)], x.shape)),
    "Tile": lambda x, repeats: _product(repeats.reshape(-1)) * x.size,
    "Range": _range,
    "Pad": _padded,
    "OneHot": lambda indices, depth, values: indices.size * int(depth.reshape(-1)[0]),
}


def _elements(op: str, inputs: Sequence[Any]) -> float:
    try:
        return _SIZES[op](*inputs) if op in _SIZES else 0
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0  # malformed: the evaluation says how


#: ONNX operators that the front end knows.
OPERATORS = tuple(sorted([*(op for op in ONNX if "." not in op), "Constant", "ConstantOfShape", "Range"]))
