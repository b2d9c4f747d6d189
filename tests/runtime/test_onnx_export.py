"""Sparsified models as ONNX files that this engine and others run."""

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402
from actzip.activations import set_thresholds  # noqa: E402
from actzip.errors import InputError, UnsupportedError  # noqa: E402
from actzip.runtime.from_onnx import from_onnx  # noqa: E402
from actzip.runtime.onnx_export import export_onnx  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.r, self.s, self.fc = nn.ReLU(inplace=True), nn.ReLU6(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.r(self.a(x))
        return self.fc(self.s(self.b(x)).mean((2, 3)))


@pytest.fixture
def thresholded():
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 10, 10)
    set_thresholds(net, {"r": 0.3, "s": torch.linspace(0, 0.2, 8)}, x)
    with torch.no_grad():
        return net, x, net(x).numpy()


@pytest.mark.parametrize("opset", [12, 17, 21])
def test_thresholds_are_standard_operators(thresholded, tmp_path, opset):
    net, x, want = thresholded
    path = export_onnx(net, x, tmp_path / "net.onnx", opset=opset)
    model = onnx.load(path)
    ops = [n.op_type for n in model.graph.node]
    assert ops.count("ThresholdedRelu") == 1 and ops.count("Where") == 1 and "Relu" not in ops
    alpha = next(n for n in model.graph.node if n.op_type == "ThresholdedRelu").attribute[0].f
    assert alpha == np.float32(0.3) and model.opset_import[0].version == opset
    fast = actzip.compile(path, x, tune=False, cache=False)
    assert np.allclose(fast(x.numpy()), want, atol=1e-5)
    assert np.allclose(fast(x[:1].numpy()), want[:1], atol=1e-5)  # any batch
    with torch.no_grad():
        assert np.array_equal(net(x).numpy(), want)  # left as it was


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_other_engines_run_it(thresholded, tmp_path, engine):
    module = pytest.importorskip(engine)
    net, x, want = thresholded
    path = export_onnx(net, x, tmp_path / "net.onnx")
    if engine == "onnxruntime":
        got = module.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
            None, {"input": x.numpy()}
        )[0]
    else:
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        got = module.Core().compile_model(str(path), "CPU", hint)(x.numpy())[0]
    assert np.allclose(got, want, atol=1e-5)


def test_bad_calls_are_named(thresholded, tmp_path):
    net, x, _ = thresholded
    with pytest.raises(InputError, match="opset 9"):
        export_onnx(net, x, tmp_path / "a.onnx", opset=9)
    with pytest.raises(InputError, match="does not take this example"):
        export_onnx(net, x[:, :2], tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def graph_of(nodes, constants):
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4, 4]) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("op", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("limit", [0.5, [[[0.25]], [[0.5]], [[0.75]]]])
def test_comparisons_that_make_a_threshold(op, swapped, limit):
    node = helper.make_node(op, ["t", "x"] if swapped else ["x", "t"], ["m"])
    above = op.startswith("Greater") != swapped
    x = np.tile(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4), (2, 3, 1, 1))
    x[0, :, 0, 0] = 0.5
    x[0, :, 0, 1] = 0.25
    constants = {"t": limit, "zero": 0.0}
    keep = ["x", "zero"] if above else ["zero", "x"]
    models = [graph_of([node, helper.make_node("Where", ["m", *keep], ["y"])], constants)]
    if above:  # as FATReLU is written by hand: a mask of numbers times x
        cast = helper.make_node("Cast", ["m"], ["f"], to=TensorProto.FLOAT)
        models.append(graph_of([node, cast, helper.make_node("Mul", ["f", "x"], ["y"])], {"t": limit}))
    for model in models:
        (want,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
        fast = actzip.compile(from_onnx(model), x, tune=False, cache=False)
        assert np.array_equal(fast(x), want)


@pytest.mark.parametrize(
    "nodes",
    [
        [("Greater", ["x", "t"], ["m"]), ("Where", ["m", "t", "x"], ["y"])],
        [("Less", ["x", "t"], ["m"]), ("Where", ["m", "x", "zero"], ["y"])],
        [("LessOrEqual", ["x", "t"], ["m"]), ("Where", ["m", "t", "inf"], ["y"])],
        [("GreaterOrEqual", ["x", "x"], ["m"]), ("Where", ["m", "x", "zero"], ["y"])],
        [("Greater", ["x", "t"], ["m"]), ("Where", ["m", "zero", "zero"], ["y"])],
        [("Greater", ["x", "w"], ["m"]), ("Where", ["m", "x", "zero"], ["y"])],
        [("Greater", ["x", "w"], ["m"]), ("Where", ["on", "x", "w"], ["y"])],
        [("Relu", ["x"], ["r"]), ("Equal", ["r", "x"], ["m"]), ("Where", ["m", "x", "w"], ["y"])],
        [("Greater", ["x", "t"], ["m"]), ("Cast", ["m"], ["f"], 1), ("Sub", ["f", "x"], ["y"])],
        [("Greater", ["x", "w"], ["m"]), ("Cast", ["m"], ["f"], 1), ("Mul", ["x", "f"], ["y"])],
        [("Cast", ["x"], ["m"], 9), ("Not", ["m"], ["k"]), ("Where", ["k", "t", "x"], ["y"])],
        [
            ("Greater", ["x", "t"], ["a"]),
            ("Less", ["x", "w"], ["b"]),
            ("And", ["a", "b"], ["c"]),
            ("Or", ["b", "on"], ["d"]),
            ("Xor", ["c", "d"], ["e"]),
            ("Cast", ["e"], ["y"], 1),
        ],
        [("Log", ["x"], ["l"]), ("IsNaN", ["l"], ["m"]), ("Where", ["m", "t", "l"], ["y"])],
    ],
)
def test_other_comparisons_logic_and_choices_are_computed(nodes):
    made = [helper.make_node(op, i, o, **({"to": to[0]} if to else {})) for op, i, o, *to in nodes]
    wide = np.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    model = graph_of(made, {"t": 0.5, "zero": 0.0, "w": wide, "inf": np.inf})
    model.graph.initializer.append(numpy_helper.from_array(wide > 0.3, "on"))
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    x[0, 0, 0, :3] = 0.5, 0, np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        (want,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    fast = actzip.compile(from_onnx(model), x, tune=False, cache=False)
    np.testing.assert_allclose(fast(x), want, atol=1e-6)


def test_a_mask_is_an_output_of_type_bool(tmp_path):
    model = graph_of([helper.make_node("Greater", ["x", "t"], ["y"])], {"t": 0.5})
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    got = actzip.compile(from_onnx(model), x, tune=False, cache=False)(x)
    assert got.dtype == np.bool_ and np.array_equal(got, x > 0.5)


def test_lstm_topk_and_nearest_resizes_of_a_file_are_exported(tmp_path):
    """What PyTorch's exporter does not know of a file's module: it printed its graph, and failed."""
    ort = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((4, 3, 3, 3), np.float32),
        "sizes": np.array([1, 4, 12, 10], np.int64),
        "flat": np.array([0, 4, -1], np.int64),
        "lw": 0.3 * rng.standard_normal((1, 20, 120), np.float32),
        "lr": 0.3 * rng.standard_normal((1, 20, 5), np.float32),
        "k": np.array([3], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node(
            "Resize", ["a", "", "", "sizes"], ["u"], mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        ),
        helper.make_node("Reshape", ["u", "flat"], ["f"]),
        helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "lw", "lr"], ["", "h"], hidden_size=5),
        helper.make_node("TopK", ["h", "k"], ["y", "i"]),
    ]  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 6, 5])],
        [value("y", TensorProto.FLOAT, None), value("i", TensorProto.INT64, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    net, x = actzip.load(tmp_path / "m.onnx"), rng.standard_normal((1, 3, 6, 5), np.float32)
    written = export_onnx(net, torch.from_numpy(x), tmp_path / "e.onnx", dynamic_batch=False)
    run = [
        ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (tmp_path / "m.onnx", written)
    ]
    want, got = (s.run(None, {s.get_inputs()[0].name: x}) for s in run)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_what_pytorch_cannot_export_is_one_line(tmp_path, capfd):
    class Net(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x).relu()

    with pytest.raises(UnsupportedError, match=r"PyTorch cannot export this model: .*bessel"):
        export_onnx(Net(), torch.rand(1, 3, 4, 4), tmp_path / "e.onnx")
    assert "graph(" not in "".join(capfd.readouterr()) and not (tmp_path / "e.onnx").exists()
