"""Memory and time of training with packed activation maps, against plain PyTorch and checkpointing.

    python benchmarks/training/run.py           # every figure: benchmarks/results/training/*.json
    python benchmarks/training/run.py saved     # one of: saved, step, peak, pages, largest
    python benchmarks/training/run.py step --networks resnet50,vgg16

Peaks are the kernel's own count (VmHWM), the median of three processes for each, over what the
process holds with model, gradients and images before the first step; beside them what
`actzip profile --training` predicts.
"pages": peaks where glibc gives every block of a megabyte pages of its own (MALLOC_MMAP_THRESHOLD_).
Times: methods in turn in one process, median and minimum. The accuracy of a fine-tuned network: accuracy.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from networks import CHECKPOINTED, METHODS, NETWORKS, PACKED, batch_of, packing, prepare, train_step

from actzip import cpu
from actzip.files import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results" / "training"
LIMIT = 1 << 30


def saved(name: str, batch: int) -> dict[str, Any]:
    """Bytes saved for backward, plain and packed, and the density of the maps after ReLU."""
    model = prepare(name, "plain")
    images = batch_of(NETWORKS[name], batch)
    found: dict[str, Any] = {"batch": batch, "trained": NETWORKS[name].trained, "norm": NETWORKS[name].norm}
    for method in PACKED:
        with packing(model, method) as packed:
            torch.nn.functional.cross_entropy(model(images[0]), images[1])
        found["plain"] = packed.saved_bytes
        found[method] = packed.packed_bytes
    found["density"] = density(model, images[0])
    return found


def density(model: torch.nn.Module, x: torch.Tensor) -> float:
    """The share of elements after ReLU and ReLU6 that are not zero."""
    from actzip.activations import ActivationTap

    counts = [0, 0]

    def count(site: Any, out: torch.Tensor) -> None:
        if site.sparse:
            counts[0] += int((out != 0).sum())
            counts[1] += out.numel()

    with ActivationTap(model, activation=count), torch.no_grad():
        model(x)
    return counts[0] / max(counts[1], 1)


def step(name: str, batch: int, rounds: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of a step by method, methods in turn."""
    models = {m: prepare(name, m) for m in {"plain", *(m for m in methods if m in CHECKPOINTED)}}
    optimizers = {k: torch.optim.SGD(m.parameters(), 1e-4) for k, m in models.items()}
    images = batch_of(NETWORKS[name], batch)
    times: dict[str, list[float]] = {m: [] for m in methods}
    for i in range(rounds + 1):
        first = i % len(methods)  # what ran before a method leaves its memory as it was
        for method in (*methods[first:], *methods[:first]):
            of = method if method in CHECKPOINTED else "plain"
            gc.collect()
            start = time.perf_counter()
            train_step(models[of], images, method, optimizers[of])
            if i:  # the first is a warm-up
                times[method].append(time.perf_counter() - start)
    return {
        "batch": batch,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        **{m: {"median": statistics.median(t), "min": min(t)} for m, t in times.items()},
    }


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak(name: str, batch: int, method: str) -> dict[str, Any]:
    """Peak of this process over model, gradients and images, in bytes."""
    model = prepare(name, method)
    images = batch_of(NETWORKS[name], batch)
    train_step(
        model, (images[0][:1].repeat(2, 1, 1, 1), images[1][:1].repeat(2)), method
    )  # gradients, libraries
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    train_step(model, images, method)
    return {"peak": status("VmHWM") - before, "before": before}


def child(*arguments: Any, pages: bool = False) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "one", *map(str, arguments)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if pages else None
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if out.returncode:
        raise SystemExit(out.stderr)
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def predicted(name: str, batch: int) -> dict[str, Any]:
    """The peaks that `actzip profile --training` expects, in bytes."""
    from actzip.profile.training import training_memory

    peaks = training_memory(prepare(name, "plain"), *batch_of(NETWORKS[name], batch)).peaks
    return {"plain": peaks["plain"], "exact": peaks["exact"], "8": peaks["bits8"], "4": peaks["bits4"]}


def largest(name: str, method: str, limit: int) -> int:
    """The largest batch whose step stays below ``limit`` bytes over the model, by bisection."""

    def fits(batch: int) -> bool:
        found = child("peak", name, batch, method)["peak"]
        print(f"{name} {method} batch {batch}: {found / 1e6:.0f} MB", flush=True)
        return bool(found <= limit)

    first = child("peak", name, 8, method)["peak"]
    low = high = max(1, int(8 * limit / first))
    if fits(low):
        while fits(high := high + max(1, high // 4)):
            low = high
    else:
        while low > 0 and not fits(low := low - max(1, low // 4)):
            high = low
    while high - low > max(1, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", "saved", "step", "peak", "pages", "largest", "one"]
    )
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--networks", default=None, help="with commas between them")
    parser.add_argument("--methods", default=None, help="with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="of a peak; the median is kept")
    args = parser.parse_args()
    if args.what == "one":
        kind, name, batch, *method = args.rest
        found = predicted(name, int(batch)) if kind == "predicted" else peak(name, int(batch), *method)
        print(json.dumps(found))
        return
    names = args.networks.split(",") if args.networks else list(NETWORKS)
    asked = tuple(args.methods.split(",")) if args.methods else METHODS
    for what in ("saved", "step", "peak", "pages", "largest") if args.what == "all" else (args.what,):
        for name in names:
            network = NETWORKS[name]
            batch, one_cut = network.batch, network.blocks == network.stages
            methods = tuple(m for m in asked if not (one_cut and m.startswith("stages")))
            if what == "saved":
                record(what, name, saved(name, batch))
            elif what == "step":
                packed = tuple(m for m in methods if args.methods or m not in CHECKPOINTED)
                record(what, name, step(name, batch, args.rounds, packed))
            elif what in ("peak", "pages"):
                record(what, name, {"batch": batch, "predicted": child("predicted", name, batch)})
                for method in methods:
                    runs = [
                        child("peak", name, batch, method, pages=what == "pages")["peak"]
                        for _ in range(args.runs)
                    ]
                    record(what, name, {method: int(statistics.median(runs))})
            elif name == "mobilenet_v2" or args.networks:
                for method in methods:
                    record(what, name, {"limit": LIMIT, method: largest(name, method, LIMIT)})


def record(what: str, name: str, found: dict[str, Any]) -> None:
    """Into results/WHAT.json, beside what is there; and a line on the screen."""
    path = RESULTS / f"{what}.json"
    all_found = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    all_found["environment"] = cpu.info()
    all_found["networks"].setdefault(name, {}).update(found)
    RESULTS.mkdir(exist_ok=True)
    write_text(path, json.dumps(all_found, indent=1) + "\n")
    print(what, name, line(what, all_found["networks"][name]), flush=True)


def line(what: str, row: dict[str, Any]) -> str:
    """Ratios to plain."""
    shown = []
    for method in METHODS:
        if method not in row:
            continue
        value = row[method]
        if what == "step":
            plain = row.get("plain", value)
            shown.append(
                f"{method} {value['median'] / plain['median']:.2f} ({value['min'] / plain['min']:.2f})"
            )
        elif what == "largest":
            shown.append(f"{method} {value}")
        else:
            shown.append(f"{method} {value / row.get('plain', value):.3f}")
    if "density" in row:
        shown.append(f"density {row['density']:.3f}")
    return ", ".join(shown)


if __name__ == "__main__":
    main()
