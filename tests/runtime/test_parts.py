"""ONNX models of which the engine lacks some operators: parts, and ONNX Runtime for the rest."""

import pickle
import sys
import warnings

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402
from actzip.errors import ActzipWarning, InputError, UnsupportedError  # noqa: E402
from crowd import at_once  # noqa: E402

N = helper.make_node
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def save(tmp_path, nodes, constants, shape, outputs=("y",), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, kind, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    return path


def theirs(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def compiled(path, x, **kw):
    with pytest.warns(ActzipWarning, match="run with ONNX Runtime"):
        return actzip.compile(path, x, tune=False, cache=False, **kw)


def crnn(tmp_path):
    """Convolutions, an RNN over the width, a linear layer: a text recogniser in small."""
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="first"),
        N("Relu", ["c"], ["r"]),
        N("ReduceMean", ["r"], ["m"], axes=[2], keepdims=0),
        N("Transpose", ["m"], ["t"], perm=[2, 0, 1]),
        N("RNN", ["t", "wi", "wh"], ["h", ""], hidden_size=6, name="memory"),
        N("Squeeze", ["h", "one"], ["s"]),
        N("Transpose", ["s"], ["st"], perm=[1, 2, 0]),
        N("Unsqueeze", ["st", "two"], ["map"]),
        N("Conv", ["map", "v"], ["z"]),
        N("Relu", ["z"], ["y"]),
    ]
    constants = {
        "w": normal(8, 3, 3, 3), "wi": normal(1, 6, 8), "wh": normal(1, 6, 6), "one": np.int64([1]),
        "two": np.int64([2]), "v": normal(5, 6, 1, 1),
    }  # fmt: skip
    return save(tmp_path, nodes, constants, ["n", 3, 8, "w"])


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_a_recurrent_layer_between_convolutions(tmp_path):
    path, x = crnn(tmp_path), normal(1, 3, 8, 20)
    fast = compiled(path, x)
    close(fast(x), theirs(path, x)[0])
    for other in (normal(3, 3, 8, 20), normal(2, 3, 8, 31)):  # other batches and widths
        close(fast(other), theirs(path, other)[0])
    out = fast(torch.from_numpy(x))
    assert isinstance(out, torch.Tensor)
    close(out.numpy(), theirs(path, x)[0])
    kinds = {r.kernel for r in fast.explain(runs=1).rows}
    assert "onnxruntime" in kinds and len(kinds) > 1
    assert "RNN" in repr(fast)


def test_parts_pickle_and_run_on_several_threads(tmp_path):
    path, x = crnn(tmp_path), normal(1, 3, 8, 20)
    fast = pickle.loads(pickle.dumps(compiled(path, x)))
    inputs = [normal(1 + k % 3, 3, 8, 16 + k) for k in range(12)]

    def work(k):
        close(fast(inputs[k]), theirs(path, inputs[k])[0])

    at_once(work, len(inputs))


def test_saving_parts_is_refused_and_writes_nothing(tmp_path):
    fast = compiled(crnn(tmp_path), normal(1, 3, 8, 20))
    with pytest.raises(UnsupportedError, match="pickle it"):
        fast.save(tmp_path / "m.actzip")
    assert not (tmp_path / "m.actzip").exists()


def test_without_onnx_runtime_all_blockers_are_named(tmp_path, monkeypatch):
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Bernoulli", ["c"], ["b"], name="dice"),
        N("Det", ["x"], ["d"], name="volume"),
        N("Mish", ["b"], ["e"]),
        N("NonZero", ["e"], ["z"], name="places"),
        N("Identity", ["d"], ["y"]),
    ]
    path = save(tmp_path, nodes, {"w": normal(4, 3, 3, 3)}, ["n", 3, 8, 8], outputs=("y",))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError) as caught:
        actzip.compile(path, normal(1, 3, 8, 8), tune=False)
    for name in ("dice", "volume", "places", "pip install onnxruntime"):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_region_without_a_convolution_stays_with_onnx_runtime(tmp_path):
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("CumSum", ["c", "axis"], ["s"]),
        N("Relu", ["s"], ["r"]),
        N("Add", ["r", "r"], ["a"]),
        N("CumSum", ["a", "axis"], ["t"]),
        N("Conv", ["t", "v"], ["y"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(2, 4, 1, 1), "axis": np.int64(2)}
    path, x = save(tmp_path, nodes, constants, ["n", 3, 9, 9]), normal(2, 3, 9, 9)
    fast = compiled(path, x)
    close(fast(x), theirs(path, x)[0])
    assert "4 of 6 nodes" in repr(fast)


def test_a_comparison_is_read_in_other_parts(tmp_path):
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Greater", ["c", "zero"], ["g"]),
        N("CumSum", ["c", "axis"], ["s"]),
        N("Not", ["g"], ["k"]),
        N("Where", ["k", "s", "five"], ["h"]),
        N("Conv", ["h", "v"], ["y"]),
    ]
    constants = {
        "w": normal(4, 3, 3, 3),
        "v": normal(2, 4, 1, 1),
        "zero": np.float32(0),
        "axis": np.int64(1),
        "five": np.float32(5),
    }
    path, x = save(tmp_path, nodes, constants, ["n", 3, 9, 9]), normal(2, 3, 9, 9)
    close(compiled(path, x)(x), theirs(path, x)[0])


def test_boxes_are_selected_behind_the_engine(tmp_path):
    """NonMaxSuppression's output has a size that depends on the numbers."""
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Reshape", ["c", "flat"], ["f"]),
        N("Transpose", ["f"], ["boxes"], perm=[0, 2, 1]),
        N("ReduceMean", ["f"], ["scores"], axes=[1], keepdims=1),
        N("NonMaxSuppression", ["boxes", "scores", "most", "iou"], ["y"]),
    ]
    constants = {
        "w": np.abs(normal(4, 3, 1, 1)),
        "flat": np.int64([0, 4, -1]),
        "most": np.int64([9]),
        "iou": np.float32([0.5]),
    }
    path = save(tmp_path, nodes, constants, [1, 3, 6, 6], kind=TensorProto.INT64)
    fast = compiled(path, np.abs(normal(1, 3, 6, 6)))
    for _ in range(3):
        x = np.abs(normal(1, 3, 6, 6))
        np.testing.assert_array_equal(fast(x), theirs(path, x)[0])


def test_a_loop_and_what_it_reads_from_outside(tmp_path):
    body = helper.make_graph(
        [
            N("Add", ["v", "c"], ["w2"]),
            N("ReduceMax", ["w2"], ["most"], keepdims=0),  # how many steps there are depends on the input
            N("Less", ["most", "limit"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("more", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w2", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Loop", ["trips", "", "c"], ["l"], body=body),
        N("Relu", ["l"], ["y"]),
    ]
    path = save(
        tmp_path,
        nodes,
        {"w": normal(4, 3, 3, 3), "trips": np.int64(9), "limit": np.float32(30)},
        ["n", 3, 9, 9],
    )
    x = normal(2, 3, 9, 9)
    close(compiled(path, x)(x), theirs(path, x)[0])


def test_a_model_of_which_the_engine_has_nothing_says_so(tmp_path):
    nodes = [N("RNN", ["x", "wi", "wh"], ["y", ""], hidden_size=6)]
    path, x = (
        save(tmp_path, nodes, {"wi": normal(1, 6, 8), "wh": normal(1, 6, 6)}, [5, 2, 8]),
        normal(5, 2, 8),
    )
    with pytest.warns(ActzipWarning, match="nothing of this model is for the engine"):
        fast = actzip.compile(path, x)
    close(fast(x), theirs(path, x)[0])


@pytest.mark.parametrize(
    "x,words",
    [
        (np.zeros((1, 3, 8, 20)), "float64"),
        (normal(1, 4, 8, 20), "cannot run"),
        (normal(0, 3, 8, 20), "empty"),
        ("x", "str"),
    ],
)
def test_bad_calls_of_parts(x, words, tmp_path):
    fast = compiled(crnn(tmp_path), normal(1, 3, 8, 20))
    with pytest.raises(InputError, match=words):
        fast(x)
    with pytest.raises(InputError, match="inputs given"):
        fast(normal(1, 3, 8, 20), normal(1, 3, 8, 20))


def test_what_the_engine_has_whole_is_no_model_of_parts(tmp_path):
    path = save(
        tmp_path,
        [N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["y"])],
        {"w": normal(4, 3, 3, 3)},
        ["n", 3, 9, 9],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActzipWarning)
        assert type(actzip.compile(path, normal(1, 3, 9, 9), tune=False)).__name__ == "CompiledModel"


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_with_a_node_that_the_engine_lacks_runs_elsewhere_whole(taken, tmp_path):
    """An If whose condition is known, an RNN in one branch, as Silero's detector has it; nodes of the
    branch have numbers of their own."""
    inner = [
        N("Relu", ["c"], ["i0"]),
        N("Reshape", ["i0", "flat"], ["i1"]),
        N("RNN", ["i1", "wi", "wh"], ["h", ""], hidden_size=6),
        N("ReduceSum", ["h"], ["odd"], keepdims=0),
    ]
    other = [N("Relu", ["c"], ["e0"]), N("ReduceMean", ["e0"], ["even"], keepdims=0)]
    result = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("odd", "even")]
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        N(
            "If",
            ["known"],
            ["s"],
            then_branch=helper.make_graph(inner, "then", [], result[:1]),
            else_branch=helper.make_graph(other, "else", [], result[1:]),
        ),
        N("Conv", ["c", "v"], ["d"]),
        N("Mul", ["d", "s"], ["y"]),
    ]
    constants = {
        "w": normal(4, 3, 3, 3), "v": normal(5, 4, 1, 1), "known": np.array(taken),
        "flat": np.int64([8, 1, -1]), "wi": normal(1, 6, 28), "wh": normal(1, 6, 6),
    }  # fmt: skip
    path = save(tmp_path, nodes, constants, [1, 3, 7, 8])
    x = normal(1, 3, 7, 8)
    fast = compiled(path, x) if taken else actzip.compile(path, x, tune=False, cache=False)
    close(fast(x), theirs(path, x)[0])
