"""What a call of a compiled model costs beside its work: python benchmarks/integrations/overhead.py

A network of one ReLU on 8 numbers, one thread: almost nothing to compute, so the time of a call is
the overhead of the call. Tensors and arrays, a batch of one. Writes
benchmarks/results/integrations/call-overhead.json: microseconds a call, the median and the least of
the rounds; beside them an empty Python function, the same network in PyTorch, and in ONNX Runtime
where that is installed.
"""

from __future__ import annotations

import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actzip
from actzip import cpu
from actzip.files import write_text

RESULTS = Path(__file__).resolve().parent.parent / "results" / "integrations" / "call-overhead.json"
ROUNDS, CALLS = 30, 2000


def microseconds(call: Callable[[], Any]) -> dict[str, float]:
    for _ in range(CALLS):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return {"median": round(statistics.median(times), 3), "least": round(min(times), 3)}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    relu = nn.Sequential(nn.ReLU()).eval()
    small = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    found: dict[str, Any] = {}
    for name, net, x in (
        ("relu of 8 numbers", relu, torch.randn(1, 8)),
        ("conv, relu, linear on 4 x 4", small, torch.randn(1, 1, 4, 4)),
    ):
        fast = actzip.compile(net, x, threads=1)
        a = x.numpy()
        row = {
            "actzip tensor": microseconds(lambda f=fast, x=x: f(x)),
            "actzip array": microseconds(lambda f=fast, a=a: f(a)),
        }
        with torch.inference_mode():
            row["torch"] = microseconds(lambda n=net, x=x: n(x))
        try:
            import onnxruntime as ort

            buffer = io.BytesIO()
            torch.onnx.export(net, (x,), buffer, dynamo=False, input_names=["x"])
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = ort.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
            row["onnxruntime array"] = microseconds(lambda s=session, a=a: s.run(None, {"x": a}))
        except ImportError:
            pass
        found[name] = row
    document = {
        "command": "python benchmarks/integrations/overhead.py",
        "unit": "microseconds a call",
        "rounds": ROUNDS,
        "calls_a_round": CALLS,
        **{k: cpu.info()[k] for k in ("cpu", "isa", "versions")},
        "empty function": microseconds(lambda: None),
        "networks": found,
    }
    write_text(RESULTS, json.dumps(document, indent=1) + "\n")
    print(json.dumps({"empty function": document["empty function"], **found}, indent=1))


if __name__ == "__main__":
    main()
