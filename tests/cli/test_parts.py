"""Verbs on ONNX files of which the engine does not have every operator."""

import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from actzip import cli  # noqa: E402


@pytest.fixture
def path(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("CumSum", ["c", "axis"], ["s"], name="running"),
        helper.make_node("Det", ["s"], ["y"], name="volume"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.int64(2), "axis")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx")


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(args))
        return caught.value.code, *capsys.readouterr()

    return call


def test_compile_shows_the_part_that_runs_elsewhere(path, run):
    code, out, _ = run("compile", path, "--no-tune")
    assert not code
    assert "onnxruntime" in out and "conv2d" in out


def test_without_onnx_runtime_one_line_names_every_node(path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run("compile", path, "--no-tune")
    line = err.strip().splitlines()[-1]
    assert code and line.startswith("error: ")
    assert all(w in line for w in ("running", "volume", "pip install onnxruntime"))
