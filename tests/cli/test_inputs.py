"""What a model's inputs are, said on the command line alike to every verb that runs a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actzip import cli
from actzip.cli._inputs import form
from actzip.data.form import Form, Laid
from actzip.errors import DataError, InputError

VERBS = ("profile", "compile", "bench", "quantize", "export", "accelerate", "split")
#: Those that can be run on a small file without more.
RUN = ("profile", "compile", "bench", "quantize", "accelerate", "split")


class Nhwc(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.permute(0, 3, 1, 2)).mean((2, 3))


def export(model: nn.Module, x: Any, path: Path, **more: Any) -> Path:
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    torch.onnx.export(model.eval(), x, str(path), dynamo=False, input_names=["x"], **more)
    return path


@pytest.fixture
def nhwc(tmp_path: Path) -> Path:
    return export(Nhwc(), (torch.randn(1, 24, 32, 3),), tmp_path / "nhwc.onnx", dynamic_axes={"x": {0: "n"}})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: Any) -> tuple[int, str, str]:
        code: Any = 0
        try:
            cli.main([str(a) for a in args])
        except SystemExit as leave:
            code = leave.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_the_options(run: Any, verb: str) -> None:
    text = run(verb, "--help")[1]
    for option in ("--shape", "--input", "--mean", "--std", "--layout", "--range"):
        assert option in text, option


def args_of(verb: str, tmp_path: Path) -> list[Any]:
    """Options that make a run short."""
    return {
        "profile": ["--no-engine", "--codecs", "none", "--json"],
        "compile": ["--no-tune", "--threads", 1, "--runs", 1, "--json"],
        "bench": ["--against", "onnxruntime", "--rounds", 1, "--runs", 1, "--threads", 1, "--json"],
        "quantize": ["--out", tmp_path / "q.json", "--calibration", 4, "--json"],
        "accelerate": [
            "--attempts",
            1,
            "--distil-steps",
            0,
            "--by",
            "macs",
            "--no-clock",
            "--max-error",
            0.5,
            "--json",
        ],
        "split": ["--bandwidth", "20Mbit", "--finalists", 1, "--threads", 1, "--json"],
    }[verb]


@pytest.mark.parametrize("verb", RUN)
def test_channels_last_is_asked_for_by_name_and_then_taken(
    run: Any, nhwc: Path, photos: Path, tmp_path: Path, verb: str
) -> None:
    if verb == "bench":
        pytest.importorskip("onnxruntime")
    options = [
        "--data",
        photos,
        "--range",
        "0..255",
        "--mean",
        "127",
        "--std",
        "128",
        *args_of(verb, tmp_path),
    ]
    code, _, err = run(verb, nhwc, *options)
    assert code and "24x32x3: this looks like NHWC: --layout nhwc" in err
    code, out, err = run(verb, nhwc, "--layout", "nhwc", *options)
    assert code == 0, err
    json.loads(out)


@pytest.mark.parametrize("verb", RUN)
def test_arrays_are_taken_as_they_are(run: Any, nhwc: Path, tmp_path: Path, verb: str) -> None:
    if verb == "bench":
        pytest.importorskip("onnxruntime")
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).random((16, 24, 32, 3), np.float32))
    code, out, err = run(verb, nhwc, "--input", path, *args_of(verb, tmp_path))
    assert code == 0, err
    json.loads(out)


def test_a_split_knows_how_its_pictures_are_normalised_and_laid_out(
    run: Any, nhwc: Path, photos: Path, tmp_path: Path
) -> None:
    asked = ["--layout", "nhwc", "--range", "0..255", *args_of("split", tmp_path)]
    code, out, err = run("split", nhwc, "--data", photos, *asked)
    assert code == 0, err
    said = json.loads(out)
    jpeg = next(r for r in said["others"] if r["name"] == "send the JPEG")
    assert jpeg["codec"] == "JPEG 50" and jpeg["kept"] and not said["notes"]  # noise, but the same answer
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((16, 24, 32, 3), np.float32))
    code, out, err = run("split", nhwc, "--input", tmp_path / "x.npy", *args_of("split", tmp_path))
    assert code == 0 and "normalised is not known" in json.loads(out)["notes"][0], err
    code, _, err = run("split", nhwc, *args_of("split", tmp_path))
    assert code and "--data, or --input with arrays" in err


def test_shapes_open_what_a_file_leaves_open(run: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    path = export(net, (torch.randn(1, 3, 20, 20),), tmp_path / "open.onnx", dynamic_axes={"x": [0, 2, 3]})
    code, out, err = run("compile", path, "--no-tune", "--runs", 1, "--json")
    assert code == 0 and "leaves the size of 'x' open; 3x224x224 is taken" in err
    assert json.loads(out)["inputs"] == {"x": [1, 3, 224, 224]}
    for shape in ("x=1,3,30,44", "1,3,30,44", "1x3x30x44"):
        code, out, err = run("compile", path, "--shape", shape, "--no-tune", "--runs", 1, "--json")
        assert code == 0, err
        assert json.loads(out)["inputs"] == {"x": [1, 3, 30, 44]}
    code, _, err = run("export", path, tmp_path / "again.onnx", "--shape", "1,3,30,44", "--json")
    assert code == 0, err
    code, _, err = run("compile", path, "--shape", "y=1,3,30,44")
    assert code and "has no input 'y'; it has 'x'" in err


def test_a_file_of_a_fixed_batch_calibrates_on_many_images(run: Any, photos: Path, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(x).relu().reshape(4, 8, -1).mean(2).reshape(2, 16)

    path = export(Fixed(), (torch.randn(4, 3, 20, 20),), tmp_path / "fixed.onnx")
    code, out, err = run("profile", path, "--data", photos, *args_of("profile", tmp_path))
    assert code == 0, err
    assert json.loads(out)["data"]["images"] == 8
    code, out, err = run("quantize", path, "--data", photos, *args_of("quantize", tmp_path))
    assert code == 0, err
    code, out, err = run("compile", path, "--data", photos, *args_of("compile", tmp_path))
    assert code == 0 and json.loads(out)["inputs"] == {"x": [4, 3, 20, 20]}, err


def test_broken_images_are_named_and_skipped(run: Any, nhwc: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n no more")
    code, _, err = run("profile", nhwc, "--data", photos, "--layout", "nhwc", *args_of("profile", tmp_path))
    assert code == 0, err
    assert "1 images cannot be read and are skipped: broken.png" in err
    for file in photos.iterdir():
        file.write_bytes(b"no image")
    code, _, err = run("profile", nhwc, "--data", photos, "--layout", "nhwc")
    assert code and "holds no readable image" in err


def test_normalisation_is_of_the_range() -> None:
    white = np.full((1, 3, 4, 4), 255, np.uint8)

    def pixel(**options: Any) -> list[float]:
        images = Form(**{"layout": "nchw", **options}).normalisation(3, (0.5,) * 3, (0.25,) * 3)
        x = torch.from_numpy(white).float() / 255
        return [float((x[0, c, 0, 0] - images[0][c]) / images[1][c]) for c in range(3)]

    assert pixel() == pytest.approx([2.0] * 3)  # the model's usual
    assert pixel(range="0..255") == pytest.approx([255.0] * 3)
    assert pixel(range="-1..1") == pytest.approx([1.0] * 3)
    assert pixel(range="0..255", mean=(127.0,), std=(128.0,)) == pytest.approx([1.0] * 3)
    assert pixel(mean=(0.0, 0.5, 1.0), std=(0.5,)) == pytest.approx([2.0, 1.0, 0.0])


def test_bad_options_are_one_line_each(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 3), np.float32), b=np.zeros((3, 3), np.float32))
    for error, options in (
        ("whole numbers", {"shape": ["x=1,3,y"]}),
        ("whole numbers", {"shape": ["x=0,3"]}),
        ("nchw or nhwc", {"layout": "hwc"}),
        ("one of 0..1", {"range": "0-1"}),
        ("numbers with commas", {"mean": "a"}),
        ("holds a zero", {"std": "0"}),
        ("there is no file", {"input": [str(tmp_path / "none.npy")]}),
    ):
        with pytest.raises((InputError, DataError), match=error) as caught:
            form(**options)
        assert "\n" not in str(caught.value)
    both = form(input=[str(tmp_path / "two.npz")])
    with pytest.raises(InputError, match=r"arrays of (2 and 3|3 and 2) inputs"):
        list(both.batches(["a", "b"], None))
    with pytest.raises(InputError, match=r"no array for input 'c'; there are a, b"):
        list(both.batches(["a", "c"], None))
    with pytest.raises(InputError, match="one a channel"):
        Form(mean=(1.0, 2.0)).normalisation(3, None, None)


def test_fewer_arrays_than_a_batch_are_one_batch() -> None:
    few = Form(arrays={"": np.zeros((3, 2), np.float32)})
    assert [len(b) for b in few.batches([""], 16, fixed=False)] == [3]
    many = Form(arrays={"": np.zeros((19, 2), np.float32)})
    assert [len(b) for b in many.batches([""], 8, fixed=False)] == [8, 8, 3]
    assert [len(b) for b in many.batches([""], 8)] == [8, 8]
    with pytest.raises(DataError, match="exported for batches of 16"):
        list(few.batches([""], 16))


def test_arrays_are_given_by_the_names_of_forward(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "twoinputs.py").write_text(
        "import torch\nfrom torch import nn\nclass Two(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.c = nn.Conv2d(3, 4, 3)\n"
        "    def forward(self, x, y, z=None):\n        return self.c(x).relu() + self.c(y).relu()\n"
        "two = Two().eval()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arrays = {n: np.ones((3, 3, 8, 8), np.float32) for n in "xy"}
    np.savez(tmp_path / "two.npz", **arrays)
    np.save(tmp_path / "x.npy", arrays["x"])
    options = args_of("profile", tmp_path)
    code, out, err = run("profile", "twoinputs:two", "--input", tmp_path / "two.npz", *options)
    assert code == 0 and json.loads(out)["data"]["images"] == 3, err
    code, _, err = run("profile", "twoinputs:two", "--input", tmp_path / "x.npy", *options)
    assert code and "no array for input 'y'" in err


def test_a_loader_in_another_layout_is_read_more_than_once() -> None:
    laid = Laid([(torch.zeros(2, 3, 4, 5), 1)], Form(layout="nhwc"))
    assert [x.shape for x, _ in laid] == [x.shape for x, _ in laid] == [torch.Size((2, 4, 5, 3))]


@pytest.mark.parametrize("verb", ["profile", "quantize", "export", "accelerate"])
def test_a_file_that_needs_parts_runs_in_parts_or_is_refused_by_name(
    run: Any, tmp_path: Path, verb: str
) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Unique", ["r"], ["y"], "the_unique"),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", 1, ["k"])],
        [weight],
    )
    path = tmp_path / "parts.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32))
    options: dict[str, list[Any]] = {
        "profile": ["--input", tmp_path / "x.npy", "--codecs", "none"],
        "quantize": ["--input", tmp_path / "x.npy", "--out", tmp_path / "q.json"],
        "export": [tmp_path / "again.onnx"],
        "accelerate": ["--input", tmp_path / "x.npy"],
    }
    code, _, err = run(verb, path, *options[verb])
    assert "the_unique" in err
    if verb in ("profile", "quantize"):
        assert code == 0 and "1 of 3 nodes run with ONNX Runtime in this module" in err
    else:
        words = "all else needs every node" if verb == "export" else "thresholds are not weighed"
        assert code and words in err.strip().splitlines()[-1]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x).relu()
        return y.mean((2, 3)), y + z


def test_bench_times_models_with_several_inputs_and_outputs(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path, x = tmp_path / "twice.onnx", (torch.randn(1, 3, 16, 20), torch.randn(1, 8, 16, 20))
    axes = {n: {0: "n", 2: "h", 3: "w"} for n in ("x", "z")}
    torch.onnx.export(Twice().eval(), x, str(path), dynamo=False, input_names=["x", "z"], dynamic_axes=axes)
    code, out, err = run("bench", path, *args_of("bench", tmp_path))
    assert code == 0, err
    rows = {r["engine"]: r for r in json.loads(out)["engines"]}
    assert rows.keys() == {"actzip", "onnxruntime"}
    assert all("skip" not in r and r["error"] < 1e-5 for r in rows.values()), rows


def test_a_quick_profile_of_a_model_with_two_inputs(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            make("Concat", ["a", "b"], ["c"], axis=1),
            make("Relu", ["c"], ["r"]),
            make("Conv", ["r", "w"], ["y"]),
        ],
        "g",
        [value(n, 1, ["n", 2, 8, 8]) for n in "ab"],
        [value("y", 1, None)],
        [onnx.numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "m.onnx")
    for n in "ab":
        np.save(tmp_path / f"{n}.npy", np.random.default_rng(0).standard_normal((3, 2, 8, 8), np.float32))
    given = [f"--input={n}={tmp_path / n}.npy" for n in "ab"]
    code, out, _ = run("profile", tmp_path / "m.onnx", "--quick", *given)
    assert code == 0 and "density 0.5" in out


class Remembering(nn.Module):
    """A state beside its input, the batch second, and a number of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 8, 3, padding=1), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor, state: torch.Tensor, rate: torch.Tensor) -> Any:
        y = self.a(x[:, None]).relu().mean(-1)
        y = self.b(torch.cat([y, state[0], state[1]], 1)).relu()
        return y * rate, torch.stack([y, state[0]])


@pytest.mark.parametrize("verb", ["profile", "compile", "bench", "quantize"])
def test_a_state_beside_an_input_is_taken_as_it_is(run: Any, tmp_path: Path, verb: str) -> None:
    example = (torch.rand(1, 32), torch.rand(2, 1, 8), torch.tensor(0.5))
    pytest.importorskip("onnxruntime")
    path, names = tmp_path / "m.onnx", ["x", "state", "rate"]
    torch.onnx.export(Remembering().eval(), example, path, dynamo=False, input_names=names)
    given = []
    for name, array in zip(names, example, strict=True):
        np.save(tmp_path / f"{name}.npy", array.numpy())
        given += ["--input", f"{name}={tmp_path / name}.npy"]
    code, out, err = run(verb, path, *given, *args_of(verb, tmp_path))
    assert code == 0, err
    json.loads(out)


@pytest.mark.parametrize("verb", ["compile", "quantize", "export"])
def test_the_file_that_is_read_is_not_written_over(run: Any, nhwc: Path, tmp_path: Path, verb: str) -> None:
    before = nhwc.read_bytes()
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((4, 24, 32, 3), np.float32))
    options = {"compile": ["--no-tune", "--out", nhwc], "quantize": ["--out", nhwc], "export": [nhwc]}[verb]
    code, _, err = run(verb, nhwc, *options, "--input", tmp_path / "x.npy")
    assert code == 2 and "is the file that is read; give another name" in err
    assert nhwc.read_bytes() == before


def test_channels_first_for_a_file_that_has_them_last_is_said(run: Any, nhwc: Path) -> None:
    code, _, err = run("compile", nhwc, "--no-tune", "--shape", "1,3,24,32")
    assert code == 2 and "dimension 3 is 3, not 32: the file has its channels last (N, H, W, C)" in err
