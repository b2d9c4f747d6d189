"""ONNX files as checked protos and arrays. Nothing in a file is trusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actzip.errors import DataError, InputError, UnsupportedError

Array = NDArray[Any]


#: No tensor of a graph, constant or computed, may have more elements than this (for one image).
MAX_ELEMENTS = 1 << 28


class NeedsConstant(UnsupportedError):
    """An operand that must be known when the graph is made is an input of the graph; ``value`` names it."""

    def __init__(self, message: str, value: str) -> None:
        super().__init__(message)
        self.value = value


def onnx_package() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise DataError(
            "reading ONNX models needs the onnx package; `pip install actzip[onnx]` brings it"
        ) from error
    return onnx


def inputs_of(model: Any) -> list[Any]:
    """The inputs that a caller gives (``ValueInfoProto``): those without an initializer."""
    known = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in known]


def load_onnx(source: Any) -> Any:
    """A checked ``ModelProto`` from a path, bytes or a ``ModelProto``, external data included.

    Raises:
        DataError: no such file, not an ONNX model, damaged or truncated; external data that is
            missing, outside the model's folder, or shorter than the tensor needs.
    """
    onnx = onnx_package()
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
        load_external(onnx, model, None, name)
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
    load_external(onnx, model, folder, name)
    return model


def _tensors(graph: Any) -> Any:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def load_external(onnx: Any, model: Any, folder: Path | None, name: str) -> None:
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


def tensor_array(onnx: Any, tensor: Any, where: str) -> Array:
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
