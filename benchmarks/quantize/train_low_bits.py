"""Trains sparsity and a low-bit quantizer together (learned steps, rate penalty), and a float
control beside it.

    python benchmarks/quantize/train_low_bits.py --bits 4 --epochs 4 --factor 0.15 --out out/mobilenet-4bit
    python benchmarks/quantize/train_low_bits.py --control --epochs 4 --out out/mobilenet-control

Writes OUT.safetensors (weights), OUT.json (scales; not for the control) and OUT.log.json (figures
of each epoch).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import actzip
from actzip.data import Loader
from actzip.data import resolve as resolve_data
from actzip.models import load_weights, model_info, resolve, save_weights
from actzip.profile.rates import measure_rates
from actzip.quantize.files import save_quantized
from actzip.quantize.train import RatePenalty, finetune


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--network", default="mobilenet_v1")
    p.add_argument("--weights", default="cifar10_mobilenet_v1")
    p.add_argument("--teacher", help="float weights to learn from too; the first weights where not given")
    p.add_argument("--data", default="cifar10")
    p.add_argument("--bits", type=int, default=4)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--factor", type=float, default=0.15, help="loss a bit an element")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--scale-lr", type=float, default=2e-3)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--images", type=int, default=0, help="train on so many only (0: all)")
    p.add_argument("--control", action="store_true", help="float, no penalty, the same epochs and rates")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", type=Path, required=True)
    return p.parse_args()


def networks(a: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The network to train, and its teacher."""
    model = resolve(a.network).to(memory_format=torch.channels_last)
    load_weights(model, a.weights)
    teacher = copy.deepcopy(model).eval()
    if a.teacher:
        load_weights(teacher, a.teacher)
    return model, teacher


def data(a: argparse.Namespace) -> tuple[Loader, Loader, Loader]:
    """Batches to train on, the same images to calibrate on, and the test set."""
    info = model_info(a.network)
    train, test = (
        dataclasses.replace(resolve_data(a.data, s), mean=info.mean, std=info.std) for s in ("train", "test")
    )
    if a.images:
        train = train.take(range(a.images))
    return (
        Loader(train, a.batch, shuffle=True, augment="crop_flip", drop_last=True, channels_last=True),
        Loader(train, 250, channels_last=True),
        Loader(test, 250, channels_last=True),
    )


def keeper(a: argparse.Namespace, model: nn.Module, test: Loader) -> Callable[[int, dict[str, float]], None]:
    """What is called behind each epoch: tests the network, and writes it and the log."""
    log: list[dict[str, float]] = []

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        model.eval()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
        row["test_accuracy"] = right / len(test.data)
        print(epoch, row, flush=True)
        log.append(row)
        if a.control:
            save_weights(model, a.out.with_suffix(".safetensors"))
        else:
            save_quantized(model, a.out)
        a.out.with_suffix(".log.json").write_text(
            json.dumps({"options": vars(a), "epochs": log}, indent=1, default=str)
        )

    return on_epoch


def main() -> None:
    a = options()
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    model, teacher = networks(a)
    train, calibration, test = data(a)
    given: dict[str, Any] = {
        "epochs": a.epochs,
        "lr": a.lr,
        "weight_decay": 1e-2,
        "teacher": teacher,
        "on_epoch": keeper(a, model, test),
    }
    if a.control:  # no quantizer at all: the same loop with an empty one
        actzip.quantize.Quantization().attach(model)
        finetune(model, train, **given)
        return
    model = actzip.quantize(model, calibration, bits=a.bits, observer="mse", batches=4, inplace=True)
    with RatePenalty(model, a.factor) as penalty:
        steps = itertools.count(1)

        def watched() -> torch.Tensor:
            value = penalty()
            step = next(steps)
            if step % 20 == 0:
                print(step, f"rate {penalty.rate:.3f}", flush=True)
            return value

        finetune(model, train, scale_lr=a.scale_lr, penalty=watched, **given)
    report = measure_rates(model, test, codecs=["seg", "rans"], images=1000)
    print(json.dumps(report.to_dict()["codecs"]), report.density, flush=True)


if __name__ == "__main__":
    main()
