"""One engine in a process of its own, for ``actzip bench``: makes itself ready, then times runs when asked.

Run as a script, by any Python >= 3.8 that has the engine: ``_engines.py ENGINE '{"model": ..., "onnx": ..., "input": x.npy,
"output": y.npy, "threads": 1}'``. Answers one JSON object a line: first {"ready": true, "version": ...} or {"skip": reason};
then for each line ``N SECONDS`` on standard input the milliseconds of N runs, or of as many as SECONDS allow, and the
peak memory of the process.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # this folder has an `inspect` and a `profile` that are not the standard library's
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]

import importlib
import json
import time
from typing import Any

import numpy as np


def _network(spec: dict[str, Any]) -> Any:
    import torch

    from actzip.profile.load import load_model

    torch.set_num_threads(spec["threads"])
    model = load_model(spec["model"])[0]
    if spec.get("state"):
        model.load_state_dict(torch.load(spec["state"], weights_only=True))
    for m in model.modules():
        m.training = False
    return model


def _torch(spec: dict[str, Any], channels_last: bool = False, compiled: bool = False) -> tuple[Any, Any, str]:
    import torch

    model, x = _network(spec), torch.from_numpy(np.load(spec["input"]))
    if channels_last and x.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    if compiled:
        import torch._inductor.config as config

        config.freezing = True
        model = torch.compile(model)

    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run, lambda: run().numpy(), torch.__version__


def _onnxruntime(spec: dict[str, Any]) -> tuple[Any, Any, str]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = spec["threads"], 1
    session = ort.InferenceSession(spec["onnx"], options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.load(spec["input"])}
    return lambda: session.run(None, feed), lambda: session.run(None, feed)[0], ort.__version__


def _openvino(spec: dict[str, Any]) -> tuple[Any, Any, str]:
    import openvino as ov

    core, x = ov.Core(), np.load(spec["input"])
    model = core.read_model(spec["onnx"])
    model.reshape(list(x.shape))
    config = {
        "INFERENCE_NUM_THREADS": spec["threads"], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }  # fmt: skip
    request = core.compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(x))  # a copy: a shared one does not keep the array alive

    def last() -> Any:
        request.infer()
        return np.array(request.get_output_tensor(0).data)

    return request.infer, last, ov.__version__


def _deepsparse(spec: dict[str, Any]) -> tuple[Any, Any, str]:
    os.environ["NM_BIND_THREADS_TO_CORES"] = "0"
    deepsparse = importlib.import_module("deepsparse")
    x = np.load(spec["input"])
    engine = deepsparse.compile_model(spec["onnx"], batch_size=x.shape[0], num_cores=spec["threads"])
    return lambda: engine.run([x]), lambda: engine.run([x])[0], deepsparse.__version__


def _actzip(spec: dict[str, Any]) -> tuple[Any, Any, str]:
    import actzip

    x = np.load(spec["input"])
    model = spec["model"] if spec["model"].endswith(".onnx") else _network(spec)
    fast = actzip.compile(model, x, threads=spec["threads"])
    return lambda: fast(x), lambda: fast(x), actzip.__version__


ENGINES = {
    "actzip": _actzip,
    "torch": _torch,
    "torch channels_last": lambda spec: _torch(spec, True),
    "torch.compile": lambda spec: _torch(spec, True, True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "deepsparse": _deepsparse,
}


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status") as f:
            lines = [line for line in f if line.startswith("VmHWM:")]
        return int(lines[0].split()[1]) * 1024
    except (OSError, IndexError, ValueError):
        return 0


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print; the answers have standard output for themselves

    def say(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    name, spec = sys.argv[1], json.loads(sys.argv[2])
    try:
        started = time.perf_counter()
        run, result, version = ENGINES[name](spec)
        np.save(spec["output"], np.asarray(result()))
        seconds = time.perf_counter() - started
        for _ in range(2):
            run()
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        say(skip=f"{type(error).__name__}: {text}")
        return
    say(ready=True, version=version, seconds=seconds)
    for line in sys.stdin:
        count, limit = line.split()
        times: list[float] = []
        run()
        end = time.perf_counter() + float(limit)
        while len(times) < int(count) and (not times or time.perf_counter() < end):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        say(ms=times, peak_bytes=_peak_bytes())


if __name__ == "__main__":
    main()
