"""``actzip quantize``: find the scales of a model's activation maps."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from actzip.cli.common import JSON, complain, out, print_json
from actzip.text import cell


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(
        epilog="Example:  actzip quantize mobilenet_v1 --weights cifar10_mobilenet_v1 --data "
        "cifar10 --bits 8 --out mobilenet.quant.json"
    )
    def quantize(
        model: str = typer.Argument(
            ..., help="Ours, torchvision's or timm's name, or package.module:attribute."
        ),
        weights: str | None = typer.Option(None, help="Trained weights, safetensors."),
        data: str = typer.Option(
            ..., help="A data set: a name, or parquet:, folder:, wds:, npy: and a path."
        ),
        target: Path = typer.Option(..., "--out", help="The JSON file of scales to write."),
        bits: int = typer.Option(8, help="4 to 16."),
        per: str = typer.Option("tensor", help="One scale a map (tensor) or a channel (channel)."),
        observer: str = typer.Option("mse", help="minmax, percentile, mse or entropy."),
        calibration: int = typer.Option(
            500, help="Training images to calibrate on; as many others to compare on."
        ),
        image_size: int | None = typer.Option(None, help="Resize and crop images to this square."),
        folder: Path | None = typer.Option(
            None, "--data-dir", help="Where to look for named data sets first."
        ),
        json: bool = JSON,
    ) -> None:
        """Quantize activation maps to 4 to 16 bits, zero exactly zero; writes scales, says what it
        changes."""
        import torch

        from actzip import data as datasets
        from actzip.models import RANDOM_WEIGHTS, has_random_weights, load_weights, model_info, resolve
        from actzip.quantize import quantization
        from actzip.quantize import quantize as run
        from actzip.quantize.files import quantization_to_dict, save_quantization

        network = resolve(model).eval()
        if weights is not None:
            load_weights(network, weights)
        elif has_random_weights(network):
            complain("warning", RANDOM_WEIGHTS, "yellow")
        info = model_info(model)
        images = datasets.resolve(
            data,
            "train",
            folder=folder,
            image_size=image_size,
            mean=info.mean,
            std=info.std,
            limit=2 * calibration,
        )
        used = images.take(slice(0, calibration))
        others = images.take(slice(calibration, 2 * calibration)) if len(images) > calibration else used
        quantized = run(
            network, [x for x, _ in datasets.Loader(used, 50)], bits=bits, per=per, observer=observer
        )
        same = 0
        with torch.no_grad():
            for x, _ in datasets.Loader(others, 50):
                same += int((network(x).argmax(1) == quantized(x).argmax(1)).sum())
        save_quantization(quantized, target)
        scales = quantization_to_dict(quantization(quantized))
        agreement = same / len(others)
        if json:
            print_json({"out": str(target), "agreement": agreement, "compared_on": len(others), **scales})
            return
        table = Table("map", "bits", "signed", "scale (smallest)")
        for name, entry in scales["maps"].items():
            table.add_row(
                cell(name),
                str(entry["bits"]),
                "yes" if entry["signed"] else "no",
                f"{min(entry['scale']):.6g}",
            )
        out.print(table)
        out.print(
            f"{target}; the same answer as the float model on {100 * agreement:.2f} % of "
            f"{len(others)} images",
        )
