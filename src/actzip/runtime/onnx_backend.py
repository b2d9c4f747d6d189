"""ONNX's own backend interface, so that its test suite and tools run against the engine.

    import actzip.onnx_backend as backend
    outputs = backend.run_model(model, [x])

Inputs that the engine must know when a graph is made (weights, axes, shapes ...) may be inputs of
the ONNX graph: the model is then compiled for the values of the first run and compiled again when
they change. At least one float32 input stays an input of the engine; a model that has none is not
for it. Outputs are float32, the int64 of operators that give indices, or integers of at most 16
bits, which float32 holds exactly (QuantizeLinear).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx.backend.base import Backend, BackendRep
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.from_onnx import NeedsConstant, from_onnx, load_onnx
from actzip.runtime.onnx_file import inputs_of

__all__ = [
    "ActzipBackend",
    "ActzipRep",
    "BackendIsNotSupposedToImplementIt",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
]

Runner = Callable[[g.Graph], Callable[[Sequence[np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]]


def _engine(graph: g.Graph) -> Callable[[Sequence[np.ndarray[Any, Any]]], Sequence[np.ndarray[Any, Any]]]:
    from actzip.runtime import compile as compile_graph

    compiled = compile_graph(graph, tune=False, cache=False)
    return lambda inputs: compiled.run([np.asarray(x, order="C") for x in inputs])


def _array(value: Any) -> np.ndarray[Any, Any]:
    """An array, also from the ``TensorProto`` that ONNX's tests use for types that numpy does not have."""
    if hasattr(value, "data_type"):
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(value))
    if isinstance(value, (list, dict)) and not all(isinstance(v, (int, float)) for v in value):
        raise BackendIsNotSupposedToImplementIt("an input that is a sequence or a map")
    array = np.asarray(value)
    if array.dtype == object:
        raise BackendIsNotSupposedToImplementIt(f"an input of type {type(value).__name__}")
    return array


class ActzipRep(BackendRep):  # type: ignore[misc]
    """A prepared model; see the module's documentation for inputs that must be known beforehand."""

    def __init__(self, model: Any, runner: Runner) -> None:
        self.model = load_onnx(model)
        self.runner = runner
        self.names = [v.name for v in inputs_of(self.model)]
        self.outputs = [v.name for v in self.model.graph.output]
        self.types: list[np.dtype[Any] | None] = []
        self.fixed = {
            v.name
            for v in self.model.graph.input
            if v.type.tensor_type.elem_type != 1 and v.name in self.names  # 1: float32
        }
        self.plans: dict[str, tuple[list[str], Callable[..., Any]]] = {}

    def _plan(self, values: dict[str, np.ndarray[Any, Any]]) -> tuple[list[str], Callable[..., Any]]:
        while True:
            constants = {n: v for n, v in values.items() if n in self.fixed}
            dynamic = [n for n in self.names if n not in self.fixed]
            key = hashlib.sha256()
            for n in self.names:
                v = values[n]
                key.update(f"{n}|{v.dtype}|{v.shape}|".encode())
                if n in constants:
                    key.update(np.ascontiguousarray(v).tobytes())
            digest = key.hexdigest()
            if digest in self.plans:
                return self.plans[digest]
            if not dynamic:
                raise UnsupportedError(
                    "no float32 input is left for the engine: the model computes with constants alone"
                )
            shapes = {n: values[n].shape for n in dynamic}
            try:
                graph = from_onnx(self.model, shapes, constants=constants)
            except NeedsConstant as error:
                if error.value not in self.names or error.value in self.fixed:
                    raise
                self.fixed.add(error.value)
                continue
            for out, name, t in zip(graph.outputs, self.outputs, self.types, strict=True):
                if t is not None and (t == np.int64) != (graph.values[out].dtype == "int64"):
                    raise UnsupportedError(
                        f"output {name!r} is of type {t}, which the engine does not compute"
                    )
            if not graph.inputs or not graph.nodes:
                raise UnsupportedError("nothing is left for the engine to compute")
            if len(self.plans) > 16:
                self.plans.clear()
            self.plans[digest] = (dynamic, self.runner(graph))
            return self.plans[digest]

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs in order, for inputs in order.

        Raises:
            InputError: as many inputs are not given as the model has.
            BackendIsNotSupposedToImplementIt: the engine does not have an operator or type of the model.
        """
        arrays = [_array(v) for v in inputs]
        if len(arrays) != len(self.names):
            raise InputError(
                f"{len(arrays)} inputs for a model of {len(self.names)}: {', '.join(self.names)}"
            )
        values = dict(zip(self.names, arrays, strict=True))
        self.types = [_output_type(v) for v in self.model.graph.output]
        try:
            dynamic, run = self._plan(values)
        except UnsupportedError as error:
            raise BackendIsNotSupposedToImplementIt(str(error)) from error
        outputs = run([values[n] for n in dynamic])
        return tuple(np.asarray(y, t) for y, t in zip(outputs, self.types, strict=True))  # None: as it is


def _output_type(value: Any) -> np.dtype[Any] | None:
    """The numpy type of an output that the model declares, None where it does not say.

    Raises:
        BackendIsNotSupposedToImplementIt: a type that the engine cannot give.
    """
    from onnx import TensorProto, helper

    kind = value.type.tensor_type.elem_type if value.type.WhichOneof("value") in (None, "tensor_type") else -1
    if kind == TensorProto.UNDEFINED:
        return None
    small = (TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16)
    if kind in (TensorProto.FLOAT, TensorProto.INT64, *small):
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    raise BackendIsNotSupposedToImplementIt(f"output {value.name!r} is of a type that float32 does not hold")


class ActzipBackend(Backend):  # type: ignore[misc]
    """The ``onnx.backend.base.Backend`` of the engine (CPU, float32)."""

    runner: Runner = staticmethod(_engine)

    @classmethod
    def is_compatible(cls, model: Any, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the front end knows every operator of ``model``."""
        try:
            from_onnx(model)
        except NeedsConstant:
            return True
        except (UnsupportedError, InputError):
            return False
        return True

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> ActzipRep:
        """A model ready to run.

        Raises:
            InputError: the device is not the CPU.
        """
        if not cls.supports_device(device):
            raise InputError(f"device {device!r}; the engine runs on the CPU")
        return ActzipRep(model, cls.runner)

    @classmethod
    def run_model(cls, model: Any, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """Outputs of ``model`` for ``inputs``."""
        return cls.prepare(model, device).run(inputs)

    @classmethod
    def run_node(
        cls, node: Any, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Outputs of a single node for ``inputs``."""
        import onnx
        from onnx import helper

        arrays = [np.asarray(v) for v in inputs]
        names = [n for n in node.input if n]
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, arrays, strict=True)
        ]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        version = int(kwargs.get("opset_version", onnx.defs.onnx_opset_version()))
        graph = helper.make_graph([node], "node", infos, outputs)
        return cls.run_model(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)]), arrays, device
        )

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """True for ``CPU``."""
        return device.split(":")[0].upper() == "CPU"


prepare = ActzipBackend.prepare
run_model = ActzipBackend.run_model
run_node = ActzipBackend.run_node
supports_device = ActzipBackend.supports_device
