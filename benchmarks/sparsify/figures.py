"""Test accuracy against work of fine-tuned CIFAR-10 networks (benchmarks/sparsify/finetune.py),
beside their control.

    python benchmarks/sparsify/figures.py mobilenet_v1 benchmarks/results/sparsify/mobilenet_v1.json \
        --control runs/control --run runs/tl1 --run runs/tl1-milder

The test set (10,000 images) is looked at here and nowhere else. Differences in accuracy come with
their standard error, from the images that one network has right and the other wrong.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from actzip import cpu
from actzip.data import Loader, resolve
from actzip.files import write_text
from actzip.models import load_weights, model_info
from actzip.models import resolve as resolve_model
from actzip.sparsify import measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--control", type=Path, action="append", required=True, help="the first is the reference"
    )
    parser.add_argument("--run", type=Path, action="append", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    info = model_info(args.model)
    test = resolve("cifar10", "test", mean=info.mean, std=info.std)
    rows: list[dict[str, Any]] = []
    right: list[torch.Tensor] = []
    entries: list[tuple[str, Path | None]] = [("original", None)]
    entries += [("control", p) for p in args.control] + [("sparse", p) for p in args.run]
    for kind, folder in entries:
        model = resolve_model(args.model).eval()
        weights = {"mobilenet_v1": "cifar10_mobilenet_v1"}.get(
            args.model, args.model.replace("cifar_", "cifar10_")
        )
        load_weights(model, weights if folder is None else folder / "model.safetensors")
        model = model.to(memory_format=torch.channels_last)
        tops: list[torch.Tensor] = []
        model.register_forward_hook(lambda module, inputs, out, tops=tops: tops.append(out.argmax(1)))
        m = measure(model, Loader(test, 250, channels_last=True))
        right.append(torch.cat(tops) == torch.from_numpy(test.labels))
        row: dict[str, Any] = {
            "kind": kind,
            "name": folder.name if folder else "original",
            "test": m.as_dict(),
        }
        if folder is not None:
            row |= json.loads((folder / "result.json").read_text())
        rows.append(row)
        print(
            row["name"],
            f"{100 * m.accuracy:.2f} %",
            f"{m.theoretical_speedup:.3f}x",
            f"density {m.density:.3f}",
            flush=True,
        )
    reference, base = rows[1], right[1]
    for row, hits_of in zip(rows, right):
        gained, lost = int((hits_of & ~base).sum()), int((~hits_of & base).sum())
        n = len(base)
        row["against_control"] = {
            "points": 100 * (gained - lost) / n,
            "standard_error": 100 * math.sqrt(gained + lost) / n,
            "speedup": reference["test"]["effective_macs"] / row["test"]["effective_macs"],
        }
        print(row["name"], json.dumps(row["against_control"]))
    described = {
        "model": args.model,
        "data": test.source,
        "environment": cpu.info(),
        "torch": torch.__version__,
    }
    write_text(args.out, json.dumps({**described, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
