"""An ONNX file that leaves sizes open loads without an example, and its module takes every size that
the file takes: outputs are ONNX Runtime's, parameters, hooks and thresholds are there once."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip import cli
from actzip.activations import find_sites, set_thresholds
from actzip.errors import ActzipError, InputError
from actzip.runtime.to_torch import GraphNet

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class UNet(nn.Module):
    """A map resized to the size of another, a pool, BatchNorm, sizes in a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(64), nn.Conv2d(96, 8, 3, padding=1)
        nn.init.uniform_(self.norm.running_mean, -0.3, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.a(x))
        b = self.norm(F.relu(self.b(F.max_pool2d(a, 2))))
        up = F.interpolate(b, size=a.shape[2:], mode="bilinear", align_corners=False)
        y = self.c(torch.cat([up, a], 1))
        return y.flatten(2).transpose(1, 2)


SIZES = [(224, 224), (32, 48), (33, 47), (64, 20)]


def export(model: nn.Module, path: Path, x: Any = None, **more: Any) -> Path:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 48) if x is None else x
    axes = more.pop("dynamic_axes", {"x": {0: "n", 2: "h", 3: "w"}})
    torch.onnx.export(
        model.eval(), (x,), str(path), dynamo=False, input_names=["x"], dynamic_axes=axes, **more
    )
    return path


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return export(UNet(), tmp_path / "unet.onnx")


def session(path: Path) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def close(got: Any, want: Any, atol: float = 2e-5) -> None:
    want = torch.as_tensor(want)
    torch.testing.assert_close(
        torch.as_tensor(got), want, atol=atol * max(1.0, float(want.abs().max())), rtol=0
    )


def test_it_loads_and_takes_every_size(unet: Path) -> None:
    net, run = actzip.load(unet), session(unet)
    assert isinstance(net, GraphNet) and net.batch is None and list(net.open) == ["x"]
    weights = {p.data_ptr() for p in net.parameters()}
    for i, (h, w) in enumerate(SIZES * 2):
        x = torch.randn(1 + i % 3, 3, h, w)
        close(net(x), run.run(None, {"x": x.numpy()})[0])
    assert {p.data_ptr() for p in net.parameters()} == weights and len(net.state_dict()) == 11


def test_hooks_and_parameters_are_those_of_the_submodules_at_every_size(unet: Path) -> None:
    net = actzip.load(unet)
    seen: list[tuple[int, ...]] = []
    for _, module in net.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda _m, _a, y: seen.append(tuple(y.shape)))
    for h, w in SIZES:
        seen.clear()
        net(torch.randn(1, 3, h, w))
        assert len(seen) == len(net.graph.nodes) and (1, 32, h, w) in seen
    x = torch.randn(2, 3, 40, 24)
    before = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    assert float((net(x) - before).abs().max()) > 1e-3
    want = net(x)
    fast = actzip.compile(net, x, tune=False, cache=False)
    close(fast(x), want.detach())
    for h, w in SIZES:
        x = torch.randn(2, 3, h, w)
        close(fast(x), net(x).detach())


def test_thresholds_hold_at_every_size_compiled_or_not(unet: Path) -> None:
    net = actzip.load(unet)
    sites = [s for s in find_sites(net, torch.randn(1, 3, 48, 32))[0] if s.sparse]
    assert len(sites) == 2
    set_thresholds(net, {s.name: 0.2 + 0.1 * i for i, s in enumerate(sites)})
    fast = actzip.compile(net, torch.randn(1, 3, 48, 32), tune=False, cache=False)
    plain = actzip.load(unet)
    for h, w in SIZES:
        x = torch.randn(2, 3, h, w)
        assert float((net(x) - plain(x)).abs().max()) > 1e-3
        close(fast(x), net(x).detach())


def test_copies_and_pickles_take_every_size(unet: Path) -> None:
    net = actzip.load(unet)
    x = torch.randn(1, 3, 20, 28)
    want = net(x).detach()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.0)
        close(twin(x), want)
        with torch.no_grad():
            next(twin.parameters()).mul_(2)
        assert float((twin(x) - want).abs().max()) > 1e-3
        close(net(x).detach(), want)


def test_the_packages_verbs_take_inputs_of_another_size(unet: Path) -> None:
    net = actzip.load(unet)
    batches = [torch.randn(4, 3, 40, 56) for _ in range(3)]
    report = actzip.profile(net, batches, engine=False, progress=False)
    rows = {r["name"]: r for r in report.to_dict()["layers"]}
    assert any(r["macs"] == 40 * 56 * 32 * 27 for r in rows.values()), rows.keys()
    quantized = actzip.quantize(actzip.load(unet), batches, bits=8)
    fast = actzip.compile(quantized, batches[0], tune=False, cache=False)
    want = quantized(batches[0]).detach()
    assert float((fast(batches[0]) - want).abs().max()) < 0.05 * float(want.abs().max())
    found = actzip.accelerate(net, batches, max_error=0.5, by="macs", attempts=1, threads=1)
    assert found.model(batches[0]).shape == want.shape


def test_a_size_that_does_not_fit_is_refused_and_the_next_call_runs(unet: Path) -> None:
    net = actzip.load(unet)
    for shape in [(1, 4, 32, 32), (3, 32, 32), (1, 3, 0, 32)]:
        with pytest.raises(ActzipError) as error:
            net(torch.randn(shape))
        assert "\n" not in str(error.value)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1024, 8)


def test_padding_that_depends_on_the_size(tmp_path: Path) -> None:
    """SAME_UPPER with stride 2, as TensorFlow's exporters write it."""
    h = onnx.helper
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(s, np.float32) for s in [(32, 3, 3, 3), (32, 32, 5, 5)]]
    nodes = [
        h.make_node("Conv", ["x", "w0"], ["a"], auto_pad="SAME_UPPER", strides=[2, 2]),
        h.make_node("Relu", ["a"], ["b"]),
        h.make_node("Conv", ["b", "w1"], ["c"], auto_pad="SAME_LOWER", strides=[2, 2]),
        h.make_node("MaxPool", ["c"], ["y"], auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[2, 2]),
    ]
    graph = h.make_graph(
        nodes,
        "tf",
        [h.make_tensor_value_info("x", 1, ["n", 3, "h", "w"])],
        [h.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    path = tmp_path / "tf.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8), str(path))
    net, run = actzip.load(path), session(path)
    fast = actzip.compile(net, torch.randn(1, 3, 31, 40), tune=False, cache=False)
    for size in [(224, 224), (31, 40), (30, 41), (33, 35), (64, 61)]:
        x = torch.randn(2, 3, *size)
        want = run.run(None, {"x": x.numpy()})[0]
        close(net(x).detach(), want)
        close(fast(x), want)


class Positions(nn.Module):
    """Takes 96 x 96 (or what pools to 6 x 6): no usual size fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, stride=16, padding=1), nn.Linear(8 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)).flatten(1))


def test_where_no_usual_size_fits_the_error_says_how_to_give_one(tmp_path: Path, capsys: Any) -> None:
    path = export(Positions(), tmp_path / "p.onnx", torch.randn(1, 3, 96, 96))
    with pytest.raises(InputError) as error:
        actzip.load(path)
    text = str(error.value)
    assert "input 'x' is (n, 3, h, w)" in text and "--shape x=n,3,h,w" in text and "\n" not in text
    assert actzip.load(path, shape=(3, 96, 96))(torch.randn(2, 3, 96, 96)).shape == (2, 4)
    assert actzip.load(path, shape={"x": (1, 3, 96, 96)})(torch.randn(2, 3, 96, 96)).shape == (2, 4)
    assert run("profile", path)
    assert "--shape x=n,3,h,w" in " ".join(capsys.readouterr().err.split())
    assert not run("compile", path, "--shape", "x=1,3,96,96", "--no-tune", "--threads", 1, "--json")


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main([str(a) for a in args])
    return int(leave.value.code or 0)


def photographs(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_command_line_takes_the_size_of_the_data_and_says_so(
    unet: Path, tmp_path: Path, capsys: Any
) -> None:
    alike = photographs(tmp_path / "alike", [(40, 56)] * 4)
    unlike = photographs(tmp_path / "unlike", [(40, 56), (60, 30), (50, 50), (64, 64)])
    for folder, taken in ((alike, "3x40x56"), (unlike, "3x224x224")):
        assert not run("profile", unet, "--data", folder, "--no-engine", "--codecs", "none")
        err = " ".join(capsys.readouterr().err.split())
        assert f"leaves the size of 'x' open; {taken} is taken: --shape x=n,3,h,w says another" in err
    for more in (["--shape", "x=1,3,32,64"], ["--size", "32"]):
        args = ["profile", unet, "--data", unlike, "--no-engine", "--codecs", "none"]
        assert not run(*args, *more)
        assert "open" not in capsys.readouterr().err


def test_all_dimensions_open_and_several_inputs(tmp_path: Path) -> None:
    """The convolution says the channels; dimensions of one name have one size."""
    h = onnx.helper
    rng = np.random.default_rng(0)
    nodes = [
        h.make_node("Sub", ["x", "mean"], ["m"]),
        h.make_node("Conv", ["m", "w"], ["a"], pads=[1, 1, 1, 1]),
        h.make_node("Add", ["a", "z"], ["y"]),
    ]
    graph = h.make_graph(
        nodes,
        "two",
        [
            h.make_tensor_value_info("x", 1, ["b", "c", "h", "w"]),
            h.make_tensor_value_info("z", 1, ["b", 6, "h", "w"]),
        ],
        [h.make_tensor_value_info("y", 1, None)],
        [
            onnx.numpy_helper.from_array(np.float32([0.5]), "mean"),
            onnx.numpy_helper.from_array(rng.standard_normal((6, 5, 3, 3), np.float32), "w"),
        ],
    )
    path = tmp_path / "two.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8), str(path))
    net, run = actzip.load(path), session(path)
    fast = actzip.compile(path, tune=False, cache=False)  # nor does compiling want an example
    for size in [(17, 9), (224, 224)]:
        x, z = torch.randn(2, 5, *size), torch.randn(2, 6, *size)
        want = run.run(None, {"x": x.numpy(), "z": z.numpy()})[0]
        close(net(x, z), want)
        close(fast(x, z), want)


def test_what_needs_parts_is_compiled_without_an_example_too(tmp_path: Path) -> None:
    h = onnx.helper
    rng = np.random.default_rng(0)
    nodes = [
        h.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        h.make_node("Relu", ["a"], ["b"]),
        h.make_node("NonZero", ["b"], ["y"]),
    ]
    graph = h.make_graph(
        nodes,
        "parts",
        [h.make_tensor_value_info("x", 1, ["n", 3, "h", "w"])],
        [h.make_tensor_value_info("y", 7, None)],
        [onnx.numpy_helper.from_array(rng.standard_normal((8, 3, 3, 3), np.float32), "w")],
    )
    path = tmp_path / "parts.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 13)], ir_version=8), str(path))
    with pytest.warns(actzip.errors.ActzipWarning, match="ONNX Runtime"):
        fast = actzip.compile(path, tune=False, cache=False, threads=1)
    x = rng.standard_normal((1, 3, 20, 12), np.float32)
    np.testing.assert_array_equal(fast(x), session(path).run(None, {"x": x})[0])


@pytest.mark.parametrize("height", [32, 48])
def test_readers_of_lines_of_text_load_without_an_example(height: int, tmp_path: Path) -> None:
    """Height and width are open, but only one height is squeezed to 1."""
    from exported import N, model_of, normal

    nodes = [
        N("Conv", ["x", "w"], ["a"], strides=[4, 2], pads=[1] * 4),
        N("Relu", ["a"], ["b"]),
        N("MaxPool", ["b"], ["c"], kernel_shape=[height // 4, 1], strides=[height // 4, 1]),
        N("Squeeze", ["c", "two"], ["d"]),
        N("Transpose", ["d"], ["y"], perm=[0, 2, 1]),
    ]
    model = model_of(nodes, {"w": normal(8, 3, 4, 3), "two": np.int64([2])}, ["n", 3, "h", "w"])
    onnx.save(model, tmp_path / "reader.onnx")
    net = actzip.load(tmp_path / "reader.onnx")
    x = torch.rand(2, 3, height, 200)
    (want,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(net(x).detach().numpy(), want, rtol=0, atol=1e-5)
