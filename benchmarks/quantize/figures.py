"""Accuracy x bits x codec of one network at each stage, as JSON: the figures of docs/results/quantize.md.

    python benchmarks/quantize/figures.py mobilenet --stage baseline=cifar10_mobilenet_v1 \\
        --stage control=CONTROL.safetensors --stage sparsified=SPARSE.safetensors --bits 16 8 4
    python benchmarks/quantize/figures.py lenet --stage baseline=A.safetensors \\
        --stage sparsified=B.safetensors
    python benchmarks/quantize/figures.py inception --bits 16 8 --stage baseline=inception_v3_5class \\
        --stage thresholds=benchmarks/results/sparsify/inception-thresholds.json

A stage is a name and float weights (a file or a name under the shared weights), or NAME=STEM.json
for weights and learned scales written by ``save_quantized`` (their own bits are used). Everything
is streamed: one batch's maps at a time. Inception has no test labels here: its accuracy is top-1
agreement with the original float model on the photographs that benchmarks/sparsify/inception.py
sets aside (calibration never sees them), and its sparsified stages are results of that script,
which hold thresholds; NAME=RESULT.json,WEIGHTS adds trained weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actzip
from actzip import cpu
from actzip.data import Loader
from actzip.data import resolve as resolve_data
from actzip.files import write_text
from actzip.models import load_weights, model_info, resolve
from actzip.profile.rates import RateReport, measure_rates
from actzip.quantize import quantization
from actzip.quantize.files import load_quantized

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sparsify"))
import inception

NETWORKS = {
    "mobilenet": ("mobilenet_v1", "cifar10", 250),
    "lenet": ("lenet5", "mnist", 500),
    "resnet20": ("cifar_resnet20", "cifar10", 250),
    "resnet32": ("cifar_resnet32", "cifar10", 250),
    "inception": ("inception_v3_5class", "imagenet_sample", 4),
}


def row(network: str, stage: str, bits: Any, report: RateReport, seconds: float) -> dict[str, Any]:
    data = report.to_dict()
    best = data["codecs"]["best"]
    print(
        f"{network:10s} {stage:12s} {bits!s:>5s} bits  accuracy "
        f"{100 * (report.accuracy or 0):6.2f} %  density {report.density:.3f}  "
        + "  ".join(f"{c} {v['gain_float32']:.2f}x" for c, v in data["codecs"].items())
        + f"  (best {best['bits_per_element']:.3f} bits/element, {seconds:.0f} s)",
        flush=True,
    )
    return {"network": network, "stage": stage, "bits": bits, "seconds": round(seconds, 1), **data}


def float_accuracy(model: nn.Module, test: Any) -> float:
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for x, y in test:
            right += int((model(x).argmax(1) == y).sum())
            seen += len(x)
    return right / seen


class Figures:
    """The rows of a command, written to its file as each is measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stages = dict(s.split("=", 1) for s in args.stage)
        self.name, self.data_name, batch = NETWORKS[args.network]
        self.batch = args.batch or batch
        self.rows: list[dict[str, Any]] = []
        self.floats: dict[str, float] = {}
        self.calibration, self.test = (Loader(d, self.batch) for d in self.data())

    def data(self) -> tuple[Any, Any]:
        """Images to calibrate on, and others to judge on."""
        a = self.args
        if a.network == "inception":
            calibration = inception.photographs(slice(0, 24), self.batch).data
            test = inception.photographs(slice(200, 500), self.batch).data
        else:
            info = model_info(self.name)
            train, test = (
                dataclasses.replace(resolve_data(self.data_name, split), mean=info.mean, std=info.std)
                for split in ("train", "test")
            )
            calibration = train.take(range(a.calibration))
        return calibration, test.take(range(a.images)) if a.images else test

    @functools.cached_property
    def answers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inception: photographs, and what the original answers."""
        original = inception.network()
        with torch.no_grad():
            return [(x, original(x).argmax(1)) for x, _ in self.test]

    def measure(self, stage: str, weights: str) -> None:
        if self.args.network == "inception":
            self.each_bits(stage, inception_stage(weights), self.answers, "agreement")
        elif weights.endswith(".json"):
            model = load_quantized(resolve(self.name).eval(), weights.removesuffix(".json"))
            bits = sorted(set(quantization(model).bits.values()))
            self.add(stage, bits[0] if len(bits) == 1 else bits, model, self.test, time.perf_counter())
        else:
            model = resolve(self.name).eval()
            load_weights(model, weights)
            self.each_bits(stage, model, self.test, "accuracy")

    def each_bits(self, stage: str, model: nn.Module, batches: Any, what: str) -> None:
        """``model`` in float, then calibrated at each number of bits."""
        a = self.args
        self.floats[stage] = float_accuracy(model, batches)
        print(f"{a.network} {stage}: float {what} {100 * self.floats[stage]:.2f} %", flush=True)
        for bits in a.bits:
            start = time.perf_counter()
            observer = a.observer or ("minmax" if bits >= 6 else "mse")
            q = actzip.quantize(model, self.calibration, bits=bits, observer=observer, weights=a.weight_bits)
            self.add(stage, bits, q, batches, start)

    def add(self, stage: str, bits: Any, model: nn.Module, batches: Any, start: float) -> None:
        a = self.args
        report = measure_rates(model, batches, codecs=a.codecs, threads=a.threads)
        self.rows.append(row(a.network, stage, bits, report, time.perf_counter() - start))
        if a.out is None:
            return
        given = {k: v for k, v in vars(a).items() if k not in ("out", "stage")}
        result = {
            "command": given | {"stages": list(self.stages)},
            "machine": cpu.info(),
            "float_accuracy": self.floats,
            "rows": self.rows,
        }
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(a.out, json.dumps(result, indent=1, default=str) + "\n")


def inception_stage(weights: str) -> nn.Module:
    """Inception with trained weights, with thresholds of a result, or both: ``RESULT.json,WEIGHTS``."""
    found, _, trained = weights.partition(",")
    is_result = found.endswith(".json")
    model = inception.network()
    if trained or not is_result:
        load_weights(model, trained or found)
    if is_result:
        inception.with_thresholds(model, json.loads(Path(found).read_text())["thresholds"])
    return model


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("network", choices=NETWORKS)
    p.add_argument("--stage", action="append", default=[], metavar="NAME=WEIGHTS", required=True)
    p.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    p.add_argument(
        "--observer", default=None, help="minmax, percentile, mse, entropy; minmax from 6 bits, else mse"
    )
    p.add_argument("--weight-bits", type=int, default=None)
    p.add_argument("--codecs", nargs="+", default=["zvc", "seg", "rans"])
    p.add_argument("--images", type=int, default=None, help="of the test set; all where not given")
    p.add_argument("--calibration", type=int, default=1000, help="images of the training set")
    p.add_argument("--batch", type=int)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    figures = Figures(args)
    for stage, weights in figures.stages.items():
        figures.measure(stage, weights)


if __name__ == "__main__":
    main()
