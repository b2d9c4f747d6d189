"""An ONNX model in parts: what the engine has runs as compiled networks, the rest with ONNX Runtime.

The graph is cut into stages that alternate between the two. A region of the engine without a
convolution costs two changes of layout and saves nothing: it goes to ONNX Runtime as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actzip.errors import ActzipError, InputError, UnsupportedError
from actzip.runtime.binding import no_memory
from actzip.runtime.blame import MOST_CUTS, first_failing, reasons
from actzip.runtime.drawn import drawn as drawn_of
from actzip.runtime.explain import Explanation, LayerRow, elsewhere_row, together
from actzip.runtime.from_onnx import Importer, at_least_opset
from actzip.runtime.graph import Array, Graph
from actzip.runtime.onnx_file import inputs_of, load_onnx, onnx_package, tensor_array
from actzip.runtime.onnx_node import OnnxNode, reads
from actzip.runtime.onnx_quantized import is_quantized
from actzip.runtime.open_sizes import open_inputs, settled, usual_shapes

__all__ = [
    "PartitionedModel",
    "Plan",
    "RefusedInput",
    "compile_parts",
    "line_of",
    "run_whole",
    "runtime",
    "types_of",
    "usual_inputs",
]

_MOST_PLANS = 8  # sizes of input that are kept
_WORK = {"Conv", "ConvTranspose"}  # what a region of the engine is worth crossing a border for
_NO_WORK = "without a convolution a part is not worth its borders"


class RefusedInput(InputError):
    """ONNX Runtime refuses the sizes or values of an input."""


class Compiler(Protocol):
    """How a region of the engine is compiled."""

    def __call__(self, graph: Graph, inputs: list[Array]) -> Any: ...

    def without_trials(self) -> Compiler: ...


def compile_parts(
    source: Any, inputs: Any, compiler: Compiler, threads: int, refused: UnsupportedError
) -> PartitionedModel:
    """A model of which the engine lacks some operators.

    Args:
        source: path, bytes or ``ModelProto``.
        inputs: an example: one array, several, or a dict by name; None: random numbers of the
            declared shapes.
        refused: what the engine lacks, raised where there is no ONNX Runtime for the rest.

    Raises:
        UnsupportedError: ONNX Runtime is not installed or cannot run the model, or nothing is left
        for the engine.
    """
    runtime(refused)
    model = at_least_opset(load_onnx(source))
    names = _input_names(model)
    arrays = _example(model, names, inputs)
    made = PartitionedModel(model.SerializeToString(), names, compiler, threads)
    made.prepare(arrays)
    return made


def usual_inputs(model: Any, given: Mapping[str, tuple[int, ...]] | None = None) -> list[Array]:
    """Random inputs of the shapes ``given``, else of those declared; where sizes are open, of usual
    ones that ONNX Runtime takes.

    Raises:
        InputError: it takes none of them.
    """
    types, names = types_of(model), _input_names(model)
    rng = np.random.default_rng(0)

    def drawn(shapes: Mapping[str, tuple[int, ...]]) -> list[Array]:
        return [drawn_of(rng, shapes[n], str(types[n])) for n in names]

    def tried(shapes: Mapping[str, tuple[int, ...]] | None) -> list[Array]:
        arrays = drawn(next(usual_shapes(model, shapes)))
        if running is not None:
            try:
                running.run(None, dict(zip(names, arrays, strict=True)))
            except Exception as error:
                raise InputError(f"ONNX Runtime refuses it: {line_of(error)}") from error
        return arrays

    left = open_inputs(model).keys() - (given or {}).keys()
    running = _session(model, 0) if left else None
    return settled(model, model.graph.name or "the model", given, tried)


def runtime(refused: UnsupportedError | None = None) -> Any:
    """ONNX Runtime's module.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        what = f"{refused}; " if refused else ""
        hint = "with ONNX Runtime the rest would run there: `pip install onnxruntime`"
        raise UnsupportedError(f"{what}{hint}") from error
    return onnxruntime


def _session(model: Any, threads: int) -> Any:
    ort = runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    data = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UnsupportedError(f"ONNX Runtime refuses the rest: {line_of(error)}") from error


def _run_session(session: Any, outputs: list[str], given: Mapping[str, Any]) -> list[Any]:
    try:
        return list(session.run(outputs, dict(given)))
    except Exception as error:
        raise RefusedInput(f"ONNX Runtime cannot run the model on this input: {line_of(error)}") from error


def line_of(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _input_names(model: Any) -> list[str]:
    return [v.name for v in inputs_of(model)]


def types_of(model: Any) -> dict[str, np.dtype[Any]]:
    """Types of the inputs by name."""
    to_numpy = onnx_package().helper.tensor_dtype_to_np_dtype
    return {v.name: np.dtype(to_numpy(v.type.tensor_type.elem_type)) for v in model.graph.input}


def _example(model: Any, names: Sequence[str], given: Any) -> list[Array]:
    types = types_of(model)
    if given is not None:
        leaves = [given[n] for n in names if n in given] if isinstance(given, Mapping) else given
        leaves = leaves if isinstance(leaves, (tuple, list)) else [leaves]
        if len(leaves) != len(names):
            raise InputError(
                f"example: {len(leaves)} inputs given; the model has {len(names)}: {', '.join(names)}"
            )
        return [_plain(n, x, types[n]) for n, x in zip(names, leaves, strict=True)]
    return usual_inputs(model)


def _numpy(name: str, x: Any) -> Array:
    try:
        array: Array = x.numpy()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"input {name!r} is {x.dtype}, which NumPy cannot hold: {error}") from error
    return array


def _plain(name: str, x: Any, dtype: np.dtype[Any]) -> Array:
    """An array of its own type, from a tensor or array."""
    if hasattr(x, "detach"):
        x = x.detach().resolve_neg().cpu()
        narrow = str(x.dtype) == "torch.bfloat16"
        x = x.float().numpy().astype(dtype) if narrow and dtype.name == "bfloat16" else _numpy(name, x)
    if not isinstance(x, np.ndarray):
        raise InputError(f"input {name!r} is of type {type(x).__name__}, not a tensor or array")
    if x.dtype != dtype:
        raise InputError(f"input {name!r} is {x.dtype}; the model takes {dtype}")
    return np.ascontiguousarray(x)


# -- cutting


class _Survey(Importer):
    """Reads a model whose refused nodes are left to another runtime, and says where each node goes."""

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]], seen: Mapping[str, Array]) -> None:
        super().__init__(model, shapes, {}, model.graph.name or "onnx", False)
        self.seen = seen
        self.elsewhere: dict[int, str] = {}  # nodes that another runtime runs, and why
        self.forced: dict[int, str] = {}  # of these what the engine might have
        self.constant: set[int] = set()
        self.holders: set[int] = set()  # an If with a refused node inside: it goes elsewhere whole
        self.top: OnnxNode | None = None

    def survey(self) -> list[OnnxNode]:
        self._inputs()
        self.nodes = [OnnxNode(self, n, i) for i, n in enumerate(self.order(self.model.graph.node))]
        for node in self.nodes:
            self.top = node
            self.run(node)
            if node.index in self.holders:
                self.env.update({o: self.foreign(o) for o in node.proto.output if o})
            if node.index not in self.elsewhere and all(
                isinstance(self.env.get(o), np.ndarray) for o in node.proto.output if o
            ):
                self.constant.add(node.index)
        return self.nodes

    def _inputs(self) -> None:
        for tensor in self.model.graph.initializer:
            self.env[tensor.name] = tensor_array(self.onnx, tensor, f"initialiser {tensor.name!r}")
        for value in self.model.graph.input:
            if value.name not in self.env:
                self.env[value.name] = self.foreign(value.name)

    def run(self, node: OnnxNode) -> None:
        self.current = node
        if node is self.top and node.index in self.forced:
            self.refused(node, UnsupportedError(self.forced[node.index]))
            return
        try:
            super().run(node)
        except ActzipError as error:
            self.refused(node, UnsupportedError(str(error)))

    def refused(self, node: OnnxNode, error: UnsupportedError) -> None:
        super().refused(node, error)
        top = self.top or node
        self.elsewhere.setdefault(top.index, str(error))
        if top is not node:
            self.holders.add(top.index)

    def foreign(self, name: str) -> Any:
        """A value that comes from elsewhere, as an input of the graph."""
        value = self.seen.get(name)
        if not isinstance(value, np.ndarray) or value.size == 0:
            return super().foreign(name)
        if value.dtype not in (np.float32, np.float16, np.int64, np.int32, np.uint8, np.int8, np.bool_):
            return super().foreign(name)
        if name in self.graph.values:
            return super().foreign(name)
        added = self.graph.add_input(name, tuple(value.shape), str(value.dtype))
        if value.dtype in (np.int64, np.int32):
            self.inexact.add(added)
        return added


@dataclass
class _Part:
    """One stage: an ONNX model of its nodes; ``run`` once it is made."""

    engine: bool
    nodes: list[Any]
    places: list[int] = field(default_factory=list)  # of its nodes in the model
    why: list[str] = field(default_factory=list)  # why the engine has not its nodes
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    model: bytes = b""
    compiled: Any = None
    session: Any = None
    milliseconds: float = 0.0

    def run(self, values: dict[str, Array]) -> list[Array]:
        given = [values[n] for n in self.inputs]
        if self.engine:
            outputs = self.compiled._general(tuple(given), {})
            return outputs if isinstance(outputs, list) else [outputs]
        return _run_session(self.session, self.outputs, dict(zip(self.inputs, given, strict=True)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "session": None, "nodes": []}


def _stages(nodes: Sequence[OnnxNode], engine: set[int], live: set[int]) -> list[tuple[bool, list[OnnxNode]]]:
    """Nodes by stage. Stages alternate; a node stands in the first that its operands allow."""
    made: dict[str, int] = {}
    stages: dict[int, list[OnnxNode]] = {}
    for node in nodes:
        if node.index not in live:
            continue
        parity = 0 if node.index in engine else 1
        at = parity
        for name in reads(node.proto):
            before = made.get(name, -1)
            if before >= 0:
                at = max(at, before if before % 2 == parity else before + 1)
        for o in node.proto.output:
            made[o] = at
        stages.setdefault(at, []).append(node)
    return [(k % 2 == 0, stages[k]) for k in sorted(stages)]


def _regions(stage: Sequence[OnnxNode]) -> list[list[OnnxNode]]:
    """Connected pieces of a stage."""
    group: dict[str, int] = {}
    members: dict[int, list[OnnxNode]] = {}
    for k, node in enumerate(stage):
        names = [*reads(node.proto), *node.proto.output]
        met = {group[n] for n in names if n in group}
        home = min(met, default=k)
        merged = [n for other in sorted(met) for n in members.pop(other)]
        members[home] = [*merged, node]
        for n in [n for m in members[home] for n in [*m.proto.output]]:
            group[n] = home
    return list(members.values())


# -- running


def run_whole(model: Any, given: Mapping[str, Array], threads: int) -> dict[str, Array]:
    """Every value of the model for this input, computed by ONNX Runtime.

    Raises:
        InputError: it cannot run the model on it.
    """
    onnx = onnx_package()
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for value in whole.graph.input:  # what is declared is no promise
        if value.name in given:
            shape = value.type.tensor_type.shape
            for i, d in enumerate(shape.dim):
                d.Clear()
                d.dim_value = int(given[value.name].shape[i]) if i < given[value.name].ndim else 0
    declared = {o.name for o in whole.graph.output}
    for o in whole.graph.output:
        o.type.tensor_type.ClearField("shape")
    del whole.graph.value_info[:]
    for node in whole.graph.node:
        for o in node.output:
            if o and o not in declared:
                declared.add(o)
                whole.graph.output.append(onnx.ValueInfoProto(name=o))
    session = _session(whole, threads)
    names = [o.name for o in session.get_outputs()]
    results = _run_session(session, names, given)
    return {n: r for n, r in zip(names, results, strict=True) if isinstance(r, np.ndarray)}


class Plan:
    """The parts for one set of input shapes."""

    def __init__(
        self, model: Any, names: Sequence[str], arrays: Sequence[Array], compiler: Compiler, threads: int
    ) -> None:
        self.onnx = onnx_package()
        self.model = model
        given = dict(zip(names, arrays, strict=True))
        self.seen = {**given, **run_whole(model, given, threads)}
        self.shapes = {n: tuple(a.shape) for n, a in given.items()}
        self.failed: dict[int, str] = {}  # nodes at which parts did not compile, and why
        self.known: dict[str, Array] = {}  # values that are the same for every input
        made: dict[bytes, Any] = {}
        while True:
            self.parts = self._cut()
            more = self._compile(compiler, made)
            if not more:
                break
            self.failed |= more
        for part in self.parts:
            if not part.engine:
                part.session = _session(part.model, threads)
        self.seen, self.known = {}, {}
        self.measure(given)

    def _compile(self, compiler: Compiler, made: dict[bytes, Any]) -> dict[int, str]:
        """Compiles the engine's parts, but for those in ``made``. Where some do not compile: the nodes
        at which they failed, or all of their nodes, with the reasons."""
        blamed: dict[int, str] = {}
        for part in self.parts:
            if not part.engine:
                continue
            try:
                if part.model not in made:
                    made[part.model] = self._compiled(part, compiler)
                part.compiled = made[part.model]
            except ActzipError as error:
                at = range(len(part.places))
                if len(self.failed) < MOST_CUTS:
                    k = first_failing(len(at), partial(self._fails, part, compiler))
                    at = range(k, k + 1)
                names = {k: part.nodes[k].name or part.nodes[k].output[0] for k in at}
                blamed |= {part.places[k]: f"{names[k]!r} does not compile: {error}" for k in at}
        return blamed

    def _compiled(self, part: _Part, compiler: Compiler) -> Any:
        shapes = {n: tuple(self.seen[n].shape) for n in part.inputs}
        graph = Importer(self._proto(part), shapes, {}, "part", False).build()
        return compiler(graph, [self.seen[n] for n in part.inputs])

    def _fails(self, part: _Part, compiler: Compiler, count: int) -> bool:
        """Whether the first nodes of a part do not compile."""
        nodes = part.nodes[:count]
        first = _Part(True, nodes, part.places[:count])
        read = {n for node in nodes for n in reads(node)}
        written = [o for node in nodes for o in node.output if o]
        wanted = {n for node in part.nodes[count:] for n in reads(node)} | set(part.outputs)
        first.outputs = [o for o in written if o in wanted and isinstance(self.seen.get(o), np.ndarray)]
        first.inputs = [n for n in part.inputs if n in read]
        if not first.outputs or not first.inputs:
            return False
        known = {n: self.known[n] for n in read if n in self.known}
        first.model = self._part_model(first, known)
        try:
            self._compiled(first, compiler.without_trials())
        except ActzipError:
            return True
        return False

    @classmethod
    def elsewhere(cls, model: bytes, names: Sequence[str], outputs: Sequence[str], threads: int) -> Plan:
        """One part, all of the model, for every size."""
        made = cls.__new__(cls)
        made.constants, made.failed = {}, {}
        whole = _Part(False, [], inputs=list(names), outputs=list(outputs), model=model)
        whole.session = _session(model, threads)
        made.parts = [whole]
        return made

    def _proto(self, part: _Part) -> Any:
        return self.onnx.ModelProto.FromString(part.model)

    def _cut(self) -> list[_Part]:
        forced = dict(self.failed)
        for _ in range(len(self.model.graph.node) + 1):
            survey = _Survey(self.model, self.shapes, self.seen)
            survey.forced = forced
            nodes = survey.survey()
            live = {n.index for n in nodes} - survey.constant
            engine = live - survey.elsewhere.keys()
            stages = _stages(nodes, engine, live)
            more = self._misplaced(survey, stages)
            if not more:
                return self._finished(survey, stages)
            forced |= more
        raise UnsupportedError("nothing is left for the engine")

    def _misplaced(self, survey: _Survey, stages: list[tuple[bool, list[OnnxNode]]]) -> dict[int, str]:
        """Nodes of the engine that had better be elsewhere: integers that it does not hold, regions
        without work."""
        outputs = {o.name for o in self.model.graph.output}
        stage_of = {o: k for k, (_, nodes) in enumerate(stages) for n in nodes for o in n.proto.output}
        maker = {o: n for _, nodes in stages for n in nodes for o in n.proto.output}
        out: dict[int, str] = {}

        def needed(node: OnnxNode) -> None:
            out[node.index] = str(node.refuse("its result is needed elsewhere"))

        for k, (engine, nodes) in enumerate(stages):
            if engine:
                for o in outputs:
                    if stage_of.get(o) == k and self._no_output(survey, o):
                        needed(maker[o])
                for region in _regions(nodes):
                    if not any(n.op in _WORK for n in region):
                        out |= {n.index: _NO_WORK for n in region}
        return {k: why for k, why in out.items() if k not in survey.forced}

    def _no_output(self, survey: _Survey, name: str) -> bool:
        value = survey.env.get(name)
        return isinstance(value, str) and value in survey.inexact

    def _finished(self, survey: _Survey, stages: list[tuple[bool, list[OnnxNode]]]) -> list[_Part]:
        outputs = [o.name for o in self.model.graph.output]
        lacking = survey.elsewhere
        parts = [
            _Part(
                engine,
                [n.proto for n in nodes],
                [n.index for n in nodes],
                [lacking[n.index] for n in nodes if n.index in lacking],
            )
            for engine, nodes in stages
        ]
        self.known = {n: a for n, a in survey.env.items() if isinstance(a, np.ndarray)}
        self.constants = {n: self.known[n] for n in outputs if n in self.known}
        for part in parts:
            written = {o for n in part.nodes for o in n.output}
            wanted = {n for other in parts if other is not part for m in other.nodes for n in reads(m)} | set(
                outputs
            )
            part.outputs = [o for n in part.nodes for o in n.output if o and o in wanted]
            read = list(dict.fromkeys(n for m in part.nodes for n in reads(m) if n not in written))
            known = {n: self.known[n] for n in read if n in self.known}
            part.inputs = [n for n in read if n not in known]
            part.model = self._part_model(part, known)
        return parts

    def _part_model(self, part: _Part, known: Mapping[str, Array]) -> bytes:
        helper = self.onnx.helper
        infos = []
        for n in part.inputs:
            value = self.seen[n]
            infos.append(
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                if isinstance(value, np.ndarray)
                else self.onnx.ValueInfoProto(name=n)
            )
        outputs = []
        for n in part.outputs:
            seen = self.seen.get(n)
            kind = helper.np_dtype_to_tensor_dtype(seen.dtype) if isinstance(seen, np.ndarray) else 0
            outputs.append(
                helper.make_tensor_value_info(n, kind, None) if kind else self.onnx.ValueInfoProto(name=n)
            )
        to_tensor = self.onnx.numpy_helper.from_array
        graph = helper.make_graph(
            part.nodes, "part", infos, outputs, [to_tensor(np.asarray(a), n) for n, a in known.items()]
        )
        model = helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version or 8
        )
        model.functions.extend(self.model.functions)
        data: bytes = model.SerializeToString()
        return data

    def run(self, given: Mapping[str, Array], outputs: Sequence[str], clock: bool = False) -> list[Array]:
        values: dict[str, Array] = {**self.constants, **given}
        for part in self.parts:
            start = time.perf_counter()
            results = part.run(values)
            if clock:
                part.milliseconds = 1e3 * (time.perf_counter() - start)
            values.update(zip(part.outputs, results, strict=True))
        return [values[o] for o in outputs]

    def measure(self, given: Mapping[str, Array]) -> None:
        """Times each part once, warm."""
        self.run(given, [])
        self.run(given, [], clock=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "onnx": None, "model": None}

    def reopen(self, threads: int) -> None:
        self.onnx = onnx_package()
        for part in self.parts:
            if not part.engine:
                part.session = _session(part.model, threads)


class PartitionedModel:
    """A compiled network of which some nodes run with ONNX Runtime: called, run, explained and pickled as a
    :class:`~actzip.runtime.compiled.CompiledModel`.

    Parts are made for the shapes of an input when it first comes; those of the last few are kept.

    Attributes:
        threads: threads of a call.
        note: what :func:`actzip.compile` measured with ONNX Runtime, or why it did not.
    """

    note = ""

    def __init__(self, model: bytes, names: Sequence[str], compiler: Any, threads: int) -> None:
        self.threads = threads
        self._bytes = model
        self._names = list(names)
        self._compiler = compiler
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._open()

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._model = onnx_package().ModelProto.FromString(self._bytes)
        self._outputs = [o.name for o in self._model.graph.output]
        self._dtypes = types_of(self._model)

    @property
    def quantized(self) -> bool:
        """Whether the file computes in integers."""
        return is_quantized(self._model)

    @property
    def on_engine(self) -> bool:
        """Whether the engine runs a part of it."""
        return any(p.engine for plan in self._plans.values() for p in plan.parts)

    def rest(self) -> None:
        """Gives the memory of the parts back; the next call makes those that it needs again."""
        self._plans.clear()

    def wake(self) -> None:
        """The parts for the example again."""
        self._plan(self._sample)

    def prepare(self, arrays: Sequence[Array]) -> None:
        """Makes the parts for these inputs, which are the sample of :meth:`explain`."""
        self._sample = list(arrays)
        self._plan(self._sample)
        self._compiler = self._compiler.without_trials()

    def _plan(self, arrays: Sequence[Array]) -> Plan:
        key = tuple(a.shape for a in arrays)
        found = self._plans.get(key)
        if found is None:
            with self._lock:
                found = self._plans.get(key)
                if found is None:
                    found = Plan(self._model, self._names, arrays, self._compiler, self.threads)
                    while len(self._plans) >= _MOST_PLANS:
                        self._plans.pop(next(iter(self._plans)))
                    self._plans[key] = found
        return found

    def says(self) -> str:
        """One line: which nodes run elsewhere, and their share of the time."""
        plan = next(iter(self._plans.values()))
        protos = [n for p in plan.parts if not p.engine for n in self._nodes_of(p)]
        ours = sum(len(self._nodes_of(p)) for p in plan.parts if p.engine)
        counts = ", ".join(f"{k} {op}" for op, k in Counter(n.op_type for n in protos).most_common(6))
        total = sum(p.milliseconds for p in plan.parts) or 1.0
        share = sum(p.milliseconds for p in plan.parts if not p.engine) / total
        why = reasons((w for p in plan.parts for w in p.why if w != _NO_WORK), 3)
        if not ours:
            what = "nothing of this model is for the engine"
            return f"all {len(protos)} nodes run with ONNX Runtime: {what} ({counts}): {why}"
        return (
            f"{len(protos)} of {len(protos) + ours} nodes run with ONNX Runtime ({counts}), "
            f"{100 * share:.0f} % of the time; explain() lists them: {why}"
        )

    def _nodes_of(self, part: _Part) -> list[Any]:
        return list(onnx_package().ModelProto.FromString(part.model).graph.node)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the network.

        Raises:
            InputError: another number of inputs or type than the model's, or a shape that it cannot take.
        """
        leaves = self._leaves(args, kwargs)
        outputs: list[Any] = list(self.run(leaves))
        if any(hasattr(x, "detach") for x in leaves):
            import torch

            outputs = [torch.from_numpy(np.array(o)) for o in outputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def _leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        only = args[0] if len(args) == 1 else None
        if isinstance(only, Mapping):
            args, kwargs = (), only
        elif isinstance(only, (tuple, list)):
            args = tuple(only)
        unknown = [k for k in kwargs if k not in self._names]
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if unknown or len(given) != len(self._names) or len(args) + len(kwargs) != len(self._names):
            wanted = ", ".join(map(repr, self._names))
            raise InputError(f"{len(args) + len(kwargs)} inputs given; this model takes {wanted}")
        return [given[n] for n in self._names]

    def run(self, inputs: list[Any]) -> list[Array]:
        """Outputs as a flat list of arrays, for a flat list of inputs.

        Raises:
            InputError: as calling.
        """
        arrays = self._arrays(inputs)
        try:
            plan = self._plan(arrays)
            return plan.run(dict(zip(self._names, arrays, strict=True)), self._outputs)
        except MemoryError as error:
            raise no_memory(int(arrays[0].shape[0]) if arrays and arrays[0].ndim else 1) from error

    def _arrays(self, inputs: list[Any]) -> list[Array]:
        if len(inputs) != len(self._names):
            raise InputError(f"{len(inputs)} inputs given; this model was compiled for {len(self._names)}")
        arrays = [_plain(n, x, self._dtypes[n]) for n, x in zip(self._names, inputs, strict=True)]
        if any(a.size == 0 for a in arrays):
            raise InputError("an input is empty; N must be at least 1")
        return arrays

    def explain(self, x: Any = None, *, runs: int = 10) -> Explanation:
        """What runs where and why, measured now on ``x`` (or on the example)."""
        arrays = self._sample
        if x is not None:
            arrays = self._arrays(self._leaves((x,), {}))
        plan = self._plan(arrays)
        values: dict[str, Array] = {**plan.constants, **dict(zip(self._names, arrays, strict=True))}
        reports: list[Explanation] = []
        rows: list[LayerRow] = []
        for number, part in enumerate(plan.parts):
            times = []
            for _ in range(max(1, runs)):
                start = time.perf_counter()
                results = part.run(values)
                times.append(1e3 * (time.perf_counter() - start))
            if part.engine:
                given = [values[n] for n in part.inputs]
                reports.append(part.compiled.explain(tuple(given), runs=runs))
                rows += reports[-1].rows
            else:
                rows.append(self._foreign_row(part, number, float(np.median(times))))
            values.update(zip(part.outputs, results, strict=True))
        batch = int(arrays[0].shape[0]) if arrays[0].ndim else 1
        inputs = {n: list(a.shape) for n, a in zip(self._names, arrays, strict=True)}
        return together(reports, rows, batch, self.threads, inputs, self.note)

    def _foreign_row(self, part: _Part, number: int, milliseconds: float) -> LayerRow:
        nodes = self._nodes_of(part)
        counts = ", ".join(f"{k} {op}" for op, k in Counter(n.op_type for n in nodes).most_common())
        source = ", ".join(n.name for n in nodes if n.name)[:200]
        reason = self._reason(counts, part.why)
        return elsewhere_row(f"part {number}", "onnxruntime", reason, milliseconds, source)

    def _reason(self, counts: str, why: list[str]) -> str:
        return f"not for the engine: {counts}: {reasons(why, 100)}"

    def arena_bytes(self, batch: int = 1) -> int:
        """Bytes of activations of the engine's parts at their own batch; ONNX Runtime's are not known."""
        plan = next(iter(self._plans.values()))
        return sum(p.compiled.arena_bytes(batch) for p in plan.parts if p.engine)

    def weight_bytes(self) -> int:
        """Bytes of packed weights and constants of the engine's parts."""
        plan = next(iter(self._plans.values()))
        return sum(p.compiled.weight_bytes() for p in plan.parts if p.engine)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Not possible: a ``.actzip`` file holds networks of the engine alone.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{os.fspath(path)}: some nodes of this model run with ONNX Runtime, which no .actzip file "
            "holds; pickle it, or compile the ONNX file where it runs"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._names)}: {self.says()})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_model", "_outputs", "_dtypes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        for plan in self._plans.values():
            plan.model = self._model
            plan.reopen(self.threads)
