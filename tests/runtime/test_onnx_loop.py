"""Loops whose number of steps is known run on the engine, step after step, as ONNX Runtime runs them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import actzip
from actzip.errors import ActzipError, ActzipWarning, InputError, UnsupportedError
from exported import N, compiled, kinds, model_of, normal, onnx

T, C, H = 7, 48, 48  # large enough for weights to be shared


def body(nodes, states, gathered=(), constants=None, step="i", go="go", goes_on="more"):
    """A Loop's body: ``states`` as (name before, name after)."""

    def info(name, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, None if kind == TensorProto.FLOAT else [])

    return helper.make_graph(
        nodes,
        "body",
        [
            info(step, TensorProto.INT64),
            info(go, TensorProto.BOOL),
            *(info(a, TensorProto.INT64 if a.startswith("k") else TensorProto.FLOAT) for a, _ in states),
        ],
        [
            info(goes_on, TensorProto.BOOL),
            *(info(b, TensorProto.INT64 if a.startswith("k") else TensorProto.FLOAT) for a, b in states),
            *map(info, gathered),
        ],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )


def keras_cell(last):
    """A recurrent cell as tf2onnx writes Keras' GRU: a counter, weights that the states carry along,
    steps of the sequence taken by index, gates that a Split parts."""
    nodes = [
        N("Add", ["k", "one"], ["k2"]),
        N("Gather", ["sequence", "k"], ["x_t"], axis=0),
        N("Split", ["b"], ["b0", "b1"], axis=0),
        N("Squeeze", ["b0", "first"], ["c0"]),
        N("MatMul", ["x_t", "w"], ["p"]),
        N("Add", ["p", "c0"], ["q"]),
        N("MatMul", ["h", "u"], ["r"]),
        N("Add", ["r", "q"], ["s"]),
        N("Split", ["s"], ["z0", "g0"], axis=-1),
        N("Sigmoid", ["z0"], ["z"]),
        N("Tanh", ["g0"], ["g"]),
        N("Sub", ["h", "g"], ["d"]),
        N("Mul", ["z", "d"], ["e"]),
        N("Add", ["g", "e"], ["h2"]),
        N("Identity", ["h2"], ["out"]),
        N("Identity", ["w"], ["w2"]),
        N("Cast", ["k2"], ["f"], to=TensorProto.FLOAT),
        N("Less", ["f", "end"], ["more"]),
    ]
    states = [("k", "k2"), ("h", "h2"), ("w", "w2"), ("u", "u"), ("b", "b")]
    constants = {"one": np.int64(1), "first": np.int64([0]), "end": np.float32(last)}
    return body(nodes, states, ["out"], constants)


def recurrent(cell, most=T, opset=15):
    """A convolution of signals, the cell along them, all states and the last."""
    outputs = ["_k", "h_n", "_w", "_u", "_b", "all"]
    nodes = [
        N("Conv", ["x", "v"], ["c"], pads=[1, 1]),
        N("Transpose", ["c"], ["sequence"], perm=[2, 0, 1]),
        N("Shape", ["x"], ["shape"]),
        N("Gather", ["shape", "zero"], ["n"]),
        N("Concat", ["n", "wide"], ["sizes"], axis=0),
        N("Expand", ["nought", "sizes"], ["h0"]),
        N("Loop", ["most", "yes", "k0", "h0", "w0", "u0", "bias"], outputs, body=cell),
        N("Unsqueeze", ["h_n", "zero"], ["h_1"]),
        N("Concat", ["all", "h_1"], ["y"], axis=0),
    ]  # fmt: skip
    constants = {
        "v": normal(C, 4, 3),
        "zero": np.int64([0]),
        "wide": np.int64([H]),
        "nought": np.float32(0),
        "most": np.int64(most),
        "yes": np.array(True),
        "k0": np.int64(0),
        "w0": normal(C, 2 * H) / 8,
        "u0": normal(H, 2 * H) / 8,
        "bias": normal(2, 2 * H),
    }
    return model_of(nodes, constants, ["n", 4, T], opset)


@pytest.mark.parametrize(("most", "last"), [(T, T), (T, 4), (3, T), (10**9, T)])
def test_recurrent_layers_written_as_loops(most, last, tmp_path):
    """Ended by the number of steps, or by the condition that the body computes."""
    fast = compiled(recurrent(keras_cell(last), most), normal(1, 4, T), tmp_path)
    weights = {id(n.weight) for n in fast.graph.nodes if n.op == "linear"}
    assert len(weights) <= 2, "each step has weights of its own"
    fast.save(tmp_path / "m.actzip")
    x = normal(2, 4, T)
    np.testing.assert_array_equal(actzip.runtime.load(tmp_path / "m.actzip")(x), fast(x))


def test_loops_of_maps_have_their_convolutions_on_the_engine(tmp_path):
    cell = body(
        [
            N("Conv", ["h", "w"], ["c"], pads=[1] * 4),
            N("Add", ["c", "x"], ["d"]),
            N("Relu", ["d"], ["h2"]),
            N("Identity", ["go"], ["more"]),
        ],
        [("h", "h2")],
    )
    nodes = [N("Relu", ["x"], ["h0"]), N("Loop", ["three", "", "h0"], ["y"], body=cell)]
    model = model_of(nodes, {"three": np.int64([3]), "w": normal(4, 4, 3, 3) * 0.2}, ["n", 4, 9, 8])
    assert kinds(compiled(model, normal(1, 4, 9, 8), tmp_path)).count("conv2d") == 3


def test_a_loop_within_a_loop(tmp_path):
    inner = body(
        [N("Add", ["s", "h"], ["t"]), N("Sin", ["t"], ["s2"]), N("Identity", ["ig"], ["im"])],
        [("s", "s2")],
        step="ii",
        go="ig",
        goes_on="im",
    )
    outer = body(
        [
            N("Loop", ["two", "", "h"], ["g"], body=inner),
            N("Mul", ["g", "half"], ["h2"]),
            N("Identity", ["go"], ["more"]),
        ],
        [("h", "h2")],
    )
    nodes = [N("Relu", ["x"], ["h0"]), N("Loop", ["two", "yes", "h0"], ["y"], body=outer)]
    constants = {"two": np.int64(2), "half": np.float32(0.5), "yes": np.array(True)}
    compiled(model_of(nodes, constants, ["n", 8]), normal(1, 8), tmp_path)


def doubling(condition):
    """h = h + h, ended by ``condition`` of (i, h)."""
    return body([N("Add", ["h", "h"], ["h2"]), *condition], [("h", "h2")])


def test_loops_that_the_engine_cannot_end_run_elsewhere(tmp_path):
    """Steps that depend on the input; very many of them."""
    condition = [N("ReduceMax", ["h2"], ["m"], keepdims=0), N("Less", ["m", "limit"], ["more"])]
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Relu", ["c"], ["h0"]),
        N("Loop", ["", "yes", "h0"], ["y"], body=doubling(condition)),
    ]
    constants = {"w": normal(4, 3, 3, 3), "yes": np.array(True), "limit": np.float32(50)}
    with pytest.warns(ActzipWarning, match="1 Loop"):
        compiled(model_of(nodes, constants, ["n", 3, 6, 6]), normal(1, 3, 6, 6), tmp_path)
    nodes[2] = N("Loop", ["many", "", "h0"], ["y"], body=doubling([N("Identity", ["go"], ["more"])]))
    model = model_of(nodes, {"w": constants["w"], "many": np.int64(10**6)}, ["n", 3, 6, 6])
    onnx.save(model, tmp_path / "many.onnx")
    with pytest.raises(UnsupportedError, match="more than 4096 steps"):
        actzip.compile(tmp_path / "many.onnx", normal(1, 3, 6, 6), tune=False, parts=False)


@pytest.mark.parametrize(
    ("cell", "inputs"),
    [
        (helper.make_graph([], "b", [], []), ["three", "", "h0"]),
        (doubling([]), ["three", "", "h0"]),
        (doubling([N("Identity", ["go"], ["more"])]), ["three", ""]),
        (doubling([N("Identity", ["go"], ["more"])]), ["", "", "h0"]),
        (body([N("Concat", ["h", "h"], ["h2"], axis=1), N("Identity", ["go"], ["more"])], [("h", "h2")]),
         ["three", "", "h0"]),
    ],
    ids=["empty body", "unwritten condition", "no state", "no end", "growing state"],
)  # fmt: skip
def test_damaged_loops_are_named(cell, inputs, tmp_path):
    model = model_of(
        [N("Relu", ["x"], ["h0"]), N("Loop", inputs, ["y"], name="L", body=cell)],
        {"three": np.int64(3)},
        ["n", 4],
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ActzipError, match=r"'L'|Loop") as error:
        actzip.compile(tmp_path / "m.onnx", normal(1, 4), tune=False, parts=False)
    assert isinstance(error.value, (InputError, UnsupportedError))


@pytest.mark.parametrize("time", [0, 1])
def test_sequences_turned_round_whole(time, tmp_path):
    """As TensorFlow's exporter writes a flip."""
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Transpose", ["c"], ["s"], perm=[2, 0, 1] if time == 0 else [0, 2, 1]),
        N("Shape", ["s"], ["d"]),
        N("Gather", ["d", "batch"], ["count"]),
        N("Gather", ["d", "steps"], ["length"]),
        N("Expand", ["length", "count"], ["lengths"]),
        N("ReverseSequence", ["s", "lengths"], ["r"], time_axis=time, batch_axis=1 - time),
        N("Neg", ["r"], ["y"]),
    ]
    constants = {"w": normal(5, 4, 3), "batch": np.int64([1 - time]), "steps": np.int64(time)}
    compiled(model_of(nodes, constants, ["n", 4, T]), normal(1, 4, T), tmp_path)


def test_sequences_of_several_lengths_run_elsewhere(tmp_path):
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Transpose", ["c"], ["s"], perm=[2, 0, 1]),
        N("ReverseSequence", ["s", "lengths"], ["y"], time_axis=0, batch_axis=1),
    ]
    model = model_of(nodes, {"w": normal(5, 4, 3), "lengths": np.int64([2, 5])}, [2, 4, T])
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="several lengths"):
        actzip.compile(tmp_path / "m.onnx", normal(2, 4, T), tune=False, parts=False)
