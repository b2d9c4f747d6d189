"""A quantized ONNX file is never run slower in silence: ONNX Runtime is timed, or a line says why not."""

import gc
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
from actzip import cli  # noqa: E402
from actzip.errors import ActzipWarning  # noqa: E402
from actzip.runtime import fallback, load  # noqa: E402
from actzip.runtime.compiled import CompiledModel  # noqa: E402
from actzip.runtime.onnx_quantized import is_quantized  # noqa: E402

N = helper.make_node
RNG = np.random.default_rng(0)
ONES = {"cache": False, "threads": 1}


def nodes_of(weights, activations=True, product="Conv"):
    """x -> [Q, DQ ->] product -> Relu [-> Q, DQ] -> y; ``weights`` gives "w"."""
    first = [N("QuantizeLinear", ["x", "s", "z"], ["q"]), N("DequantizeLinear", ["q", "s", "z"], ["d"])]
    last = [N("QuantizeLinear", ["r", "s", "z"], ["p"]), N("DequantizeLinear", ["p", "s", "z"], ["y"])]
    x, r = ("d", "r") if activations else ("x", "y")
    body = [*weights, N(product, [x, "w"], ["c"]), N("Relu", ["c"], [r])]
    return [*first, *body, *last] if activations else body


DQ = N("DequantizeLinear", ["wq", "ws", "wz"], ["w"], axis=0)
TENSORS = {
    "s": np.float32(0.05),
    "z": np.uint8(128),
    "wq": RNG.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8),
    "ws": RNG.uniform(0.005, 0.02, 8).astype(np.float32),
    "wz": np.zeros(8, np.int8),
    "w": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
    "w0": np.float32(0.01),
    "w1": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
    "wz0": np.int8(0),
    "one": np.float32(1),
    "yes": np.array(True),
}


def model_of(nodes, shape=("n", 3, "h", "w"), functions=()):
    made = {o for n in nodes for o in n.output}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in TENSORS.items() if n not in made],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def saved(tmp_path, model=None):
    path = tmp_path / "m.onnx"
    onnx.save(model or model_of(nodes_of([DQ])), path)
    return path


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def raced(monkeypatch, ours, theirs):
    """Both run once, and take these milliseconds; gives the list of races."""
    races = []

    def timed(a, b):
        a(), b()
        races.append(1)
        return [ours] * 3, [theirs] * 3

    monkeypatch.setattr(fallback, "_race", timed)
    return races


def compiled(path, x, **options):
    """The compiled model, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = actzip.compile(path, x, **ONES, **options)
    return fast, [str(w.message) for w in caught if issubclass(w.category, ActzipWarning)]


def theirs(path, x):
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_onnx_runtime_runs_it_by_default_where_it_is_quicker(tmp_path, monkeypatch):
    path, x = saved(tmp_path), normal(1, 3, 12, 11)
    assert raced(monkeypatch, 2.0, 1.0) == []
    fast, said = compiled(path, x)
    assert isinstance(fast, fallback.FallbackModel) and fast.quantized
    assert len(said) == 1 and said[0] == fast.note and "ONNX Runtime runs all of it" in said[0]
    assert np.array_equal(fast(x), theirs(path, x))


def test_the_engine_runs_it_by_default_where_that_is_not(tmp_path, monkeypatch):
    path, x = saved(tmp_path), normal(1, 3, 12, 11)
    raced(monkeypatch, 1.0, 2.0)
    fast, said = compiled(path, x)
    assert isinstance(fast, CompiledModel) and fast.quantized and not said
    assert "the engine runs it:" in str(fast.explain(runs=1))


def test_nothing_is_timed_that_computes_in_floats(tmp_path, monkeypatch):
    races = raced(monkeypatch, 2.0, 1.0)
    path, x = saved(tmp_path, model_of(nodes_of([], activations=False))), normal(1, 3, 9, 9)
    fast, said = compiled(path, x)
    assert isinstance(fast, CompiledModel) and not (said or races or fast.note or fast.quantized)


def test_fallback_false_is_silence(tmp_path, monkeypatch):
    races = raced(monkeypatch, 2.0, 1.0)
    fast, said = compiled(saved(tmp_path), normal(1, 3, 9, 9), fallback=False, tune=False)
    assert isinstance(fast, CompiledModel) and not (said or races or fast.note)


@pytest.mark.parametrize("lacks", ["onnxruntime", "tune", "path"])
def test_where_nothing_can_be_timed_one_line_says_so(tmp_path, monkeypatch, lacks):
    races = raced(monkeypatch, 2.0, 1.0)
    path, x = saved(tmp_path), normal(1, 3, 9, 9)
    model = path
    if lacks == "onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    elif lacks == "path":
        with pytest.warns(ActzipWarning, match="the file is quantized"):
            model, x = actzip.load(path), torch.from_numpy(x)
    fast, said = compiled(model, x, tune=lacks == "path")
    hint = {"onnxruntime": "pip install onnxruntime", "tune": "fallback=True", "path": "the file itself"}
    assert isinstance(fast, CompiledModel) and not races
    assert len(said) == 1 and "this file is quantized" in said[0] and hint[lacks] in said[0]
    assert fast.note == said[0] and said[0] in str(fast.explain(runs=1))


def test_a_file_in_parts_is_spoken_of_once(tmp_path, monkeypatch):
    nodes = nodes_of([DQ])
    nodes[-1].output[0] = "e"
    nodes.append(N("Det", ["e"], ["y"]))
    path, x = saved(tmp_path, model_of(nodes)), normal(1, 3, 9, 9)
    for ours, start in ((2.0, "ONNX Runtime runs all of it"), (1.0, "1 of 7 nodes run with ONNX Runtime")):
        raced(monkeypatch, ours, 1.5)
        _, said = compiled(path, x)
        assert len(said) == 1 and said[0].startswith(start)


def test_what_onnx_runtime_runs_whole_is_not_timed(tmp_path, monkeypatch):
    races = raced(monkeypatch, 2.0, 1.0)
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["q", "a", "b"]),
        N("ConvInteger", ["q", "wq", "b"], ["c"]),
        N("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
    ]
    path, x = saved(tmp_path, model_of(nodes)), normal(1, 3, 9, 9)
    fast, said = compiled(path, x)
    assert fast.quantized and not fast.on_engine and not races
    assert len(said) == 1 and said[0].startswith("all 3 nodes run with ONNX Runtime")
    assert np.array_equal(fast(x), theirs(path, x))


def branch(nodes, out):
    return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)])


SHAPED = {
    "as it is": ([DQ], True),
    "transposed": (
        [N("DequantizeLinear", ["wq", "w0"], ["v"]), N("Transpose", ["v"], ["w"], perm=[0, 1, 3, 2])],
        True,
    ),
    "of a Constant": (
        [
            N("Constant", [], ["k"], value=numpy_helper.from_array(TENSORS["wq"])),
            N("DequantizeLinear", ["k", "w0"], ["w"]),
        ],
        True,
    ),
    "quantized in the file": (
        [N("QuantizeLinear", ["w1", "w0", "wz0"], ["k"]), N("DequantizeLinear", ["k", "w0", "wz0"], ["w"])],
        True,
    ),
    "before what it reads": (
        [N("Identity", ["v"], ["w"]), N("DequantizeLinear", ["wq", "w0"], ["v"])],
        True,
    ),
    "floats": ([], False),
}


@pytest.mark.parametrize("name", SHAPED)
def test_what_counts_as_quantized(name):
    weights, wanted = SHAPED[name]
    model = model_of(nodes_of(weights))
    assert is_quantized(model) == wanted
    inner = helper.make_graph(
        nodes_of(weights), "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    held = N("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    assert is_quantized(model_of([held])) == wanted


def test_a_function_of_the_file_counts():
    opsets = [helper.make_opsetid("", 17)]
    body = [N("DequantizeLinear", ["i", "s"], ["w"]), N("Conv", ["x", "w"], ["y"])]
    constant = N("Constant", [], ["i"], value=numpy_helper.from_array(TENSORS["wq"]))
    for nodes, wanted in (([constant, *body], True), (body[1:], False)):
        own = helper.make_function("own", "Layer", ["x", "s", "w"][: 2 + (not wanted)], ["y"], nodes, opsets)
        call = N("Layer", ["x", "w0", "w"][: 2 + (not wanted)], ["y"], domain="own")
        assert is_quantized(model_of([call], functions=[own])) == wanted


@pytest.mark.parametrize("op", ["QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm"])
def test_integer_operators_count(op):
    assert is_quantized(model_of([N(op, ["x"], ["y"])]))


def test_the_engines_copy_is_made_when_it_is_needed(tmp_path, monkeypatch):
    path, x = saved(tmp_path, model_of(nodes_of([DQ]), (1, 3, 9, 8))), normal(1, 3, 9, 8)
    raced(monkeypatch, 2.0, 1.0)
    fast = compiled(path, x)[0]
    copied = pickle.loads(pickle.dumps(fast))
    for model in (fast, copied):
        assert model._engine._rests
        assert np.array_equal(model(x), theirs(path, x)) and model._engine._rests
        two = normal(2, 3, 9, 8)
        step = TENSORS["s"]
        np.testing.assert_allclose(model(two)[1:], theirs(path, two[1:]), atol=1.01 * step)
        assert not model._engine._rests


def test_a_file_of_the_slower_model_says_so(tmp_path, monkeypatch):
    path, x = saved(tmp_path), normal(1, 3, 12, 11)
    raced(monkeypatch, 2.0, 1.0)
    fast = compiled(path, x)[0]
    with pytest.warns(ActzipWarning, match="holds the engine's model, in float32, which was slower") as said:
        twin = load(fast.save(tmp_path / "m.actzip"))
    assert len(said) == 1 and twin.quantized
    np.testing.assert_allclose(twin(x), theirs(path, x), atol=1.01 * TENSORS["s"])


def test_verbs_take_both_words_and_say_what_runs(tmp_path, monkeypatch, capsys):
    path = str(saved(tmp_path, model_of(nodes_of([DQ]), (1, 3, 12, 11))))

    def run(*args):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(args))
        assert not caught.value.code
        return capsys.readouterr()

    races = raced(monkeypatch, 2.0, 1.0)
    out, err = run("compile", path)
    assert "onnxruntime" in out and "ONNX Runtime runs all of it" in err
    out, err = run("compile", path, "--no-fallback")
    assert "onnxruntime" not in out and "quantized" not in err and len(races) == 1
    out, err = run("compile", path, "--no-tune")
    assert "this file is quantized" in err and len(races) == 1
    out, _ = run("compile", path, "--no-tune", "--fallback")
    assert "onnxruntime" in out and len(races) == 2
    engines = ["--engines", "onnxruntime", "--runs", "1", "--rounds", "1"]
    for word, noted in (([], True), (["--no-fallback"], False)):
        out, _ = run("bench", path, *engines, *word)
        assert ("ms with ONNX Runtime" in out) == noted


def test_compiling_leaves_no_weights_to_the_garbage_collector(tmp_path):
    """Arrays in a cycle stay until it comes by: the weights were in memory twice."""
    path, x = saved(tmp_path), normal(1, 3, 12, 11)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        fast = actzip.compile(path, x, fallback=False, **ONES)
        gc.collect()
        arrays = [r for o in gc.garbage for r in gc.get_referents(o) if isinstance(r, np.ndarray)]
        assert not any(a.shape[1:] == (3, 3, 3) for a in arrays)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert fast(x).shape == (1, 8, 10, 9)


def test_the_module_of_a_quantized_file_is_said_to_compute_in_float32(tmp_path):
    path, x = saved(tmp_path), torch.from_numpy(normal(1, 3, 12, 11))
    with pytest.warns(ActzipWarning, match="its module computes the same in float32") as said:
        net = actzip.load(path)
    assert len(said) == 1
    np.testing.assert_allclose(net(x).detach().numpy(), theirs(path, x.numpy()), atol=1.01 * TENSORS["s"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actzip.load(saved(tmp_path, model_of(nodes_of([], activations=False))))
