"""Files of TensorFlow's exporter keep maps as (N, H, W, C) between transposes: none but those at the
ends is left, and the numbers are ONNX Runtime's."""

import numpy as np
import pytest
import torch
from onnx import TensorProto

from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.explain import dense_arena_bytes
from actzip.runtime.interpret import interpret
from actzip.runtime.lower import lower
from actzip.runtime.ops.copy import Copy
from exported import FIRST, LAST, RNG, N, compiled, kinds, model_of, normal, onnx


def conv(name, x, y, weights, out, size=3):
    """A convolution of (N, H, W, C), as tf2onnx writes it where its optimizer gives up."""
    channels = weights.get("c:" + x, 4)
    weights |= {f"{name}.w": normal(out, channels, size, size) * 0.3, "c:" + y: out}
    pads = [size // 2] * 4
    return [
        N("Transpose", [x], [f"{name}.t"], perm=FIRST),
        N("Conv", [f"{name}.t", f"{name}.w"], [f"{name}.v"], name=name, pads=pads),
        N("Transpose", [f"{name}.v"], [y], perm=LAST),
    ]


BETWEEN = {
    "pad": [N("Pad", ["a", "pads"], ["b"])],
    "pad below nothing": [N("Relu", ["a"], ["r"]), N("Pad", ["r", "pads", "low"], ["b"])],
    "slice": [N("Slice", ["a", "starts", "ends", "axes"], ["b"])],
    "concatenation": [N("Neg", ["a"], ["n"]), N("Concat", ["a", "n"], ["b"], axis=-1)],
    "concatenation of rows": [N("Neg", ["a"], ["n"]), N("Concat", ["a", "n"], ["b"], axis=1)],
    "squeeze and excite": [
        N("ReduceMean", ["a"], ["m"], axes=[1, 2], keepdims=1),
        *conv("se1", "m", "s1", {}, 4, 1),
        N("Relu", ["s1"], ["s2"]),
        *conv("se2", "s2", "s3", {}, 4, 1),
        N("HardSigmoid", ["s3"], ["s4"], alpha=1 / 6),
        N("Mul", ["a", "s4"], ["b"]),
    ],
    "largest of channels": [N("ReduceMax", ["a"], ["m"], axes=[3]), N("Sub", ["a", "m"], ["b"])],
    "softmax": [N("Softmax", ["a"], ["b"], axis=-1)],
    "softmax of rows": [N("Softmax", ["a"], ["b"], axis=1)],
    "numbers a channel": [N("Mul", ["a", "each"], ["m"]), N("Sub", ["each", "m"], ["b"])],
}


@pytest.mark.parametrize("what", BETWEEN)
def test_nodes_between_transposes_are_said_of_maps(what, tmp_path):
    weights = {}
    nodes = conv("first", "x", "a", weights, 4)
    weights |= {"se1.w": normal(4, 4, 1, 1), "se2.w": normal(4, 4, 1, 1), "c:b": 4}
    if what == "concatenation":
        weights["c:b"] = 8
    nodes += [*BETWEEN[what], *conv("last", "b", "y", weights, 6)]
    constants = {k: v for k, v in weights.items() if not k.startswith("c:")}
    constants |= {
        "pads": np.int64([0, 0, 1, 0, 0, 1, 2, 0]),
        "low": np.float32(-0.5),
        "starts": np.int64([1, 0]),
        "ends": np.int64([2**31 - 1, -2]),
        "axes": np.int64([1, 2]),
        "each": normal(4),
    }
    fast = compiled(model_of(nodes, constants, ["n", 9, 8, 4]), normal(1, 9, 8, 4), tmp_path)
    assert kinds(fast).count("transpose") == 2, fast.graph
    assert what != "pad" or "pad" not in kinds(fast)


@pytest.mark.parametrize(
    "node",
    [
        N("ReduceMean", ["a"], ["y"], axes=[1, 2], keepdims=0),
        N("ReduceMean", ["a"], ["y"], axes=[1], keepdims=0),
        N("ReduceSum", ["a", "three"], ["y"], keepdims=0),
        N("ReduceMax", ["a"], ["y"], axes=[3], keepdims=1),
        N("ArgMax", ["a"], ["y"], axis=3, keepdims=0),
        N("ArgMax", ["a"], ["y"], axis=1, keepdims=1),
        N("ArgMin", ["a"], ["y"], axis=2, keepdims=0),
    ],
    ids=lambda n: f"{n.op_type} {[onnx.helper.get_attribute_value(a) for a in n.attribute]}",
)
def test_what_reduces_last_channels_is_right_whatever_axes_it_leaves(node, tmp_path):
    weights = {}
    nodes = [*conv("first", "x", "a", weights, 5), node]
    model = model_of(nodes, {"first.w": weights["first.w"], "three": np.int64([3])}, ["n", 6, 7, 4])
    if node.op_type.startswith("Arg"):
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    compiled(model, normal(1, 6, 7, 4), tmp_path)


def test_what_is_done_to_an_input_of_last_channels_is_done_to_its_maps(tmp_path):
    """Keras' Rescaling, Normalization and ZeroPadding2D in front of the first transpose: the numbers
    go into the convolution, but where the padding is of zeros behind them."""
    nodes = [
        N("Mul", ["x", "s"], ["a"]),
        N("Sub", ["a", "mean"], ["b"]),
        N("Div", ["b", "deviation"], ["c"]),
        N("Transpose", ["c"], ["t"], perm=FIRST),
        N("Conv", ["t", "w"], ["y"]),
    ]
    constants = {
        "s": np.float32(1 / 255),
        "mean": np.float32([[[[0.4, 0.5, 0.6]]]]),
        "deviation": np.float32([0.2, 0.3, 0.4]),
        "w": normal(8, 3, 3, 3),
    }
    x = (RNG.random((1, 10, 12, 3)) * 255).astype(np.float32)
    fast = compiled(model_of(nodes, constants, ["n", 10, 12, 3]), x, tmp_path)
    assert kinds(fast) == ["transpose", "conv2d"]
    padded = [*nodes[:3], N("Pad", ["c", "p"], ["d"]), N("Transpose", ["d"], ["t"], perm=FIRST), nodes[4]]
    constants["p"] = np.int64([0, 1, 1, 0, 0, 1, 0, 0])
    fast = compiled(model_of(padded, constants, ["n", 10, 12, 3]), x, tmp_path)
    assert "pad" not in kinds(fast)


def test_an_input_of_last_channels_that_others_read_stays_as_it_is(tmp_path):
    nodes = [
        N("Mul", ["x", "s"], ["a"]),
        N("Transpose", ["a"], ["t"], perm=FIRST),
        N("Conv", ["t", "w"], ["c"]),
        N("Transpose", ["c"], ["d"], perm=LAST),
        N("Add", ["d", "a"], ["y"]),
    ]
    constants = {"s": np.float32(0.5), "w": normal(4, 4, 1, 1)}
    compiled(model_of(nodes, constants, ["n", 6, 5, 4]), normal(1, 6, 5, 4), tmp_path)


def test_a_view_that_torch_writes_as_a_gather_of_every_number_keeps_the_batch_open(tmp_path):
    """torch.onnx' ``as_strided`` of a mean, whose indices it computes of the batch."""
    nodes = [
        N("Relu", ["x"], ["r"]),
        N("ReduceMean", ["r"], ["m"], axes=[-1, -2]),
        N("Reshape", ["m", "all"], ["flat"]),
        N("Shape", ["x"], ["n"], start=0, end=1),
        N("Squeeze", ["n"], ["count"]),
        N("Range", ["zero", "count", "one"], ["r0"]),
        N("Mul", ["r0", "six"], ["r1"]),
        N("Unsqueeze", ["r1", "behind"], ["r2"]),
        N("Add", ["r2", "channels"], ["at"]),
        N("Gather", ["flat", "at"], ["y"], axis=0),
    ]
    constants = {
        "all": np.int64([-1]),
        "zero": np.int64(0),
        "one": np.int64(1),
        "six": np.int64(6),
        "behind": np.int64([1, 2, 3]),
        "channels": np.arange(6).reshape(1, 6, 1, 1),
    }
    fast = compiled(model_of(nodes, constants, ["n", 6, 5, 4], 17), normal(1, 6, 5, 4), tmp_path)
    assert "slice" not in kinds(fast)


def test_a_copy_of_what_a_transpose_gives_is_a_map_where_all_is_dense():
    """explain() lowers a network once more with all maps dense, where such a copy was taken for a map
    and the plan crashed."""
    graph = g.Graph("g")
    x = graph.add_input("x", (24, 4, 10, 14))
    turned = graph.add(ops.Transpose("t", (x,), "turned", perm=(1, 0, 2, 3)))
    copied = graph.add(Copy("c", (turned,), "copied"))
    graph.outputs = [graph.add(ops.Conv2d("k", (copied,), "y", weight=normal(8, 24, 3, 3)))]
    given = normal(24, 4, 10, 14)
    assert dense_arena_bytes(graph, 1) > 0
    y = np.empty((4, 8, 8, 12), np.float32)
    lower(graph).plan.run(1, [given], [y], 1)
    np.testing.assert_allclose(y, interpret(graph, {"x": torch.from_numpy(given)})[0][0], atol=1e-4)


def test_a_view_of_a_view_is_named_once(tmp_path):
    """Two sweeps put a transpose behind one node: the second found the name taken."""
    nodes = [
        N("Transpose", ["x"], ["a"], perm=LAST),
        N("Transpose", ["a"], ["b"], perm=LAST),
        N("Softmax", ["b"], ["s"], axis=1),
        N("HardSwish", ["s"], ["y"]),
    ]
    compiled(model_of(nodes, {}, ["n", 1, 7, 5]), normal(2, 1, 7, 5), tmp_path)
