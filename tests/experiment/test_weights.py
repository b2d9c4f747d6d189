"""The weights in weights/ are those whose figures stand in benchmarks/results."""

import json
import re
from pathlib import Path

import pytest
import torch

import actzip
from actzip.activations import get_thresholds, load_thresholds, set_thresholds
from actzip.data import Loader, resolve
from actzip.models import load_weights
from actzip.models import resolve as resolve_model

ROOT = Path(__file__).resolve().parents[2]
#: file -> (model, result, stage)
WEIGHTS = {
    "cifar_resnet20_sparse": ("cifar_resnet20", "cifar-resnet20-cifar10/thresholds", "sparse"),
    "cifar_resnet20_dense": ("cifar_resnet20", "cifar-resnet20-cifar10/longer", "sparse"),
}


def test_every_file_is_listed():
    assert {f.stem for f in (ROOT / "weights").glob("*.safetensors")} == set(WEIGHTS)


def test_the_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "weights" / "README.md").read_text(), re.M | re.S)
    names: dict = {}
    exec(compile(code, "weights/README.md", "exec"), names)
    stored = json.loads((ROOT / "weights" / "cifar_resnet20_sparse.thresholds.json").read_text())
    assert stored and get_thresholds(names["net"]).keys() == stored.keys()


@pytest.mark.parametrize("name", WEIGHTS)
def test_compiled_accuracy_is_the_recorded_one(name, shared, shared_file):
    shared_file("data/cifar10/test.parquet")
    model, result, stage = WEIGHTS[name]
    recorded = json.loads((ROOT / "benchmarks" / "results" / "recipes" / f"{result}.json").read_text())
    row = next(s for s in recorded["stages"] if s["stage"] == stage)
    how = recorded["recipe"]["data"]
    net = resolve_model(model).eval()
    load_weights(net, ROOT / "weights" / f"{name}.safetensors")
    beside = ROOT / "weights" / f"{name}.thresholds.json"
    if beside.exists():
        set_thresholds(net, load_thresholds(beside))
    test = resolve("cifar10", "test", folder=shared / "data", mean=how["mean"], std=how["std"])
    run = actzip.compile(net, torch.zeros(250, 3, 32, 32), tune=False)
    right = 0
    for x, y in Loader(test, 250):
        right += int((torch.as_tensor(run(x)).argmax(1) == y).sum())
    # the kernels sum in another order than torch did: an image on the edge may fall to the other side
    assert right / len(test) == pytest.approx(row["accuracy"], abs=3e-4)
