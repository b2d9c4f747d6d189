"""One compiled model at every height and width: outputs are the model's, weights are shared, and what
does not fit says why."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.errors import InputError
from actzip.runtime import load, sizes
from crowd import at_once
from torches import needs_2_6


def conv(i: int, o: int, **more: Any) -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False, **more), nn.BatchNorm2d(o), nn.ReLU())
    nn.init.uniform_(made[1].running_mean, -0.3, 0.3)
    nn.init.uniform_(made[1].running_var, 0.5, 2.0)
    return made


class Convolutional(nn.Module):
    """No layer knows a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 32), conv(32, 64, stride=2)
        self.c = nn.ConvTranspose2d(64, 8, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


class Classifier(nn.Module):
    """Adaptive pooling to what the map is already at the size that it is compiled at, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2, ceil_mode=True))
        self.pool, self.head = (
            nn.AdaptiveAvgPool2d((8, 12)),
            nn.Sequential(nn.Linear(32 * 96, 64), nn.ReLU(), nn.Linear(64, 5)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.body(x)).flatten(1))


class UNet(nn.Module):
    """Skips; maps resized to the size of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 32), conv(32, 64)
        self.d, self.e = conv(96, 32), conv(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        up = F.interpolate(c, size=b.shape[2:], mode="bilinear", align_corners=False)
        b = self.d(torch.cat([up, b], 1))
        up = F.interpolate(b, size=a.shape[2:], mode="nearest")
        return self.e(torch.cat([up, a], 1))


class Pyramid(nn.Module):
    """FPN: three outputs, lateral sums of maps enlarged by scale, cut to what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16, stride=2), conv(16, 16, stride=2), conv(16, 16, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        up = F.interpolate(c, scale_factor=2.0, mode="nearest")[:, :, : b.shape[2], : b.shape[3]]
        b = b + up
        up = F.interpolate(b, scale_factor=2.0, mode="bilinear", align_corners=False)
        a = a + up[:, :, : a.shape[2], : a.shape[3]]
        return {"a": self.head(a), "b": self.head(b), "c": self.head(c)}


class Branching(nn.Module):
    """Odd sizes are padded, even ones are not; a grid of positions is added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(17, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[2:]
        y = self.a(F.pad(x, (0, w % 2, 0, h % 2)))
        h, w = y.shape[2:]
        rows = torch.arange(h, dtype=torch.float32).view(1, 1, h, 1).expand(1, 1, h, w) / h
        y = self.b(torch.cat([y, rows.expand(y.shape[0], 1, h, w)], 1))
        return y.reshape(y.shape[0], 16, h // 2, 2, w // 2, 2).mean((3, 5)).flatten(2).transpose(1, 2)


class Positions(nn.Module):
    """A large weight that is resized to the map: other numbers at every size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 16)
        self.grid = nn.Parameter(torch.randn(1, 16, 32, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + F.interpolate(self.grid, size=y.shape[2:], mode="bilinear", align_corners=False)


MODELS = [Convolutional, Classifier, UNet, Pyramid, Branching]
SIZES = [(33, 47), (32, 48), (8, 8), (97, 16), (64, 128), (17, 4), (4, 5), (160, 200)]


def flat(y: Any) -> list[torch.Tensor]:
    if isinstance(y, dict):
        return [torch.as_tensor(v) for v in y.values()]
    return [torch.as_tensor(v) for v in y] if isinstance(y, (list, tuple)) else [torch.as_tensor(y)]


def close(got: Any, want: Any) -> None:
    for a, b in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_every_size_is_the_models(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    fast = actzip.compile(model, torch.randn(1, 3, 32, 48), threads=1, tune=kind is Pyramid)
    rng = np.random.default_rng(0)
    for h, w in [*SIZES, *rng.integers(4, 90, (6, 2)).tolist()]:
        x = torch.randn(int(rng.integers(1, 4)), 3, h, w)
        with torch.no_grad():
            close(fast(x), model(x))


@pytest.mark.parametrize("kind", [m for m in MODELS if m is not Classifier])  # which has no export
def test_an_onnx_file_with_dynamic_axes_takes_every_size(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    model, path = kind().eval(), str(tmp_path / "m.onnx")
    axes = {0: "n", 2: "h", 3: "w"}
    x = torch.randn(1, 3, 32, 48)
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    fast = actzip.compile(path, x, threads=1, tune=False)
    for i, (h, w) in enumerate(SIZES):
        a = np.random.default_rng(i).standard_normal((1 + i % 3, 3, h, w), np.float32)
        try:
            want = session.run(None, {"x": a})
        except Exception:  # Branching: it was traced for even sizes
            with pytest.raises(InputError, match="does not fit"):
                fast(a)
            continue
        close(fast(a), [torch.from_numpy(y) for y in want])


def test_a_size_that_does_not_fit_says_what_the_model_needs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 4)).eval()
    fast = actzip.compile(model, torch.randn(1, 3, 32, 32), tune=False)
    for shape in [(1, 3, 40, 40), (1, 4, 32, 32), (1, 3, 2, 2)]:
        with pytest.raises(
            InputError, match=r"compiled for \(N, 3, 32, 32\), and another size does not fit: "
        ) as e:
            fast(torch.randn(shape))
        assert "\n" not in str(e.value)
    assert fast(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_an_onnx_file_of_a_fixed_size_names_it(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    path = str(tmp_path / "fixed.onnx")
    x = torch.randn(1, 3, 32, 48)
    torch.onnx.export(Convolutional().eval(), (x,), path, dynamo=False, input_names=["x"])
    fast = actzip.compile(path, x, tune=False)
    with pytest.raises(InputError, match="fixes dimension 2 of 'x' at 32"):
        fast(torch.randn(1, 3, 64, 48))
    assert (
        actzip.compile(path, torch.randn(1, 3, 64, 48), tune=False)(torch.randn(1, 3, 64, 48)).shape[2] == 64
    )


def test_a_large_weight_that_depends_on_the_size_is_refused_and_never_wrong() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    x = torch.randn(1, 3, 32, 48)
    fast = actzip.compile(model, x, tune=False)
    with torch.no_grad():
        close(fast(x), model(x))
    with pytest.raises(InputError, match="other ones at this size"):
        fast(torch.randn(1, 3, 40, 48))


def test_weights_are_packed_once_for_all_sizes_and_the_model_is_let_go() -> None:
    model: nn.Module | None = nn.Sequential(*(conv(64, 64) for _ in range(6))).eval()
    weights = model[0][0].weight.detach()
    seen = weakref.ref(weights.untyped_storage())
    fast = actzip.compile(model, torch.randn(1, 64, 24, 24), tune=False, threads=1)
    y = fast(torch.ones(1, 64, 24, 24))
    packed = sum(a.nbytes for a in fast._store.used().values())
    del model, weights
    gc.collect()
    assert seen() is None
    for n in (16, 20, 31, 48):
        fast(torch.randn(1, 64, n, n + 1))
    assert sum(a.nbytes for a in fast._store.used().values()) <= 1.01 * packed
    other = fast._sizes.all()[-1]
    assert all(
        np.shares_memory(a.weight, b.weight)
        for a, b in zip(fast.graph.nodes, other.graph.nodes, strict=False)
        if hasattr(a, "weight") and hasattr(b, "weight")
    )
    torch.testing.assert_close(fast(torch.ones(1, 64, 24, 24)), y)


def test_weights_that_change_afterwards_change_no_size() -> None:
    torch.manual_seed(0)
    model = Convolutional().eval()
    fast = actzip.compile(model, torch.randn(1, 3, 32, 48), tune=False)
    x = torch.randn(1, 3, 20, 28)
    with torch.no_grad():
        want = model(x)
        for p in model.parameters():
            p.mul_(2)
    close(fast(x), want)


def test_few_sizes_are_kept_the_last_that_were_used() -> None:
    model = Convolutional().eval()
    fast = actzip.compile(model, torch.randn(1, 3, 16, 16), tune=False)
    for n in range(sizes.MOST_SIZES + 3):
        fast(torch.randn(1, 3, 20 + 2 * n, 20))
        fast(torch.randn(1, 3, 20, 20))
    kept = fast._sizes.all()
    assert len(kept) == sizes.MOST_SIZES
    assert kept[-1].graph.shape(kept[-1].graph.inputs[0])[2] == 20


def test_sizes_from_several_threads() -> None:
    torch.manual_seed(0)
    model = UNet().eval()
    fast = actzip.compile(model, torch.randn(1, 3, 16, 16), tune=False, threads=1)
    inputs = [torch.randn(1, 3, 16 + 3 * i, 20) for i in range(12)]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(inputs)):
            if not torch.allclose(fast(inputs[i]), want[i], atol=1e-4):
                wrong.append(i)

    at_once(work, 4)
    assert not wrong


def test_thresholds_and_quantized_maps_at_other_sizes() -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 3, 32, 48), torch.randn(1, 3, 40, 30)
    model = Convolutional().eval()
    actzip.activations.set_thresholds(model, {"a.2": 0.3, "b.2": 0.2})
    with torch.no_grad():
        want = model(other)
    close(actzip.compile(model, x, tune=False)(other), want)
    quantized = actzip.quantize(Convolutional().eval(), x, bits=8)
    with torch.no_grad():
        want = quantized(other)
    got = actzip.compile(quantized, x, tune=False)(other)
    assert float((got - want).abs().mean() / want.abs().mean()) < 0.02


def test_a_size_is_tuned_on_demand_and_when_it_came_often(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Convolutional().eval()
    x, y = torch.randn(1, 3, 32, 48), torch.randn(1, 3, 40, 24)
    monkeypatch.setattr("actzip.runtime.compiled._OFTEN", 3)
    monkeypatch.setattr("actzip.runtime.compiled._SECONDS", 0.05)
    fast = actzip.compile(model, x, threads=1, cache=False)
    with torch.no_grad():
        wants = model(x), model(y)

    def why(z: torch.Tensor) -> str:
        return " ".join(r.why for r in fast.explain(z, runs=1).rows)

    close(fast(y), wants[1])
    assert "as at" in why(y)
    for _ in range(3):
        close(fast(y), wants[1])
    assert "as at" not in why(y) and "trials" in why(y)
    fast.tune(x, seconds=0.05, cache=False)
    close(fast(x), wants[0])
    close(fast(y), wants[1])
    still = actzip.compile(model, x, tune=False)
    still.tune(y, seconds=0.05, cache=False)
    close(still(y), wants[1])
    assert "as at" not in " ".join(r.why for r in still.explain(y, runs=1).rows)


def test_inputs_of_one_channel_and_several_inputs(caplog: pytest.LogCaptureFixture) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(1, 16, stride=2), nn.Conv2d(32, 4, 3)

        def forward(self, x: torch.Tensor, *, mask: torch.Tensor) -> dict[str, Any]:
            y = self.a(x)
            z = F.interpolate(self.b(mask), size=y.shape[2:])
            return {"out": self.c(torch.cat([y, z], 1)), "height": y.shape[2]}

    torch.manual_seed(0)
    model = Masked().eval()
    example = {"x": torch.randn(1, 3, 32, 40), "mask": torch.randn(1, 1, 16, 20)}
    fast = actzip.compile(model, example, tune=False)
    for h, w in [(32, 40), (20, 30), (48, 18)]:
        x, mask = torch.randn(2, 3, h, w), torch.randn(2, 1, h // 2, w // 2)
        with torch.no_grad():
            want, got = model(x, mask=mask), fast(x=x, mask=mask)
        close(got["out"], want["out"])
        assert got["height"] == want["height"] == h
    assert "specialized" not in caplog.text


def test_tuning_for_no_time_is_a_typed_error() -> None:
    fast = actzip.compile(Convolutional().eval(), torch.randn(1, 3, 16, 16), tune=False)
    for bad in (-1, float("nan"), "a"):
        with pytest.raises(InputError, match="seconds"):
            fast.tune(torch.randn(1, 3, 16, 16), seconds=bad)


def test_explain_says_for_which_size() -> None:
    fast = actzip.compile(Convolutional().eval(), torch.randn(1, 3, 32, 48), tune=False)
    report = fast.explain(torch.randn(1, 3, 20, 30), runs=1)
    assert "1x3x20x30" in report.table()
    assert "1x3x32x48" in fast.explain(runs=1).table()
    assert any(r.why.startswith("as at 3x32x48") for r in report.rows)


@needs_2_6
@pytest.mark.parametrize("way", ["file", "pickle"])
@pytest.mark.parametrize("kind", [Convolutional, Classifier, UNet, Pyramid])
def test_files_and_pickles_take_sizes_without_the_model(
    kind: Callable[[], nn.Module], way: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    fast = actzip.compile(model, torch.randn(1, 3, 32, 48), tune=False, threads=1)
    if way == "file":
        again = actzip.runtime.load(fast.save(tmp_path / "m.actzip"), threads=1)
    else:
        again = pickle.loads(pickle.dumps(fast))
    assert again._resizer is not None
    taken = 0
    for h, w in [*SIZES, (48, 64), (144, 320), (16, 16)]:
        x = torch.randn(2, 3, h, w)
        try:
            got = again(x)
        except InputError as error:
            assert "were checked when it was saved" in str(error)
            continue
        taken += 1
        with torch.no_grad():
            close(got, model(x))
    assert taken >= 4
    twice = actzip.runtime.load(again.save(tmp_path / "n.actzip"), threads=1)
    close(twice(torch.ones(1, 3, 48, 64)), fast(torch.ones(1, 3, 48, 64)))


def test_a_network_without_rules_keeps_its_size_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 48)
    fast = actzip.compile(Branching().eval(), x, tune=False)
    again = actzip.runtime.load(fast.save(tmp_path / "m.actzip"))
    close(again(x), fast(x))
    with pytest.raises(InputError, match=r"compiled for \(N, 3, 32, 48\)"):
        again(torch.randn(1, 3, 33, 48))


def test_sizes_that_torch_cannot_solve_for_leave_its_log_empty(capfd: pytest.CaptureFixture[str]) -> None:
    """Pools in ceil_mode behind a stride, as GoogLeNet has them."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    model = nn.Sequential(conv(3, 16, stride=2), pool, conv(16, 16), pool, conv(16, 8)).eval()
    fast = actzip.compile(model, torch.randn(1, 3, 64, 64), tune=False, cache=False)
    for shape in [(1, 3, 64, 64), (3, 3, 49, 67)]:
        x = torch.randn(shape)
        close(fast(x), model(x).detach())
    assert not capfd.readouterr().err


class WithConstants(nn.Module):
    """Outputs that are the same for every input, of large weights and of the size, in other types."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 4200, 3, padding=1)
        self.places = places

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        w = self.b.weight
        out = {"y": self.b(self.a(x).relu()).mean(1), "double": w.double(), "half": w.half(), "own": w}
        out |= {"best": w.argmax(1), "positive": w > 0, "sum": w.sum(), "high": x.shape[2]}
        return out | ({"places": torch.arange(x.shape[-1])} if self.places else {})


def same_outputs(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for k, v in want.items():
        if isinstance(v, torch.Tensor):
            torch.testing.assert_close(got[k], v, atol=1e-4, rtol=1e-5)
        else:
            assert got[k] == v, k


@torch.no_grad()
@pytest.mark.parametrize("places", [False, True])
def test_constant_outputs_of_other_types_are_the_models_at_every_size(places: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithConstants(places).eval()
    small, other = torch.randn(1, 3, 8, 10), torch.randn(2, 3, 12, 9)
    fast = actzip.compile(model, small, tune=False, cache=False)
    assert sum(p.numel() for p in model.parameters()) * 4 > 8 << 20  # weights go to a temporary file
    for x in (small, other, small):
        same_outputs(fast(x), model(x))
    fast.save(tmp_path / "m.actzip")
    for twin in (load(tmp_path / "m.actzip"), pickle.loads(pickle.dumps(fast))):
        same_outputs(twin(small), model(small))
        if places:  # for numbers of an array there is no rule
            with pytest.raises(InputError, match="compiled for"):
                twin(other)
        else:
            same_outputs(twin(other), model(other))


def test_constant_outputs_of_files_are_the_files_at_every_size(tmp_path: Path) -> None:
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    wide, half = rng.standard_normal((70, 3, 5, 5)), rng.standard_normal((70, 70)).astype(np.float16)
    make, kind = onnx.helper.make_node, onnx.TensorProto
    nodes = [
        make("Cast", ["wide"], ["w"], to=kind.FLOAT),
        make("Conv", ["x", "w"], ["y"]),
        make("Identity", ["wide"], ["own"]),
        make("Identity", ["half"], ["small"]),
        make("ArgMax", ["half"], ["best"], axis=1),
        make("Cast", ["half"], ["positive"], to=kind.BOOL),
    ]
    info = onnx.helper.make_tensor_value_info
    names = {"y": kind.FLOAT, "own": kind.DOUBLE, "small": kind.FLOAT16, "best": kind.INT64}
    outputs = [info(n, t, None) for n, t in {**names, "positive": kind.BOOL}.items()]
    given = [onnx.numpy_helper.from_array(a, n) for n, a in (("wide", wide), ("half", half))]
    x = info("x", kind.FLOAT, ["n", 3, "h", "w"])
    graph = onnx.helper.make_graph(nodes, "g", [x], outputs, given)
    path = str(tmp_path / "m.onnx")
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        path,
    )
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    first = rng.standard_normal((1, 3, 9, 9)).astype(np.float32)
    fast = actzip.compile(path, first, tune=False, cache=False)
    for a in (first, rng.standard_normal((2, 3, 12, 7)).astype(np.float32)):
        for got, want in zip(fast(a), session.run(None, {"x": a}), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_pickles_of_files_take_sizes_without_rules(tmp_path: Path) -> None:
    """A constant that the size makes has no rule: the pickle holds the file's graph."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 64), nn.Conv2d(64, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x) + torch.arange(x.shape[3]).float().sin())

    torch.manual_seed(0)
    model, x, path = Placed().eval(), torch.randn(1, 3, 8, 10), str(tmp_path / "m.onnx")
    axes = {0: "n", 2: "h", 3: "w"}
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    fast = actzip.compile(path, x, tune=False, cache=False)
    twin = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fast))))
    with torch.no_grad():
        for shape in ((1, 3, 8, 10), (2, 3, 12, 9), (1, 3, 90, 7)):
            x = torch.randn(shape)
            torch.testing.assert_close(twin(x), model(x), atol=1e-4, rtol=1e-5)


class TwoImages(nn.Module):
    """Two inputs that have to be of one size, and their batch in another dimension within."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(16, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = self.b(F.relu(self.a(x) - self.a(y))).flatten(2).permute(2, 0, 1)
        return self.c(z).softmax(-1)


@needs_2_6
def test_files_of_two_inputs_of_one_size_take_others(tmp_path: Path) -> None:
    net = TwoImages().eval()
    fast = actzip.compile(net, (torch.rand(2, 3, 32, 48), torch.rand(2, 3, 32, 48)), tune=False, cache=False)
    there = load(fast.save(tmp_path / "m.actzip"))
    for shape in ((1, 3, 17, 21), (3, 3, 64, 16)):
        x, y = torch.rand(shape), torch.rand(shape)
        for twin in (fast, there, pickle.loads(pickle.dumps(there))):
            torch.testing.assert_close(twin(x, y), net(x, y).detach(), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"dimension 3 of input 'y' is 22 and .* 'x' 21: they are one size"):
        there(torch.rand(1, 3, 17, 21), torch.rand(1, 3, 17, 22))


class Queries(nn.Module):
    """Attention from queries of the model's own, as detectors have: numbers that the batch repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.queries = conv(3, 16), nn.Parameter(torch.randn(5, 16))
        self.own, self.cross = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.body(x).flatten(2).transpose(1, 2)
        q = self.queries.expand(x.shape[0], -1, -1)
        q = q + self.own(q, q, q)[0]
        return q + self.cross(q, keys, keys)[0]


@pytest.mark.filterwarnings("ignore:::torch")
@pytest.mark.parametrize("way", ["module", "file"])
def test_attention_of_constant_queries_runs_on_the_engine_at_any_batch(way: str, tmp_path: Path) -> None:
    net, x = Queries().eval(), torch.rand(2, 3, 8, 8)
    source: Any = net
    if way == "file":
        source = tmp_path / "m.onnx"
        axes = {"x": {0: "n"}}
        torch.onnx.export(net, (x,), source, dynamo=False, input_names=["x"], dynamic_axes=axes)
    fast = actzip.compile(source, x, tune=False, cache=False)
    assert isinstance(fast, actzip.runtime.CompiledModel)
    for batch in (1, 2, 5):
        x = torch.rand(batch, 3, 8, 8)
        torch.testing.assert_close(fast(x), net(x).detach(), rtol=0, atol=1e-5)


def test_a_network_for_one_batch_is_made_again_for_another(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make = onnx.helper.make_node
    nodes = [  # numbers that depend on the batch by more than its size: none that the engine keeps open
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "zero"], ["n"]),
        make("Range", ["zero", "n", "one"], ["r"]),
        make("Cast", ["r"], ["f"], to=1),
        make("Reshape", ["f", "column"], ["c"]),
        make("Add", ["x", "c"], ["y"]),
    ]
    numbers = {"zero": np.int64(0), "one": np.int64(1), "column": np.array([-1, 1], np.int64)}
    for declared in ("n", 2):
        graph = onnx.helper.make_graph(
            nodes,
            "g",
            [onnx.helper.make_tensor_value_info("x", 1, [declared, 4])],
            [onnx.helper.make_tensor_value_info("y", 1, None)],
            [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items()],
        )
        path = tmp_path / f"{declared}.onnx"
        onnx.save(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
            path,
        )
        fast = actzip.compile(path, np.zeros((2, 4), np.float32), tune=False, cache=False)
        x = np.random.default_rng(0).random((3, 4), np.float32)
        if declared == "n":
            np.testing.assert_array_equal(fast(x), x + np.arange(3, dtype=np.float32)[:, None])
        else:
            with pytest.raises(InputError, match="fixes dimension 0 of 'x' at 2"):
                fast(x)


@pytest.mark.parametrize("by", [0, 2])
def test_small_weights_that_depend_on_the_size_are_refused_and_never_wrong(by: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    branches = [
        onnx.helper.make_graph([make("Conv", ["x", w], [f"{w}_y"])], w, [], [value(f"{w}_y", 1, None)])
        for w in "ab"
    ]
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "axis"], ["n"]),
        make("Equal", ["n", "one"], ["c"]),
        make("If", ["c"], ["i"], then_branch=branches[0], else_branch=branches[1]),
        make("Relu", ["i"], ["y"]),
    ]
    numbers = {"axis": np.int64(by), "one": np.int64(1 if by == 0 else 8)}
    numbers |= {w: rng.standard_normal((8, 3, 3, 3)).astype(np.float32) for w in "ab"}
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in numbers.items()]
    shapes = [value("x", 1, ["n", 3, "h", 8])], [value("y", 1, None)]
    graph, opset = onnx.helper.make_graph(nodes, "g", *shapes, tensors), [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    fast = actzip.compile(path, np.zeros((1, 3, 8, 8), np.float32), tune=False, cache=False)
    fast(np.zeros((1, 3, 8, 8), np.float32))
    other = (2, 3, 8, 8) if by == 0 else (1, 3, 9, 8)
    with pytest.raises(InputError, match="are other ones at this size"):
        fast(np.zeros(other, np.float32))
