"""Fine-tunes one CIFAR-10 network with the given settings, resumable; several runs in parallel make
a frontier.

    python benchmarks/sparsify/finetune.py mobilenet_v1 runs/control '{"epochs": 2, "lr": 0.02, "alpha": 0}'
    python benchmarks/sparsify/finetune.py mobilenet_v1 runs/tl1 '{"epochs": 2, "lr": 0.02, "alpha": 4.0}'
    python benchmarks/sparsify/figures.py mobilenet_v1 out.json --control runs/control --run runs/tl1

45,000 images train, 5,000 of the training set are the validation split (fixed); the test set is not
looked at here. Writes OUT/last.pt after each epoch, and OUT/model.safetensors and OUT/result.json
at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from actzip.data import Loader, resolve, split
from actzip.files import write_text
from actzip.models import load_weights, model_info, save_weights
from actzip.models import resolve as resolve_model
from actzip.sparsify import SparsifyConfig, sparsify, sparsify_result
from actzip.sparsify.bar import epoch_line

WEIGHTS = {
    "mobilenet_v1": "cifar10_mobilenet_v1",
    "cifar_resnet20": "cifar10_resnet20",
    "cifar_resnet32": "cifar10_resnet32",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=sorted(WEIGHTS))
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=json.loads, help="fields of SparsifyConfig as JSON")
    parser.add_argument("--init", default=None, help="weights to begin with; default: the shared ones")
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    info = model_info(args.model)
    config = SparsifyConfig.of({"channels_last": True, "seed": 1, **args.config})
    train, val = split(resolve("cifar10", "train", mean=info.mean, std=info.std), 5000, 0)
    model = resolve_model(args.model)
    load_weights(model, args.init or WEIGHTS[args.model])
    sparse = sparsify(
        model,
        Loader(train, args.batch_size, seed=1, shuffle=True, augment="crop_flip", channels_last=True),
        Loader(val, 250, channels_last=True),
        config,
        checkpoint_dir=args.out,
        progress=lambda e: print(epoch_line(e), flush=True) if e["kind"] == "epoch" else None,
    )
    save_weights(sparse, args.out / "model.safetensors")
    described = {
        "config": args.config,
        "batch": args.batch_size,
        "model": args.model,
        "init": Path(args.init).parent.name if args.init else WEIGHTS[args.model],
        "result": sparsify_result(sparse).as_dict(),
    }
    write_text(args.out / "result.json", json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
