"""ONNX files of which the engine lacks nodes, as modules: ONNX Runtime runs those, at every size."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402
from actzip.activations import set_thresholds  # noqa: E402
from actzip.errors import ActzipWarning, UnsupportedError  # noqa: E402

N = helper.make_node
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def save(path: Path, nodes: list[Any], constants: dict[str, Any], outputs: dict[str, int]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(o, kind, None) for o, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return path


@pytest.fixture
def recogniser(tmp_path: Path) -> Path:
    """Convolutions, an RNN over the width, a linear layer, the best class and its score."""
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="first"),
        N("Relu", ["c"], ["r"], name="relu"),
        N("ReduceMean", ["r"], ["m"], axes=[2], keepdims=0),
        N("Transpose", ["m"], ["t"], perm=[2, 0, 1]),
        N("RNN", ["t", "wi", "wh"], ["h", "last"], hidden_size=6, name="memory"),
        N("Squeeze", ["h", "one"], ["s"]),
        N("MatMul", ["s", "v"], ["y"], name="head"),
        N("Add", ["last", "half"], ["state"]),
    ]
    constants = {
        "w": normal(8, 3, 3, 3), "wi": normal(1, 6, 8), "wh": normal(1, 6, 6), "v": normal(6, 5),
        "one": np.int64([1]), "half": np.float32(0.5),
    }  # fmt: skip
    return save(tmp_path / "rec.onnx", nodes, constants, {"y": 1, "state": 1})


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A comparison that is read as numbers, boxes whose number is not known, what is made of them."""
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="first"),
        N("Relu", ["c"], ["r"], name="relu"),
        N("Greater", ["r", "half"], ["g"]),
        N("Equal", ["r", "nought"], ["e"]),
        N("Where", ["e", "half", "r"], ["q"]),
        N("Cast", ["g"], ["gf"], to=TensorProto.FLOAT),
        N("Mul", ["q", "gf"], ["y"]),
        N("NonZero", ["g"], ["at"]),
        N("Transpose", ["at"], ["places"], perm=[1, 0]),
    ]
    constants = {"w": normal(8, 3, 3, 3), "half": np.float32(0.5), "nought": np.float32(0)}
    return save(tmp_path / "det.onnx", nodes, constants, {"y": 1, "places": TensorProto.INT64})


SIZES = [(1, 20, 28), (2, 20, 28), (3, 9, 13), (1, 64, 31)]


def loaded(path: Path) -> Any:
    with pytest.warns(ActzipWarning, match="nodes run with ONNX Runtime in this module and have no gradient"):
        return actzip.load(path)


@pytest.mark.parametrize("name", ["recogniser", "detector"])
def test_outputs_are_onnx_runtimes_at_every_size(name: str, request: Any) -> None:
    path = request.getfixturevalue(name)
    net, run = loaded(path), ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert net.elsewhere() and net.batch is None
    nets = [net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for n, h, w in SIZES:
        x = torch.randn(n, 3, h, w)
        want = run.run(None, {"x": x.numpy()})
        for one in nets:
            for a, b in zip(one(x), want, strict=True):
                assert np.asarray(a.detach()).dtype == b.dtype
                np.testing.assert_allclose(np.asarray(a.detach()), b, rtol=1e-5, atol=1e-5)


def test_profiles_quantizers_and_the_engine_take_it(recogniser: Path) -> None:
    net = loaded(recogniser)
    batches = [torch.randn(2, 3, 16, 24) for _ in range(3)]
    report = actzip.profile(net, batches, engine=False, progress=False).to_dict()
    assert report["layers"][0]["name"] == "first" and report["maps"][0]["name"] == "relu"
    quantized = actzip.quantize(copy.deepcopy(net), batches, bits=8)
    assert float((quantized(batches[0])[0] - net(batches[0])[0]).abs().max()) < 0.2
    with pytest.warns(ActzipWarning, match="run with ONNX Runtime"):
        fast = actzip.compile(net, batches[0], tune=False, cache=False)
    for a, b in zip(fast(batches[1]), net(batches[1]), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match=r"\d nodes run with ONNX Runtime"):
        actzip.accelerate(net, batches * 4, max_error=0.5)
    set_thresholds(net, {"relu": 0.3})
    with pytest.raises(UnsupportedError, match="are not the file's"):
        actzip.compile(net, batches[0], tune=False, cache=False)


def test_without_onnx_runtime_the_blockers_are_named(recogniser: Path, monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"RNN node 'memory'.*pip install onnxruntime"):
        actzip.load(recogniser)


def test_integers_compared_for_a_node_that_runs_elsewhere(tmp_path):
    """The engine has neither: the comparison ended the reading of the file."""
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Conv", ["x", "w"], ["c"]),
        make("Greater", ["n", "zero"], ["some"]),
        make("Where", ["some", "n", "one"], ["least"]),
        make("Cast", ["least"], ["f"], to=1),
        make("Mul", ["c", "f"], ["y"]),
    ]
    numbers = {"w": np.ones((4, 3, 3, 3), np.float32), "zero": np.int64([0]), "one": np.int64([1])}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", 1, [1, 3, 6, 6]), value("n", 7, [1])],
        [value("y", 1, None)],
        [onnx.numpy_helper.from_array(a, k) for k, a in numbers.items()],
    )
    path, opset = tmp_path / "m.onnx", [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    with pytest.warns(ActzipWarning, match="run with ONNX Runtime"):
        net = actzip.load(path)
    x = torch.rand(1, 3, 6, 6)
    for n, factor in ((0, 1.0), (3, 3.0)):
        want = factor * torch.nn.functional.conv2d(x, torch.ones(4, 3, 3, 3))
        torch.testing.assert_close(net(x, torch.tensor([n])), want)
