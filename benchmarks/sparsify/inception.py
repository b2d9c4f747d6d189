"""Inception-V3 (five classes) on photographs: thresholds without training, or distilled from itself.

    python benchmarks/sparsify/inception.py calibrate runs/inception --density 0.33
    python benchmarks/sparsify/inception.py distil runs/inception-distilled --epochs 2 --alpha 1.0
    python benchmarks/sparsify/inception.py evaluate runs/inception benchmarks/results/sparsify-inception-thresholds.json

The 500 photographs are put in a fixed random order. The first 200 are for calibration and distillation (without labels),
the last 300 are looked at by `evaluate` alone: there the density of all ReLU outputs, effective MACs and the share of
photographs with the same highest output as the original are measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actzip import cpu
from actzip.activations import get_thresholds, set_thresholds
from actzip.data import Loader, resolve
from actzip.files import write_text
from actzip.models import load_weights, save_weights
from actzip.models import resolve as resolve_model
from actzip.sparsify import calibrate_thresholds, measure, sparsify, sparsify_result
from actzip.sparsify.bar import epoch_line


def photographs(part: slice, batch: int, shuffle: bool = False) -> Loader:
    data = resolve("imagenet_sample", "test", image_size=299, mean=(0.0,) * 3, std=(1.0,) * 3)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data))
    return Loader(data.take(np.sort(order[part])), batch, shuffle=shuffle, seed=1, channels_last=True)


def network() -> torch.nn.Module:
    model = resolve_model("inception_v3_5class").eval()
    load_weights(model, "inception_v3_5class")
    return model.to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["calibrate", "distil", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--density", type=float, default=0.33)
    parser.add_argument("--per", default="layer")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--photographs", type=int, default=300, help="held-out ones to evaluate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.001)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    model = network()
    settings = args.folder / "settings.json"
    if args.what == "calibrate":
        found = calibrate_thresholds(
            model, photographs(slice(0, args.samples), 8), density=args.density, per=args.per, samples=args.samples, steps=args.steps
        )  # fmt: skip
        values = {n: t.tolist() if isinstance(t, torch.Tensor) else t for n, t in found.thresholds.items()}
        write_text(args.folder / "thresholds.json", json.dumps(values))
        described = {"what": "thresholds without training", "target_density": args.density, "per": args.per,
                     "samples": found.samples, "calibration_density": found.density,
                     "calibration_agreement": found.agreement, "tried": found.tried}  # fmt: skip
        write_text(settings, json.dumps(described, indent=1))
    elif args.what == "distil":
        config = {"epochs": args.epochs, "lr": args.lr, "weight_decay": 0.0, "distill": 1.0, "alpha": args.alpha,
                  "ramp": 0.2, "channels_last": True}  # fmt: skip
        sparse = sparsify(
            model, photographs(slice(0, 180), 12, shuffle=True), None, config, checkpoint_dir=args.folder,
            progress=lambda e: print(
                epoch_line(e) if e["kind"] == "epoch" else (e["step"], e["loss"], e["penalty"], e["density"]), flush=True
            ),
        )  # fmt: skip
        save_weights(sparse, args.folder / "model.safetensors")
        described = {
            "what": "distilled from itself",
            "config": config,
            "result": sparsify_result(sparse).as_dict(),
        }
        write_text(settings, json.dumps(described, indent=1))
    else:
        reference = network()
        if (args.folder / "model.safetensors").exists():
            load_weights(model, (args.folder / "model.safetensors").resolve())
        if (args.folder / "thresholds.json").exists():
            values = json.loads((args.folder / "thresholds.json").read_text())
            set_thresholds(
                model, {n: torch.tensor(t) if isinstance(t, list) else t for n, t in values.items()}
            )
        tops: list[torch.Tensor] = []
        images: list[Any] = [x for x, _ in photographs(slice(200, 200 + args.photographs), 10)]
        reference.register_forward_hook(lambda module, inputs, out: tops.append(out.argmax(1)))
        before = measure(reference, images)
        m = measure(model, list(zip(images, tops)))
        same = m.accuracy  # the original's highest output is the label
        result = {
            **json.loads(settings.read_text()),
            "photographs": m.samples,
            "agreement": same,
            "original_classes": torch.bincount(torch.cat(tops), minlength=5).tolist(),
            "density": m.density,
            "density_original": before.density,
            "theoretical_speedup": m.theoretical_speedup,
            "theoretical_speedup_original": before.theoretical_speedup,
            "thresholds": {
                n: t.tolist() if isinstance(t, torch.Tensor) else t for n, t in get_thresholds(model).items()
            },
            "densities": m.densities,
            "environment": cpu.info(),
            "torch": torch.__version__,
        }
        print(json.dumps({k: result[k] for k in ("photographs", "agreement", "density", "density_original")}))
        if args.out is not None:
            write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
