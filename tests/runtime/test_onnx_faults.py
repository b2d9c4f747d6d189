"""Faults that ONNX files brought to light, each with its kind, against ONNX Runtime or by ONNX's
own words."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import actzip  # noqa: E402

N = helper.make_node
RNG = np.random.default_rng(0)


def make(nodes, constants, shape, opset=17, dtype=TensorProto.FLOAT, outputs=("y",), out=None):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(o, out or TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ours(model, x, tmp_path, **kw):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    fast = actzip.compile(path, x, tune=False, **kw)
    out = fast(x)
    return out if isinstance(out, list) else [out]


def theirs(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def check(model, x, tmp_path):
    got, want = ours(model, x, tmp_path), theirs(model, x)
    assert [a.dtype for a in got] == [b.dtype for b in want]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        most = float(np.abs(b).max(initial=1.0)) if b.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * most)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_onnx_lrn_even(size, tmp_path):
    x = normal(2, 7, 3, 3)
    model = make([N("LRN", ["x"], ["y"], size=size, alpha=0.5, bias=2.0)], {}, ["n", 7, 3, 3])
    wide = np.pad(x.astype(float) ** 2, [(0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)])
    sums = sum(wide[:, k : k + 7] for k in range(size))
    np.testing.assert_allclose(ours(model, x, tmp_path)[0], x / (2 + 0.5 / size * sums) ** 0.75, rtol=1e-5)


@pytest.mark.parametrize("size,wanted", [(11, 7), (13, 7), (9, 5), (28, 11), (17, 23), (7, 40)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_onnx_resize_scale(size, wanted, mode, tmp_path):
    scales = np.float32([1, 1, wanted / size, wanted / size])
    x = normal(1, 2, size, size)
    node = N(
        "Resize",
        ["x", "", "s"],
        ["y"],
        mode=mode,
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    check(make([node], {"s": scales}, ["n", 2, size, size]), x, tmp_path)


@pytest.mark.parametrize(
    "pad,pool",
    [
        ((0, 3, 2, 1), (2, 3, True)),
        ((4, 3, 4, 5), (2, 2, False)),
        ((1, 1, 1, 1), (3, 2, False)),
        ((2, 2, 2, 2), (2, 1, True)),
    ],
)
def test_pad_inf_pool(pad, pool):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(6, 8, 3)
            self.pool = nn.MaxPool2d(pool[0], pool[1], ceil_mode=pool[2])

        def forward(self, x):
            x = torch.relu(self.conv(x))
            return self.pool(nn.functional.pad(x, pad, value=-float("inf")))

    x, model = torch.randn(2, 6, 12, 10), Model().eval()
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(actzip.compile(model, x, tune=False)(x), want, rtol=1e-5, atol=1e-5)


def test_onnx_reshape_1_minus1(tmp_path):
    nodes = [N("Relu", ["x"], ["h"]), N("Reshape", ["h", "s"], ["r"]), N("Gemm", ["r", "w"], ["y"], transB=1)]
    model = make(nodes, {"s": np.int64([1, -1]), "w": normal(3, 100)}, ["n", 4, 5, 5])
    check(model, normal(1, 4, 5, 5), tmp_path)


def test_nudenet_unsqueeze(tmp_path):
    """A scalar index gives a scalar: what is unsqueezed and joined then has one dimension."""
    nodes = [
        N("Conv", ["x", "w"], ["r"], pads=[1, 1, 1, 1]),
        N("Shape", ["r"], ["s"]),
        N("Gather", ["s", "two"], ["h"]),
        N("Gather", ["s", "three"], ["v"]),
        N("Mul", ["h", "v"], ["hv"]),
        N("Unsqueeze", ["hv", "ax"], ["u"]),
        N("Concat", ["head", "u"], ["shape"], axis=0),
        N("Reshape", ["r", "shape"], ["y"]),
    ]
    constants = {
        "w": normal(8, 3, 3, 3),
        "two": np.int64(2),
        "three": np.int64(3),
        "ax": np.int64([0]),
        "head": np.int64([-1, 8]),
    }
    check(make(nodes, constants, ["batch", 3, 16, 16]), normal(2, 3, 16, 16), tmp_path)


def test_shape_arithmetic_of_exporters(tmp_path):
    """Casts, halves, floors, ranges, conditions and comparisons on a shape that depends on the batch."""
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Slice", ["s", "a0", "a1"], ["n"]),
        N("Slice", ["s", "a2", "a4"], ["hw"]),
        N("Cast", ["hw"], ["f"], to=TensorProto.FLOAT),
        N("Div", ["f", "two"], ["half"]),
        N("Floor", ["half"], ["fl"]),
        N("Cast", ["fl"], ["ints"], to=TensorProto.INT64),
        N("Equal", ["ints", "ints"], ["same"]),
        N("Where", ["same", "ints", "ints"], ["w"]),
        N("Concat", ["n", "minus", "w", "minus2"], ["shape"], axis=0),
        N("Mul", ["n", "one"], ["nn"]),
        N("Concat", ["nn", "three"], ["bshape"], axis=0),
        N("ConstantOfShape", ["bshape"], ["zeros"], value=numpy_helper.from_array(np.float32([2]), "v")),
        N("Reshape", ["x", "rs"], ["flat"]),
        N("ReduceMean", ["flat"], ["m"], axes=[2]),
        N("Add", ["m", "zeros"], ["y"]),
    ]
    constants = {
        "a0": np.int64([0]), "a1": np.int64([1]), "a2": np.int64([2]), "a4": np.int64([4]),
        "two": np.float32(2), "minus": np.int64([-1]), "minus2": np.int64([4]), "one": np.int64([1]),
        "three": np.int64([3]), "rs": np.int64([0, 3, -1]),
    }  # fmt: skip
    check(make(nodes, constants, ["batch", 3, 6, 5]), normal(3, 3, 6, 5), tmp_path)


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
def test_opset9(opset, tmp_path):
    nodes = [
        N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        N("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        N("Clip", ["n"], ["r"], min=0.0, max=6.0),
        N("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        N("Flatten", ["p"], ["f"]),
        N("Gemm", ["f", "fc"], ["l"]) if opset >= 11 else N("MatMul", ["f", "fc"], ["l"]),
        N("Softmax", ["l"], ["y"]),
    ]
    constants = {
        "w": normal(8, 3, 3, 3),
        "g": normal(8),
        "b": normal(8),
        "m": normal(8),
        "v": np.abs(normal(8)) + 1,
        "fc": normal(128, 5),
    }
    check(make(nodes, constants, [1, 3, 8, 8], opset), normal(1, 3, 8, 8), tmp_path)


def test_static_batch_calibration(tmp_path):
    model = make(
        [N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["y"])], {"w": normal(8, 3, 3, 3)}, [1, 3, 9, 9]
    )
    x = normal(6, 3, 9, 9)
    got = ours(model, x[:1], tmp_path, calibration=x)[0]
    np.testing.assert_allclose(got, theirs(model, x[:1])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0, -1])
def test_declared_dimensions_that_are_no_size(size, tmp_path):
    model = make(
        [N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["y"])], {"w": normal(8, 3, 3, 3)}, ["n", 3, 9, 9]
    )
    for i in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[i].dim_value = size
    x = normal(2, 3, 9, 7)
    got = ours(model, x, tmp_path)[0]
    for i in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[i].dim_param = f"d{i}"
    np.testing.assert_allclose(got, theirs(model, x)[0], rtol=1e-5, atol=1e-5)


ENDS = [np.int64([v]) for v in (2**63 - 1, 2**31 - 1, 2**31, 2**62, 9)] + [
    np.int32([v]) for v in (2**31 - 1, 9)
]


@pytest.mark.parametrize("end", ENDS, ids=lambda a: f"{a.dtype}_{a[0]}")
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_integer_ends_at_every_extreme(end, axis, tmp_path):
    start = np.array([np.iinfo(end.dtype).min], end.dtype)
    for begin in (start, np.zeros_like(start)):
        model = make(
            [N("Slice", ["x", "b", "e", "a"], ["h"]), N("Relu", ["h"], ["y"])],
            {"b": begin, "e": end, "a": np.array([axis], end.dtype)},
            ["n", 9, 3, 9],
        )
        check(model, normal(2, 9, 3, 9), tmp_path)


def test_backward_slices(tmp_path):
    constants = {
        "b": np.int64([-1, 5]),
        "e": np.int64([-(2**63), 0]),
        "a": np.int64([1, 3]),
        "s": np.int64([-1, -2]),
    }
    check(
        make([N("Slice", ["x", *constants], ["h"]), N("Relu", ["h"], ["y"])], constants, ["n", 5, 3, 7]),
        normal(2, 5, 3, 7),
        tmp_path,
    )


@pytest.mark.parametrize(
    "limit", [(), (1,), (1, 1), (3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1, 1), (1, 1, 3, 1, 1)]
)
@pytest.mark.parametrize("zero", [(), (1, 1, 1, 1, 1), (4, 5)])
def test_ranks_of_where_and_its_limits(limit, zero, tmp_path):
    """The threshold x > t has the shape that x, t and 0 broadcast to, which may have more
    dimensions than x."""
    nodes = [N("Greater", ["x", "t"], ["g"]), N("Where", ["g", "x", "z"], ["y"])]
    model = make(
        nodes, {"t": np.full(limit, 0.3, np.float32), "z": np.zeros(zero, np.float32)}, ["n", 3, 4, 5]
    )
    check(model, normal(2, 3, 4, 5), tmp_path)


@pytest.mark.parametrize(
    "array",
    [np.int64([[1, -(2**63)], [2**63 - 1, 7]]), np.int32(5), np.array([True, False]), np.float32([1.5])],
)
def test_a_constant_output(array, tmp_path):
    nodes = [N("Relu", ["x"], ["y"]), N("Identity", ["k"], ["c"])]
    model = make(nodes, {"k": array}, ["n", 3], outputs=("y", "c"))
    model.graph.output[1].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    check(model, normal(2, 3), tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "int64", "bool", "float16"])
def test_inputs_of_every_type(dtype, tmp_path):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        N("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        N("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
        N("Conv", ["f", "w"], ["c"]),
        N("Relu", ["c"], ["y"]),
    ]
    x = RNG.integers(0, 2 if dtype == "bool" else 100, (2, 9, 9, 3)).astype(dtype)
    check(make(nodes, {"w": normal(8, 3, 3, 3)}, ["n", 9, 9, 3], dtype=kind), x, tmp_path)


def test_a_network_in_float16(tmp_path):
    half = TensorProto.FLOAT16
    nodes = [N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["r"]), N("GlobalAveragePool", ["r"], ["y"])]
    model = make(nodes, {"w": normal(8, 3, 3, 3).astype(np.float16)}, ["n", 3, 9, 9], dtype=half, out=half)
    x = normal(2, 3, 9, 9).astype(np.float16)
    (got,), (want,) = ours(model, x, tmp_path), theirs(model, x)
    assert got.dtype == want.dtype == np.float16
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("to", ["int32", "int64"])
def test_casts_to_integers_are_towards_zero(to, tmp_path):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(to))
    nodes = [N("Mul", ["x", "k"], ["m"]), N("Cast", ["m"], ["i"], to=kind), N("Cast", ["i"], ["y"], to=1)]
    check(make(nodes, {"k": np.float32(5)}, ["n", 30]), normal(2, 30), tmp_path)


@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "pytorch_half_pixel", "asymmetric"])
@pytest.mark.parametrize(
    "mode,wanted", [("cubic", (12, 5)), ("cubic", (4, 21)), ("linear", (3, 4)), ("linear", (1, 20))]
)
def test_resize_cubic_and_antialiased(mode, wanted, coordinates, antialias, tmp_path):
    how = {"mode": mode, "coordinate_transformation_mode": coordinates, "antialias": antialias}
    node = N("Resize", ["x", "", "", "s"], ["y"], **how)
    check(
        make([node], {"s": np.int64([2, 3, *wanted])}, [2, 3, 9, 10], opset=18), normal(2, 3, 9, 10), tmp_path
    )


@pytest.mark.parametrize("pads", [(0, 0, 2, 1, 0, 0, 3, 4), (0, 1, 0, 0, 0, 2, 0, 5)])
def test_pad_wrap(pads, tmp_path):
    model = make([N("Pad", ["x", "p"], ["y"], mode="wrap")], {"p": np.int64(pads)}, ["n", 3, 5, 6], opset=19)
    check(model, normal(2, 3, 5, 6), tmp_path)


def test_resize_sizes_that_hold_the_batch(tmp_path):
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Slice", ["s", "zero", "two"], ["head"]),
        N("Concat", ["head", "hw"], ["sizes"], axis=0),
        N("Resize", ["x", "", "", "sizes"], ["y"], mode="linear"),
    ]
    constants = {"zero": np.int64([0]), "two": np.int64([2]), "hw": np.int64([7, 9])}
    model = make(nodes, constants, ["n", 3, 5, 6])
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    fast = actzip.compile(path, normal(1, 3, 5, 6), tune=False)
    for batch in (1, 4):
        x = normal(batch, 3, 5, 6)
        np.testing.assert_allclose(fast(x), theirs(model, x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "equation,other",
    [
        ("nchw,cd->ndhw", (3, 5)), ("nchw,cd->nhwd", (3, 5)), ("nchw,nchv->nhwv", None),
        ("nchw,c->nhw", (3,)), ("nchw,whd->ncd", (6, 4, 2)), ("nchw,nchw->n", None), ("nchw->nwc", None),
        ("nchw->nchw", None),
        ("nchw,chw->nchw", (3, 4, 6)), ("nchw,d->nchwd", (2,)), ("nchw,nkhw->nck", None),
        ("nchw,cd", (3, 5)), ("n...w,wd->n...d", (6, 5)), ("...hw,...vw->...hv", None),
        ("...w,w->...", (6,)), ("...w,w", (6,)),
    ],
)  # fmt: skip
def test_einsum(equation, other, tmp_path):
    constants = {} if other is None else {"k": normal(*other)}
    inputs = ["x"] if "," not in equation else ["x", "k" if constants else "x"]
    model = make(
        [N("Einsum", inputs, ["h"], equation=equation), N("Relu", ["h"], ["y"])], constants, ["n", 3, 4, 6]
    )
    x = normal(2, 3, 4, 6)
    if equation != "nchw,cd":  # the batch would come behind
        from actzip.runtime.from_onnx import from_onnx

        from_onnx(model)  # by the engine itself
    check(model, x, tmp_path)


def test_types_and_constant_outputs_survive_the_file_and_the_module(tmp_path):
    """`.actzip`, pickle and `actzip.load` give what the ONNX file gives: integers in, a constant of
    integers out."""
    nodes = [
        N("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        N("Conv", ["f", "w"], ["c"]),
        N("Relu", ["c"], ["y"]),
        N("Identity", ["k"], ["constant"]),
    ]
    constants = {"w": normal(8, 3, 3, 3), "k": np.int64([2**62, 1])}
    model = make(nodes, constants, ["n", 3, 9, 9], dtype=TensorProto.UINT8, outputs=("y", "constant"))
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    x = RNG.integers(0, 255, (2, 3, 9, 9)).astype(np.uint8)
    want = theirs(model, x)
    onnx.save(model, tmp_path / "m.onnx")
    fast = actzip.compile(tmp_path / "m.onnx", x, tune=False)
    fast.save(tmp_path / "m.actzip")
    net = actzip.load(tmp_path / "m.onnx")
    for run in (fast, pickle.loads(pickle.dumps(fast)), actzip.runtime.load(tmp_path / "m.actzip")):
        y, constant = run(x)
        np.testing.assert_allclose(y, want[0], rtol=0, atol=1e-5 * np.abs(want[0]).max())
        np.testing.assert_array_equal(constant, want[1])
    y, constant = net(torch.from_numpy(x))
    np.testing.assert_allclose(y.detach(), want[0], rtol=0, atol=1e-5 * np.abs(want[0]).max())
    np.testing.assert_array_equal(constant, want[1])


def test_an_empty_operand_of_a_concatenation_is_left_out(tmp_path):
    """What a spindle detector's export ends with: a map and padding of nothing."""
    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["r"]),
        onnx.helper.make_node("Concat", ["r", "none"], ["a"], axis=1),
        onnx.helper.make_node("Concat", ["none", "r", "r"], ["b"], axis=1),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, [1, 5, 2])],
        [info("a", 1, None), info("b", 1, None)],
        [onnx.numpy_helper.from_array(np.zeros((1, 0, 2), np.float32), "none")],
    )
    opset = onnx.helper.make_opsetid("", 13)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    x = np.random.default_rng(0).standard_normal((1, 5, 2), np.float32)
    r = np.maximum(x, 0)
    for got in (actzip.compile(path, x, tune=False, cache=False)(x), actzip.load(path)(torch.from_numpy(x))):
        np.testing.assert_array_equal(np.asarray(got[0]), r)
        np.testing.assert_array_equal(np.asarray(got[1]), np.concatenate([r, r], 1))


@pytest.mark.parametrize("repeats", [[1, 1, 5000, 1], [1, 3, 1, 2], [2, 1, 1, 1]])
def test_tiles_of_ones_are_no_concatenation(repeats, tmp_path):
    x = normal(1, 4, 1, 6)
    nodes = [N("Relu", ["x"], ["r"]), N("Tile", ["r", "t"], ["y"])]
    check(make(nodes, {"t": np.int64(repeats)}, [1, 4, 1, 6]), x, tmp_path)


@pytest.mark.parametrize("shape", [(2, 3, 11), (2, 3, 6, 7), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_resizes_of_signals_maps_and_volumes(rounding, shape, tmp_path):
    """In every combination of coordinates and rounding, among them PyTorch's "nearest-exact"."""
    rank = len(shape) - 2
    sizes = [(2 * d, d // 2, d + 3)[k % 3] for k, d in enumerate(shape[2:])]
    for coordinates in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"):
        how = {"coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
        nodes = [
            N("Resize", ["x", "", "", "s"], ["a"], **how), N("Resize", ["a", "", "f"], ["y"], **how),
        ]  # fmt: skip
        factor = [2.0] * rank if coordinates == "align_corners" else [2.0, 1.5, 0.6][:rank]
        constants = {"s": np.int64([*shape[:2], *sizes]), "f": np.float32([1, 1, *factor])}
        check(make(nodes, constants, ["n", *shape[1:]]), normal(*shape), tmp_path)


@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("shape", [(2, 3, 11), (2, 3, 4, 5, 6)], ids=str)
def test_linear_resizes_of_signals_and_volumes(coordinates, shape, tmp_path):
    sizes = [(2 * d, d // 2, d + 3)[k % 3] for k, d in enumerate(shape[2:])]
    node = N("Resize", ["x", "", "", "s"], ["y"], mode="linear", coordinate_transformation_mode=coordinates)
    check(make([node], {"s": np.int64([*shape[:2], *sizes])}, ["n", *shape[1:]]), normal(*shape), tmp_path)


@pytest.mark.parametrize(
    ("opset", "scale"),
    [
        (k, s)
        for k in (7, 9, 10)
        for s in ((2.0, 2.0), (1.5, 3.0), (0.5, 0.6), (0.4, 0.7))
        if k > 9 or min(s) > 1
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resizes_of_old_opsets_keep_their_coordinates(opset, mode, scale, tmp_path):
    """onnx's converter leaves them to the defaults of opset 11, which are half pixels."""
    scales = np.float32([1, 1, *scale])
    if opset == 7:
        node, constants = N("Upsample", ["x"], ["y"], mode=mode, scales=scales.tolist()), {}
    else:
        node, constants = (
            N("Upsample" if opset == 9 else "Resize", ["x", "s"], ["y"], mode=mode),
            {"s": scales},
        )
    check(make([node], constants, ["n", 3, 8, 10], opset=opset), normal(2, 3, 8, 10), tmp_path)


@pytest.mark.parametrize(
    "indices,batch",
    [
        ([[2], [0], [2], [1]], 0),
        ([[[1, -1], [0, 0]]], 0),
        ([[[1, 2, 3]], [[2, 0, 5]]], 0),
        ([[[0], [3]], [[-1], [1]], [[2], [2]]], 1),
    ],
)
def test_gather_nd_by_constants(indices, batch, tmp_path):
    nodes = [
        N("Transpose", ["x"], ["t"], perm=[1, 2, 3, 0]),
        N("GatherND", ["t", "i"], ["g"], batch_dims=batch),
        N("Relu", ["g"], ["y"]),
    ]
    model = make(nodes, {"i": np.array(indices, np.int64)}, ["n", 3, 4, 6])
    check(model, normal(2, 3, 4, 6), tmp_path)
    from actzip.runtime.from_onnx import from_onnx

    from_onnx(model)  # by the engine itself


@pytest.mark.parametrize("axis,chosen", [(1, [0, 1, 1]), (2, [1, 0, 0, 1]), (-1, [0, 1, 1, 0])])
def test_compress_by_constants(axis, chosen, tmp_path):
    nodes = [N("Compress", ["x", "c"], ["g"], axis=axis), N("Relu", ["g"], ["y"])]
    model = make(nodes, {"c": np.array(chosen, bool)}, ["n", 3, 4, 6])
    check(model, normal(2, 3, 4, 6), tmp_path)
    from actzip.runtime.from_onnx import from_onnx

    from_onnx(model)  # by the engine itself


def test_constants_that_the_reference_fails_at(tmp_path):
    """A depth of one element in a list, which ONNX's own reference does not take."""
    nodes = [N("OneHot", ["i", "depth", "values"], ["hot"]), N("Add", ["x", "hot"], ["y"])]
    constants = {"i": np.int64([2, 0]), "depth": np.int64([4]), "values": np.float32([0, 3])}
    check(make(nodes, constants, [2, 4]), normal(2, 4), tmp_path)
