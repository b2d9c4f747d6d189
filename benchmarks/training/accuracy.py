"""CIFAR ResNet-20, fine-tuned from the given weights: does packing in 8 or 4 bits cost accuracy?

    python benchmarks/training/accuracy.py runs/accuracy     # three seeds each of none, 8 and 4 bits

Every seed sees the same images in the same order whatever the bits. Runs go side by side, an epoch of each in
turn, and are resumable: OUT holds a checkpoint a run. Writes results/training/accuracy.json after each.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from actzip import cpu
from actzip.data import Loader, resolve
from actzip.files import write_text
from actzip.models import load_weights, model_info
from actzip.models import resolve as resolve_model
from actzip.training import packed_activations

RESULTS = Path(__file__).resolve().parents[1] / "results" / "training" / "accuracy.json"
BITS = (None, 8, 4)


def accuracy(model: nn.Module, test: Loader) -> float:
    """Top-1 on the test set, in percent."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in test:
            right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    return 100 * right / total


def epoch(model: nn.Module, batches: Loader, optimizer: Any, schedule: Any, bits: int | None) -> float:
    """One pass over the training set; returns the mean loss."""
    model.train()
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with packed_activations(model, bits) if bits else contextlib.nullcontext():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses)


def advance(
    folder: Path, seed: int, bits: int | None, data: Any, test: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """One more epoch of a run; returns its state for the table."""
    model = resolve_model("cifar_resnet20")
    load_weights(model, "cifar10_resnet20")
    loader = Loader(data, 128, seed=seed, shuffle=True, augment="crop_flip")
    steps = args.epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = folder / f"seed{seed}-{bits or 'none'}.pt"
    state: dict[str, Any] = {"epochs": 0, "losses": [], "accuracies": []}
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if state["epochs"] < args.epochs:
        torch.manual_seed(1000 * seed + state["epochs"])
        loss = epoch(model, loader.at(state["epochs"]), optimizer, schedule, bits)
        found = accuracy(model, Loader(test, 250))
        state = {
            "epochs": state["epochs"] + 1,
            "losses": [*state["losses"], loss],
            "accuracies": [*state["accuracies"], found],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save(state, path)
        print(
            f"seed {seed} bits {bits} epoch {state['epochs']}: loss {loss:.4f} test {found:.2f} %", flush=True
        )
    return {"seed": seed, "bits": bits, **{k: state[k] for k in ("epochs", "losses", "accuracies")}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="of the training set, the first ones")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    info = model_info("cifar_resnet20")
    data = resolve("cifar10", "train", mean=info.mean, std=info.std).take(slice(0, args.images))
    test = resolve("cifar10", "test", mean=info.mean, std=info.std)
    model = resolve_model("cifar_resnet20")
    load_weights(model, "cifar10_resnet20")
    start = accuracy(model, Loader(test, 250))
    for _ in range(args.epochs):
        runs = [
            advance(args.out, seed, bits, data, test, args)
            for seed, bits in itertools.product(range(args.seeds), BITS)
        ]
        write(args, start, runs)


def write(args: argparse.Namespace, start: float, runs: list[dict[str, Any]]) -> None:
    """Everything measured, and a line a number of bits."""
    last = {b: [r["accuracies"][-1] for r in runs if r["bits"] == b] for b in BITS}
    summary = [
        {"bits": b, "mean": statistics.fmean(v), "low": min(v), "high": max(v)} for b, v in last.items()
    ]
    described = {
        "what": "CIFAR ResNet-20 from the given weights, SGD, cosine, batch 128; test accuracy in percent",
        "epochs": args.epochs,
        "images": args.images,
        "lr": args.lr,
        "before": start,
        "environment": cpu.info(),
        "summary": summary,
        "runs": runs,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_text(RESULTS, json.dumps(described, indent=1) + "\n")
    for line in summary:
        print(line, flush=True)


if __name__ == "__main__":
    main()
