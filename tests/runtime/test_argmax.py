"""argmax, ArgMax and the indices of max: integers that are right on every way through the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.interpret import interpret
from actzip.runtime.ops.reduce import MOST_INDICES, ArgMax
from wrapped import Of


def same(got, want):
    got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b) if b.dtype == torch.int64 else torch.allclose(a, b, atol=1e-5)


FORMS = {
    "channels": lambda x: x.argmax(1),
    "kept": lambda x: x.argmax(1, keepdim=True),
    "least": lambda x: x.argmin(-1),
    "moved": lambda x: x.argmax(1).unsqueeze(-1).transpose(1, 2).flatten(1),
    "max": lambda x: tuple(x.max(1)),
    "min kept": lambda x: tuple(x.min(2, keepdim=True)),
    "index of max": lambda x: x.max(3)[1],
    "as float": lambda x: x.argmax(1).float() * 0.5,
    "float output": lambda x: x.argmax(1).float(),
    "promoted": lambda x: x.argmax(1) + 0.5,
    "joined": lambda x: torch.cat([x.argmax(1, keepdim=True), x.argmin(1, keepdim=True)], 1),
    "behind a map": lambda x: (nn.functional.relu(x).argmax(1), nn.functional.max_pool2d(x, 2)),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_compiled_is_torchs(form):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, 8).round(decimals=1)  # with equals
    model = Of(FORMS[form]).eval()
    fast = actzip.compile(model, x, tune=False, cache=False)
    same(fast(x), model(x))
    big = torch.randn(4, 5, 6, 8)
    same(fast(big), model(big))
    arrays = fast(big.numpy())
    same(
        tuple(map(torch.from_numpy, arrays)) if isinstance(arrays, tuple) else torch.from_numpy(arrays),
        model(big),
    )


def test_behind_a_network_with_packed_maps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 7, 1), Of(lambda x: x.argmax(1))).eval()
    x = torch.randn(2, 3, 12, 12)
    fast = actzip.compile(net, x, tune=False, cache=False)
    with torch.no_grad():
        same(fast(x), net(x))


def test_nan_is_the_greatest_and_the_least():
    x = torch.randn(2, 9)
    x[0, 4] = x[0, 6] = torch.nan
    for f in (lambda x: x.argmax(1), lambda x: x.argmin(1)):
        same(actzip.compile(Of(f), x, tune=False, cache=False)(x), f(x))


def test_torch_compile_gives_integers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Of(lambda x: (x.argmax(1), x))).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        same(torch.compile(net, backend="actzip")(x), net(x))


def test_what_is_refused_says_so():
    x = torch.randn(2, 3)
    with pytest.raises(UnsupportedError, match="all images"):
        actzip.compile(Of(lambda x: x.argmax()), x, tune=False)
    with pytest.raises(UnsupportedError, match="batch"):
        actzip.compile(Of(lambda x: x.argmax(0)), x, tune=False)
    with pytest.raises(UnsupportedError, match=r"gives torch\.int64"):
        actzip.compile(Of(lambda x: x.argmax(1) + 1), x, tune=False)
    with pytest.raises(UnsupportedError, match="indices"):
        ArgMax("a", ("x",), "y").infer([(1, MOST_INDICES + 1)])


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize(("axis", "keep"), [(1, 1), (-1, 0), (2, 1)])
def test_onnx_is_its_reference(op, last, axis, keep, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    import actzip.onnx_backend as backend
    from actzip.runtime.from_onnx import from_onnx

    x = np.random.default_rng(0).integers(0, 4, (2, 3, 4, 5)).astype(np.float32)
    node = helper.make_node(op, ["x"], ["y"], axis=axis, keepdims=keep, select_last_index=last)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 5])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (want,) = ReferenceEvaluator(model).run(None, {"x": x})
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    built = from_onnx(model)
    for got in (
        actzip.compile(str(path), tune=False, cache=False)(x),
        *backend.run_model(model, [x]),
        *backend.run_node(node, [x]),
        interpret(built, {"x": torch.from_numpy(x)})[0][0].numpy(),
        actzip.load(path)(torch.from_numpy(x)).numpy(),
    ):
        assert got.dtype == want.dtype == np.int64
        assert np.array_equal(got, want)
    assert built.values[built.outputs[0]].dtype == "int64"
    assert isinstance(built.nodes[0], ArgMax) and built.shape(built.outputs[0])[0] == g.Sym()
