"""Engines in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from actzip.cli._workers import AVX2_AT_MOST, DENSE, NO_AVX2_CAP, Worker, export_ncnn, export_onnx, take_turns


@pytest.fixture
def model(tmp_path, monkeypatch):
    """(spec, right answer) of a small network that a process can make too."""
    (tmp_path / "small_net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    n = torch.nn\n"
        "    return n.Sequential(n.Conv2d(3, 8, 3), n.ReLU(), n.Flatten(), n.Linear(288, 5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    spec = {
        "model": "small_net:make",
        "input": str(tmp_path / "x.npy"),
        "output": str(tmp_path / "y.npy"),
        "threads": 1,
    }
    with torch.no_grad():
        return spec, net, x, net(x).numpy()


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino", "ncnn", "actzip"])
def test_every_engine_gives_the_answer_of_pytorch(engine, model, tmp_path):
    if not engine.startswith(("torch", "actzip")):
        pytest.importorskip(engine)
    spec, net, x, want = model
    if engine == "ncnn":
        spec["ncnn"], why = export_ncnn(net, x, tmp_path)
        if "not installed" in why:
            pytest.skip(why)
        assert why == ""
    elif engine in ("onnxruntime", "openvino"):
        spec["onnx"] = str(tmp_path / "net.onnx")
        assert export_onnx(net, x, tmp_path / "net.onnx") == ""
    w = Worker(engine, spec)
    assert "skip" not in w.info, w.info
    w.time(3, 10.0)
    w.stop()
    assert len(w.ms) == 3 and w.peak > 0
    np.testing.assert_allclose(np.load(w.output).reshape(want.shape), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino", "actzip compile", "actzip"])
def test_of_several_outputs_the_first_is_the_answer(engine, tmp_path, monkeypatch):
    if engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
    (tmp_path / "two_outputs.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.relu(x), torch.flatten(x, 1) * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    x = torch.randn(1, 3, 4, 4)
    np.save(tmp_path / "x.npy", x.numpy())
    spec = {"model": "two_outputs:Two", "input": str(tmp_path / "x.npy"), "threads": 1}
    spec |= {"output": str(tmp_path / "y.npy"), "onnx": str(tmp_path / "net.onnx")}
    spec |= {"compiled": str(tmp_path / "fast.pickle")} if engine == "actzip compile" else {}
    net = __import__("two_outputs").Two()
    assert export_onnx(net, x, tmp_path / "net.onnx") == ""
    w = Worker(engine, spec)
    assert "skip" not in w.info, w.info
    w.stop()
    np.testing.assert_allclose(np.load(w.output), torch.relu(x).numpy(), rtol=0, atol=1e-6)


def test_thresholds_are_set_and_a_compiled_model_is_kept(model, tmp_path):
    spec, _, _, plain = model
    spec |= {"thresholds": {"1": 0.5}, "compiled": str(tmp_path / "fast.pickle")}
    outputs = []
    for engine in ("torch", "actzip compile", "actzip"):
        w = Worker(engine, {**spec, "output": str(tmp_path / f"{engine}.npy")})
        assert "skip" not in w.info, w.info
        if engine == "actzip":
            explained = w.explain()
            assert explained is not None and explained["rows"]
        w.stop()
        outputs.append(np.load(w.output))
    assert abs(outputs[0] - plain).max() > 1e-3
    for y in outputs[1:]:
        np.testing.assert_allclose(y, outputs[0], rtol=0, atol=1e-5)


def test_what_an_engine_lacks_is_the_reason(model):
    pytest.importorskip("onnxruntime")
    spec, *_ = model
    w = Worker("onnxruntime", {**spec, "onnx": "no-such.onnx"})
    w.time(1, 1.0)
    w.stop()
    assert w.ms == [] and "no-such.onnx" in w.info["skip"]
    assert Worker("torch", spec, skip="because").info == {"skip": "because"}


def test_a_process_that_dies_says_how(model, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho the last words >&2\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    w = Worker("torch", model[0])
    assert w.info["skip"] == "its process ended with signal SIGSEGV: the last words"
    w.time(1, 1.0)
    w.stop()


class _Slow:
    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.calls: list[float] = []

    def time(self, runs: int, seconds: float) -> None:
        self.calls.append(seconds)
        time.sleep(0.02)


def test_turns_end_when_their_time_is_over():
    slow = [_Slow(), _Slow()]
    take_turns(slow, 6, 5, 0.03)  # type: ignore[arg-type]
    assert [len(w.calls) for w in slow] == [1, 1] and slow[0].calls[0] == pytest.approx(0.03 / 6 / 2)
    slow = [_Slow(), _Slow()]
    take_turns(slow, 3, 5, 100.0)  # type: ignore[arg-type]
    assert [len(w.calls) for w in slow] == [3, 3]


_KERNELS = {
    "torch": "import torch; x = torch.ones(1, 16, 9, 9); torch.nn.Conv2d(16, 16, 3)(x);"
    "print(torch.backends.cpu.get_cpu_capability())",
    "openvino": """
import numpy as np, openvino as ov, openvino.opset8 as ops
x = ops.parameter([1, 16, 9, 9], np.float32)
y = ops.convolution(x, np.ones((16, 16, 3, 3), np.float32), [1, 1], [0, 0], [0, 0], [1, 1])
settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
r = ov.compile_model(ov.Model([ops.exp(y)], [x]), "CPU", settings).create_infer_request()
r.infer({0: np.ones((1, 16, 9, 9), np.float32)})
print([p.exec_type for p in r.get_profiling_info()])
""",
}


@pytest.mark.parametrize("engine", sorted(_KERNELS))
def test_rivals_told_avx2_use_nothing_above_it(engine):
    from actzip import cpu

    pytest.importorskip(engine)
    if "avx2" not in cpu.info()["isas"]:
        pytest.skip("this CPU has no AVX2")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _KERNELS[engine]],
        env={**os.environ, **AVX2_AT_MOST[engine], "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    told = done.stdout.lower()
    assert done.returncode == 0, done.stderr
    assert "avx2" in told and "avx512" not in told and "avx-512" not in told


def test_every_rival_is_told_or_said_not_to_be():
    assert {*DENSE, "deepsparse", "actzip"} == {*AVX2_AT_MOST, *NO_AVX2_CAP}
