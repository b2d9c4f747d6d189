"""The scripts that measure the engine: what they run, and one small table from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "engine"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"engine_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_suite_makes_the_tables_asked_for():
    suite = load("suite")

    def commands(*words: str) -> list[list[str]]:
        return suite.commands(suite.parse(list(words)))

    every = commands()
    assert {c[1] for c in every} == set(suite.NETWORKS) and every[0][-2:] == ["--isa", "avx2"]
    some = commands(
        "resnet18", "vgg16", "--batches", "1", "8", "--repeats", "32", "--engines", "actzip", "ort"
    )
    assert [(c[1], c[3], c[5]) for c in some] == [
        (n, b, "1") for n in ("resnet18", "vgg16") for b in ("1", "8")
    ]
    at = some[0].index("--rounds")
    assert some[0][at : at + 4] == ["--rounds", "6", "--runs", "6"] and "actzip,onnxruntime" in some[0]
    sparse = commands("mobilenet_v1", "cifar_resnet20", "--weights", "mobilenet_v1=a/b.safetensors")
    assert [c[-1] == "a/b.safetensors" for c in sparse] == [c[1] == "mobilenet_v1" for c in sparse]
    assert "--isa" not in commands("inception_v3", "--isa", "none")[0]
    for wrong in (["no-such"], ["resnet18", "--weights", "a.safetensors"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            commands(*wrong)


@pytest.mark.parametrize(
    ("vendor", "family", "model", "folder"),
    [
        ("AuthenticAMD", 25, 1, "zen3"),
        ("AuthenticAMD", 25, 17, "zen4"),
        ("AuthenticAMD", 25, 33, "zen3"),
        ("AuthenticAMD", 25, 97, "zen4"),
        ("AuthenticAMD", 26, 2, "zen5"),
        ("GenuineIntel", 6, 143, f"{platform.machine()}-6-143".lower()),
    ],
)
def test_results_go_to_a_folder_of_the_machine(vendor, family, model, folder):
    run = load("run")
    text = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: X 9\n"
    assert run.machine_folder(text) == folder
    assert run.machine_folder("") and "/" not in run.machine_folder()


def test_densities_and_thresholds():
    models = load("models")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.ReLU(), torch.nn.Flatten())
    torch.nn.init.constant_(net[0].weight, 1.0)
    x = torch.ones(2, 3, 2, 2)
    x[1] = -1
    density, means, y = models.measure(net, [(x[:1],), (x[1:],)])
    assert density == 0.5 and means == {"1": 3.0} and y.shape == (2, 16)
    assert models.measure(net[0], [(x,)])[0] is None
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[5.0, 5.0]])
    assert (
        models.output_error(a, a + 1) == 0.0 and models.output_error(a, b) == 1.0
    )  # a constant says nothing of the classes


def test_thresholds_become_the_operator_of_onnx(tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from actzip.activations import set_thresholds
    from actzip.cli._workers import export_onnx

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1)).eval()
    set_thresholds(net, {"1": 0.25})
    x, path = torch.randn(2, 3, 5, 5), tmp_path / "net.onnx"
    assert export_onnx(net, x, path, 13) == ""
    load("run").fuse_thresholds(path)
    assert [n.op_type for n in onnx.load(str(path)).graph.node] == ["Conv", "ThresholdedRelu", "Conv"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=0, atol=1e-5)


@pytest.mark.shared
def test_stored_thresholds_are_used(shared):
    models = load("models")
    found = models.calibrated_thresholds("inception_v3", 0.33)
    assert found == json.loads(models.STORED.read_text())["thresholds"]


@pytest.mark.shared
@pytest.mark.slow
def test_a_table(shared_file, tmp_path):
    pytest.importorskip("onnxruntime")
    weights = shared_file("weights/cifar10_resnet20.safetensors")
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes())
    other.with_suffix(".thresholds.json").write_text(json.dumps({"layer1.0.relu2": 0.5}))
    command = [
        sys.executable,
        str(FOLDER / "run.py"),
        "--network",
        "cifar_resnet20",
        "--batch",
        "2",
        "--unseen",
        "16",
        "--photos",
        "4",
        "--rounds",
        "1",
        "--runs",
        "2",
        "--engines",
        "torch,onnxruntime,actzip,deepsparse",
        "--weights",
        str(other),
        "--density",
        "0.3",
        "--folder",
        str(tmp_path / "made"),
        "--results",
        str(tmp_path),
        "--no-zeros",
    ]
    env = {k: v for k, v in os.environ.items() if k != "ACTZIP_DEEPSPARSE_PYTHON"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cifar_resnet20-b2-t1.json").read_text())
    rows = {(r["engine"], r["isa"], r["zeros"]): r for r in found["rows"]}
    best = found["machine"]["isa"]
    plain, sparse, scaled = (rows["actzip", best, z] for z in ("natural", "sparsified", "scaled 0.3"))
    assert plain["top1_agreement"] == 1 and plain["output_error"] == 0 and plain["unseen"] == 16
    assert sparse["density"] < plain["density"] and sparse["output_error"] > 0
    assert 0.2 < scaled["density"] < 0.4 and scaled["output_error"] > sparse["output_error"]
    for r in (plain, sparse, scaled, rows["torch", "any", "dense"], rows["onnxruntime", "any", "dense"]):
        assert r["skip"] is None and r["runs"] == 2 and r["error"] < 1e-3
    assert plain["against_pytorch_and_ort"] > 0 and "without zeros: actzip" in done.stdout
    assert "ACTZIP_DEEPSPARSE_PYTHON" in rows["deepsparse", "any", "natural"]["skip"]
    assert not list(FOLDER.glob("*.onnx"))
