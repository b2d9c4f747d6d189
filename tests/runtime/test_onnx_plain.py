"""Functions, fused operators and sparse initialisers of ONNX files: as ONNX Runtime computes them, on
the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402
from actzip.errors import DataError, UnsupportedError  # noqa: E402
from actzip.runtime.onnx_plain import plain  # noqa: E402

N = helper.make_node
MS = "com.microsoft"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def model_of(
    nodes: list[Any], weights: dict[str, Any], functions: list[Any] | None = None, opset: int = 17
) -> Any:
    tensors = [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    domains = [helper.make_opsetid(d, v) for d, v in (("", opset), (MS, 1), ("my", 1))]
    return helper.make_model(graph, opset_imports=domains, functions=functions or [], ir_version=8)


def agrees(model: Any, folder: Path) -> None:
    onnx.save(model, folder / "m.onnx")
    before = model.SerializeToString()
    session = ort.InferenceSession(before, providers=["CPUExecutionProvider"])
    fast = actzip.compile(folder / "m.onnx", normal(1, 3, 12, 14), tune=False, parts=False)
    for shape in [(1, 3, 12, 14), (2, 3, 16, 10)]:
        x = normal(*shape)
        np.testing.assert_allclose(fast(x), session.run(None, {"x": x})[0], rtol=1e-4, atol=1e-5)
    names = [n.name for n in plain(model).graph.node if n.name]
    assert len(names) == len(set(names))  # ONNX Runtime, which may run a part of them, asks for it
    assert model.SerializeToString() == before


def leaky(**said: Any) -> Any:
    node = N("LeakyRelu", ["t"], ["y"])
    attribute = onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    node.attribute.append(attribute)
    return helper.make_function("my", "Act", ["t"], ["y"], [node], [helper.make_opsetid("", 17)], **said)


def test_functions_of_a_file_are_written_out_with_their_attributes(tmp_path: Path) -> None:
    act = leaky(attribute_protos=[helper.make_attribute("slope", 0.25)])
    block = helper.make_function(
        "my",
        "Block",
        ["x", "w"],
        ["y"],
        [N("Conv", ["x", "w"], ["t"], pads=[1] * 4), N("Act", ["t"], ["y"], domain="my")],
        [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)],
    )
    nodes = [
        N("Block", ["x", "v"], ["a"], domain="my"),
        N("Act", ["a"], ["b"], domain="my", slope=0.5),
        N("Block", ["b", "w"], ["y"], domain="my"),
    ]
    weights = {"v": normal(8, 3, 3, 3), "w": normal(8, 8, 3, 3)}
    agrees(model_of(nodes, weights, [act, block]), tmp_path)


@pytest.mark.parametrize("opset", [10, 17])
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("Relu", []), ("LeakyRelu", [0.2]), ("Clip", [0.0, 6.0]), ("HardSigmoid", [0.2, 0.5]), ("Tanh", [])],
)
def test_fused_convolutions(kind: str, numbers: list[float], opset: int, tmp_path: Path) -> None:
    said = {"activation": kind, **({"activation_params": numbers} if numbers else {})}
    nodes = [
        N("FusedConv", ["x", "v", "b"], ["a"], domain=MS, pads=[1] * 4, **said),
        N("FusedConv", ["a", "w", "", "a"], ["y"], domain=MS, pads=[1] * 4, activation="Relu"),
    ]
    weights = {"v": normal(8, 3, 3, 3), "w": normal(8, 8, 3, 3), "b": normal(8)}
    agrees(model_of(nodes, weights, opset=opset), tmp_path)


def test_fused_products_and_norms(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "v"], ["c"]),
        N("ReduceMean", ["c"], ["m"], axes=[2, 3], keepdims=0),
        N("FusedGemm", ["m", "w", "b"], ["f"], domain=MS, activation="LeakyRelu", activation_alpha=0.3),
        N("BiasGelu", ["f", "b"], ["g"], domain=MS),
        N("SkipLayerNormalization", ["g", "f", "s", "b", "s"], ["l"], domain=MS, epsilon=1e-5),
        N("FusedMatMul", ["l", "w"], ["p"], domain=MS, transB=1, alpha=0.5),
        N("QuickGelu", ["p"], ["q"], domain=MS, alpha=1.702),
        N("Gelu", ["q"], ["r"], domain=MS),
        N("FastGelu", ["r", "b"], ["y"], domain=MS),
    ]
    weights = {"v": normal(8, 3, 3, 3), "w": normal(8, 8), "b": normal(8), "s": 1 + 0.1 * normal(8)}
    agrees(model_of(nodes, weights), tmp_path)


def test_a_file_that_onnx_runtime_has_optimized(tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "v"], ["a"], pads=[1] * 4),
        N("Relu", ["a"], ["b"]),
        N("Conv", ["b", "w"], ["c"], pads=[1] * 4),
        N("Add", ["c", "b"], ["d"]),
        N("Relu", ["d"], ["y"]),
    ]
    onnx.save(model_of(nodes, {"v": normal(8, 3, 3, 3), "w": normal(8, 8, 3, 3)}), tmp_path / "a.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "b.onnx")
    ort.InferenceSession(str(tmp_path / "a.onnx"), options, providers=["CPUExecutionProvider"])
    agrees(onnx.load(tmp_path / "b.onnx"), tmp_path)


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initialisers_are_filled_up(flat: bool, tmp_path: Path) -> None:
    at = np.array([1, 5, 100])
    places = at if flat else np.stack(np.unravel_index(at, (8, 3, 3, 3)), 1)
    values = numpy_helper.from_array(np.float32([1, 2, 3]), "v")
    model = model_of([N("Conv", ["x", "v"], ["y"])], {})
    model.graph.sparse_initializer.append(
        onnx.SparseTensorProto(values=values, indices=numpy_helper.from_array(places, "i"), dims=[8, 3, 3, 3])
    )
    dense = np.zeros((8, 3, 3, 3), np.float32)
    dense.reshape(-1)[at] = [1, 2, 3]
    x = normal(2, 3, 9, 9)
    onnx.save(model, tmp_path / "m.onnx")
    got = actzip.compile(tmp_path / "m.onnx", x, tune=False, parts=False)(x)
    same = model_of([N("Conv", ["x", "v"], ["y"])], {"v": dense}).SerializeToString()
    want = ort.InferenceSession(same, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    model.graph.sparse_initializer[0].dims[0] = 1
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(DataError, match="sparse initialiser 'v'"):
        actzip.compile(tmp_path / "m.onnx", x, tune=False)


@pytest.mark.parametrize("said", [{"transA": 1}, {"transB": 1, "alpha": 0.25}])
def test_products_of_transposed_maps_that_onnx_runtime_fused(said: dict[str, Any], tmp_path: Path) -> None:
    nodes = [
        N("Conv", ["x", "v"], ["c"], pads=[1] * 4),
        N("Relu", ["c"], ["r"]),
        N("FusedMatMul", ["r", "c"], ["y"], domain=MS, **said),
    ]
    agrees(model_of(nodes, {"v": normal(8, 3, 3, 3)}), tmp_path)


def test_a_file_optimized_for_one_kind_of_cpu_says_which_to_give(tmp_path: Path) -> None:
    nodes = [N("Conv", ["x", "v"], ["a"], domain="com.microsoft.nchwc"), N("Relu", ["a"], ["y"])]
    onnx.save(model_of(nodes, {"v": normal(16, 3, 3, 3)}), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"the file that it was made of, or .* ORT_ENABLE_EXTENDED"):
        actzip.compile(tmp_path / "m.onnx", normal(1, 3, 8, 8), parts=False)


@pytest.mark.parametrize(
    "opset,node",
    [
        (18, N("MeanVarianceNormalization", ["c"], ["y"])),
        (18, N("Shrink", ["c"], ["y"], lambd=0.3, bias=0.1)),
        (23, N("RMSNormalization", ["s", "g"], ["y"], axis=-1)),
        (23, N("Attention", ["s", "s", "s"], ["y"], q_num_heads=2, kv_num_heads=2)),
        (24, N("Swish", ["c"], ["y"], alpha=1.5)),
    ],
)
def test_operators_that_onnx_defines_by_others_run_on_the_engine(
    opset: int, node: Any, tmp_path: Path
) -> None:
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"this onnx has no opset {opset}")
    nodes = [
        N("Conv", ["x", "v"], ["c"], strides=[2, 2]),
        N("Reshape", ["c", "rows"], ["r"]),
        N("Transpose", ["r"], ["s"], perm=[0, 2, 1]),
        node,
    ]
    weights = {"v": normal(8, 3, 3, 3), "g": normal(8), "rows": np.int64([0, 0, -1])}
    agrees(model_of(nodes, weights, opset=opset), tmp_path)


def test_a_constant_with_sparse_values(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.float32([1, 2, 3]), "v"),
        numpy_helper.from_array(np.int64([0, 3, 6]), "i"),
        [8],
    )
    nodes = [
        N("Conv", ["x", "v"], ["c"]),
        N("Constant", [], ["k"], sparse_value=sparse),
        N("Reshape", ["k", "shape"], ["r"]),
        N("Add", ["c", "r"], ["y"]),
    ]
    weights = {"v": normal(8, 3, 3, 3), "shape": np.int64([1, 8, 1, 1])}
    agrees(model_of(nodes, weights), tmp_path)


def test_gelu_as_tensorflows_exporter_leaves_it(tmp_path: Path) -> None:
    """Erfc is no operator of ONNX: ONNX Runtime refuses the file, Keras' own GELU gives it."""

    def gelu(op: str) -> list[Any]:
        turned = [N("Mul", ["c", "turn"], ["t"]), N("Mul", ["c", "half"], ["h"])]
        ends = [N("Erf", ["t"], ["f"]), N("Sub", ["one", "f"], ["e"])]
        ends = [N("Erfc", ["t"], ["e"])] if op == "Erfc" else ends
        return [N("Conv", ["x", "v"], ["c"]), *turned, *ends, N("Mul", ["h", "e"], ["y"])]

    numbers = {"turn": np.float32(-(0.5**0.5)), "half": np.float32(0.5), "one": np.float32(1)}
    weights = {"v": normal(8, 3, 3, 3), **numbers}
    onnx.save(model_of(gelu("Erfc"), weights), tmp_path / "m.onnx")
    session = ort.InferenceSession(model_of(gelu("Erf"), weights).SerializeToString())
    x = normal(2, 3, 12, 14)
    fast = actzip.compile(tmp_path / "m.onnx", x, tune=False, parts=False)
    np.testing.assert_allclose(fast(x), session.run(None, {"x": x})[0], rtol=0, atol=1e-5)
