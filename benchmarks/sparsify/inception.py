"""Inception-V3 (five classes) on photographs: thresholds without training, and distilled from itself.

    python benchmarks/sparsify/inception.py thresholds out/inception-thresholds \\
        benchmarks/results/sparsify/inception-thresholds.json
    python benchmarks/sparsify/inception.py distilled out/inception-distilled \\
        benchmarks/results/sparsify/inception-distilled.json --density 0.27

`thresholds` calibrates thresholds to --density; `distilled` does that too and then trains the
weights so that the network with thresholds gives what it gave without them. Both end with an
evaluation. What is found in the folder is used, so a run that was stopped goes on; `evaluate` does
nothing but the last step.

The 500 photographs are put in a fixed random order. The first 200 are for calibration and
distillation (without labels), the last 300 are looked at by the evaluation alone: the density of
all ReLU outputs, effective MACs, the share of photographs with the same highest output as the
original, and how far the outputs are from the original's (root mean square of the difference of
centred outputs, relative to theirs: the class of most photographs is the same, so that agreement
alone says little).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip import cpu
from actzip.activations import get_thresholds, set_thresholds
from actzip.data import Loader, resolve
from actzip.files import write_text
from actzip.models import load_weights, save_weights
from actzip.models import resolve as resolve_model
from actzip.sparsify import calibrate_thresholds, measure, sparsify, sparsify_result
from actzip.sparsify.bar import epoch_line

#: Outputs that the distilled network is to give as the original does, beside the last one.
COMPARED = ["Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7c", "avgpool"]


def photographs(part: slice, batch: int, shuffle: bool = False) -> Loader:
    data = resolve("imagenet_sample", "test", image_size=299, mean=(0.0,) * 3, std=(1.0,) * 3)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(data))
    return Loader(data.take(np.sort(order[part])), batch, shuffle=shuffle, seed=1, channels_last=True)


def network() -> nn.Module:
    model = resolve_model("inception_v3_5class").eval()
    load_weights(model, "inception_v3_5class")
    return model.to(memory_format=torch.channels_last)


def with_thresholds(model: nn.Module, values: dict[str, Any]) -> nn.Module:
    return set_thresholds(
        model, {n: torch.tensor(t) if isinstance(t, list) else t for n, t in values.items()}
    )


def plain(thresholds: dict[str, float | Tensor]) -> dict[str, Any]:
    return {n: t.tolist() if isinstance(t, Tensor) else t for n, t in thresholds.items()}


def calibrate(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    done = folder / "thresholds.json"
    if not done.exists():
        found = calibrate_thresholds(
            network(),
            photographs(slice(0, args.samples), 8),
            density=args.density,
            per=args.per,
            samples=args.samples,
            steps=args.steps,
        )
        made = {"target_density": args.density, "per": args.per, "samples": found.samples,
                "calibration_density": found.density, "calibration_agreement": found.agreement,
                "tried": found.tried, "thresholds": plain(found.thresholds)}  # fmt: skip
        write_text(done, json.dumps(made, indent=1))
    return dict(json.loads(done.read_text()))


def distil(folder: Path, thresholds: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    config = {"epochs": args.epochs, "lr": args.lr, "optimizer": "adam", "weight_decay": 0.0, "warmup": 0.3,
              "alpha": args.alpha, "distill": 1.0, "distill_maps": args.maps, "distill_layers": COMPARED,
              "freeze_norm": True, "channels_last": True}  # fmt: skip
    done = folder / "distilled.json"
    if not done.exists():
        sparse = sparsify(
            with_thresholds(network(), thresholds),
            photographs(slice(0, args.train), 10, shuffle=True),
            None,
            config,
            checkpoint_dir=folder,
            teacher=network(),
            progress=lambda e: print(
                epoch_line(e) if e["kind"] == "epoch" else (e["step"], e["loss"], e["penalty"], e["density"]),
                flush=True,
            ),
        )
        save_weights(sparse, folder / "model.safetensors")
        write_text(
            done, json.dumps({"config": config, "result": sparsify_result(sparse).as_dict()}, indent=1)
        )
    return dict(json.loads(done.read_text()))


def evaluate(model: nn.Module, count: int) -> dict[str, Any]:
    """Densities, work and agreement with the original over the first ``count`` held-out photographs."""
    reference, outputs = network(), ([], [])  # type: tuple[nn.Module, tuple[list[Tensor], list[Tensor]]]
    for net, kept in zip((reference, model), outputs):
        net.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out.detach()))
    images: list[Any] = [x for x, _ in photographs(slice(200, 200 + count), 10)]
    before = measure(reference, images)
    after = measure(model, images)
    want, got = (torch.cat(o) for o in outputs)
    same = want.argmax(1) == got.argmax(1)
    centred = [o - o.mean(1, keepdim=True) for o in (want, got)]
    return {
        "photographs": len(want),
        "agreement": float(same.double().mean()),
        "differing": int((~same).sum()),
        "output_error": float(
            (centred[1] - centred[0]).square().mean().sqrt() / centred[0].square().mean().sqrt()
        ),
        "original_classes": torch.bincount(want.argmax(1), minlength=5).tolist(),
        "density": after.density,
        "density_original": before.density,
        "theoretical_speedup": after.theoretical_speedup,
        "theoretical_speedup_original": before.theoretical_speedup,
        "thresholds": plain(get_thresholds(model)),
        "densities": after.densities,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["thresholds", "distilled", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--density", type=float, default=0.33)
    parser.add_argument("--per", default="layer")
    parser.add_argument(
        "--samples", type=int, default=24, help="photographs that thresholds are calibrated on"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--photographs", type=int, default=300, help="held-out ones to evaluate on")
    parser.add_argument("--train", type=int, default=200, help="photographs to distil on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--maps", type=float, default=20.0, help="strength of the comparison of maps")
    parser.add_argument("--lr", type=float, default=5e-5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"what": args.what}
    model = network()
    if args.what != "evaluate" or (args.folder / "thresholds.json").exists():
        result["calibration"] = calibrate(args.folder, args)
        thresholds = result["calibration"].pop("thresholds")
        with_thresholds(model, thresholds)
        if args.what == "distilled":
            result["training"] = distil(args.folder, thresholds, args)
    if (args.folder / "model.safetensors").exists():
        load_weights(model, (args.folder / "model.safetensors").resolve())
    result |= evaluate(model, args.photographs)
    result |= {"environment": cpu.info(), "torch": torch.__version__}
    shown = ("photographs", "agreement", "output_error", "density", "density_original")
    print(json.dumps({k: result[k] for k in shown}))
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
