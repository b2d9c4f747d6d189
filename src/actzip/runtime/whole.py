"""An ONNX file as one Graph although the engine lacks some of its nodes: what ONNX Runtime computes
stands in it as :class:`~actzip.runtime.ops.elsewhere.Elsewhere`. For modules, which profiles,
quantizers and thresholds work on; the engine takes such a file in parts
(:mod:`actzip.runtime.parts`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from actzip.errors import ActzipError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.from_onnx import Importer
from actzip.runtime.graph import Array
from actzip.runtime.onnx_file import inputs_of, onnx_package
from actzip.runtime.onnx_node import OnnxNode, reads
from actzip.runtime.ops.elsewhere import Elsewhere
from actzip.runtime.origin import Shapes
from actzip.runtime.parts import run_whole, usual_inputs
from actzip.runtime.passes.edit import drop_dead
from actzip.runtime.registry import Mask, Probed

__all__ = ["WholeOrigin", "file_behind"]

#: Operators whose output has a shape that numbers decide: what is behind them runs elsewhere too.
_LOOSE = {"NonZero", "NonMaxSuppression", "Unique", "Compress", "If", "Loop", "Scan"}


class _Inside(Exception):
    """A node inside a branch is refused: the node that holds the branch runs elsewhere."""


class _Importer(Importer):
    """Reads every node: refused ones become nodes of ONNX Runtime."""

    def __init__(
        self, model: Any, given: Mapping[str, Array], seen: Mapping[str, Array], forced: set[int]
    ) -> None:
        shapes = {n: tuple(a.shape) for n, a in given.items()}
        super().__init__(model, shapes, {}, model.graph.name or "onnx", False)
        self.seen = seen
        self.forced = forced
        self.makers: dict[str, int] = {}  # value -> node that writes it
        self.loose: set[str] = set()
        self.lacking: list[str] = []  # what is refused, in words
        self.top: OnnxNode | None = None
        self.depth = 0

    def run(self, node: OnnxNode) -> None:
        if self.depth:
            super().run(node)
            return
        self.top, self.current = node, node
        self.makers.update({o: node.index for o in node.proto.output if o})
        behind = any(n in self.loose for n in reads(node.proto))
        if node.index in self.forced or behind:
            self.elsewhere(node, behind)
            return
        self.depth = 1
        try:
            super().run(node)
        except (_Inside, ActzipError) as error:
            self.lacking.append(str(error))
            self.elsewhere(node, node.op in _LOOSE)
        finally:
            self.depth = 0

    def refused(self, node: OnnxNode, error: UnsupportedError) -> None:
        if self.depth:
            raise _Inside(str(error)) from error
        self._force(node.index, error)  # an output as it cannot be handed out

    def _force(self, index: int, error: UnsupportedError) -> None:
        if index in self.forced:
            raise error
        self.forced.add(index)
        raise _Again

    def elsewhere(self, node: OnnxNode, loose: bool) -> None:
        """The node's outputs as ONNX Runtime gives them."""
        names, constants = [], {}
        for n in dict.fromkeys(reads(node.proto)):
            value = self.env.get(n)
            if isinstance(value, Mask):
                try:
                    self.env[n] = value = self.ref(value)
                except UnsupportedError as error:  # of integers: what compares them runs elsewhere too
                    self._force(self.makers[n], error)
            if isinstance(value, Probed):
                self._force(self.makers[n], node.refuse(f"reads the shape {n!r}"))
            if isinstance(value, str):
                names.append(n)
            else:
                constants[n] = np.asarray(value)
        if any(n not in self.seen for n in names):
            raise UnsupportedError(f"{node.where}: an operand is no tensor")
        model = _alone(self.model, node.proto, names, constants, self.seen)
        kinds = tuple(str(self.seen[n].dtype) for n in names)
        for o in [o for o in node.proto.output if o and self.is_read(o)]:
            found = self.seen.get(o)
            if found is None:
                raise UnsupportedError(f"{node.where}: its output {o!r} is no tensor")
            name = f"{node.name}:{o}" if len(node.proto.output) > 1 else node.name
            made = Elsewhere(
                g.unused(name, self.node_names),
                tuple(self.env[n] for n in names),
                self.graph.fresh(f"v_{name}"),
                source=node.where,
                model=model,
                names=tuple(names),
                kinds=kinds,
                result=o,
                shape=tuple(int(d) for d in found.shape),
            )
            kind = str(found.dtype)
            self.env[o] = self.graph.add(made, kind if kind in g.TYPES else "float32")
            if loose or node.op in _LOOSE:
                self.loose.add(o)


class _Again(Exception):
    """A shape has to be computed elsewhere: the model is read again."""


def _alone(
    model: Any, proto: Any, names: list[str], constants: Mapping[str, Array], seen: Mapping[str, Array]
) -> bytes:
    """A model of one node, its inputs of any size."""
    onnx = onnx_package()
    helper = onnx.helper
    inputs = [
        helper.make_tensor_value_info(
            n, helper.np_dtype_to_tensor_dtype(seen[n].dtype), [None] * seen[n].ndim
        )
        for n in names
    ]
    outputs = [onnx.ValueInfoProto(name=o) for o in proto.output if o]
    tensors = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph([proto], "alone", inputs, outputs, tensors)
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version or 8)
    made.functions.extend(model.functions)
    data: bytes = made.SerializeToString()
    return data


class WholeOrigin:
    """An ONNX model of which the engine lacks nodes, weights and all: read for every size."""

    is_data = False

    def __init__(self, model: Any, label: str) -> None:
        self.model = model
        self.label = label
        self.lacking: list[str] = []

    def first(self, shapes: Mapping[str, tuple[int, ...]]) -> g.Graph:
        """The graph for inputs of these shapes; usual ones for those that are not said.

        Raises:
            UnsupportedError: ONNX Runtime is not installed, or refuses the model.
            InputError: it takes no usual size.
        """
        return self._read(usual_inputs(self.model, given=shapes))

    def graph(self, shapes: Shapes, seed: int = 0, *, quick: bool = False) -> g.Graph:
        known = dict(zip(self._names(), shapes, strict=True))
        return self._read(usual_inputs(self.model, given=known))

    def simpler(self) -> bool:
        return False

    def _names(self) -> list[str]:
        return [v.name for v in inputs_of(self.model)]

    def _read(self, arrays: list[Array]) -> g.Graph:
        given = dict(zip(self._names(), arrays, strict=True))
        seen = {**given, **run_whole(self.model, given, 0)}
        forced: set[int] = set()
        while True:
            importer = _Importer(self.model, given, seen, forced)
            try:
                made = importer.build()
            except _Again:
                continue
            self.lacking = importer.lacking
            return drop_dead(made)


def file_behind(model: Any) -> Any:
    """The ONNX model of a module of :func:`actzip.load` that the engine does not have whole; None of
    others.

    Raises:
        UnsupportedError: the module is not what the file is any more.
    """
    from actzip.runtime.to_torch import GraphNet

    if not isinstance(model, GraphNet) or not isinstance(model.origin, WholeOrigin):
        return None
    if "_actzip_quantization" in model.__dict__ or model.changed():
        raise UnsupportedError(
            f"{len(model.elsewhere())} nodes of this module run with ONNX Runtime, and its parameters, "
            "thresholds or quantizers are not the file's: only the file's own are compiled in parts"
        )
    return model.origin.model
