"""Inception-V3 in the engine with packed maps as float32, float16 and 8-bit integers: activation memory and latency.

    python benchmarks/quantize/engine.py --out benchmarks/quantize/results/engine.json

All plans run in one process, in turn, so that the ratio does not depend on when the machine was busy. Kernels are the
defaults (no tuning trials), densities are calibrated on four photographs; timed on another one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actzip
from actzip import cpu
from actzip.data import Loader
from actzip.data import resolve as resolve_data
from actzip.files import write_text
from actzip.models import load_weights, model_info, resolve


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    model = resolve("inception_v3_5class").eval()
    load_weights(model, "inception_v3_5class")
    info = model_info("inception_v3_5class")
    data = resolve_data("imagenet_sample", "test", image_size=299, limit=12)
    data = dataclasses.replace(data, mean=info.mean, std=info.std)
    x, _ = next(iter(Loader(data, 8)))
    calibration, test = x[:4], x[4:5]
    quantized = actzip.quantize(model, calibration, bits=8, observer="minmax")
    options: dict[str, Any] = {
        "tune": False,
        "cache": False,
        "threads": a.threads,
        "calibration": calibration,
    }
    plans = {
        "float32": actzip.compile(model, calibration, **options),
        "float16": actzip.compile(model, calibration, storage="float16", **options),
        "int8": actzip.compile(quantized, calibration, **options),
    }
    want = {"float32": model, "float16": model, "int8": quantized}
    times: dict[str, list[float]] = {n: [] for n in plans}
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, plan in plans.items():
            y, reference = plan(test), want[name](test)
            rows[name] = {
                "arena_bytes": plan.arena_bytes(1),
                "error": float((y - reference).abs().max()),
                "largest_output": float(reference.abs().max()),
            }
        for _ in range(a.runs):
            for name, plan in plans.items():
                start = time.perf_counter()
                plan(test)
                times[name].append(time.perf_counter() - start)
    for name, t in times.items():
        rows[name]["median_ms"], rows[name]["least_ms"] = 1e3 * float(np.median(t)), 1e3 * min(t)
    for name, r in rows.items():
        for key, base in (
            ("arena", "arena_bytes"),
            ("latency_median", "median_ms"),
            ("latency_least", "least_ms"),
        ):
            r[f"{key}_ratio"] = r[base] / rows["float32"][base]
        print(name, {k: round(v, 4) for k, v in r.items()}, flush=True)
    if a.out is not None:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        load = os.getloadavg()
        result = {
            "runs": a.runs,
            "threads": a.threads,
            "load_average": load,
            "machine": cpu.info(),
            "rows": rows,
        }
        write_text(a.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
