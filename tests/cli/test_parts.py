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


@pytest.mark.parametrize("verb", ["compile", "bench", "profile"])
def test_random_input_of_a_file_that_takes_integers_is_of_its_type(verb, run, tmp_path):
    draw = np.random.default_rng(0).standard_normal
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["g"], name="embedding"),
        helper.make_node("Transpose", ["g"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["t", "w"], ["y"]),
    ]
    arrays = {"table": draw((40, 6), np.float32), "w": draw((4, 6, 3), np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = str(tmp_path / "ids.onnx")
    onnx.save(model, path)
    more = {
        "compile": ["--no-tune"],
        "bench": ["--engines", "onnxruntime", "--runs", "1", "--rounds", "1"],
        "profile": ["--codecs", "none", "--no-engine"],
    }
    code, _, err = run(verb, path, *more[verb])
    assert not code, err
    assert "left out" not in err
