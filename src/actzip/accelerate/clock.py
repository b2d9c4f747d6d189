"""Before and after by the clock, against the engines that are installed here, in one run and in turns."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.errors import ActzipError

if TYPE_CHECKING:
    from actzip.accelerate.result import Acceleration

__all__ = ["race"]

_Run = Callable[[], Any]
#: Seconds that a round of one engine takes at least, and what it may take at most.
_ROUND = 0.05


def race(found: Acceleration, *, rounds: int, engines: bool) -> dict[str, Any]:
    """Median and fastest milliseconds of every engine: one image, ``found.threads`` threads, in
    turns.

    Engines other than actzip run the original: zeros change nothing for them. One that cannot is
    left out with the reason.
    """
    from actzip import cpu

    info = cpu.info()
    threads = found.threads or int(info["threads"])
    runs: dict[str, _Run] = {}
    skipped: dict[str, str] = {}
    x = found.example
    if found.compiled_before is not None:
        before, after = found.compiled_before, found.compiled
        runs["actzip, before"] = lambda: before(x)
        if found.thresholds:
            runs["actzip, after"] = lambda: after(x)
    original = found.original or found.model
    torch_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="actzip-clock-") as folder:
        if engines:
            runs["PyTorch"] = _pytorch(original, x)
            for name, module, make in (
                ("ONNX Runtime", "onnxruntime", _onnxruntime),
                ("OpenVINO", "openvino", _openvino),
            ):
                if importlib.util.find_spec(module) is None:
                    skipped[name] = "not installed"
                    continue
                try:
                    runs[name] = make(_onnx(original, x, Path(folder)), x.numpy(), threads)
                except Exception as error:  # engines raise many types
                    skipped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        torch.set_num_threads(threads)
        try:
            times = _turns(runs, rounds)
        finally:
            torch.set_num_threads(torch_threads)
    rows = {
        n: {"median_ms": statistics.median(t), "fastest_ms": min(t), "runs": len(t)} for n, t in times.items()
    }
    dense = {n: r["median_ms"] for n, r in rows.items() if not n.startswith("actzip")}
    ours = rows.get("actzip, after") or rows.get("actzip, before")
    return {
        "cpu": info["cpu"],
        "isa": info["isa"],
        "threads": threads,
        "engines": rows,
        "left_out": skipped,
        "fastest_dense": min(dense, key=dense.__getitem__) if dense else None,
        "against_fastest_dense": min(dense.values()) / ours["median_ms"] if dense and ours else None,
        "layers": _layers(found),
    }


def _turns(runs: dict[str, _Run], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            end = time.perf_counter() + _ROUND
            run()  # caches are another engine's
            while True:
                start = time.perf_counter()
                run()
                now = time.perf_counter()
                times[name].append(1e3 * (now - start))
                if now >= end:
                    break
    return times


def _pytorch(model: nn.Module, x: Tensor) -> _Run:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def _onnx(model: nn.Module, x: Tensor, folder: Path) -> Path:
    from actzip.runtime.onnx_export import export_onnx

    path = folder / "original.onnx"
    if not path.exists():
        export_onnx(model, x, path, dynamic_batch=False)
    return path


def _onnxruntime(path: Path, x: np.ndarray[Any, Any], threads: int) -> _Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def _openvino(path: Path, x: np.ndarray[Any, Any], threads: int) -> _Run:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ascontiguousarray(x)))
    return request.infer  # type: ignore[no-any-return]


def _layers(found: Acceleration) -> list[dict[str, Any]]:
    """Milliseconds of every layer on the engine, before and after."""
    if found.compiled_before is None:
        return []
    try:
        before = found.compiled_before.explain(found.example, runs=5).to_dict()["rows"]
        after = (
            found.compiled.explain(found.example, runs=5).to_dict()["rows"] if found.thresholds else before
        )
    except ActzipError:
        return []
    other = {r["name"]: r for r in after}
    return [
        {
            "layer": r["name"],
            "op": r["op"],
            "ms_before": r["milliseconds"],
            "ms_after": other[r["name"]]["milliseconds"] if r["name"] in other else None,
            "density_before": r["density"],
            "density_after": other[r["name"]]["density"] if r["name"] in other else None,
            "kernel": (other.get(r["name"]) or r)["kernel"],
        }
        for r in before
    ]
