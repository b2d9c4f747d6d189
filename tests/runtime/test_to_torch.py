"""A Graph as a module is what the Graph means, and comes back as the Graph that the module is then."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import actzip
from actzip.activations import find_sites, set_thresholds
from actzip.cli import build
from actzip.errors import ActzipError, DataError, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import Act
from actzip.runtime.interpret import interpret
from actzip.runtime.to_torch import GraphNet, to_torch
from actzip.sparsify import calibrate_thresholds

N = g.Sym()
RNG = np.random.default_rng(0)


def w(*shape):
    return RNG.standard_normal(shape, np.float32)


def one(node_type, shape=(N, 4, 9, 11), **kw):
    graph = g.Graph("t")
    graph.add_input("x", shape)
    graph.outputs = [graph.add(node_type("n", ("x",), "y", **kw))]
    return graph


def assert_same(graph, net=None, batch=3):
    net = net or to_torch(graph)
    inputs = [torch.randn(g.concrete(graph.shape(v), batch)) for v in graph.inputs]
    want = interpret(graph, dict(zip(graph.inputs, inputs, strict=True)))[0]
    got = net(*inputs)
    for a, b in zip(want, got if isinstance(got, tuple) else (got,), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, equal_nan=True)
    return net


ACTS = [Act.of(k) for k in g.ACT_KINDS if k not in g.ACT_PARAM and k != "prelu"] + [
    Act.of("clip", lo=0.0, hi=6.0),
    Act.of("clip", lo=0.0),
    Act.of("clip", lo=-0.5, hi=0.25),
    Act.of("clip", hi=0.3),
    Act.of("hardsigmoid", alpha=0.2, beta=0.4),
    Act.of("threshold", param=np.float32([0.3])),
    Act.of("threshold", param=w(4).clip(0)),
    Act.of("threshold", param=np.float32([0.3]), hi=0.7),
    Act.of("prelu", param=np.float32([0.3])),
    Act.of("prelu", param=w(4)),
]


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activations(act):
    graph = one(ops.Activation, act=act)
    net = to_torch(graph)
    x = torch.randn(2, 4, 9, 11)
    want = interpret(graph, {"x": x})[0][0]
    torch.testing.assert_close(net(x), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    back = interpret(net.to_graph(), {"x": x})[0][0]
    torch.testing.assert_close(back, want, equal_nan=True, rtol=1e-5, atol=1e-5)


PADS = [(0, 0, 0, 0), (1, 2, 1, 2), (0, 1, 2, 1), (3, 0, 0, 3)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2))])
def test_convolutions(groups, padding, stride, dilation):
    kw = {"weight": w(8, 4 // groups, 3, 3), "stride": stride, "padding": padding, "dilation": dilation}
    for bias in (None, w(8)):
        net = assert_same(one(ops.Conv2d, groups=groups, bias=bias, **kw))
        assert isinstance(net.n, nn.Conv2d)
        assert_same(net.to_graph(), net)
    fused = one(ops.Conv2d, weight=w(8, 4, 3, 3), act=Act.of("relu"))
    assert_same(fused)
    assert_same(to_torch(fused).to_graph(), to_torch(fused))


@pytest.mark.parametrize("padding", PADS)
@pytest.mark.parametrize("output_padding", [(0, 0), (1, 0), (1, 1)])
def test_transposed_convolutions(padding, output_padding):
    graph = one(
        ops.ConvTranspose2d,
        weight=w(4, 3, 4, 4),
        bias=w(6),
        groups=2,
        stride=(2, 2),
        padding=padding,
        output_padding=output_padding,
    )
    net = assert_same(graph)
    assert_same(net.to_graph(), net)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_pools(kind, padding, ceil_mode, include):
    for kernel, stride in itertools.product(((3, 3), (3, 4)), ((1, 1), (2, 2))):
        assert_same(
            one(
                ops.Pool,
                kind=kind,
                kernel_size=kernel,
                stride=stride,
                padding=padding,
                ceil_mode=ceil_mode,
                count_include_pad=include,
            )
        )
    assert_same(one(ops.AdaptivePool, kind=kind, output_size=(2, 3)))


@pytest.mark.parametrize("shape", [(N, 4), (N, 4, 5), (N, 4, 5, 6), (N, 4, 5, 6, 3)])
def test_batch_norms_keep_their_statistics_in_training(shape):
    net = assert_same(one(ops.BatchNorm, shape, scale=w(4), shift=w(4)))
    assert isinstance(net.n, nn.modules.batchnorm._BatchNorm)
    net.train()
    assert_same(net.graph, net)
    assert_same(net.to_graph(), net)


@pytest.mark.parametrize("mode", ["reflect", "edge", "constant"])
def test_padding_has_a_gradient(mode):
    net = assert_same(one(ops.Pad, before=(0, 0, 2, 0), after=(0, 0, 1, 3), mode=mode))
    x = torch.randn(1, 4, 9, 11, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None


def small(classes=5, batch_norm=False):
    """A CNN as exporters write it: residual, concatenation, flatten."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
            self.a = nn.Conv2d(8, 8, 3, padding=1)
            self.b = nn.Conv2d(16, 8, 1)
            self.fc = nn.Linear(8 * 16, classes)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            y = torch.relu(self.a(x)) + x
            x = torch.clamp(self.b(torch.cat([x, y], 1)), 0, 6)
            return self.fc(torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))

    torch.manual_seed(1)
    return Net().eval()


@pytest.fixture
def onnx_file(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            small(),
            (torch.randn(2, 3, 16, 16),),
            str(path),
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
    return path


def test_an_onnx_file_is_a_module_that_everything_takes(onnx_file, tmp_path):
    net, x = actzip.load(onnx_file), torch.randn(5, 3, 16, 16)
    assert isinstance(net, GraphNet) and not net.training
    torch.testing.assert_close(net(x), small()(x), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 3
    state = net.state_dict()
    assert len(state) == 8  # weights and biases of four layers
    # its copy is its own
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert not torch.allclose(other(x), net(x))
    # thresholds, compiled and exported
    sites = [s for s in find_sites(net, x)[0] if s.sparse]
    assert len(sites) == 3
    set_thresholds(net, {s.name: 0.1 * (i + 1) for i, s in enumerate(sites)})
    want = net(x)
    fast = actzip.compile(net, x, tune=False, cache=False)
    torch.testing.assert_close(fast(x), want, rtol=1e-4, atol=1e-4)
    from actzip.runtime.onnx_export import export_onnx

    again = actzip.load(export_onnx(net, x[:1], tmp_path / "again.onnx"))
    torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-4)
    set_thresholds(net, {sites[1].name: torch.rand(8)})
    fast = actzip.compile(net, x, tune=False, cache=False)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)


def test_changed_weights_are_what_is_compiled(onnx_file):
    net, x = actzip.load(onnx_file), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.7)
    torch.testing.assert_close(
        actzip.compile(net, x, tune=False, cache=False)(x), net(x), rtol=1e-4, atol=1e-4
    )


def test_quantize_and_thresholds_take_onnx_files(onnx_file):
    x = torch.randn(8, 3, 16, 16)
    net = actzip.load(onnx_file)
    found = calibrate_thresholds(net, [x], density=0.2)
    assert found.thresholds and found.density < found.density_before
    actzip.quantize(net, [x], bits=8)
    fast = actzip.compile(net, x, tune=False, cache=False)
    assert float((fast(x) - net(x)).abs().max()) < 0.05 * float(net(x).abs().max())


def test_the_verb_export_takes_onnx_files(onnx_file, tmp_path):
    out = tmp_path / "out.onnx"
    result = CliRunner().invoke(build(), ["export", str(onnx_file), str(out)])
    assert result.exit_code == 0, result.output
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(actzip.load(out)(x), small()(x), rtol=1e-4, atol=1e-4)


def test_a_threshold_of_no_relu_is_refused(onnx_file):
    net = actzip.load(onnx_file)
    set_thresholds(net, {"nothing": 0.5})
    with pytest.raises(UnsupportedError, match="nothing"):
        net.to_graph()


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        actzip.load(tmp_path / "none.pt2")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(DataError):
        actzip.load(tmp_path / "bad.onnx")
    with pytest.raises(InputError, match="did you mean"):
        actzip.load("resnet19")
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(DataError, match="runs code"):
        actzip.load(tmp_path / "x.pth")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_onnx_operators_one_by_one(tmp_path):
    """Every node test of ONNX that the front end takes: the module is what the graph means."""
    onnx = pytest.importorskip("onnx")
    from onnx.backend.test.loader import load_model_tests

    from actzip.runtime.from_onnx import from_onnx

    compared = 0
    for case in load_model_tests(kind="node"):
        if case.model is None:
            pytest.skip("this version of onnx has its node tests in files")
        try:
            onnx.save(case.model, str(tmp_path / "m.onnx"))
            graph = from_onnx(tmp_path / "m.onnx")
            inputs = {v: torch.randn(g.concrete(graph.shape(v), 1)) for v in graph.inputs}
            want = interpret(graph, inputs)[0]
        except (ActzipError, RuntimeError, TypeError, ValueError):
            continue
        got = to_torch(graph)(*inputs.values())
        for a, b in zip(want, got if isinstance(got, tuple) else (got,), strict=True):
            torch.testing.assert_close(b, a, equal_nan=True, rtol=1e-4, atol=1e-4, msg=case.name)
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", ["p/add:0_pooling", "graph/conv", "p", "p/q/r"])
def test_a_layer_lies_on_the_way_of_a_name(name):
    graph = g.Graph("net")
    x = graph.add_input("x", (N, 4, 9, 11))
    p = graph.add(ops.Conv2d(name="p", inputs=(x,), output="a", weight=w(4, 4, 1, 1)))
    y = graph.add(ops.Conv2d(name=name, inputs=(p,), output="b", weight=w(5, 4, 1, 1)))
    graph.outputs.append(y)
    assert_same(graph)
    assert len([m for m in to_torch(graph).modules() if isinstance(m, nn.Conv2d)]) == 2


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_indices_of_a_resized_or_padded_map_are_no_activations(mode):
    graph = g.Graph("net")
    x = graph.add_input("x", (N, 4, 9, 11))
    y = graph.add(ops.Pad("p", (x,), "a", before=(0, 0, 1, 1), after=(0, 0, 2, 0), mode="edge"))
    y = graph.add(ops.Resize("r", (y,), "b", size=(20, 7), mode=mode))
    gate = Act.of("hardsigmoid", alpha=0.2, beta=0.5)
    graph.outputs = [graph.add(ops.Activation("h", (y,), "c", act=gate))]
    assert not find_sites(assert_same(graph), torch.randn(1, 4, 9, 11))[0]
