"""benchmarks/real: what the rivals get of a file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "real"


def test_rivals_get_the_file_at_the_measured_size(tmp_path, monkeypatch):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.syspath_prepend(FOLDER.parent / "engine")
    before = set(sys.modules)
    try:
        import bench
    finally:
        for name in set(sys.modules) & {"bench", "files", "run", "models"} - before:
            del sys.modules[name]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, 3, 32, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [10, 3, 32, 32])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", [x], [y])
    opset = helper.make_opsetid("", 13)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(tmp_path / "a.onnx"))
    bench.onnx_of_size(tmp_path / "a.onnx", (1, 3, 48, 40), tmp_path / "b.onnx")
    session = ort.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    given = np.random.default_rng(0).standard_normal((1, 3, 48, 40), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": given})[0], np.maximum(given, 0))
