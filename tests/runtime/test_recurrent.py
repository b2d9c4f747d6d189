"""LSTM and GRU layers on the engine, against PyTorch and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import actzip
from actzip import cpu
from actzip.errors import UnsupportedError
from torches import needs_2_6

RNG = np.random.default_rng(0)


class Recogniser(nn.Module):
    """A convolution, a recurrent layer over the width, a linear layer; states too."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(1, 8, 3, padding=1), layer, nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x).relu().mean(2)
        y, state = self.layer(y.permute(0, 2, 1) if self.layer.batch_first else y.permute(2, 0, 1))
        return self.head(y), state[0] if isinstance(state, tuple) else state


FORMS = [
    {}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "batch_first": True}, {"hidden_size": 70},
]  # fmt: skip


def made(kind: type[nn.Module], form: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    size = int(form.get("hidden_size", 33))  # type: ignore[call-overload]
    layer = kind(8, **{"hidden_size": 33, **form})
    return Recogniser(layer, size * (2 if layer.bidirectional else 1)).eval()


@needs_2_6
@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_modules_at_every_batch_and_length(kind, form, tmp_path):
    model, x = made(kind, form), torch.randn(1, 1, 8, 20)
    fast = actzip.compile(model, x, tune=False, cache=False, parts=False, threads=2)
    for given in (x, torch.randn(11, 1, 8, 20), torch.randn(2, 1, 8, 31)):
        for got, want in zip(fast(given), model(given), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    fast.save(tmp_path / "m.actzip")
    loaded = actzip.runtime.load(tmp_path / "m.actzip")
    np.testing.assert_array_equal(loaded(x.numpy())[0], fast(x.numpy())[0])


@torch.no_grad()
@pytest.mark.parametrize("isa", list(cpu.info()["isas"]))
def test_every_instruction_set_and_number_of_threads(isa):
    model, x = made(nn.LSTM, {"bidirectional": True}), torch.randn(9, 1, 8, 12)
    with cpu.forced(isa):
        fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
        two = actzip.compile(model, x, tune=False, cache=False, threads=2)
        got = fast(x)[0]
        torch.testing.assert_close(got, model(x)[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(got, two(x)[0])
        torch.testing.assert_close(got[:, 3:4], fast(x[3:4])[0], atol=0, rtol=0)


@torch.no_grad()
def test_states_of_zeros_that_the_module_makes_itself():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(6, 10, num_layers=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(2, x.shape[1], 10)
            return self.layer(x, (zeros, zeros.clone()))[0]

    model, x = Own().eval(), torch.randn(5, 3, 6)
    fast = actzip.compile(model, x, tune=False, cache=False, parts=False)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_first_states_are_refused_by_name_and_run_elsewhere():
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer = nn.Conv1d(6, 6, 3, padding=1), nn.GRU(6, 10, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x).relu().permute(0, 2, 1)
            return self.layer(y, torch.ones(1, x.shape[0], 10))[0]

    model, x = Started().eval(), torch.randn(2, 6, 9)
    with pytest.raises(UnsupportedError, match=r"gru.*a first state other than zeros"):
        actzip.compile(model, x, tune=False, cache=False, parts=False)
    with pytest.warns(actzip.errors.ActzipWarning, match="run in PyTorch"):
        fast = actzip.compile(model, x, tune=False, cache=False)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


def file_of(folder, op, direction, *, bias=True, names=("y", "last"), **attributes):
    """An ONNX file of one recurrent layer of 5 steps, 3 images, 6 inputs and 10 hidden."""
    d, gates = 2 if direction == "bidirectional" else 1, 4 if op == "LSTM" else 3
    batch_first = attributes.get("layout", 0)
    arrays = {"w": (d, gates * 10, 6), "r": (d, gates * 10, 10), "b": (d, 2 * gates * 10)}
    arrays = {k: RNG.standard_normal(s).astype(np.float32) / 3 for k, s in arrays.items() if bias or k != "b"}
    node = helper.make_node(
        op, ["x", *arrays], list(names), hidden_size=10, direction=direction, **attributes
    )
    shape = [3, 5, 6] if batch_first else [5, 3, 6]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "layer.onnx"
    path.write_bytes(model.SerializeToString())
    return path, RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LSTM", {}), ("LSTM", {"bias": False}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"bias": False}), ("LSTM", {"activations": ["Sigmoid", "Tanh", "Tanh"]}),
    ],
    ids=str,
)  # fmt: skip
def test_onnx_files(op, attributes, direction, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    attributes = dict(attributes)
    if "activations" in attributes and direction == "bidirectional":
        attributes["activations"] *= 2
    path, x = file_of(tmp_path, op, direction, **attributes)
    fast = actzip.compile(path, x, tune=False, cache=False, parts=False)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for got, want in zip(fast(x), session.run(None, {"x": x}), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    net = actzip.load(path)
    with torch.no_grad():
        np.testing.assert_allclose(net(torch.from_numpy(x))[0].numpy(), fast(x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "more", "words"),
    [
        ("LSTM", {"clip": 3.0}, "clipped"),
        ("LSTM", {"activations": ["HardSigmoid", "Tanh", "Tanh"]}, "activations hardsigmoid"),
        ("LSTM", {"names": ("y", "last", "cell")}, "'cell' is not computed"),
        ("GRU", {"activations": ["Sigmoid", "Relu"]}, "activations sigmoid, relu"),
    ],
)
def test_forms_that_the_engine_lacks_are_refused_by_name(op, more, words, tmp_path):
    path, x = file_of(tmp_path, op, "forward", **more)
    with pytest.raises(UnsupportedError, match=words):
        actzip.compile(path, x, tune=False, cache=False, parts=False)


def test_gradients_flow_through_a_files_recurrent_layer(tmp_path):
    path, x = file_of(tmp_path, "LSTM", "bidirectional", names=("y",))
    net, given = actzip.load(path), torch.from_numpy(x).requires_grad_()
    net(given).square().sum().backward()
    assert given.grad is not None and bool(given.grad.any())


@needs_2_6
@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_sizes_and_files_share_the_recurrent_weights(kind, tmp_path):
    model, x = made(kind, {"bidirectional": True}), torch.randn(1, 1, 8, 20)
    fast = actzip.compile(model, x, tune=False, cache=False)
    kept = fast._store.used()
    assert [k for k in kept if "/recurrent/" in k]
    fast(torch.randn(1, 1, 8, 31))
    assert fast._store.used().keys() == kept.keys()
    fast.save(tmp_path / "m.actzip")
    loaded = actzip.runtime.load(tmp_path / "m.actzip")
    assert loaded._store.used().keys() == kept.keys()
    torch.testing.assert_close(loaded(x)[0], fast(x)[0], atol=0, rtol=0)
