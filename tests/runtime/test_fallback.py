"""``compile(..., fallback=True)``: an ONNX file runs with ONNX Runtime where that is clearly quicker."""

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
from actzip.runtime import fallback, load  # noqa: E402
from actzip.runtime.compiled import CompiledModel  # noqa: E402
from crowd import at_once  # noqa: E402

N = helper.make_node
RNG = np.random.default_rng(0)
QUICK = {"tune": False, "cache": False, "threads": 1}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def network(tmp_path, shape=("n", 3, "h", "w"), lacks=False):
    last = N("CumSum", ["c", "axis"], ["y"]) if lacks else N("Relu", ["c"], ["y"])
    graph = helper.make_graph(
        [N("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]), last],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(normal(8, 3, 3, 3), "w"),
            numpy_helper.from_array(normal(8), "b"),
            numpy_helper.from_array(np.int64(1), "axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    return path


def theirs(path, x):
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def race(monkeypatch, ours, theirs):
    """Both run once, and take these times."""

    def timed(a, b):
        a(), b()
        return ours, theirs

    monkeypatch.setattr(fallback, "_race", timed)


def other(path, x, monkeypatch, **options):
    race(monkeypatch, [2.0, 2.1, 2.2], [1.0, 1.1, 1.2])
    with pytest.warns(ActzipWarning, match="ONNX Runtime runs all of it, which is quicker here"):
        fast = actzip.compile(path, x, fallback=True, **QUICK, **options)
    assert isinstance(fast, fallback.FallbackModel)
    return fast


def test_what_is_quicker_elsewhere_runs_there_and_says_so(tmp_path, monkeypatch):
    path, x = network(tmp_path), normal(2, 3, 9, 8)
    fast = other(path, x, monkeypatch)
    for y in (x, normal(1, 3, 5, 17)):
        assert np.array_equal(fast(y), theirs(path, y))
    given = fast(torch.from_numpy(x))
    assert isinstance(given, torch.Tensor) and np.array_equal(given.numpy(), theirs(path, x))
    assert np.array_equal(fast(x=x), theirs(path, x)) and np.array_equal(fast({"x": x}), theirs(path, x))
    said = fast.explain(runs=1)
    assert [r.kernel for r in said.rows] == ["onnxruntime"]
    assert "quicker than the engine here" in said.rows[0].why
    assert "1.1 ms with ONNX Runtime, 2.1 on the engine (medians of 3 runs by turns)" in str(said)
    assert said.to_dict()["note"] == fast.note and fast.note in repr(fast)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([2.0, 2.1, 2.2], [3.0, 3.1, 3.2]),
        ([2.0, 2.1, 2.2], [1.95, 2.05, 2.15]),  # hardly quicker
        ([1.0, 2.1, 2.2], [1.0, 1.1, 1.2]),  # by medians alone: the machine was busy
        ([2.0, 2.1, 2.2], [1.0, 2.1, 2.2]),  # by minima alone
    ],
)
def test_without_a_clear_margin_the_engine_runs_it(tmp_path, monkeypatch, ours, theirs):
    path, x = network(tmp_path), normal(1, 3, 9, 8)
    race(monkeypatch, ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = actzip.compile(path, x, fallback=True, **QUICK)
    assert isinstance(fast, CompiledModel)
    for model in (fast, pickle.loads(pickle.dumps(fast))):
        assert "the engine runs it:" in model.note and model.note in str(model.explain(runs=1))


def test_parts_fall_back_too(tmp_path, monkeypatch):
    path, x = network(tmp_path, lacks=True), normal(1, 3, 9, 8)
    fast = other(path, x, monkeypatch)
    assert np.array_equal(fast(x), theirs(path, x))
    with pytest.raises(UnsupportedError, match="pickle it"):
        fast.save(tmp_path / "m.actzip")
    race(monkeypatch, [1.0], [2.0])
    with pytest.warns(ActzipWarning, match="nodes run with ONNX Runtime"):
        fast = actzip.compile(path, x, fallback=True, **QUICK)
    assert "the engine runs it:" in str(fast.explain(runs=1))


def test_what_fell_back_is_saved_as_the_engine_has_it(tmp_path, monkeypatch):
    path, x = network(tmp_path), normal(1, 3, 9, 8)
    with pytest.warns(ActzipWarning, match="holds the engine's model"):
        twin = load(other(path, x, monkeypatch).save(tmp_path / "m.actzip"))
    assert isinstance(twin, CompiledModel)
    np.testing.assert_allclose(twin(x), theirs(path, x), atol=1e-5)


def test_what_fell_back_pickles_and_runs_on_several_threads(tmp_path, monkeypatch):
    path = network(tmp_path)
    fast = pickle.loads(pickle.dumps(other(path, normal(1, 3, 9, 8), monkeypatch)))
    inputs = [normal(1 + k % 3, 3, 8, 6 + k) for k in range(8)]
    at_once(lambda k: np.testing.assert_array_equal(fast(inputs[k]), theirs(path, inputs[k])), len(inputs))
    assert "quicker here" in str(fast.explain(runs=1))


def test_what_the_file_does_not_declare_runs_on_the_engine(tmp_path, monkeypatch):
    path = network(tmp_path, (1, 3, 9, 8))
    x, two = normal(1, 3, 9, 8), normal(2, 3, 9, 8)
    fast = other(path, x, monkeypatch)
    assert np.array_equal(fast(x), theirs(path, x))
    np.testing.assert_allclose(fast(two)[1:], theirs(path, two[1:]), atol=1e-5)
    assert "onnxruntime" not in {r.kernel for r in fast.explain(two, runs=1).rows}
    # compiled at such a size, it is timed without what the file declares
    np.testing.assert_allclose(other(path, two, monkeypatch)(two), fast(two), atol=1e-5)


def test_wrong_inputs_are_typed_errors(tmp_path, monkeypatch):
    fast = other(network(tmp_path), normal(1, 3, 9, 8), monkeypatch)
    for wrong in (normal(1, 5, 9, 8), normal(3, 9, 8), normal(0, 3, 9, 8), normal(1, 3, 9, 8).astype("f8")):
        with pytest.raises(InputError):
            fast(wrong)
    with pytest.raises(InputError):
        fast(normal(1, 3, 9, 8), normal(1))


def test_only_onnx_files_and_only_where_there_is_a_rival(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="path of an ONNX file, not Conv2d"):
        actzip.compile(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4), fallback=True)
    with pytest.raises(InputError, match="fallback"):
        actzip.compile(network(tmp_path), fallback="onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match="pip install onnxruntime"):
        actzip.compile(network(tmp_path), fallback=True)


def test_the_race_goes_by_turns_and_ends_where_it_is_decided(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(fallback.time, "perf_counter", lambda: now[0])

    def taking(name, seconds):
        def run():
            calls.append(name)
            now[0] += seconds

        return run

    ours, theirs = fallback._race(taking("a", 0.002), taking("b", 0.001))
    assert len(ours) == len(theirs) == 200
    np.testing.assert_allclose(ours, 2.0)
    np.testing.assert_allclose(theirs, 1.0)
    assert "".join(calls[4:12]) == "abbaabba"
    ours, theirs = fallback._race(taking("a", 0.001), taking("b", 0.002))
    assert len(ours) == 3
    ours, _ = fallback._race(taking("a", 2.0), taking("b", 1.0))
    assert len(ours) == 5


def test_without_a_stand_in_for_the_times_answers_are_right(tmp_path):
    x = normal(1, 3, 40, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)
        for shape in (("n", 3, "h", "w"), (1, 3, 40, 40)):
            path = network(tmp_path, shape)
            for example in (x, np.zeros_like(x), None) if shape[0] == 1 else (x, np.zeros_like(x)):
                fast = actzip.compile(path, example, fallback=True, **QUICK)
                np.testing.assert_allclose(fast(x), theirs(path, x), atol=1e-5)
                assert "ms with ONNX Runtime" in fast.note


@pytest.mark.parametrize("falls_back", [False, True])
def test_values_that_onnx_runtime_refuses_are_a_typed_error(tmp_path, monkeypatch, falls_back):
    graph = helper.make_graph(
        [N("Conv", ["x", "w"], ["c"]), N("Gather", ["c", "i"], ["y"], axis=1)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8]),
            helper.make_tensor_value_info("i", TensorProto.INT64, ["k"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(normal(8, 3, 3, 3), "w")],
    )
    path = tmp_path / "gather.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    race(monkeypatch, *([2.0], [1.0]) if falls_back else ([1.0], [2.0]))
    x = normal(2, 3, 8, 8)
    with pytest.warns(ActzipWarning):
        fast = actzip.compile(path, (x, np.array([0, 7])), fallback=True, **QUICK)
    assert isinstance(fast, fallback.FallbackModel) == falls_back
    assert fast(x, np.array([1, 2])).shape == (2, 2, 6, 6)
    for run in (fast, fast.explain):
        with pytest.raises(InputError, match=r"ONNX Runtime cannot run .*out of data bounds, idx=99"):
            run((x, np.array([0, 99])))
        with pytest.raises(InputError, match="N must be at least 1"):
            run((x[:0], np.array([0, 7])))
