"""``actzip.onnx_backend``: ONNX's own backend interface, so that its test suite and tools run
against the engine.

    import actzip.onnx_backend as backend
    outputs = backend.run_model(model, [x])

See :mod:`actzip.runtime.onnx_backend`.
"""

from __future__ import annotations

from actzip.runtime.onnx_backend import (
    ActzipBackend,
    ActzipRep,
    BackendIsNotSupposedToImplementIt,
    prepare,
    run_model,
    run_node,
    supports_device,
)

__all__ = [
    "ActzipBackend",
    "ActzipRep",
    "BackendIsNotSupposedToImplementIt",
    "prepare",
    "run_model",
    "run_node",
    "supports_device",
]
