"""Inception-V3 in the engine with packed maps as float32, float16 and 8-bit integers, beside dense
float32 and int8 engines.

    python benchmarks/quantize/engine.py prepare out/engine \\
        --thresholds benchmarks/results/sparsify/inception-thresholds.json
    python benchmarks/quantize/engine.py run out/engine --out benchmarks/results/quantize/engine.json

`prepare` writes what needs no quiet machine: the photographs, the float network as ONNX (without
thresholds, which would only cost dense engines time), and two int8 ones: by ONNX Runtime's own
static quantization (QDQ, 8-bit activations and weights, weights a channel), and our own quantized
network as `actzip.quantize.onnx` writes it. `run` times all engines in one process, one thread
each, in turn, so that the ratios do not depend on when the machine was busy. Peak activation memory
of our plans is the arena and what packed maps take beyond it. `float32 packed` packs every map that
can be; `float32` those where it is quicker. Kernels are the defaults (no tuning trials); densities
are calibrated on photographs that are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actzip
from actzip import cpu
from actzip.files import write_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sparsify"))
import inception

Run = Callable[[], Any]


def network(folder: Path) -> torch.nn.Module:
    model = inception.network().to(memory_format=torch.contiguous_format)
    kept = folder / "thresholds.json"
    return inception.with_thresholds(model, json.loads(kept.read_text())) if kept.exists() else model


def quantized(model: torch.nn.Module, calibration: torch.Tensor, **options: Any) -> torch.nn.Module:
    return actzip.quantize(model, calibration, bits=8, observer="minmax", **options)


def prepare(folder: Path, thresholds: Path | None) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from actzip.quantize.onnx import export_qdq

    folder.mkdir(parents=True, exist_ok=True)
    images = torch.cat([x for x, _ in inception.photographs(slice(0, 8), 4)]).contiguous()
    np.save(folder / "calibration.npy", images.numpy())
    np.save(
        folder / "test.npy", next(iter(inception.photographs(slice(200, 201), 1)))[0].contiguous().numpy()
    )
    if thresholds is not None:
        values = json.loads(thresholds.read_text())["thresholds"]
        write_text(folder / "thresholds.json", json.dumps(values))
    plain = inception.network().to(memory_format=torch.contiguous_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(plain, (images[:1],), str(folder / "float.onnx"), dynamo=False, opset_version=17)

    graph = onnx.load(str(folder / "float.onnx"))
    name = graph.graph.input[0].name
    quant_pre_process(str(folder / "float.onnx"), str(folder / "ready.onnx"))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{name: images[i : i + 1].numpy()} for i in range(len(images))]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    quantize_static(
        str(folder / "ready.onnx"),
        str(folder / "int8.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ours = quantized(plain, images, weights=8, inputs="all")
    export_qdq(ours, images[:1], folder / "qdq.onnx", dynamic_batch=False)


def onnxruntime(path: Path, x: np.ndarray[Any, Any], threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


def openvino(path: Path, x: np.ndarray[Any, Any], threads: int) -> Run:
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    model.reshape(list(x.shape))
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(x, shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return run


def measure(folder: Path, runs: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    calibration = torch.from_numpy(np.load(folder / "calibration.npy"))[:4]
    x = np.load(folder / "test.npy")
    model = network(folder)
    q = quantized(model, calibration)
    with torch.no_grad():
        want = {
            n: m(torch.from_numpy(x)).numpy()
            for n, m in (("float", inception.network()), ("thresholds", model), ("quantized", q))
        }
    options: dict[str, Any] = {"tune": False, "cache": False, "threads": threads, "calibration": calibration}
    plans = {
        "actzip float32": (actzip.compile(model, calibration, **options), "thresholds"),
        "actzip float32 packed": (actzip.compile(model, calibration, pack="always", **options), "thresholds"),
        "actzip float16 packed": (
            actzip.compile(model, calibration, storage="float16", pack="always", **options),
            "thresholds",
        ),
        "actzip 8-bit packed": (actzip.compile(q, calibration, **options), "quantized"),
    }
    rows: dict[str, dict[str, Any]] = {}
    engines: dict[str, Run] = {}
    for name, (plan, reference) in plans.items():
        y = plan(x)
        memory = {"arena_bytes": plan.arena_bytes(1), "spilled_bytes": plan.explain(x).spilled_bytes}
        rows[name] = {**memory, "peak_activation_bytes": sum(memory.values()), "reference": reference}
        rows[name]["error"] = float(np.abs(y - want[reference]).max())
        engines[name] = lambda plan=plan: plan(x)
    for name, make, file in (
        ("onnxruntime float32", onnxruntime, "float.onnx"),
        ("onnxruntime int8", onnxruntime, "int8.onnx"),
        ("onnxruntime int8, actzip's QDQ", onnxruntime, "qdq.onnx"),
        ("openvino float32", openvino, "float.onnx"),
        ("openvino int8", openvino, "int8.onnx"),
        ("openvino int8, actzip's QDQ", openvino, "qdq.onnx"),
    ):
        rows[name] = {"reference": "float"}
        try:
            engines[name] = make(folder / file, x, threads)
            rows[name]["error"] = float(np.abs(engines[name]() - want["float"]).max())
        except Exception as error:  # an engine that cannot run this file here says why
            engines.pop(name, None)
            rows[name]["skip"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    times: dict[str, list[float]] = {n: [] for n in engines}
    for i in range(runs + 2):
        for name, run in engines.items():
            start = time.perf_counter()
            run()
            if i > 1:
                times[name].append(time.perf_counter() - start)
    for name, t in times.items():
        rows[name]["median_ms"], rows[name]["least_ms"] = 1e3 * float(np.median(t)), 1e3 * min(t)
    base = rows["actzip float32 packed"]
    for row in rows.values():
        if "median_ms" in row:
            row["latency_against_float32_packed"] = row["median_ms"] / base["median_ms"]
        if "peak_activation_bytes" in row:
            row["memory_against_float32_packed"] = (
                row["peak_activation_bytes"] / base["peak_activation_bytes"]
            )
    for name, row in rows.items():
        print(
            f"{name:32s}", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True
        )
    return {
        "network": "inception_v3_5class",
        "thresholds": (folder / "thresholds.json").exists(),
        "batch": 1,
        "runs": runs,
        "threads": threads,
        "load_average": os.getloadavg(),
        "machine": cpu.info(),
        "largest_output": float(np.abs(want["float"]).max()),
        "rows": rows,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["prepare", "run"])
    p.add_argument("folder", type=Path)
    p.add_argument(
        "--thresholds", type=Path, help="JSON with thresholds, of benchmarks/sparsify/inception.py"
    )
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    if a.what == "prepare":
        prepare(a.folder, a.thresholds)
        return
    result = measure(a.folder, a.runs, a.threads)
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(a.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
