"""topk and TopK: values and int64 indices on every way through the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import InputError, UnsupportedError
from actzip.runtime.interpret import interpret
from actzip.runtime.ops.reduce import MOST_INDICES
from actzip.runtime.ops.topk import TopKIndices, TopKValues
from wrapped import Of


def same(got, want):
    got, want = (tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a = torch.from_numpy(a) if isinstance(a, np.ndarray) else a
        assert a.dtype == b.dtype
        assert (
            torch.equal(a, b) if b.dtype == torch.int64 else torch.allclose(a, b, atol=1e-5, equal_nan=True)
        )


FORMS = {
    "last": lambda x: tuple(x.topk(3)),
    "channels, least": lambda x: tuple(x.topk(2, dim=1, largest=False)),
    "all of a line": lambda x: tuple(x.topk(6, dim=2)),
    "values": lambda x: x.topk(3)[0],
    "indices": lambda x: x.topk(3, dim=1).indices,
    "moved": lambda x: x.flatten(2).topk(4, -1).indices.permute(0, 2, 1),
    "of scores": lambda x: tuple(torch.softmax(x.mean((2, 3)), -1).topk(5)),
    "behind a map": lambda x: (*nn.functional.relu(x - 1).amax((2, 3)).sub(x.mean((2, 3))).topk(2), x),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_compiled_is_torchs(form):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, 8)
    model = Of(FORMS[form]).eval()
    fast = actzip.compile(model, x, tune=False, cache=False)
    same(fast(x), model(x))
    big = torch.randn(4, 5, 6, 8)
    same(fast(big), model(big))
    same(fast(big.numpy()), model(big))


@pytest.mark.parametrize("largest", [True, False])
def test_nan_is_the_greatest(largest):
    x = torch.tensor([[3.0, torch.nan, -1.0, 7.0, -torch.inf, torch.inf]])
    f = lambda x: tuple(x.topk(6, largest=largest))  # noqa: E731
    same(actzip.compile(Of(f), x, tune=False, cache=False)(x), f(x))


def test_torch_compile_gives_integers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), Of(lambda x: tuple(x.topk(5)))).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        same(torch.compile(net, backend="actzip")(x), net(x))


def test_what_is_refused_says_so():
    with pytest.raises(UnsupportedError, match="batch"):
        actzip.compile(Of(lambda x: x.topk(1, 0)[0]), torch.randn(2, 3), tune=False)
    with pytest.raises(InputError, match="k is 4 for a dimension of 3"):
        TopKValues("t", ("x",), "y", k=4).infer([(1, 3)])
    with pytest.raises(UnsupportedError, match="indices"):
        TopKIndices("t", ("x",), "y", k=4).infer([(1, MOST_INDICES + 1)])


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("axis", "k"), [(1, 2), (-1, 5), (2, 1)])
def test_onnx_is_its_reference(largest, axis, k, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    import actzip.onnx_backend as backend
    from actzip.runtime.from_onnx import from_onnx

    x = np.random.default_rng(0).integers(0, 4, (2, 3, 4, 5)).astype(np.float32)
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=axis, largest=largest)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 5])],
        [
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("i", TensorProto.INT64, None),
        ],
        [numpy_helper.from_array(np.array([k], np.int64), "k")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    # ONNX's rule for equals, which its reference implementation does not keep: the lower index first
    order = np.argsort(-x if largest else x, axis=axis, kind="stable").take(range(k), axis)
    want = [np.take_along_axis(x, order, axis), order]
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    for got in (
        actzip.compile(str(path), tune=False, cache=False)(x),
        backend.run_model(model, [x]),
        backend.run_node(node, [x, np.array([k], np.int64)]),
        [t.numpy() for t in interpret(from_onnx(model), {"x": torch.from_numpy(x)})[0]],
        [t.numpy() for t in actzip.load(path)(torch.from_numpy(x))],
    ):
        assert [a.dtype for a in got] == [np.float32, np.int64]
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
