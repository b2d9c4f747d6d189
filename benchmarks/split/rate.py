"""Bits an element of real networks' maps at a loss of at most 1 %, without training.

    python benchmarks/split/rate.py inception-v3 --at Mixed_6a
    python benchmarks/split/rate.py mobilenet-v2 --at features.7 --labels

Writes benchmarks/results/split/rate-NAME.json: for every cut the bits of frames (every header
counted, one image a frame) over the elements of the maps, and what stays on images that neither
calibrated nor chose: the share whose highest output is the same, and top-1 by labels. Networks and
images: benchmarks/accelerate/networks.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actzip import cpu
from actzip.accelerate.inputs import Inputs
from actzip.accelerate.promise import Promise
from actzip.files import write_text
from actzip.sparsify.judge import wilson
from actzip.split.api import open_network
from actzip.split.choose import Choice, Coded, choose
from actzip.split.clock import code_time
from actzip.split.cut import find_cut

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accelerate"))
from networks import NETWORKS

RESULTS = Path(__file__).resolve().parents[1] / "results" / "split"


def parts(name: str, choosing: int, proving: int, labels: bool) -> tuple[Inputs, Tensor | None]:
    """Images to calibrate, to choose by and to prove, and the labels of the last."""
    network = NETWORKS[name]
    calibrate, rest, y = network.data(network.calibrate)
    pick = torch.zeros(len(rest), dtype=torch.bool)
    pick[torch.linspace(0, len(rest) - 1, choosing).round().long()] = True
    others = (~pick).nonzero()[:, 0]
    held = torch.zeros_like(pick)
    held[others[torch.linspace(0, len(others) - 1, min(proving, len(others))).round().long()]] = True

    def pairs(mask: Tensor) -> list[tuple[Tensor, Any]]:
        xs = rest[mask].split(network.batch)
        ys = y[mask].split(network.batch) if y is not None and labels else [None] * len(xs)
        return list(zip(xs, ys, strict=True))

    known = y[held] if y is not None and network.labelled else None
    return Inputs(list(calibrate.split(network.batch)), pairs(pick), pairs(held)), known


def top1(model: Any, batches: Any, labels: Tensor) -> int:
    with torch.no_grad():
        best = torch.cat([model(x).argmax(1) for x, _ in batches])
    return int((best == labels).sum())


def measured(choice: Choice, network: Any, cut: Any, inputs: Inputs, labels: Tensor | None) -> dict[str, Any]:
    head, tail = network.parts(cut)
    row: dict[str, Any] = {
        "cut": cut.name,
        "shapes": [[str(d) for d in s] for s in cut.shapes],
        "elements": choice.elements,
        "bits_per_element": choice.bits_per_element,
        "kilobytes": choice.bits / 8000,
        "widths": [q.bits for q in choice.coder.quantizers],
        "rounding": [q.rounding for q in choice.coder.quantizers],
        "codec": choice.coder.codec,
        "met": choice.met,
        "judged": {k: j.as_dict() for k, j in choice.judged.items()},
        "tried": choice.tried,
    }
    if labels is not None:
        coded = Coded(head, tail, choice.coder.quantizers)
        before, after = (top1(m, inputs.prove, labels) for m in (network.model, coded))
        row["top1"] = {
            "before": before / len(labels),
            "after": after / len(labels),
            "interval_after": wilson(after, len(labels)),
            "images": len(labels),
        }
    with torch.no_grad():
        out = head(inputs.calibrate[0][:1])
    maps = [m.numpy() for m in (out if isinstance(out, tuple) else (out,))]
    row["encode_ms"], row["decode_ms"] = code_time(choice.coder, maps)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--at", nargs="+", required=True, help="layers, each behind which it is cut")
    parser.add_argument("--keep", type=float, default=0.99)
    parser.add_argument("--labels", action="store_true", help="keep accuracy by labels, not agreement")
    parser.add_argument("--choosing", type=int, default=200)
    parser.add_argument("--proving", type=int, default=300)
    parser.add_argument("--attempts", type=int, default=7)
    parser.add_argument("--per", default="channel")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    inputs, labels = parts(o.network, o.choosing, o.proving, o.labels)
    model = NETWORKS[o.network].make()
    network = open_network(model, inputs.calibrate[0][:2])
    path = o.out or RESULTS / f"rate-{o.network}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {r["cut"]: r for r in json.loads(path.read_text())["cuts"]} if path.exists() else {}
    for at in o.at:
        start = time.perf_counter()
        cut = find_cut(network.graph, at, network.layers)
        promise = Promise(o.keep, labels=o.labels)
        choice = choose(*network.parts(cut), inputs, promise, cut.values, per=o.per, attempts=o.attempts)
        row = measured(choice, network, cut, inputs, labels)
        row |= {"at": at, "per": o.per, "seconds": time.perf_counter() - start}
        known[row["cut"]] = row
        print(json.dumps({k: v for k, v in row.items() if k not in ("tried", "shapes")}), flush=True)
        info = cpu.info()
        found = {
            "network": o.network,
            "promise": str(promise),
            "calibrated": sum(map(len, inputs.calibrate)),
            "chose": sum(len(x) for x, _ in inputs.choose),
            "proved": sum(len(x) for x, _ in inputs.prove),
            "cpu": info["cpu"],
            "isa": info["isa"],
            "cuts": list(known.values()),
        }
        write_text(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
