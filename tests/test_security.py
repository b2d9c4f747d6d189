"""Nothing that a file holds is run: every format that is read, with a hostile file of it
(docs/security.md)."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actzip.cli import main
from actzip.errors import ActzipError, DataError, InputError, RecipeError

torch = pytest.importorskip("torch")


class Evil:
    """What a pickle does to whoever reads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "MARK"


def cli(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    return int(end.value.code or 0)


def pt2(mark: Path, member: str) -> Path:
    """An exported program, one member of which is a pickle that makes ``mark``."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), "good.pt2")
    file = io.BytesIO()
    torch.save(Evil(mark), file)
    with zipfile.ZipFile("good.pt2") as good, zipfile.ZipFile("evil.pt2", "w") as evil:
        for i in good.infolist():
            evil.writestr(i.filename, file.getvalue() if member in i.filename else good.read(i.filename))
    return Path("evil.pt2")


READERS: list[Callable[[Path], Any]] = [
    lambda f: __import__("actzip").load(f),
    lambda f: __import__("actzip").profile(str(f), [torch.randn(1, 3, 8, 8)], codecs=[], engine=False),
    lambda f: __import__("actzip.profile.source", fromlist=["x"]).open_subject(str(f), None),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", READERS)
def test_pt2_code_execution_by_python(mark: Path, read: Callable[[Path], Any]) -> None:
    evil = pt2(mark, "sample_inputs")
    for file in (evil, Path("good.pt2")):
        with pytest.raises(DataError, match="trust"):
            read(file)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_pt2_code_execution_by_command(mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = pt2(mark, "sample_inputs")
    for verb in (
        ["profile", evil, "--no-engine"],
        ["compile", evil],
        ["bench", evil],
        ["export", evil, "x.onnx"],
    ):
        assert cli(*verb) == 4
        assert "--trust" in capsys.readouterr().err
    assert not mark.exists()
    assert cli("export", "good.pt2", "x.onnx", "--trust") == 0 and Path("x.onnx").exists()
    assert cli("profile", evil, "--no-engine", "--trust") in (0, 4)
    assert mark.exists(), "the file would not have done anything: the test tests nothing"


def test_pickles_of_tensors(mark: Path) -> None:
    torch.save({"w": torch.ones(3), "x": Evil(mark)}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Evil(mark)))
    with tarfile.open("tar.pt", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(Evil(mark))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for name in ("zip.pt", "plain.pt", "tar.pt"):
        assert cli("encode", name, "out.acz") == 4
        assert cli("profile", name) == 4  # as a model
        assert cli("profile", name, "--trust") == 4
    assert not mark.exists() and not Path("out.acz").exists()


def test_pickles_in_array_files(mark: Path) -> None:
    a = np.array([Evil(mark)], object)
    np.save("a.npy", a, allow_pickle=True)
    np.savez("a.npz", good=np.zeros(3, "u1"), evil=a)
    for name in ("a.npy", "a.npz"):
        assert cli("encode", name) == 4
    assert cli("profile", "lenet5", "--data", "a.npy", "--no-engine") == 4
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "name: x\nmodel: {name: 'os:system', args: {command: touch MARK}}\ndata: {name: digits, "
        "validation: 9}\n"
        "train: {epochs: 1}\n",
        "name: x\nmodel: {name: 'subprocess:getoutput', args: {cmd: touch MARK}}\ndata: {name: "
        "digits, validation: 9}\n"
        "train: {epochs: 1}\n",
        "name: x\nmodel: {name: 'timm:resnet18', args: {checkpoint_path: evil.pth}}\ndata: {name: "
        "digits, validation: 9}\n"
        "train: {epochs: 1}\n",
        "a: &a [*a]",
        "a: " + "[" * 5000 + "]" * 5000,
        "a0: &a0 [1, 1]\n" + "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)),
    ],
)
def test_recipes(mark: Path, text: str) -> None:
    torch.save(Evil(mark), "evil.pth")
    Path("r.yaml").write_text(text)
    assert cli("reproduce", "r.yaml", "--out", "out") == 5
    assert not mark.exists() and not Path("out").exists()


def test_a_trusted_recipe_may_name_code(mark: Path) -> None:
    from actzip.experiment.recipe import parse_recipe
    from actzip.experiment.run import _check_trust

    text = (
        "name: x\nmodel: {name: 'my.package:net'}\ndata: {name: digits, validation: 9}\ntrain: {epochs: 1}\n"
    )
    recipe = parse_recipe(text)
    with pytest.raises(RecipeError, match="--trust"):
        _check_trust(recipe, False)
    _check_trust(recipe, True)


def test_json_nested_without_end(mark: Path) -> None:
    from actzip.activations import load_thresholds
    from actzip.profile import load_report
    from actzip.quantize.files import load_quantization

    for text in ("[" * 100_000, "{", '"' + "x" * 9, "null", "[]", '{"maps": []}', "\xff"):
        Path("x.json").write_text(text, encoding="latin1")
        for read in (load_thresholds, load_report, lambda f: load_quantization(torch.nn.Sequential(), f)):
            with pytest.raises(ActzipError):
                read(Path("x.json"))


def test_a_shard_whose_name_is_a_command(mark: Path) -> None:
    pytest.importorskip("webdataset")
    from actzip.data import resolve

    name = "pipe:touch MARK #.tar"
    Path(name).write_bytes(b"")
    with pytest.raises(ActzipError):
        resolve("wds:*.tar")
    with pytest.raises(ActzipError):
        resolve(f"wds:{name}")
    assert not mark.exists()


def test_images_of_formats_that_are_programs(mark: Path) -> None:
    from actzip.data import resolve

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(eps)
    with pytest.warns(match="cannot identify image"), pytest.raises(DataError, match="no readable image"):
        resolve("folder:photos", image_size=8)


def test_onnx_external_data_outside_the_folder(mark: Path) -> None:
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    import actzip

    Path("secret").write_bytes(b"\0" * 16)
    Path("in").mkdir()
    os.symlink("../secret", "in/link")
    for place in ("../secret", str(Path("secret").resolve()), "link", "/dev/zero", "x\0y", ""):
        w = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
        w.external_data.add(key="location", value=place)
        value = helper.make_tensor_value_info
        nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
        graph = helper.make_graph(nodes, "g", [value("x", 1, [1, 4])], [value("y", 1, [1, 4])], [w])
        Path("in/m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
        with pytest.raises(DataError, match="external data"):
            actzip.load("in/m.onnx")


def test_weights_and_blobs_of_noise(mark: Path) -> None:
    from actzip.codec import MapReader, decode
    from actzip.models import load_weights, resolve

    rng = np.random.default_rng(0)
    for i in range(50):
        noise = rng.bytes(200)
        Path("w.safetensors").write_bytes((8 + i).to_bytes(8, "little") + noise)
        with pytest.raises(DataError):
            load_weights(resolve("lenet5"), Path("w.safetensors").resolve())
        Path("m.azm").write_bytes(b"ACTZMAPS" + noise)
        with pytest.raises((ActzipError, InputError)):
            MapReader("m.azm")
        with pytest.raises(ActzipError):
            decode(b"ACTZ" + noise)
