"""The torch.export front end: graphs that mean what the model does, and refusals that name operator
and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.activations import set_thresholds
from actzip.errors import InputError, UnsupportedError
from actzip.models._torchvision import import_torchvision
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.interpret import interpret
from actzip.runtime.ops.resize import _table
from actzip.runtime.passes import optimize
from actzip.runtime.tracing import capture
from torches import needs_2_6


class Fn(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *x):
        return self.f(*x)


def agrees(model, *shape, batches=(1, 3), tol=1e-5, example_batch=1):
    torch.manual_seed(0)
    graph = capture(model, torch.randn(example_batch, *shape))
    better = optimize(graph)
    model.eval()
    for n in batches:
        x = torch.randn(n, *shape)
        with torch.no_grad():
            want = model(x)
        for gr in (graph, better):
            (y, *_), _ = interpret(gr, {gr.inputs[0]: x})
            torch.testing.assert_close(y, want, rtol=tol, atol=tol * float(want.abs().max()) + 1e-12)
    return graph


FUNCTIONS = {
    "softmax": lambda x: F.softmax(x, 1) + F.log_softmax(x, 1),
    "elu": lambda x: F.elu(x, 0.7) + F.selu(x) + F.celu(x, 1.3),
    "softplus": lambda x: F.softplus(x) + F.softsign(x) + F.logsigmoid(x) + F.mish(x),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "leaky": lambda x: F.leaky_relu(x, 0.2) + F.threshold(x, 0.3, 0.0),
    "hard": lambda x: F.hardtanh(x, -0.5, 0.7) + F.hardswish(x) + F.hardsigmoid(x),
    "in_place": lambda x: (x * 2).relu_().add_(1).mul_(3).sigmoid_(),
    "arithmetic": lambda x: 3 - (x + 1) / 2 * x - x.abs() ** 1.5 + (1 / (x.abs() + 1)),
    "minmax": lambda x: torch.maximum(x, -x) - torch.minimum(x, x * 2) + x.clamp(min=-0.1).clamp(max=0.5),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "slices": lambda x: x[:, 1:, ::2, :-1].flatten(1),
    "select": lambda x: x[:, 0] + x[..., 2].unsqueeze(-1)[:, 0],
    "unbind": lambda x: sum(x.unbind(1)),
    "gather": lambda x: x[:, [3, 0, 1, 2]],
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 2).transpose(1, 2),
    "means": lambda x: (
        x.mean((2, 3)) + x.amax((2, 3)) + x.sum((2, 3)) + torch.linalg.vector_norm(x, dim=(2, 3))
    ),
    "pads": lambda x: (
        F.pad(x, (1, 2, 0, 1))
        + F.pad(x, (1, 2, 0, 1), mode="reflect")
        + F.pad(x, (1, 2, 0, 1), mode="replicate")
    ),
    "crop": lambda x: F.pad(x, (-1, -1, 0, 0)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(12, 12)),
    "nearest exact": lambda x: (
        F.interpolate(x, size=(9, 4), mode="nearest-exact")
        + F.interpolate(x, size=(3, 2), mode="nearest-exact").mean((2, 3), keepdim=True)
        + F.interpolate(x, scale_factor=(1.5, 0.7), mode="nearest-exact")
    ),
    "a signal enlarged": lambda x: torch.cat(
        [F.interpolate(x.flatten(2), size=54, mode=m) for m in ("nearest", "nearest-exact", "linear")]
        + [F.interpolate(x.flatten(2), size=54, mode="linear", align_corners=True)]
        + [F.interpolate(x.flatten(2), scale_factor=1.5, mode="linear")],
        1,
    ),
    "a volume enlarged": lambda x: torch.cat(
        [
            F.interpolate(x.reshape(-1, 4, 3, 2, 6), size=(5, 3, 4), mode=m)
            for m in ("nearest", "nearest-exact", "trilinear")
        ]
        + [F.interpolate(x.reshape(-1, 4, 3, 2, 6), size=(5, 3, 4), mode="trilinear", align_corners=True)]
        + [F.interpolate(x.reshape(-1, 4, 3, 2, 6), scale_factor=(1.7, 1.5, 0.7), mode="nearest-exact")],
        1,
    ),
    "bilinear": lambda x: (
        F.interpolate(x, size=(9, 7), mode="bilinear")
        + F.interpolate(x, size=(9, 7), mode="bilinear", align_corners=True)
    ),
    "cubic": lambda x: (
        F.interpolate(x, size=(9, 7), mode="bicubic")
        + F.interpolate(x, size=(9, 7), mode="bicubic", align_corners=True)
        + F.interpolate(x, scale_factor=(1.5, 1.2), mode="bicubic")
        + F.interpolate(x, scale_factor=(1.5, 1.2), mode="bicubic", recompute_scale_factor=True)
    ),
    "cubic, a shift": lambda x: F.interpolate(x, scale_factor=1.1, mode="bicubic"),  # as large as before
    "cubic, one axis": lambda x: (
        F.interpolate(x, size=(6, 9), mode="bicubic")
        + F.interpolate(x, scale_factor=(1.0, 1.5), mode="bicubic")
    ),
    "antialiased": lambda x: (
        F.interpolate(x, size=(3, 4), mode="bicubic", antialias=True)
        + F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True)
        + F.interpolate(x, scale_factor=(0.5, 0.7), mode="bilinear", antialias=True)
    ),
    "pools": lambda x: (
        F.max_pool2d(x, 3, 2, 1)
        + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        + F.adaptive_max_pool2d(x, 3)
    ),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "lrn": lambda x: F.local_response_norm(x, 3),
    "shuffle": lambda x: F.pixel_shuffle(x, 2) + F.channel_shuffle(x, 2).reshape(x.shape[0], 1, 12, 12),
    "expand": lambda x: (
        x.mean((2, 3), keepdim=True).expand_as(x) + x.mean(1, keepdim=True).repeat(1, 4, 1, 1)
    ),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "attention": lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1),
    "norms": lambda x: F.group_norm(x, 2) + F.layer_norm(x, (6, 6)) + F.instance_norm(x),
    "threshold": lambda x: torch.where(x > 0.25, x, torch.zeros(())),
    "threshold le": lambda x: torch.where(x <= 0.25, torch.zeros(()), x),
    "eval": lambda x: F.dropout(x, 0.5, training=False).contiguous().clone().to(torch.float32),
}


class Biased(nn.Module):
    """Attention biases as LeViT keeps them: gathered at the first run of a module in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.biases = nn.Parameter(torch.randn(6))
        self.register_buffer("at", torch.arange(6).flip(0), persistent=False)
        self.kept = {}

    def train(self, mode=True):
        super().train(mode)
        self.kept = {}
        return self

    def forward(self, x):
        key = str(x.device)
        if key not in self.kept:
            self.kept[key] = self.biases[self.at]
        return self.conv(x) + self.kept[key]


def test_what_a_first_run_keeps_is_no_obstacle():
    model = Biased().eval()
    agrees(model, 4, 6, 6)
    model.kept = {}
    capture(model, torch.randn(1, 4, 6, 6))
    assert model.kept == {}


class Shared(nn.Module):
    """One module under two names, as in CoaT, and an attribute that the first run sets."""

    def __init__(self):
        super().__init__()
        self.one = self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.one.weight
        self.size = None

    def forward(self, x):
        self.size = tuple(x.shape[2:])
        return self.tied(self.two(self.one(x).relu()).relu())


def test_a_module_under_two_names_is_no_change_of_the_model():
    model = Shared().eval()
    weight = model.one.weight
    agrees(model, 4, 6, 6)
    assert model.two.weight is weight and model.tied.weight is weight and type(weight) is nn.Parameter


def test_a_message_that_names_the_batch_does_not_fix_it():
    """As torchvision's vision transformer asserts its shapes."""

    def f(x):
        torch._assert(x.dim() == 4, f"expected (N, C, H, W), not {tuple(x.shape)}")
        return x.relu()

    graph = agrees(Fn(f), 4, 6, 6)
    assert graph.shape(graph.inputs[0])[0] == g.Sym()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    agrees(Fn(FUNCTIONS[name]), 4, 6, 6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(4, 8, (3, 1), padding=(1, 0), groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.PReLU(8)),
        nn.PReLU(4),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(2), nn.MultiheadAttention(36, 4, batch_first=True)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_layers(layer):
    if isinstance(layer, nn.Sequential) and isinstance(layer[-1], nn.MultiheadAttention):
        mha = layer[-1]
        layer = Fn(lambda x: mha(x.flatten(2), x.flatten(2), x.flatten(2), need_weights=False)[0])
        layer.mha = mha
    agrees(layer, 4, 6, 6, tol=1e-4)


def test_training_flags_come_back_and_eval_is_captured():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    graph = capture(model, torch.randn(2, 3, 5, 5))
    assert model.training and model[0].training and not model[1].training and model[2].training
    assert [n.op for n in graph.nodes] == ["conv2d", "batch_norm"]


def test_batch_is_symbolic_in_every_dimension_that_it_reaches():
    graph = capture(Fn(lambda x: x.reshape(x.shape[0] * 4, 9).sum(1, keepdim=True)), torch.randn(1, 4, 3, 3))
    assert graph.shape(graph.inputs[0]) == (g.Sym(), 4, 3, 3)
    assert graph.shape(graph.outputs[0]) == (g.Sym(4), 1)


def test_a_model_that_fixes_its_batch_is_captured_for_that_batch():
    model = Fn(lambda x: x.reshape(2, 12))
    graph = capture(model, torch.randn(2, 3, 2, 2))
    assert graph.shape(graph.inputs[0]) == (2, 3, 2, 2)
    with pytest.raises(InputError, match=r"\(3, 3, 2, 2\)"):
        interpret(graph, {graph.inputs[0]: torch.zeros(3, 3, 2, 2)})


def test_several_inputs_keywords_and_structured_outputs():
    class M(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "pair": (a * 2, [b])}

    graph = capture(M(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert len(graph.inputs) == 2 and len(graph.outputs) == 3
    graph = capture(M(), {"a": torch.randn(2, 3), "b": np.ones((2, 3), np.float32)})
    assert len(graph.inputs) == 2


@pytest.mark.parametrize("per_channel", [False, True])
def test_thresholds_beside_the_model_are_part_of_it(per_channel):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU6()).eval()
    t = torch.tensor([0.1, 0.2, 0.3, 0.4]) if per_channel else 0.25
    set_thresholds(model, {"1": t, "3": 0.1})
    graph = optimize(agrees(model, 3, 6, 6))
    acts = [n.act for n in graph.nodes]
    assert [a.kind for a in acts] == ["threshold", "threshold"]
    np.testing.assert_allclose(acts[0].param, [0.1, 0.2, 0.3, 0.4] if per_channel else [0.25], rtol=1e-6)
    assert acts[1].hi == 6.0


@pytest.mark.parametrize("exact", [False, True])
def test_nearest_pixels_are_those_of_pytorch_at_any_factor(exact):
    """As float32 rounds them: at a factor of 2.3 pixel 69 is number 29, not 30."""
    aten = torch.ops.aten
    function = aten._upsample_nearest_exact2d if exact else aten.upsample_nearest2d
    mode, coordinates = ("nearest_exact", "half_pixel") if exact else ("nearest", "asymmetric")
    for size in range(1, 72):
        x = torch.arange(float(size)).reshape(1, 1, 1, size)
        for factor in (None, 0.3, 1 / 3, 0.7, 1.0, 1.1, 1.3, 2.0, 2.3, 2.5, 3.0):
            for out in (size, 2 * size, 30, 97) if factor is None else (int(size * factor),):
                if out:
                    node = ops.Resize("", ("",), "", size=(1, out), mode=mode, coordinates=coordinates)
                    want = function(x, [1, out], None, factor).flatten().tolist()
                    assert _table(size, out, node, factor)[0] == want, (size, out, factor)


@needs_2_6
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Fn(lambda x: torch.fft.fft2(x).real), ["complex"]),
        (Fn(lambda x: torch.sort(x, 1)[0]), ["sort"]),
        (Fn(lambda x: x.cumprod(1)), ["cumprod"]),
        (Fn(lambda x: x + x[0]), ["batch"]),
        (Fn(lambda x: x.mean(0, keepdim=True) + x), ["batch"]),
        (Fn(lambda x: F.conv_transpose3d(x.unsqueeze(1), torch.ones(1, 1, 2, 1, 1), stride=3)), ["window"]),
        (Fn(lambda x: F.batch_norm(x, None, None, training=True)), ["batch"]),
        (Fn(lambda x: x + torch.randn(6)), ["random"]),
    ],
)  # fmt: skip
def test_refusals_name_the_operator_and_the_place(model, words):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(UnsupportedError) as error:
        capture(Outer(), torch.randn(2, 3, 6, 6))
    text = str(error.value)
    assert "inner" in text and "test_capture.py:" in text
    import re

    for w in words:
        assert re.search(w, text), text


def test_control_flow_on_data_is_refused():
    class M(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        UnsupportedError, match=r"torch\.export cannot capture.*x if x\.sum\(\) > 0.*control flow"
    ):
        capture(M(), torch.randn(2, 3))


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(0, 3),
        3,
        (),
        "x",
    ],
)
def test_bad_examples(example):
    with pytest.raises(InputError):
        capture(nn.Linear(3, 2), example)
    with pytest.raises(InputError):
        capture(lambda x: x, torch.zeros(2, 3))


MODELS = {
    "alexnet": 64,
    "squeezenet1_1": 64,
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "googlenet": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
}


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_models(name):
    models = import_torchvision().models
    torch.manual_seed(0)
    kw = {"init_weights": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **kw).eval()
    agrees(model, 3, MODELS[name], MODELS[name], batches=(2,), tol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bool])
def test_inputs_of_other_types_than_float32(dtype, tmp_path):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x.permute(0, 3, 1, 2).float() / 255).relu()

    model, x = Pixels().eval(), torch.randint(0, 255, (1, 12, 10, 3)).to(dtype)
    fast = actzip.compile(model, x, tune=False, cache=False, parts=False)
    for given in (x, torch.cat([x, x]), torch.randint(0, 255, (1, 14, 9, 3)).to(dtype)):
        torch.testing.assert_close(fast(given), model(given), atol=1e-5, rtol=1e-5)
    fast.save(tmp_path / "m.actzip")
    loaded = actzip.runtime.load(tmp_path / "m.actzip")
    np.testing.assert_array_equal(loaded(x.numpy()), fast(x.numpy()))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"the model takes {kind}"):
        fast(x.double())
