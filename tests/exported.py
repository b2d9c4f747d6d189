"""Tiny ONNX files in the style of exporters, compiled and compared with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402

N = helper.make_node
FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(nodes, constants, shape, opset=15):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def compiled(model, x, tmp_path):
    """The compiled model, whose answers at this batch and another are ONNX Runtime's."""
    onnx.save(model, tmp_path / "m.onnx")
    fast = actzip.compile(tmp_path / "m.onnx", x, tune=False)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for given in (x, np.concatenate([x, x + 1, x])):
        (want,) = session.run(None, {"x": given})
        got = fast(given)
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))
    return fast


def kinds(fast):
    return [n.op for n in fast.graph.nodes]
