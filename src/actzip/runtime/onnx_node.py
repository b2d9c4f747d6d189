"""One ONNX node as the front end's handlers read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.graph import Array
from actzip.runtime.onnx_file import NeedsConstant, onnx_package
from actzip.runtime.registry import Mask, Probed

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer


class OnnxNode:
    """One ONNX node: typed access to its attributes and inputs, and where it is."""

    def __init__(self, importer: Importer, proto: Any, index: int, inside: str = "") -> None:
        self.importer = importer
        self.proto = proto
        self.index = index
        self.foreign = proto.domain not in ("", "ai.onnx")
        self.op = f"{proto.domain}.{proto.op_type}" if self.foreign else proto.op_type
        if self.op == "Erfc":  # which is none of ONNX's
            self.op, self.foreign = "tf2onnx.Erfc", True
        self.name = inside + (proto.name or f"{proto.op_type}_{index}")
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
        value = onnx_package().helper.get_attribute_value(a)
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
        """A value of the graph (its name as ``str``), an array, or :class:`Probed`; None where it
        is left out."""
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
        if isinstance(value, Probed):
            raise self.refuse(f"{what} depends on the batch")
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
        return None if value is None else float32_of(value, self.where)

    def integers(self, i: int, what: str) -> list[int] | None:
        value = self.constant(i, what)
        if value is None:
            return None
        if value.dtype.kind not in "iu":
            raise self.wrong(f"{what} is of type {value.dtype}, not integer")
        return [int(v) for v in value.reshape(-1)]


def float32_of(a: Array, where: str) -> Array:
    if a.dtype.kind not in "fiub" and a.dtype.name not in ("bfloat16", "float8_e4m3fn"):
        raise UnsupportedError(f"{where}: a constant of type {a.dtype}")
    return np.asarray(a, dtype=np.float32, order="C")


def floats_only(node: OnnxNode, *values: Any) -> None:
    for v in values:
        if isinstance(v, np.ndarray) and v.dtype.kind not in "f" and v.dtype.name != "bfloat16":
            raise node.refuse(f"an operand of type {v.dtype}")


def scale_and_zero(node: OnnxNode, shape: g.Shape) -> tuple[Array, Array, int, int]:
    scale = node.floats(1, "the scale")
    if scale is None:
        raise node.wrong("the scale (input 1) is missing")
    zero = node.constant(2, "the zero point")
    dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    if zero is None and node.integer("output_dtype", 0):
        dtype = np.dtype(onnx_package().helper.tensor_dtype_to_np_dtype(node.integer("output_dtype", 0)))
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


def dequantized(node: OnnxNode, x: Any, scale: Any = None, zero: Any = None) -> Array | None:
    """(x - zero) * scale of integer constants, which ONNX's reference has from opset 19 on alone;
    None of other types."""
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


def reads(node: Any) -> list[str]:
    """Names that an ONNX node reads, those of the graphs inside it included."""
    names = [n for n in node.input if n]
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            own = {t.name for t in graph.initializer} | {v.name for v in graph.input}
            own |= {o for inner in graph.node for o in inner.output}
            inside = [n for inner in graph.node for n in reads(inner)] + [v.name for v in graph.output]
            names += [n for n in inside if n not in own]
    return names
