"""The end of ``make demo``, on a few random images and tiny settings."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actzip.models import resolve, save_weights

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("end_of_demo", PATH)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(path: Path, *shape: int) -> str:
    np.save(path, np.random.default_rng(0).random(shape, dtype=np.float32))
    return str(path)


def test_sparse_lenet_is_timed_beside_the_rivals_and_says_who_is_absent(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RIVALS", ("torch", "deepsparse"))
    monkeypatch.delenv("ACTZIP_DEEPSPARSE_PYTHON", raising=False)
    torch.manual_seed(0)
    save_weights(resolve("lenet5"), tmp_path / "sparse.safetensors")
    data = images(tmp_path / "x.npy", 2, 1, 28, 28)
    lines = demo.sparse_lenet(tmp_path / "sparse.safetensors", data, rounds=1, runs=2)
    assert "one input, 1 thread, " in lines[0] and "median (fastest) ms" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["actzip", "torch"]
    assert re.fullmatch(r"  \d+\.\d\dx the fastest dense engine \(torch\)", lines[3])
    assert lines[4].startswith("  deepsparse left out: ")


def test_mobilenet_is_made_faster_or_said_to_be_unchanged(demo, tmp_path):
    data = images(tmp_path / "x.npy", 12, 3, 32, 32)
    weights = tmp_path / "mobilenet.safetensors"
    torch.manual_seed(0)
    save_weights(resolve("mobilenet_v1"), weights)
    lines = demo.mobilenet_without_training(data, str(weights), images=12, attempts=1, rounds=1)
    assert "theoretical speed-up" in "\n".join(lines)
    assert any(line.strip().startswith("actzip, before") for line in lines)


def test_missing_data_is_a_line_each_and_no_failure(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACTZIP_SHARED", raising=False)
    monkeypatch.delenv("ACTZIP_DATA", raising=False)
    demo.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert re.findall(r"^left out: .*(sparse\.safetensors|cifar10)", said, re.M) == [
        "sparse.safetensors",
        "cifar10",
    ]
