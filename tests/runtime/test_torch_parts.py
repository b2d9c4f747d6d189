"""Modules of which the engine lacks operators: they run in parts, and one line says what runs in PyTorch."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import ActzipWarning, InputError, UnsupportedError
from actzip.runtime.torch_parts import PartitionedModule


class Sorted(nn.Module):
    """Convolutions, a sort and a cumulative product that the engine lacks, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.c = nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.b(self.a(x).relu()).relu()
        y = y.sort(1)[0] * y.cumprod(3)
        return {"map": self.c(y).relu(), "mean": y.mean((2, 3))}


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, PartitionedModule]:
    torch.manual_seed(0)
    model = Sorted().eval()
    with pytest.warns(ActzipWarning, match=r"operators run in PyTorch \(.*\), \d+ % of the time: ") as caught:
        fast = actzip.compile(model, torch.randn(1, 3, 16, 20), tune=False, threads=1)
    text = str(next(w.message for w in caught if "operators run" in str(w.message)))
    assert "sort" in text and "cumprod" in text and "\n" not in text
    assert isinstance(fast, PartitionedModule)
    return model, fast


def close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(want)
    for k, v in want.items():
        torch.testing.assert_close(torch.as_tensor(got[k]), v, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_outputs_are_the_modules_at_every_batch_and_size(made: tuple[nn.Module, PartitionedModule]) -> None:
    model, fast = made
    for shape in [(1, 3, 16, 20), (3, 3, 16, 20), (1, 3, 24, 9), (2, 3, 24, 9), (1, 3, 1, 1)]:
        x = torch.randn(shape)
        close(fast(x), model(x))
    y = fast(x.numpy())
    assert all(isinstance(v, np.ndarray) for v in y.values())


def test_explain_has_rows_of_both(made: tuple[nn.Module, PartitionedModule]) -> None:
    report = made[1].explain(runs=1)
    assert [r.op for r in report.rows].count("conv2d") == 3
    rest = report.rows[-1]
    assert rest.kernel == "pytorch" and "sort" in rest.why and report.macs > 0
    assert "1x3x16x20" in report.table()


def test_bad_inputs_and_files_are_typed_errors(
    made: tuple[nn.Module, PartitionedModule], tmp_path: Path
) -> None:
    _, fast = made
    for bad in (torch.randn(3, 16, 20), torch.randn(1, 3, 16, 20).double(), "x", torch.randn(0, 3, 16, 20)):
        with pytest.raises(InputError):
            fast(bad)
    with pytest.raises(InputError, match="does not run"):
        fast(torch.randn(1, 4, 16, 20))
    with pytest.raises(UnsupportedError, match="run in PyTorch"):
        fast.save(tmp_path / "a.actzip")
    with pytest.raises(UnsupportedError, match="pickle the module"):
        pickle.dumps(fast)


def test_where_nothing_is_left_for_the_engine_all_blockers_are_named() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort(1)[0] + x.cumprod(2)

    with pytest.raises(UnsupportedError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        actzip.compile(Nothing().eval(), torch.randn(1, 3, 8, 8), tune=False)
    assert "sort" in str(caught.value) and "cumprod" in str(caught.value)


def test_a_module_that_changes_itself_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3)
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += 1
            return self.c(x).sort(1)[0]

    with pytest.raises(UnsupportedError):
        actzip.compile(Counting().eval(), torch.randn(1, 3, 8, 8), tune=False)


class Named(Sorted):
    """A second input and a flag, by name; a list of inputs."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, *, more: list[torch.Tensor], scale: float = 1.0
    ) -> dict[str, torch.Tensor]:
        out = super().forward(x + more[0])
        return {k: scale * v for k, v in out.items()}


@torch.no_grad()
def test_keyword_arguments_and_nested_inputs_run_in_parts() -> None:
    torch.manual_seed(0)
    model = Named().eval()
    x, z = torch.randn(1, 3, 16, 20), torch.randn(1, 3, 16, 20)
    with pytest.warns(ActzipWarning, match="run in PyTorch"):
        fast = actzip.compile(model, {"x": x, "more": [z], "scale": 0.5}, tune=False, threads=1)
    for shape in [(1, 3, 16, 20), (2, 3, 9, 7)]:
        x, z = torch.randn(shape), torch.randn(shape)
        want = model(x, more=[z], scale=0.5)
        close(fast(x, more=[z], scale=0.5), want)
        close(fast({"x": x, "more": [z], "scale": 0.5}), want)
        arrays = fast(x=x.numpy(), more=[z.numpy()], scale=0.5)
        assert all(isinstance(v, np.ndarray) for v in arrays.values())
    assert fast.explain({"x": x, "more": [z], "scale": 0.5}, runs=1).macs > 0
    for args, kwargs in [((x,), {"more": [z]}), ((x,), {"more": [z, z], "scale": 0.5}), ((x, z), {})]:
        with pytest.raises(InputError):
            fast(*args, **kwargs)


class Reader(nn.Module):
    """Convolutions, a recurrent layer over the width, a linear layer: a text recogniser in small."""

    def __init__(self, kind=nn.LSTM, **kw):
        super().__init__()
        self.first = kw.get("batch_first", False)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.rnn = kind(64, 6, **kw)
        self.last = nn.Linear(12 if kw.get("bidirectional") else 6, 5)

    def forward(self, x):
        y = torch.relu(self.conv(x)).flatten(1, 2)
        return self.last(self.rnn(y.transpose(1, 2) if self.first else y.permute(2, 0, 1))[0])


@pytest.mark.parametrize(
    "kind,steps,kw",
    [
        (nn.LSTM, 5, {"num_layers": 2, "bidirectional": True}),
        (nn.GRU, 60, {"batch_first": True}),
        (nn.RNN, 60, {"batch_first": True}),
        (nn.RNN, 5, {"bidirectional": True, "nonlinearity": "relu"}),
    ],
)
def test_recurrent_layers_of_any_length(kind, steps, kw):
    """They stay one operator, which PyTorch runs where the engine lacks it: written out, many steps
    took minutes. The layer's mirrors of its parameters are no state."""
    torch.manual_seed(0)
    net = Reader(kind, **kw).eval()
    weights = [id(p) for p in net.rnn._flat_weights]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fast = actzip.compile(net, torch.rand(1, 1, 8, steps), tune=False)
    assert isinstance(fast, PartitionedModule) == (kind is nn.RNN)
    assert kind is not nn.RNN or any("1 rnn" in str(w.message) for w in said)
    assert [id(p) for p in net.rnn._flat_weights] == weights
    for batch in (1, 3):
        x = torch.rand(batch, 1, 8, steps)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=0, atol=1e-5)


def test_a_tensor_of_batch_one_repeated_along_the_batch():
    """Coordinates as further channels, in the engine; many repeats are no operands of a concatenation."""

    class Coordinates(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.linspace(-1, 1, 9).reshape(1, 1, 9, 1))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            wide = self.at.repeat(x.shape[0], 2, 1, x.shape[3])
            return self.conv(torch.cat((x, wide), 1))

    net = Coordinates().eval()
    fast = actzip.compile(net, torch.rand(1, 1, 9, 20), tune=False, parts=False)
    assert len(fast.graph.nodes) < 6
    for shape in ((1, 1, 9, 20), (3, 1, 9, 20), (2, 1, 9, 33)):
        x = torch.rand(shape)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=0, atol=1e-5)


class Overlapping(nn.Module):
    """A transposed convolution of which the engine lacks the form, between two that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose3d(8, 8, (1, 3, 3), 2, (0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.up(self.a(x).relu()).relu()).relu()


class Recurrent(nn.Module):
    """Pixels in 8 bits, a convolution, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(3, 8, 3, padding=1), nn.RNN(64, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x.permute(0, 3, 1, 2).float() / 255).relu()
        return self.head(self.rnn(y.permute(0, 3, 1, 2).flatten(2))[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Overlapping(), torch.rand(1, 3, 4, 8, 8)),
        (Recurrent(), torch.randint(0, 255, (1, 8, 20, 3), dtype=torch.uint8)),
    ],
    ids=["a form of a known operator", "8-bit input"],
)
def test_what_is_refused_by_its_numbers_or_types_leaves_the_rest_to_the_engine(model, x):
    model.eval()
    with pytest.warns(ActzipWarning, match="run in PyTorch"):
        fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    assert isinstance(fast, PartitionedModule)
    for given in (x, torch.cat([x, x]), x[:, :, : x.shape[2] - 2]):
        torch.testing.assert_close(fast(given), model(given), atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match=str(x.dtype).removeprefix("torch.")):
        fast(x.double())


class OfRows(nn.Module):
    """Every row of a map is a sequence, as in Sequencer: the batch of the layers between is N * H. The
    engine lacks the running sum."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.rows = nn.Linear(16, 12)
        self.between = nn.Linear(12, 12)
        self.turned = turned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu().permute(0, 2, 3, 1)
        n, h, w, c = y.shape
        y = y.reshape(n * h, w, c)
        y = y.transpose(0, 1) if self.turned else y
        y = self.between(self.rows(y).cumsum(0 if self.turned else 1)).relu()
        y = y.transpose(0, 1) if self.turned else y
        return self.b(y.reshape(n, h, w, 12).permute(0, 3, 1, 2)).relu()


@torch.no_grad()
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("onnx", [False, True])
def test_a_batch_that_is_folded_into_rows_may_grow(turned: bool, onnx: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OfRows(turned).eval()
    x = torch.randn(1, 3, 6, 7)
    source: object = model
    if onnx:
        pytest.importorskip("onnxruntime")
        source = tmp_path / "rows.onnx"
        axes = {"x": {0: "n"}, "y": {0: "n"}}
        torch.onnx.export(
            model, x, source, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = actzip.compile(source, x, tune=False, threads=1)
    assert type(fast).__name__.startswith("Partitioned")
    for n in (1, 2, 5, 1):
        x = torch.randn(n, 3, 6, 7)
        torch.testing.assert_close(torch.as_tensor(fast(x)), model(x), atol=2e-5, rtol=1e-5)


class Attentive(nn.Module):
    """Attention, whose kernels lay out their results as they like, beside a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, c)).cumsum(1)


@torch.no_grad()
def test_attention_in_a_module_that_runs_in_parts() -> None:
    """Its dropout is 0 by default, so it draws no random numbers; views behind it fit any strides."""
    torch.manual_seed(0)
    model = Attentive().eval()
    with pytest.warns(ActzipWarning, match="cumsum"):
        fast = actzip.compile(model, torch.randn(1, 10, 24), tune=False, threads=1)
    for n in (1, 3):
        x = torch.randn(n, 10, 24)
        torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=1e-5)


class _Statistics(nn.Module):
    """Variances, stacked and turned maps, pads that wrap, a constant identity."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.c = nn.Conv2d(8, 8, 3, padding=(1, 2), padding_mode="circular")
        self.register_buffer("e", torch.rand(300, 300))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.a(x).relu()
        z = self.c(y).relu()[..., 1:-1]
        stacked = torch.stack([y, z, 2 * y])
        found = [stacked.sum(0), stacked.mean(0, keepdim=True), stacked[1], stacked.amax(0)]
        found += [stacked.unbind(0)[2], stacked.prod(0), y.var((2, 3)), y.std(1, keepdim=True)]
        found += [y.var(dim=1, unbiased=False), *torch.std_mean(z, (2, 3)), y.flip(3).flip([1, 2])]
        return [*found, (torch.eye(300) * self.e).sum()]


@torch.no_grad()
def test_statistics_stacks_flips_and_circular_pads_run_on_the_engine() -> None:
    torch.manual_seed(0)
    model = _Statistics().eval()
    fast = actzip.compile(model, torch.randn(2, 3, 16, 16), tune=False, parts=False)
    for shape in [(2, 3, 16, 16), (1, 3, 16, 16), (3, 3, 12, 19)]:
        x = torch.randn(shape)
        for got, want in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("give", [lambda s: s, lambda s: s.max(0).indices, lambda s: s.sort(0).values])
@torch.no_grad()
def test_what_is_stacked_over_the_batch_and_not_added_up_runs_in_parts(give: Any) -> None:
    class Stacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return give(torch.stack([self.a(x), self.b(x)]))

    model, x = Stacks().eval(), torch.randn(2, 3, 9, 9)
    with pytest.raises(UnsupportedError):
        actzip.compile(model, x, tune=False, parts=False)
    with pytest.warns(ActzipWarning, match="run in PyTorch"):
        fast = actzip.compile(model, x, tune=False)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_norm_stays_in_the_part_of_its_convolution() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.c, self.d = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(self.a(x)).relu()
            left, right = self.d(self.c(y)).relu().chunk(2, 1)
            return (left * right).cumsum(1)

    model, x = Normed().eval(), torch.randn(2, 3, 16, 20)
    with pytest.warns(ActzipWarning, match="run in PyTorch"):
        fast = actzip.compile(model, x, tune=False, threads=1)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    rows = fast.explain(runs=1).rows
    assert [r.op for r in rows] == ["conv2d", "conv2d", "binary", "pytorch"]


@torch.no_grad()
def test_a_constant_without_dimensions_is_an_output_of_none() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale = nn.Conv2d(3, 8, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.a(x), self.scale.exp(), torch.tensor(3)

    model, x = Scale().eval(), torch.randn(2, 3, 16, 20)
    for got, want in zip(actzip.compile(model, x, tune=False)(x), model(x), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Conditioned(nn.Module):
    """A convolution, and numbers of classes and steps, as diffusion models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.names, self.steps = nn.Embedding(10, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, label: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        waves = step[:, None].float() * torch.exp(-torch.arange(4) / 2)
        more = self.names(label) + self.steps(torch.cat([waves.sin(), waves.cos()], 1))
        return self.b(self.a(x).relu() + more[:, :, None, None])


@torch.no_grad()
def test_inputs_of_wide_integers_are_read_in_pytorch() -> None:
    torch.manual_seed(0)
    model = Conditioned().eval()

    def inputs(n: int, h: int, w: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(n, 3, h, w), torch.arange(n) + 7 - n, torch.arange(n).int() * 100

    with pytest.warns(ActzipWarning, match="run in PyTorch.*an input of type torch.int"):
        fast = actzip.compile(model, inputs(2, 12, 14), tune=False)
    for size in [(2, 12, 14), (3, 12, 14), (1, 16, 10)]:
        given = inputs(*size)
        torch.testing.assert_close(fast(*given), model(*given), rtol=1e-4, atol=1e-5)
    assert "conv2d" in [r.op for r in fast.explain(runs=1).rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_floats_say_what_to_give(dtype: torch.dtype) -> None:
    model = nn.Conv2d(3, 8, 3).eval().to(dtype)
    with pytest.raises((InputError, UnsupportedError), match=r"model.float\(\)"):
        actzip.compile(model, torch.randn(1, 3, 8, 8).to(dtype), tune=False)


@torch.no_grad()
def test_division_by_powers_of_two_rounds_on_the_engine() -> None:
    class Divides(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.conv, self.number = nn.Conv2d(3, 8, 3), number

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = 9 * self.conv(x)
            return [torch.div(y, self.number, rounding_mode=m) for m in ("floor", "trunc")]

    x = torch.randint(-4, 5, (2, 3, 9, 9)).float()
    for number in (2, -0.25, 1):
        model = Divides(number).eval()
        model.conv.weight.copy_(torch.randint(-2, 3, (8, 3, 3, 3)))
        model.conv.bias.zero_()
        fast = actzip.compile(model, x, tune=False, parts=False)
        for got, want in zip(fast(x), model(x), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(UnsupportedError, match="by anything but a power of two"):
        actzip.compile(Divides(0.1).eval(), x, tune=False, parts=False)
