"""How many zeros thresholds make at what loss, without training: a few unlabelled images, the rest to judge.

    python benchmarks/accelerate/figures.py efficientnet-lite0
    python benchmarks/accelerate/figures.py efficientnet-lite0 --draw 1    # other images calibrate
    python benchmarks/accelerate/figures.py --list

Writes benchmarks/results/accelerate/NAME.json: for every point the density of all ReLU outputs,
effective MACs, top-1 by labels (used here alone), the share of images whose highest output stays,
how far outputs move, and the seconds that finding the point took, all on images that chose nothing.
Intervals are of 95 %. With `bits` (networks.py), also the coded size of all maps, headers included,
and top-1 with integers of so many bits, at the densities of `coded_at`. `--draw` calibrates with
other images, drawn at random, and adds its points to draws/NAME.json. Networks come from ordinary
packages; `--plain` leaves the repair out, for comparison.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import NETWORKS, Network
from torch import Tensor, nn

import actzip
from actzip import cpu
from actzip.activations.hooks import Hooks
from actzip.files import write_text
from actzip.profile.rates import measure_rates
from actzip.sparsify import measure
from actzip.sparsify.judge import agreement_of, are_scores, error_of, wilson
from actzip.sparsify.thresholds import Calibrator
from actzip.training.batches import output_tensors

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accelerate"


def split(x: Tensor, size: int) -> list[Tensor]:
    """Batches, in the layout that convolutions run fastest in."""
    return [b.contiguous(memory_format=torch.channels_last) for b in x.split(size)]


def outputs(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    with torch.no_grad():
        return [model(x) for x in batches]


def range_error(before: list[Any], after: list[Any]) -> dict[str, float]:
    """Of the first output's maps: root mean square and mean of the difference, in units of their range."""
    b = torch.cat([output_tensors(y)[0] for y in before])
    a = torch.cat([output_tensors(y)[0] for y in after])
    span = float(b.max() - b.min())
    return {"rms": float((a - b).square().mean().sqrt()) / span, "mean": float((a - b).abs().mean()) / span}


def judge(
    model: nn.Module,
    reference: list[Any],
    batches: list[Tensor],
    labels: Tensor | None,
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    """What the model does on images that chose nothing; the original itself where there is no ``base``:
    its outputs become the ``reference``."""
    after: list[Any] = []
    with Hooks() as hooks:
        hooks.after(model, lambda module, inputs, out: after.append(out))
        m = measure(model, batches)
    if base is None:
        reference.extend(after)
    found: dict[str, Any] = {
        "density": m.density,
        "macs": m.macs,
        "effective_macs": m.effective_macs,
        "theoretical_speedup": m.theoretical_speedup,
        "images": m.samples,
        "output_error": error_of(reference, after).as_dict(),
    }
    if all(are_scores(y) for y in after):
        found["agreement"] = agreement_of(reference, after).as_dict()
        found["divergence"] = divergence(reference, after)
    else:
        found["range_error"] = range_error(reference, after)
    if labels is not None:
        found |= accuracy(reference, after, labels)
    if base is not None:
        found["less_work"] = base["effective_macs"] / m.effective_macs
    return found


def divergence(before: list[Any], after: list[Any]) -> dict[str, float]:
    """Kullback and Leibler's, of the softmax of the scores, in nats: its mean and 95 % interval."""
    p, q = (torch.cat(y).double().log_softmax(1) for y in (before, after))
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    mean, half = float(each.mean()), 1.96 * float(each.std()) / math.sqrt(len(each))
    return {"value": mean, "low": mean - half, "high": mean + half}


def accuracy(reference: list[Any], after: list[Any], labels: Tensor) -> dict[str, Any]:
    """Top-1, and what it is against the original, image by image."""
    right = torch.cat([y.argmax(1) for y in after]) == labels
    before = torch.cat([y.argmax(1) for y in reference]) == labels
    lost, won = int((before & ~right).sum()), int((right & ~before).sum())
    n = len(labels)
    change = (won - lost) / n
    half = 1.96 * math.sqrt(max(lost + won - (won - lost) ** 2 / n, 0)) / n
    return {
        "top1": float(right.float().mean()),
        "top1_interval": wilson(int(right.sum()), n),
        "top1_change": {"value": change, "low": change - half, "high": change + half},
    }


def coded(
    model: nn.Module,
    calibration: list[Tensor],
    reference: list[Any],
    batches: list[Tensor],
    labels: Tensor | None,
    network: Network,
    widen: float = 1.0,
) -> list[dict[str, Any]]:
    """The maps as integers, coded, of some images; accuracy and agreement on all."""
    rows = []
    for bits in network.bits:
        quantized = actzip.quantize(model, calibration, bits=bits, observer="minmax", widen=widen)
        after = outputs(quantized, batches)
        few = [b for batch in batches for b in batch.split(4)][: network.coded // 4]
        rates = measure_rates(quantized, few, codecs=("seg", "rans")).to_dict()
        row = {"bits": bits, "widen": widen, "agreement": agreement_of(reference, after).as_dict()}
        row |= {k: rates[k] for k in ("images", "batch", "density", "entropy_bits_per_element", "codecs")}
        row |= accuracy(reference, after, labels) if labels is not None else {}
        gains = ", ".join(f"{c} {v['gain_float32']:.2f}x" for c, v in row["codecs"].items())
        change = f"top-1 {100 * row['top1_change']['value']:+.2f}" if labels is not None else ""
        print(f"{bits:4} bits: {gains} {change}", flush=True)
        rows.append(row)
    return rows


def point(
    model: nn.Module, calibrator: Calibrator, target: dict[str, float], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with thresholds for the target, and how it was found."""
    started, cpu_started = time.perf_counter(), time.process_time()
    steps = 0 if args.plain else args.distil
    found = calibrator.find(**target, steps=args.steps, distil_steps=steps)  # type: ignore[arg-type]
    made = found.apply(copy.deepcopy(model))
    told = {
        "target": target,
        "met": found.met,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "calibration_density": found.density,
        "tried": len(found.tried),
    }
    return made, told


def add_draw(path: Path, name: str, row: dict[str, Any]) -> None:
    """Adds a draw's point to the file, in place of the same one."""
    path.parent.mkdir(exist_ok=True)
    told = json.loads(path.read_text()) if path.exists() else {"network": name, "points": []}

    def key(r: dict[str, Any]) -> tuple[int, str]:
        return r["draw"], json.dumps(r["target"])

    told["points"] = sorted([r for r in told["points"] if key(r) != key(row)] + [row], key=key)
    write_text(path, json.dumps(told, indent=1) + "\n")


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    network = NETWORKS[name]
    model = network.make().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, rest, labels = network.data(network.calibrate, args.draw)
    images = args.images or network.images
    rest = rest[:images]
    labels = labels[:images] if labels is not None and network.labelled else None
    calibration, batches = split(x, network.batch), split(rest, network.batch)
    started, cpu_started = time.perf_counter(), time.process_time()
    calibrator = Calibrator(
        model, calibration, per="channel", repair=not args.plain, samples=network.calibrate, projections=4
    )
    weighed = time.perf_counter() - started, time.process_time() - cpu_started
    reference: list[Any] = []
    base = judge(model, reference, batches, labels, None)
    info = cpu.info()
    told: dict[str, Any] = {
        "network": name,
        "cpu": info["cpu"],
        "isa": info["isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "calibration_images": len(x),
        "repair": not args.plain,
        "distil_steps": 0 if args.plain else args.distil,
        "weighing_seconds": weighed[0],
        "weighing_cpu_seconds": weighed[1],
        "before": base,
        "points": [],
    }
    print(line("before", base), flush=True)
    bits = () if args.uncoded else network.bits
    if bits and not args.draw:
        base["coded"] = coded(model, calibration, reference, batches, labels, network)
    targets = [{"density": d} for d in args.density or network.density]
    factors = args.work or (() if args.density else network.less_work)
    natural = measure(model, calibration).theoretical_speedup if factors else 1.0
    targets += [{"speedup": f * natural} for f in factors]
    for target in targets:
        made, row = point(model, calibrator, target, args)
        row |= judge(made, reference, batches, labels, base)
        told["points"].append(row)
        print(line(json.dumps(target), row), flush=True)
        widen = network.coded_at.get(target.get("density", 0.0))
        if bits and widen:
            row["coded"] = coded(made, calibration, reference, batches, labels, network, widen)
        if args.draw:
            add_draw(RESULTS / "draws" / f"{name}.json", name, {"draw": args.draw} | row)
            continue
        write_text(
            args.out or RESULTS / f"{name}{'-plain' if args.plain else ''}.json",
            json.dumps(told, indent=1) + "\n",
        )
    return told


def line(what: str, r: dict[str, Any]) -> str:
    parts = [f"{what:28} density {r['density']:.4f} theoretical {r['theoretical_speedup']:.2f}x"]
    if "less_work" in r:
        parts.append(f"{r['less_work']:.2f}x less work")
    if "top1" in r:
        parts.append(f"top-1 {r['top1']:.2%}")
        c = r["top1_change"]
        parts.append(f"({100 * c['value']:+.2f}, {100 * c['low']:+.2f} to {100 * c['high']:+.2f})")
    if "agreement" in r:
        parts.append(f"agreement {r['agreement']['value']:.2%}")
    if "range_error" in r:
        parts.append(f"error of range rms {r['range_error']['rms']:.4f} mean {r['range_error']['mean']:.4f}")
    if "divergence" in r:
        parts.append(f"divergence {r['divergence']['value']:.4f}")
    parts.append(f"output error {r['output_error']['value']:.3f}")
    if "seconds" in r:
        parts.append(f"in {r['seconds']:.0f} s ({r['cpu_seconds']:.0f} s of CPU)")
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=sorted(NETWORKS))
    parser.add_argument("--list", action="store_true", help="the networks")
    parser.add_argument("--density", type=float, nargs="*", help="other densities")
    parser.add_argument("--work", type=float, nargs="*", help="other factors of less work")
    parser.add_argument("--distil", type=int, default=0, help="steps of distillation without labels")
    parser.add_argument("--steps", type=int, default=3, help="of the bisection")
    parser.add_argument("--draw", type=int, default=0, help="so many'th other images to calibrate with")
    parser.add_argument("--uncoded", action="store_true", help="without integers and codecs")
    parser.add_argument("--images", type=int, help="judge on at most so many")
    parser.add_argument("--plain", action="store_true", help="thresholds alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.list or args.network is None:
        print("\n".join(NETWORKS))
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    run(args.network, args)


if __name__ == "__main__":
    main()
