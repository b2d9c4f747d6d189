"""``actzip sparsify``: fine-tune a trained model so that its activation maps are sparser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from actzip.cli.common import JSON, out, print_json
from actzip.errors import InputError

_EPILOG = (
    "Example:  actzip sparsify cifar_resnet20 --weights cifar10_resnet20 --data cifar10 "
    "--epochs 5 --alpha auto --out sparse.safetensors"
)
_MODEL: str = typer.Argument(..., help="Ours, torchvision's or timm's name, or package.module:attribute.")
_DATA: str = typer.Option(..., help="A data set: a name, or parquet:, folder:, wds: and a path.")
_ALPHA: str = typer.Option("1.0", help="Strength of the penalty, or auto (keeps validation accuracy).")
_WEIGHTING: str = typer.Option("macs", help="What a non-zero costs: macs, elements, uniform or paper.")
_LAYERS: list[str] | None = typer.Option(None, help="Only these layers: name, glob, re:..., type:...")
_FOLDER: Path | None = typer.Option(None, "--data-dir", help="Where to look for named data sets first.")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog=_EPILOG)(sparsify)


def sparsify(
    model: str = _MODEL,
    weights: str = typer.Option(..., help="The trained weights, safetensors."),
    data: str = _DATA,
    target: Path = typer.Option(..., "--out", help="The safetensors file to write."),
    epochs: int = typer.Option(5, help="Passes over the training images."),
    lr: float = typer.Option(0.01, help="The highest learning rate."),
    alpha: str = _ALPHA,
    penalty: str = typer.Option("tl1", help="l1, tl1, log or hoyer."),
    weighting: str = _WEIGHTING,
    layers: list[str] | None = _LAYERS,
    ignore: list[str] | None = typer.Option(None, help="Not these layers."),
    validation: int = typer.Option(5000, help="Training images set aside to look at accuracy."),
    batch_size: int = typer.Option(128),
    augment: str = typer.Option("none", help="none or crop_flip."),
    seed: int = typer.Option(0),
    folder: Path | None = _FOLDER,
    limit: int | None = typer.Option(None, help="At most this many training images."),
    json: bool = JSON,
) -> None:
    """Make a trained model's activation maps sparser; same architecture and state-dict keys."""
    from actzip import data as datasets
    from actzip.models import model_info

    config: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "alpha": strength(alpha),
        "penalty": penalty,
        "weighting": weighting,
        "layers": layers or None,
        "ignore": ignore or None,
        "channels_last": True,
        "seed": seed,
    }
    network = loaded(model, weights)
    info = model_info(model)
    images = datasets.resolve(data, "train", folder=folder, mean=info.mean, std=info.std, limit=limit)
    train, val = datasets.split(images, validation, seed)
    loader = datasets.Loader(train, batch_size, seed=seed, shuffle=True, augment=augment, channels_last=True)
    run(network, loader, datasets.Loader(val, 500, channels_last=True), config, (model, target), json)


def strength(alpha: str) -> float | str:
    """``--alpha``."""
    try:
        return "auto" if alpha == "auto" else float(alpha)
    except ValueError:
        raise InputError(f"--alpha: a number or auto, not {alpha!r}") from None


def loaded(model: str, weights: str) -> Any:
    """The network with its weights."""
    from actzip.models import load_weights, resolve

    network = resolve(model)
    load_weights(network, weights)
    return network


def run(
    network: Any, loader: Any, check: Any, config: dict[str, Any], named: tuple[str, Path], json: bool
) -> None:
    """Trains, writes the weights, says what was measured before and after; ``named``: the model and
    the file to write."""
    from actzip.models import save_weights
    from actzip.sparsify import measure, sparsify_result
    from actzip.sparsify import sparsify as train

    model, target = named
    before = measure(network, check)
    sparse = train(network, loader, check, config, progress=True)
    after = measure(sparse, check)
    save_weights(sparse, target, {"model": model, "actzip.sparsify": config})
    if json:
        print_json(
            {
                "out": str(target),
                "validation_images": len(check.data),
                "before": before.as_dict(),
                "after": after.as_dict(),
                "run": sparsify_result(sparse).as_dict(),
            }
        )
        return
    for label, m in (("before", before), ("after", after)):
        out.print(
            f"{label}: validation accuracy {100 * (m.accuracy or 0):.2f} %, density {m.density:.4f}, "
            f"theoretical speed-up {m.theoretical_speedup:.2f}x",
        )
    out.print(f"{target}")
