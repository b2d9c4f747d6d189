"""What exporters write out in arithmetic becomes one node, with the numbers of ONNX Runtime."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import helper  # noqa: E402

import actzip  # noqa: E402
from exported import kinds, model_of  # noqa: E402

N = helper.make_node
F = np.float32


def compiled(model, x, tmp_path):
    """The compiled model, whose answer is ONNX Runtime's."""
    onnx.save(model, tmp_path / "m.onnx")
    fast = actzip.compile(tmp_path / "m.onnx", x, tune=False)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    np.testing.assert_allclose(fast(x), want, rtol=0, atol=2e-5 * float(np.abs(want).max()))
    return fast


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(F)


def written_norm(axes, square, root, affine, shape):
    """Nodes and constants of a layer norm, as PyTorch's exporter writes it."""
    nodes = [
        N("ReduceMean", ["x"], ["m"], axes=axes),
        N("Sub", ["x", "m"], ["d"]),
        N("Pow", ["d", "two"], ["q"]) if square == "pow" else N("Mul", ["d", "d"], ["q"]),
        N("ReduceMean", ["q"], ["v"], axes=axes),
        N("Add", ["v", "eps"], ["w"]),
        N("Pow", ["w", "half"], ["r"]) if root == "pow" else N("Sqrt", ["w"], ["r"]),
    ]
    if root == "reciprocal":
        nodes += [N("Reciprocal", ["r"], ["i"]), N("Mul", ["i", "d"], ["n"])]
    else:
        nodes += [N("Div", ["d", "r"], ["n"])]
    size = [shape[a] for a in axes]
    size += [1] * (len(shape) - 1 - axes[-1] if axes[-1] > 0 else 0)
    constants = {"two": F(2), "half": F(0.5), "eps": F(1e-3)}
    constants |= {"g": normal(*size), "b": normal(*size) + 1}
    steps = {"both": "gb", "weight": "g", "bias": "b", "none": ""}[affine]
    for k in steps:
        before = nodes[-1].output[0]
        nodes.append(N("Mul" if k == "g" else "Add", [k, before], [f"n{k}"]))
    nodes[-1].output[0] = "y"
    return nodes, constants


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("square,root", [("pow", "sqrt"), ("mul", "reciprocal"), ("pow", "pow")])
@pytest.mark.parametrize(
    "shape,axes", [((2, 5, 24), [-1]), ((2, 5, 3, 24), [-1]), ((2, 24, 5, 7), [1]), ((2, 3, 4, 6), [2, 3])]
)
def test_layer_norms_of_exporters(shape, axes, square, root, affine, tmp_path):
    nodes, constants = written_norm(axes, square, root, affine, shape)
    fast = compiled(model_of(nodes, constants, ["n", *shape[1:]], 17), normal(*shape) + 0.5, tmp_path)
    assert [k for k in kinds(fast) if k not in ("transpose", "reshape", "copy")] == ["layer_norm"]


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("axes", [[1], [3]])
def test_layer_norms_of_tensorflow(axes, affine, negative, tmp_path):
    """x * scale + (bias - mean * scale)."""
    x = normal(2, 6, 5, 6)
    size = (6, 1, 1) if axes == [1] else (6,)
    nodes = [
        N("ReduceMean", ["x"], ["m"], axes=axes),
        N("Sub", ["x", "m"], ["d"]),
        N("Mul", ["d", "d"], ["q"]),
        N("ReduceMean", ["q"], ["v"], axes=axes),
        N("Add", ["v", "eps"], ["w"]),
        N("Sqrt", ["w"], ["r"]),
        N("Reciprocal", ["r"], ["i"]),
        *([N("Mul", ["i", "g"], ["k"])] if affine else []),
    ]
    k = "k" if affine else "i"
    nodes += [N("Mul", ["x", k], ["p"])]
    if negative:
        nodes += [N("Neg", ["m"], ["o"]), N("Mul", ["o", k], ["t"])]
        nodes += [N("Add", ["t", "b"], ["s"])] if affine else []
        nodes += [N("Add", ["p", "s" if affine else "t"], ["y"])]
    else:
        nodes += [N("Mul", ["m", k], ["t"])]
        nodes += [N("Sub", ["b", "t"], ["s"]), N("Add", ["p", "s"], ["y"])] if affine else []
        nodes += [] if affine else [N("Sub", ["p", "t"], ["y"])]
    constants = {"eps": F(1e-3), "g": normal(*size), "b": normal(*size) + 1}
    fast = compiled(model_of(nodes, constants, ["n", 6, 5, 6], 17), x, tmp_path)
    assert [k for k in kinds(fast) if k not in ("transpose", "reshape", "copy")] == ["layer_norm"]


@pytest.mark.parametrize("fault", ["axes", "other", "weight", "reader"])
def test_what_only_resembles_a_layer_norm_keeps_its_meaning(fault, tmp_path):
    shape = (2, 5, 4, 4)
    nodes, constants = written_norm([3], "mul", "sqrt", "both", shape)
    if fault == "axes":  # variance over another dimension than the mean
        nodes[3] = N("ReduceMean", ["q"], ["v"], axes=[2])
    elif fault == "other":  # divided by the deviation of something else
        nodes[2] = N("Mul", ["x", "x"], ["q"])
    elif fault == "weight":  # one weight a row, not a number
        constants["g"] = normal(4, 1)
    else:  # the middle is read once more
        nodes[-1].output[0] = "last"
        nodes.append(N("Add", ["last", nodes[-3].output[0]], ["y"]))
    fast = compiled(model_of(nodes, constants, ["n", *shape[1:]], 17), normal(*shape), tmp_path)
    assert ("layer_norm" in kinds(fast)) == (fault in ("weight", "reader"))


@pytest.mark.parametrize("half", ["first", "gate", "last"])
@pytest.mark.parametrize("cube", ["pow", "mul", "square"])
def test_gelu_written_with_tanh(cube, half, tmp_path):
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))."""
    cubes = {
        "pow": [N("Pow", ["x", "three"], ["c"])],
        "mul": [N("Mul", ["x", "x"], ["s"]), N("Mul", ["x", "s"], ["c"])],
        "square": [N("Pow", ["x", "two"], ["s"]), N("Mul", ["s", "x"], ["c"])],
    }
    nodes = [
        *cubes[cube],
        N("Mul", ["c", "k"], ["e"]),
        N("Add", ["x", "e"], ["f"]),
        N("Mul", ["root", "f"], ["h"]),
        N("Tanh", ["h"], ["t"]),
        N("Add", ["t", "one"], ["u"]),
    ]
    if half == "first":
        nodes += [N("Mul", ["x", "half"], ["z"]), N("Mul", ["z", "u"], ["y"])]
    elif half == "gate":
        nodes += [N("Mul", ["u", "half"], ["z"]), N("Mul", ["x", "z"], ["y"])]
    else:
        nodes += [N("Mul", ["x", "u"], ["z"]), N("Mul", ["z", "half"], ["y"])]
    constants = {"three": F(3), "two": F(2), "k": F(0.044715), "root": F(np.sqrt(2 / np.pi))}
    constants |= {"one": F(1), "half": F(0.5)}
    fast = compiled(model_of(nodes, constants, ["n", 3, 5, 5]), 3 * normal(2, 3, 5, 5), tmp_path)
    assert [n.act.kind for n in fast.graph.nodes] == ["gelu_tanh"]
    constants["k"] = F(0.05)  # another function
    fast = compiled(model_of(nodes, constants, ["n", 3, 5, 5]), 3 * normal(2, 3, 5, 5), tmp_path)
    assert len(fast.graph.nodes) > 1


@pytest.mark.parametrize("inner", ["scaled first", "factored"])
def test_gelu_by_tanh_of_other_polynomials(inner, tmp_path):
    """x + x * (x * (0.044715 * x)), as JAX writes it, and x * (1 + 0.044715 * x^2)."""
    if inner == "factored":
        nodes = [N("Mul", ["x", "x"], ["s"]), N("Mul", ["s", "k"], ["e"]), N("Add", ["one", "e"], ["g"])]
        nodes += [N("Mul", ["x", "g"], ["f"])]
    else:
        nodes = [N("Mul", ["k", "x"], ["a"]), N("Mul", ["x", "a"], ["b"]), N("Mul", ["x", "b"], ["e"])]
        nodes += [N("Add", ["x", "e"], ["f"])]
    nodes += [N("Mul", ["root", "f"], ["h"]), N("Tanh", ["h"], ["t"]), N("Add", ["one", "t"], ["u"])]
    nodes += [N("Mul", ["half", "u"], ["z"]), N("Mul", ["x", "z"], ["y"])]
    constants = {"k": F(0.044715), "root": F(np.sqrt(2 / np.pi)), "one": F(1), "half": F(0.5)}
    fast = compiled(model_of(nodes, constants, ["n", 3, 5, 5]), 3 * normal(2, 3, 5, 5), tmp_path)
    assert [n.act.kind for n in fast.graph.nodes] == ["gelu_tanh"]
    constants["k"] = F(0.05)  # another function
    fast = compiled(model_of(nodes, constants, ["n", 3, 5, 5]), 3 * normal(2, 3, 5, 5), tmp_path)
    assert len(fast.graph.nodes) > 1


@pytest.mark.parametrize("exponent", [3.0, 4.0, 2.0, 1.0, 0.5, -0.5, -1.0, 2.5, -2.0])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_powers_of_a_constant_are_products(exponent, rank, tmp_path):
    x = np.abs(normal(1, 3, 4, 4)) + 0.5 if exponent < 1 or exponent == 2.5 else normal(1, 3, 4, 4)
    constants = {"e": F(exponent).reshape((1,) * rank)}
    model = model_of([N("Pow", ["x", "e"], ["p"]), N("Neg", ["p"], ["y"])], constants, ["n", 3, 4, 4])
    fast = compiled(model, x, tmp_path)
    product = exponent not in (2.5, -2.0)
    assert product == all(getattr(n, "kind", "") != "pow" for n in fast.graph.nodes)


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
def test_operands_of_another_layout_are_as_large_as_the_map(op, tmp_path):
    """A convolution's map with a position embedding, and with what a reduction made."""
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        N("ReduceMean", ["x"], ["m"], axes=[1]),
        N("Mul", ["m", "g"], ["p"]),
        N(op, ["c", "p"], ["a"]),
        N(op, ["a", "e"], ["y"]),
    ]
    constants = {"w": normal(20, 3, 3, 3), "g": np.abs(normal(1, 20, 1, 1)) + 1}
    constants["e"] = np.abs(normal(1, 20, 9, 7)) + 1
    x = np.abs(normal(2, 3, 9, 7)) + 1
    compiled(model_of(nodes, constants, ["n", 3, 9, 7]), x, tmp_path)


def test_depth_to_space_behind_a_turned_batch(tmp_path):
    """The batch stands where DepthToSpace wants a number: the file is read for its own batch."""
    nodes = [N("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]), N("DepthToSpace", ["t"], ["y"], blocksize=2)]
    for batch in (4, 8):
        compiled(model_of(nodes, {}, ["n", 3, 4, 4]), normal(batch, 3, 4, 4), tmp_path)


@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_cells_keep_their_weights_once(steps, tmp_path):
    nodes, h = [], "x"
    for k in range(steps):
        nodes += [N("Gemm", [h, "w"], [f"g{k}"], transB=1), N("Tanh", [f"g{k}"], [f"h{k}"])]
        h = f"h{k}"
    nodes[-1].output[0] = "y"
    model = model_of(nodes, {"w": normal(96, 96) / 10}, ["n", 96])
    fast = compiled(model, normal(1, 96), tmp_path)
    assert fast.weight_bytes() < 4 * 96 * 96 * 2
    fast.save(tmp_path / "m.actzip")
    again = actzip.runtime.load(tmp_path / "m.actzip")
    x = normal(2, 96)
    np.testing.assert_array_equal(again(x), fast(x))
    assert (tmp_path / "m.actzip").stat().st_size < 4 * 96 * 96 * 3


def test_equal_weights_in_layers_that_order_them_otherwise(tmp_path):
    """The same weights behind other strides, dilations and outputs are packed for each."""
    nodes = [
        N("Relu", ["x"], ["r"]),
        N("Conv", ["r", "w"], ["a"], pads=[1, 1, 1, 1]),
        N("Relu", ["a"], ["ar"]),
        N("Conv", ["ar", "w"], ["b"], pads=[2, 2, 2, 2], dilations=[2, 2]),
        N("Conv", ["ar", "w"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        N("Relu", ["c"], ["cr"]),
        N("Conv", ["cr", "w"], ["d"], pads=[1, 1, 1, 1]),
        N("GlobalAveragePool", ["b"], ["bp"]),
        N("GlobalAveragePool", ["d"], ["dp"]),
        N("Add", ["bp", "dp"], ["y"]),
    ]
    model = model_of(nodes, {"w": normal(80, 80, 3, 3) / 20}, ["n", 80, 12, 12])
    for isa in actzip.cpu.isas():
        with actzip.cpu.forced(isa):
            compiled(model, normal(1, 80, 12, 12), tmp_path)
