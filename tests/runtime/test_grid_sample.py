"""grid_sample and GridSample: bilinear and nearest, every padding, corners aligned or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.errors import InputError, UnsupportedError
from actzip.runtime import compile_graph
from actzip.runtime import graph as g
from actzip.runtime.interpret import interpret
from actzip.runtime.ops.grid_sample import MODES, PADDINGS, GridSample

ALL = list(itertools.product(MODES, PADDINGS, [False, True]))


class Sample(nn.Module):
    def __init__(self, mode, padding, align):
        super().__init__()
        self.how = {"mode": mode, "padding_mode": padding, "align_corners": align}

    def forward(self, x, grid):
        return F.grid_sample(F.relu(x), grid, **self.how) * 2


def places(*shape, seed=0):
    """Inside, at and far outside the map, never half-way between two pixels."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-2.7, 2.7, (*shape, 2)).astype(np.float32))


@pytest.mark.parametrize(("mode", "padding", "align"), ALL)
def test_compiled_is_torchs(mode, padding, align):
    torch.manual_seed(0)
    model, x, grid = Sample(mode, padding, align).eval(), torch.randn(2, 19, 7, 9), places(2, 5, 6)
    fast = actzip.compile(model, (x, grid), tune=False, cache=False)
    assert torch.allclose(fast(x, grid), model(x, grid), atol=1e-5)
    big, far = torch.randn(3, 19, 7, 9), places(3, 5, 6, seed=1) * 40
    assert torch.allclose(fast(big, far), model(big, far), atol=1e-4)


@pytest.mark.parametrize(("mode", "padding", "align"), ALL)
def test_edges_and_what_is_no_number_are_torchs(mode, padding, align):
    graph = g.Graph()
    x, at = graph.add_input("x", (1, 3, 4, 1)), graph.add_input("at", (1, 1, 9, 2))
    graph.outputs = [
        graph.add(GridSample("s", (x, at), "y", mode=mode, padding=padding, align_corners=align))
    ]
    edges = [-1.0, 1.0, 0.0, -1.0001, 1.0001, torch.nan, torch.inf, -torch.inf, 1e20]
    values = torch.randn(1, 3, 4, 1)
    for steady in (0.1, -3.3):
        grid = torch.tensor([[steady, e] for e in edges]).reshape(1, 1, 9, 2)
        got = compile_graph(graph)(values, grid)
        want = F.grid_sample(values, grid, mode, padding, align)
        if mode == "nearest":  # in the middle between two pixels rounding decides
            keep = [0, 1, 3, 4, 5, 6, 7, 8]
            got, want = got[..., keep], want[..., keep]
        assert torch.allclose(got, want, atol=1e-5, equal_nan=True)


def test_a_grid_that_is_computed_and_one_that_is_constant():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.where = nn.Linear(4, 6)
            self.register_buffer("fixed", places(1, 3, 3))

        def forward(self, x):
            theta = torch.tanh(self.where(x.mean((2, 3)))).view(-1, 2, 3)
            base = torch.linspace(-1, 1, 5)
            ones = torch.stack([base.expand(5, 5), base[:, None].expand(5, 5), torch.ones(5, 5)], -1)
            grid = (ones.view(1, 25, 3) @ theta.transpose(1, 2)).view(-1, 5, 5, 2)
            y = F.grid_sample(x, grid, align_corners=False)
            return y, F.grid_sample(x, self.fixed.expand(x.shape[0], -1, -1, -1), align_corners=True)

    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        want = model(x)
        for got in (
            actzip.compile(model, x, tune=False, cache=False)(x),
            torch.compile(model, backend="actzip")(x),
        ):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))


def test_what_is_refused_says_so():
    x, grid = torch.randn(1, 2, 4, 4), places(1, 2, 2)
    with pytest.raises(UnsupportedError, match="bilinear and nearest"):
        actzip.compile(Sample("bicubic", "zeros", False), (x, grid), tune=False)
    with pytest.raises(UnsupportedError, match="bilinear and nearest"):
        volume = torch.randn(1, 2, 4, 4, 4)
        actzip.compile(Sample("bilinear", "zeros", False), (volume, torch.zeros(1, 2, 2, 2, 3)), tune=False)
    node = GridSample("s", ("x", "at"), "y")
    with pytest.raises(InputError, match="grid of shape"):
        node.infer([(1, 2, 4, 4), (1, 2, 2, 3)])


@pytest.mark.parametrize(("mode", "padding", "align"), ALL)
@pytest.mark.parametrize("opset", [16, 20])
def test_onnx_is_its_reference(mode, padding, align, opset, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    import actzip.onnx_backend as backend
    from actzip.runtime.from_onnx import from_onnx

    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    grid = places(2, 3, 4).numpy()

    def model_of(opset, mode):
        node = helper.make_node(
            "GridSample", ["x", "at"], ["y"], mode=mode, padding_mode=padding, align_corners=int(align)
        )
        infos = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *s])
            for n, s in (("x", (3, 4, 5)), ("at", (3, 4, 2)), ("y", (3, 3, 4)))
        ]
        graph = helper.make_graph([node], "g", infos[:2], infos[2:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])

    new = {"bilinear": "linear"}.get(mode, mode)  # the reference knows the newer name alone
    (want,) = ReferenceEvaluator(model_of(20, new)).run(None, {"x": x, "at": grid})
    model = model_of(opset, mode if opset == 16 else new)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    values = {"x": torch.from_numpy(x), "at": torch.from_numpy(grid)}
    for got in (
        actzip.compile(str(path), tune=False, cache=False)(x, grid),
        *backend.run_model(model, [x, grid]),
        interpret(from_onnx(model), values)[0][0].numpy(),
    ):
        assert np.allclose(got, want, atol=1e-5)
