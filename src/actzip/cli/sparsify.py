"""``actzip sparsify``: fine-tune a trained model so that its activation maps are sparser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, out, print_json


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(
        epilog="Example:  actzip sparsify cifar_resnet20 --weights cifar10_resnet20 --data cifar10 "
        "--epochs 5 --alpha auto --out sparse.safetensors"
    )
    def sparsify(
        model: str = typer.Argument(
            ..., help="Ours, torchvision's or timm's name, or package.module:attribute."
        ),
        weights: str = typer.Option(..., help="The trained weights, safetensors."),
        data: str = typer.Option(..., help="A data set: a name, or parquet:, folder:, wds: and a path."),
        target: Path = typer.Option(..., "--out", help="The safetensors file to write."),
        epochs: int = typer.Option(5, help="Passes over the training images."),
        lr: float = typer.Option(0.01, help="The highest learning rate."),
        alpha: str = typer.Option(
            "1.0", help="Strength of the penalty, or auto (keeps validation accuracy)."
        ),
        penalty: str = typer.Option("tl1", help="l1, tl1, log or hoyer."),
        weighting: str = typer.Option(
            "macs", help="What a non-zero costs: macs, elements, uniform or paper."
        ),
        layers: list[str] | None = typer.Option(None, help="Only these layers: name, glob, re:..., type:..."),
        ignore: list[str] | None = typer.Option(None, help="Not these layers."),
        validation: int = typer.Option(5000, help="Training images set aside to look at accuracy."),
        batch_size: int = typer.Option(128),
        augment: str = typer.Option("none", help="none or crop_flip."),
        seed: int = typer.Option(0),
        folder: Path | None = typer.Option(
            None, "--data-dir", help="Where to look for named data sets first."
        ),
        limit: int | None = typer.Option(None, help="At most this many training images."),
        json: bool = JSON,
    ) -> None:
        """Make a trained model's activation maps sparser; same architecture and state-dict keys."""
        from actzip import data as datasets
        from actzip.errors import InputError
        from actzip.models import load_weights, model_info, resolve, save_weights
        from actzip.sparsify import measure, sparsify_result
        from actzip.sparsify import sparsify as run

        strength: float | str = "auto"
        if alpha != "auto":
            try:
                strength = float(alpha)
            except ValueError:
                raise InputError(f"--alpha: a number or auto, not {alpha!r}") from None
        network = resolve(model)
        load_weights(network, weights)
        info = model_info(model)
        images = datasets.resolve(data, "train", folder=folder, mean=info.mean, std=info.std, limit=limit)
        train, val = datasets.split(images, validation, seed)
        loader = datasets.Loader(
            train, batch_size, seed=seed, shuffle=True, augment=augment, channels_last=True
        )
        check = datasets.Loader(val, 500, channels_last=True)
        config: dict[str, Any] = {
            "epochs": epochs,
            "lr": lr,
            "alpha": strength,
            "penalty": penalty,
            "weighting": weighting,
            "layers": layers or None,
            "ignore": ignore or None,
            "channels_last": True,
            "seed": seed,
        }
        before = measure(network, check)
        sparse = run(network, loader, check, config, progress=True)
        after = measure(sparse, check)
        save_weights(sparse, target, {"model": model, "actzip.sparsify": config})
        result = {
            "out": str(target),
            "validation_images": len(val),
            "before": before.as_dict(),
            "after": after.as_dict(),
            "run": sparsify_result(sparse).as_dict(),
        }
        if json:
            print_json(result)
            return
        for label, m in (("before", before), ("after", after)):
            out.print(
                f"{label}: validation accuracy {100 * (m.accuracy or 0):.2f} %, density {m.density:.4f}, "
                f"theoretical speed-up {m.theoretical_speedup:.2f}x",
            )
        out.print(f"{target}")
