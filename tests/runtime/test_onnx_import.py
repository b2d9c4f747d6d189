"""The ONNX front end: its Graphs mean what ONNX says, and no file can hurt it."""

import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402
from actzip.errors import ActzipError, DataError, InputError, UnsupportedError  # noqa: E402
from actzip.runtime.from_onnx import from_onnx, load_onnx  # noqa: E402
from actzip.runtime.interpret import interpret  # noqa: E402


def interpreted(graph):
    def run(inputs):
        values = {n: torch.from_numpy(np.array(x)) for n, x in zip(graph.inputs, inputs, strict=True)}
        return [o.numpy() for o in interpret(graph, values)[0]]

    return run


def run_file(model, x, **kw):
    graph = from_onnx(model, **kw)
    return interpreted(graph)([x])


def make(nodes, inputs, outputs, initializers=(), opset=17):
    def info(v):
        name, shape = v
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes, "g", [info(v) for v in inputs], [info(v) for v in outputs], list(initializers)
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.a(x)))
        y = nn.functional.relu6(self.b(x))
        x = torch.cat([x, nn.functional.max_pool2d(y, 3, 1, 1)], 1)
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        x = nn.functional.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1)
        return torch.softmax(self.fc(x), -1)


def export(model, x, opset=17, dynamic=True):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (x,),
            buffer,
            opset_version=opset,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}} if dynamic else None,
        )
    return buffer.getvalue()


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("dynamic", [True, False])
def test_exported_models_of_several_opsets(opset, dynamic):
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 16, 16)
    data = export(model, x, opset, dynamic)
    with torch.no_grad():
        want = model(x).numpy()
    assert np.allclose(run_file(data, x)[0], want, atol=1e-5)
    if dynamic:
        big = torch.randn(5, 3, 16, 16)
        with torch.no_grad():
            assert np.allclose(run_file(data, big)[0], model(big).numpy(), atol=1e-5)


@pytest.mark.parametrize("opset", [18, 21, onnx.defs.onnx_opset_version()])
def test_newer_opsets(opset):
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 3, 16, 16)
    newer = onnx.version_converter.convert_version(onnx.load_from_string(export(model, x)), opset)
    assert newer.opset_import[0].version == opset
    with torch.no_grad():
        assert np.allclose(run_file(newer, x)[0], model(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_models_that_onnxruntime_quantized(tmp_path, per_channel):
    ort = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 5),
    )
    images = [{"x": np.random.default_rng(i).standard_normal((1, 3, 16, 16), np.float32)} for i in range(4)]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = list(images)

        def get_next(self):
            return self.left.pop() if self.left else None

    (tmp_path / "f.onnx").write_bytes(export(model, torch.from_numpy(images[0]["x"])))
    quantization.quantize_static(
        tmp_path / "f.onnx",
        tmp_path / "q.onnx",
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=per_channel,
    )
    kinds = {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    options = ort.SessionOptions()
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # the graph as it is written
    session = ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
    fast = actzip.compile(tmp_path / "q.onnx", images[0]["x"], tune=False, cache=False, fallback=False)
    for image in images:
        want = session.run(None, image)[0]
        assert (
            np.abs(fast(image["x"]) - want).max() <= 0.02 * np.abs(want).max()
        )  # a step of a sum rounded the other way


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_torchvision_exports(name):
    from actzip.models._torchvision import import_torchvision

    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x).numpy()
    got = run_file(export(model, x), x)[0]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_thresholded_relu_and_qdq_are_followed():
    nodes = [
        helper.make_node("ThresholdedRelu", ["x"], ["t"], alpha=0.5),
        helper.make_node("QuantizeLinear", ["t", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    parts = [tensor("s", np.float32(0.02)), tensor("z", np.uint8(3))]
    x = np.linspace(-1, 9, 60, dtype=np.float32).reshape(1, 1, 6, 10)
    cut = np.where(x > 0.5, x, 0)
    want = (np.clip(np.round(cut / np.float32(0.02)) + 3, 0, 255) - 3) * np.float32(0.02)
    assert np.allclose(
        run_file(make(nodes, [("x", x.shape)], [("y", x.shape)], parts), x)[0], want, atol=1e-6
    )


def conv_model(**kw):
    weight = tensor("w", np.random.default_rng(0).standard_normal((4, 3, 3, 3), np.float32))
    return make(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        [("x", kw.get("x", [1, 3, 8, 8]))],
        [("y", None)],
        [weight],
    )


def test_dynamic_sizes_are_taken_from_the_example():
    model = conv_model(x=["n", 3, "h", "w"])
    with pytest.raises(InputError, match="dynamic"):
        from_onnx(model)
    graph = from_onnx(model, [(1, 3, 10, 12)])
    assert str(graph.shape(graph.outputs[0])) == "(N, 4, 10, 12)"
    with pytest.raises(InputError, match="dimensions"):
        from_onnx(model, [(1, 3, 10)])
    with pytest.raises(InputError, match="is 3, not 5"):
        from_onnx(model, [(1, 5, 10, 12)])


def test_external_data_is_read_and_kept_inside_the_folder(tmp_path):
    model = conv_model()
    path = tmp_path / "m.onnx"
    x = np.ones((1, 3, 8, 8), np.float32)
    want = run_file(conv_model(), x)[0]
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    assert np.allclose(run_file(path, x)[0], want)
    for location, words in [
        ("../m.bin", "outside"),
        (str(tmp_path.parent / "m.bin"), "outside"),
        ("no.bin", "missing"),
    ]:
        bad = onnx.load(path, load_external_data=False)
        for e in bad.graph.initializer[0].external_data:
            if e.key == "location":
                e.value = location
        (tmp_path / "b.onnx").write_bytes(bad.SerializeToString())
        with pytest.raises(DataError, match=words):
            from_onnx(tmp_path / "b.onnx")
    (tmp_path / "m.bin").write_bytes(b"12")
    with pytest.raises(DataError, match="bytes"):
        from_onnx(path)
    outside = tmp_path.parent / "secret.bin"
    outside.write_bytes(b"0" * 4096)
    (tmp_path / "m.bin").unlink()
    (tmp_path / "m.bin").symlink_to(outside)
    with pytest.raises(DataError, match="outside"):
        from_onnx(path)


RELU = helper.make_node("Relu", ["x"], ["y"], name="r")


@pytest.mark.parametrize(
    "model,error,words",
    [
        (b"", DataError, "no ONNX graph"),
        (b"\x08\x07garbage" * 9, DataError, "damaged|no ONNX graph"),
        (make([RELU], [("x", [1, 0, 2])], [("y", None)]), InputError, "dynamic; give an example"),
        (make([RELU], [("x", [1, 2])], [("y", None)], opset=6), UnsupportedError, "opset 6"),
        (
            make([helper.make_node("Relu", ["z"], ["y"])], [("x", [1])], [("y", None)]),
            InputError,
            "initialiser is missing",
        ),
        (
            make(
                [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])],
                [("x", [1])],
                [("b", None)],
            ),
            InputError,
            "cycle",
        ),
        (
            make([helper.make_node("Nope", ["x"], ["y"], name="n")], [("x", [1, 2])], [("y", None)]),
            UnsupportedError,
            "Nope node 'n'",
        ),
        (make([RELU], [("x", [1, 1 << 40])], [("y", None)]), InputError, "more than"),
        (
            make(
                [helper.make_node("Expand", ["x", "s"], ["y"])],
                [("x", [1, 1])],
                [("y", None)],
                [tensor("s", np.array([1, 1 << 40]))],
            ),
            InputError,
            "more than",
        ),
        (
            make(
                [
                    helper.make_node("ConstantOfShape", ["s"], ["c"]),
                    helper.make_node("Add", ["x", "c"], ["y"]),
                ],
                [("x", [1])],
                [("y", None)],
                [tensor("s", np.array([1 << 20, 1 << 20, 1 << 20]))],
            ),
            InputError,
            "more than",
        ),
        (
            make([helper.make_node("Concat", ["x", "x"], ["y"])], [("x", [1, 2])], [("y", None)]),
            InputError,
            "axis",
        ),
        (
            make(
                [helper.make_node("MatMul", ["x", "w"], ["y"])],
                [("x", [1, 2])],
                [("y", None)],
                [tensor("w", np.ones((3, 2), np.float32))],
            ),
            InputError,
            "does not fit",
        ),
        (make([RELU], [("x", [1])], [("other", None)]), InputError, "written by no node"),
    ],
)
def test_bad_models_get_a_typed_error_that_says_where(model, error, words):
    with pytest.raises(error, match=words):
        from_onnx(model)


def test_control_flow_is_refused_by_name():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "b", [], [helper.make_tensor_value_info("y", 1, [1])]
    )
    node = helper.make_node("If", ["c"], ["y"], name="branch", then_branch=body, else_branch=body)
    model = make([node], [("x", [1]), ("c", [1])], [("y", None)])
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL
    with pytest.raises(UnsupportedError, match="branch"):
        from_onnx(model)


def test_a_branch_whose_condition_is_known_is_inlined():
    def branch(op):
        out = [helper.make_tensor_value_info(op, 1, [1])]
        return helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], out)

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("Relu"), else_branch=branch("Abs"))
    model = make([node], [("x", [1])], [("y", None)], [tensor("c", np.array(False))])
    np.testing.assert_array_equal(run_file(model, np.float32([-2]))[0], np.float32([2]))


def test_an_initialiser_with_too_few_bytes_is_refused():
    model = conv_model()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-8]
    with pytest.raises(DataError, match="bytes for"):
        from_onnx(model)
    model.graph.initializer[0].dims[0] = 1 << 50
    with pytest.raises(DataError, match="more than"):
        from_onnx(model)


def test_missing_files_and_wrong_types(tmp_path):
    with pytest.raises(DataError, match="no ONNX file"):
        load_onnx(tmp_path / "no.onnx")
    with pytest.raises(InputError, match="path, bytes or a ModelProto"):
        load_onnx(3)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_models_raise_typed_errors_or_work(seed):
    rng = random.Random(seed)
    base = bytearray(export(Small(), torch.randn(1, 3, 16, 16)))
    x = torch.randn(1, 3, 16, 16)
    survived = 0
    for _ in range(120):
        data = bytearray(base)
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.6:
                data[rng.randrange(len(data))] = rng.randrange(256)
            elif kind < 0.8:
                i = rng.randrange(len(data))
                del data[i : i + rng.randint(1, 40)]
            else:
                i = rng.randrange(len(data))
                data[i:i] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
        try:
            graph = from_onnx(bytes(data), [tuple(x.shape)])
            survived += bool(graph.nodes)
        except ActzipError:
            pass
    assert survived > 0  # most mutations of weights leave a valid model: the fuzzer gets deep


def test_files_in_bfloat16_take_and_give_float32(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 3, 3, 3)).astype(ml_dtypes.bfloat16)
    kind = onnx.TensorProto.BFLOAT16
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["c"]), onnx.helper.make_node("Relu", ["c"], ["y"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.save(model, tmp_path / "b.onnx")
    x = torch.from_numpy(rng.standard_normal((2, 3, 8, 8)).astype(np.float32))
    want = torch.nn.functional.conv2d(x, torch.from_numpy(weight.astype(np.float32))).relu()
    for example in (None, x):
        got = actzip.compile(tmp_path / "b.onnx", example, tune=False, cache=False)(x)
        assert got.dtype == torch.float32
        assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(InputError, match=r"give x.to\(torch.float32\)"):
        actzip.compile(tmp_path / "b.onnx", x.bfloat16(), tune=False)
