"""Quantized ONNX files on the engine, which computes them in float32, beside ONNX Runtime's integers.

    python benchmarks/quantize/files.py /tmp/files --json benchmarks/results/quantize/files.json

ONNX Runtime's own ``quantize_static`` makes three files of each network in the folder, with the weights
of its convolutions a channel where it can: QDQ in int8 (its default), QDQ and QOperator with uint8
activations. Both run by turns, in one process, on a photograph; the network in float32 is there too.
Files that lie in the folder are used again. Inception-V3's weights are trained, those of the others
random.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actzip
from actzip import cpu
from actzip.files import write_text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))
import models

NETWORKS = ("inception_v3", "resnet18", "resnet50", "mobilenet_v2")
KINDS = ("float32", "QDQ int8", "QDQ uint8", "QOperator uint8")


def written(name: str, folder: Path) -> dict[str, Path]:
    """The files of a network by kind, and ``x``, an input."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    files = {k: folder / f"{name}-{k.replace(' ', '-')}.onnx" for k in KINDS} | {"x": folder / f"{name}.npy"}
    if all(f.exists() for f in files.values()):
        return files
    images = [x.contiguous() for x in models.images(name, "calibration", 4).split(1)]
    np.save(files["x"], models.images(name, "unseen", 1).contiguous().numpy())
    float32 = str(files["float32"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = models.build(name).to(memory_format=torch.contiguous_format)
        torch.onnx.export(net, (images[0],), float32, dynamo=False, opset_version=17)
    quant_pre_process(float32, float32)
    (value,) = ort.InferenceSession(float32).get_inputs()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{value.name: x.numpy()} for x in images])

        def get_next(self) -> Any:
            return next(self.left, None)

    for kind in KINDS[1:]:
        form, dtype = kind.split()
        quantize_static(
            float32,
            str(files[kind]),
            Reader(),
            quant_format=getattr(QuantFormat, form),
            per_channel=True,
            activation_type=QuantType.QUInt8 if dtype == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    return files


def measure(files: dict[str, Path], kind: str, runs: int, threads: int) -> dict[str, Any]:
    """Milliseconds of both, by turns; and how far the answers are from each other."""
    import onnxruntime as ort

    x = np.load(files["x"])
    fast = actzip.compile(files[kind], x, threads=threads, fallback=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(files[kind]), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    ours, theirs = fast(x), session.run(None, feed)[0]
    engines = {"actzip": lambda: fast(x), "onnxruntime": lambda: session.run(None, feed)}
    times: dict[str, list[float]] = {n: [] for n in engines}
    for i in range(runs + 2):
        for name, run in list(engines.items())[:: 1 - 2 * (i % 2)]:
            start = time.perf_counter()
            run()
            if i > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    row: dict[str, Any] = {"runs": runs, "threads": threads}
    row |= {f"{n}_ms": float(np.median(t)) for n, t in times.items()}
    row |= {f"{n}_least_ms": min(t) for n, t in times.items()}
    row["difference"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--only", nargs="*", default=NETWORKS)
    p.add_argument("--runs", type=int, default=30)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in a.only:
        files = written(name, a.folder)
        for kind in KINDS:
            rows.append({"network": name, "file": kind, **measure(files, kind, a.runs, a.threads)})
            print(rows[-1], flush=True)
    result = {"batch": 1, "machine": cpu.info(), "rows": rows}
    if a.json is not None:
        if a.json.exists():  # other networks' rows stay
            kept = json.loads(a.json.read_text())["rows"]
            result["rows"] = [r for r in kept if r["network"] not in a.only] + rows
        write_text(a.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
