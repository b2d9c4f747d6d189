"""The former name of :mod:`actzip.runtime.from_onnx`."""

from __future__ import annotations

from actzip.runtime.from_onnx import MAX_ELEMENTS, OPERATORS, NeedsConstant, from_onnx, load_onnx

__all__ = ["MAX_ELEMENTS", "OPERATORS", "NeedsConstant", "from_onnx", "load_onnx"]
