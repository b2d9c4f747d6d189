"""Quantizers of ONNX files give ONNX Runtime's numbers and are done as maps are written, not in passes
of their own."""

import itertools

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import torch  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import actzip  # noqa: E402
from actzip import cpu  # noqa: E402
from actzip.runtime import ops  # noqa: E402
from actzip.runtime.acts import Act  # noqa: E402
from actzip.runtime.compiled import compile_graph  # noqa: E402
from actzip.runtime.from_onnx import from_onnx  # noqa: E402
from actzip.runtime.interpret import apply_act, interpret  # noqa: E402
from actzip.runtime.passes import merge_acts, optimize  # noqa: E402


class Net:
    """A quantized network, node by node. Scales are powers of two unless ``rough``: every sum is then
    exact in float32, whatever the order, and halves to be rounded to even are many."""

    def __init__(self, seed=0, dtype=np.uint8, opset=13, rough=False, per_channel=True):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.opset, self.rough, self.per_channel = dtype, opset, rough, per_channel
        self.nodes, self.tensors, self.count = [], [], 0

    def name(self):
        self.count += 1
        return f"v{self.count}"

    def tensor(self, a):
        name = self.name()
        self.tensors.append(numpy_helper.from_array(np.asarray(a), name))
        return name

    def node(self, op, *inputs, **attributes):
        out = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out

    def scale(self, power, *shape):
        k = self.rng.integers(power, power + 2, shape).astype(np.float32)
        rough = self.rng.uniform(0.7, 1.4, shape) if self.rough else 1.0
        return np.asarray(np.float32(2) ** k * rough, np.float32)

    def qdq(self, x, power=-3, zero=None):
        info = np.iinfo(self.dtype)
        zero = info.min if zero is None else zero
        s, z = self.tensor(self.scale(power)), self.tensor(np.array(zero, self.dtype))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, s, z), s, z)

    def weight(self, *shape):
        q = self.tensor(self.rng.integers(-20, 21, shape).astype(np.int8))
        if not self.per_channel:
            return self.node("DequantizeLinear", q, self.tensor(self.scale(-5)))
        s = self.tensor(self.scale(-5, shape[0]))
        return self.node("DequantizeLinear", q, s, self.tensor(np.zeros(shape[0], np.int8)), axis=0)

    def conv(self, x, inputs, outputs, k=3, groups=1, **more):
        w = self.weight(outputs, inputs // groups, k, k)
        bias = self.tensor(self.rng.integers(-40, 40, outputs).astype(np.float32) * np.float32(2**-4))
        return self.node("Conv", x, w, bias, pads=[k // 2] * 4, group=groups, **more)

    def model(self, y, shape=("n", 3, 16, 16)):
        self.nodes.append(helper.make_node("Identity", [y], ["y"], name="last"))
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset < 21 else 10)


def network(**options):
    """A residual network with all that stands between quantizers."""
    net = Net(**options)
    middle = 0 if np.dtype(net.dtype).kind == "i" else 100
    x = net.qdq("x", -4, middle)
    x = net.qdq(net.node("Relu", net.conv(x, 3, 20)), -1)
    x = net.qdq(net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), -1)
    y = net.qdq(net.node("Relu", net.conv(x, 20, 20, groups=20)), 0)
    y = net.qdq(net.conv(y, 20, 24, 1), 2, middle)
    side = net.qdq(net.conv(x, 20, 24, 1), 1, middle)
    x = net.qdq(net.node("Relu", net.node("Add", y, side)), 2)
    x = net.node("Concat", x, net.qdq(net.node("Clip", net.conv(x, 24, 8), *bounds(net)), 1), axis=1)
    x = net.qdq(net.node("AveragePool", x, kernel_shape=[8, 8]), 1)
    x = net.node("Flatten", x, axis=1)
    return net.model(net.qdq(net.node("Gemm", x, net.weight(10, 32), transB=1), 3, middle))


def bounds(net):
    return net.tensor(np.float32(0)), net.tensor(np.float32(6))


def session(model, level="ORT_DISABLE_ALL"):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


KINDS = [
    (np.uint8, 13, True),
    (np.int8, 13, False),
    (np.int8, 19, True),
    (np.uint8, 21, False),
    (np.uint16, 21, True),
    (np.int16, 21, True),
]


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(("dtype", "opset", "per_channel"), KINDS)
def test_the_numbers_are_onnx_runtimes(isa, dtype, opset, per_channel):
    model = network(seed=opset, dtype=dtype, opset=opset, per_channel=per_channel)
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32) * 3
    want = session(model).run(None, {"x": x})[0]
    assert np.count_nonzero(want) > want.size / 2
    with cpu.forced(isa):
        for pack in ("auto", "always"):
            fast = compile_graph(from_onnx(model), example=x, winograd=False, pack=pack)
            assert np.array_equal(fast(x), want), pack
    assert np.array_equal(session(model, "ORT_ENABLE_ALL").run(None, {"x": x})[0], want)


def test_the_numbers_are_the_references():
    model = network(opset=21)
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16), np.float32) * 3
    want = ReferenceEvaluator(model).run(None, {"x": x})[0]
    assert np.array_equal(compile_graph(from_onnx(model), example=x, winograd=False)(x), want)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_with_any_scales_a_sum_may_round_the_other_way(dtype):
    net = Net(dtype=dtype, rough=True)
    x = net.qdq("x", -4, 3)
    c = net.qdq(net.node("Relu", net.conv(x, 3, 64)), -1)
    model = net.model(c, ("n", 3, 40, 40))
    x = np.random.default_rng(1).standard_normal((1, 3, 40, 40), np.float32) * 3
    want = session(model).run(None, {"x": x})[0]
    step = np.diff(np.unique(want)).max()
    got = compile_graph(from_onnx(model), example=x)(x)
    assert np.abs(got - want).max() <= 1.001 * step
    assert np.count_nonzero(np.abs(got - want) > step / 2) <= want.size / 1000


def test_no_quantizer_has_a_pass_of_its_own():
    """But for that of the input and those of pools to another scale."""
    graph = optimize(from_onnx(network()))
    left = [n for n in graph.nodes if isinstance(n, ops.Activation)]
    assert {n.act.kind for n in left} == {"quantize"} and len(left) == 3
    assert not any(isinstance(n, ops.Binary) for n in graph.nodes)  # the sum is its convolution's
    assert sum(n.act is not None for n in graph.nodes if isinstance(n, ops.Conv2d)) == 6
    assert [n.pre_act.kind for n in graph.nodes if getattr(n, "pre_act", None)] == ["quantize"]


def test_maps_behind_a_relu_and_a_quantizer_are_packed():
    x = np.random.default_rng(1).standard_normal((1, 3, 16, 16), np.float32)
    for dtype in (np.uint8, np.int8):
        fast = compile_graph(from_onnx(network(dtype=dtype)), example=x, pack="always")
        stored = [fast.graph.values[n.output].storage for n in fast.graph.nodes]
        assert stored.count("packed") >= 4


def test_what_is_left_as_it_was_written():
    """Other scales on both sides, one scale a channel, a value that others read between."""
    for case in ("scales", "channels", "read"):
        net = Net()
        c = net.conv("x", 3, 8)
        s = net.tensor(net.scale(-3, 8) if case == "channels" else net.scale(-3))
        z = net.tensor(np.full(8, 5, np.uint8) if case == "channels" else np.uint8(5))
        q = net.node("QuantizeLinear", c, s, z, axis=1)
        t = net.tensor(np.float32(0.5)) if case == "scales" else s
        y = net.node("DequantizeLinear", q, t, z, axis=1)
        if case == "read":
            y = net.node("Add", y, net.node("Cast", q, to=TensorProto.FLOAT))
        model = net.model(y)
        x = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
        want = session(model).run(None, {"x": x})[0]
        graph = from_onnx(model)
        assert np.array_equal(compile_graph(graph, example=x, winograd=False)(x), want), case
        got = interpret(graph, {"x": torch.from_numpy(x)})
        assert np.array_equal(next(iter(got[0])).numpy(), want), case


QUANTIZERS = [
    Act.of("quantize", alpha=0.1, lo=0, hi=255),
    Act.of("quantize", alpha=0.1, lo=-128, hi=127),
    Act.of("quantize", alpha=0.5, lo=-3, hi=4),
    Act.of("quantize", alpha=0.3, lo=-7, hi=-2),
]
OTHERS = [
    Act.of("relu"),
    Act.of("clip", lo=0.0, hi=6.0),
    Act.of("clip", lo=-1.0, hi=1.0),
    Act.of("clip", lo=0.25, hi=0.75),
    Act.of("clip", lo=-np.inf, hi=0.0),
    Act.of("clip", lo=5.0, hi=7.0),
]


@pytest.mark.parametrize("q", QUANTIZERS, ids=str)
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_bounds_join_a_quantizer_exactly_or_not_at_all(q, other):
    steps = np.arange(-300, 300, dtype=np.float32) / 2 * np.float32(q.alpha)
    x = np.concatenate([steps, np.nextafter(steps, np.float32(np.inf)), [np.inf, -np.inf]])
    x = torch.from_numpy(x.astype(np.float32))
    for first, second in itertools.permutations((q, other)):
        one = merge_acts(first, second)
        if one is not None:
            assert torch.equal(apply_act(one, x), apply_act(second, apply_act(first, x)))
    assert merge_acts(other, q) is not None or other.lo > 1 or q.hi < 0


@pytest.mark.parametrize("isa", cpu.isas())
def test_a_block_that_runs_by_turns_gives_the_same_numbers(isa):
    """MobileNet's, with maps beyond the caches."""
    net = Net()
    x = net.qdq("x", -4, 100)
    y = net.qdq(net.node("Clip", net.conv(x, 16, 96, 1), *bounds(net)), -4)
    y = net.qdq(net.node("Clip", net.conv(y, 96, 96, groups=96), *bounds(net)), -4)
    y = net.qdq(net.conv(y, 96, 16, 1), -1, 100)
    model = net.model(net.qdq(net.node("Add", x, y), 0, 100), ("n", 16, 80, 80))
    x = np.random.default_rng(1).standard_normal((2, 16, 80, 80), np.float32)
    want = session(model).run(None, {"x": x})[0]
    with cpu.forced(isa):
        fast = compile_graph(from_onnx(model), example=x[:1])
        assert "band" in {v.storage for v in fast.graph.values.values()}
        assert np.array_equal(fast(x), want)


class Integers(Net):
    """A network of operators on quantized tensors."""

    def quantizer(self, power, zero=None):
        info = np.iinfo(self.dtype)
        zero = info.min if zero is None else zero
        return self.tensor(self.scale(power)), self.tensor(np.array(zero, self.dtype))

    def of(self, op, *inputs, **attributes):
        domain = "" if op in ("QLinearConv", "QLinearMatMul") else "com.microsoft"
        return self.node(op, *inputs, domain=domain, **attributes)

    def weights(self, *shape, each=True):
        s = self.scale(-5, shape[0]) if each else self.scale(-5)
        zero = np.zeros(s.shape, np.int8)
        q = self.rng.integers(-20, 21, shape).astype(np.int8)
        return self.tensor(q), self.tensor(s), self.tensor(zero)

    def bias(self, n):
        return self.tensor(self.rng.integers(-900, 900, n).astype(np.int32))


def integers(dtype, each):
    net = Integers(dtype=dtype, opset=17)
    a, b, c = net.quantizer(-4, 100), net.quantizer(-1), net.quantizer(1)
    x = net.node("QuantizeLinear", "x", *a)
    x = net.of("QLinearConv", x, *a, *net.weights(20, 3, 3, 3, each=each), *b, net.bias(20), pads=[1] * 4)
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    w = net.weights(20, 20, 1, 1, each=each)
    y = net.of("QLinearConv", x, *b, *w, *c)
    z = net.of("QLinearAdd", x, *b, y, *c, *c)
    z = net.of("QLinearMul", z, *c, x, *b, *net.quantizer(4))
    last = net.nodes[-1].input[-2:]
    z = net.of("QLinearConcat", *c, z, *last, x, *b, axis=1)
    z = net.of("QLinearLeakyRelu", z, *c, *b, alpha=0.5)
    z = net.of("QLinearAveragePool", z, *b, *c, kernel_shape=[4, 4], strides=[4, 4])
    z = net.of("QLinearGlobalAveragePool", z, *c, *c)
    z = net.node("Flatten", z, axis=1)
    w, d = net.weights(10, 40, each=each), net.quantizer(2)
    gemm = net.of("QGemm", z, *c, *w, net.bias(10), *d, transB=1)
    s = net.tensor(net.scale(-5))
    w = net.tensor(net.rng.integers(-20, 21, (10, 6)).astype(np.int8))
    y = net.of("QLinearMatMul", gemm, *d, w, s, net.tensor(np.int8(0)), *d)
    return net.model(net.node("DequantizeLinear", y, *d))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_operators_on_quantized_tensors_give_onnx_runtimes_numbers(dtype, each, tmp_path):
    model = integers(dtype, each)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32) * 3
    want = session(model).run(None, {"x": x})[0]
    assert np.count_nonzero(want) > want.size / 2
    graph = from_onnx(model)
    assert np.array_equal(compile_graph(graph, example=x, winograd=False)(x), want)
    assert sum(isinstance(n, ops.Pool) and n.kind == "max" for n in optimize(graph).nodes) == 1


class Decomposed(torch.nn.Module):
    """As PyTorch's own quantization (``convert_pt2e``) writes a convolution."""

    def __init__(self, tensors):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("w", torch.randint(-20, 21, (8, 3, 3, 3), generator=rng, dtype=torch.int8))
        self.register_buffer("ws", 2.0 ** torch.randint(-6, -3, (8,), generator=rng))
        self.register_buffer("wz", torch.zeros(8, dtype=torch.int64))
        self.register_buffer("s", torch.tensor(0.125))
        self.register_buffer("z", torch.tensor(3))
        self.tensors = tensors

    def qdq(self, x, scale, zero):
        q = torch.ops.quantized_decomposed
        if self.tensors:
            scale, zero = self.s, self.z
        x = q.quantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)
        return q.dequantize_per_tensor(x, scale, zero, 0, 255, torch.uint8)

    def forward(self, x):
        per_channel = torch.ops.quantized_decomposed.dequantize_per_channel
        w = per_channel(self.w, self.ws, self.wz, 0, -127, 127, torch.int8)
        x = torch.nn.functional.conv2d(self.qdq(x, 0.0625, 128), w)
        return self.qdq(torch.relu(x), 0.25, 0)


@pytest.mark.parametrize("tensors", [False, True])
def test_programs_that_pytorch_quantized_run_whole(tensors):
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    net = Decomposed(tensors).eval()
    x = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(1)) * 2
    fast = actzip.compile(net, x, tune=False, cache=False, parts=False, winograd=False)
    assert torch.equal(fast(x), net(x))
    acts = [n.act for n in fast.graph.nodes if isinstance(n, ops.Conv2d)]
    assert [a.kind for a in acts] == ["quantize"]
