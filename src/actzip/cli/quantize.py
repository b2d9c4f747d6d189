"""``actzip quantize``: find the scales of a model's activation maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import JSON, TRUST, complain, other_than, out, print_json
from actzip.text import cell

if TYPE_CHECKING:
    from actzip.data.form import Form


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(
        epilog="Example:  actzip quantize mobilenet_v1 --weights cifar10_mobilenet_v1 --data "
        "cifar10 --bits 8 --out mobilenet.quant.json"
    )
    @takes_inputs
    def quantize(
        model: str = typer.Argument(
            ...,
            help="Ours, torchvision's or timm's name, package.module:attribute, a .pt2 or an .onnx file.",
        ),
        weights: str | None = typer.Option(None, help="Trained weights, safetensors."),
        data: str | None = typer.Option(
            None, "--data", "-d", help="A data set: a name, or parquet:, folder:, wds:, npy: and a path."
        ),
        target: Path = typer.Option(..., "--out", help="The JSON file of scales to write."),
        bits: int = typer.Option(8, help="4 to 16."),
        per: str = typer.Option("tensor", help="One scale a map (tensor) or a channel (channel)."),
        observer: str = typer.Option("mse", help="minmax, percentile, mse or entropy."),
        widen: float = typer.Option(1.0, help="Steps so many times as wide: codecs need fewer bits."),
        calibration: int = typer.Option(
            500, help="Training images to calibrate on; as many others to compare on."
        ),
        image_size: int | None = typer.Option(
            None, "--size", "--image-size", help="Resize and crop images to this square."
        ),
        folder: Path | None = typer.Option(
            None, "--data-dir", help="Where to look for named data sets first."
        ),
        trust: bool = TRUST,
        json: bool = JSON,
        *,
        inputs: Form,
    ) -> None:
        """Quantize activation maps to 4 to 16 bits, zero exactly zero; writes scales, says what it
        changes."""
        from actzip.models import RANDOM_WEIGHTS, has_random_weights, load_weights
        from actzip.quantize import quantization
        from actzip.quantize import quantize as run
        from actzip.quantize.files import quantization_to_dict, save_quantization
        from actzip.runtime.models import load_whole

        other_than(Path(model), target)
        first = None if inputs.first is None else inputs.first[1:]
        network, shape, mean, std = load_whole(model, first, shapes=inputs.given, trust=trust)
        for m in network.modules():  # an exported program's module refuses eval()
            m.training = False
        if weights is not None:
            load_weights(network, weights)
        elif has_random_weights(network):
            complain("warning", RANDOM_WEIGHTS, "yellow")
        used, others = _batches(inputs, network, shape, mean, std, data, folder, image_size, calibration)
        quantized = run(network, used, bits=bits, per=per, observer=observer, widen=widen)
        agreement, error, count = _compared(network, quantized, others)
        save_quantization(quantized, target)
        scales = quantization_to_dict(quantization(quantized))
        if json:
            compared = {"agreement": agreement, "error": error, "compared_on": count}
            print_json({"out": str(target), **compared, **scales})
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
        same = f"the same answer as the float model on {100 * (agreement or 0):.2f} % of {count} images"
        differ = f"mean error {100 * error:.2f} % of the outputs' mean on {count} inputs"
        out.print(f"{target}; {differ if agreement is None else same}")


def _batches(
    form: Form,
    network: Any,
    shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    data: str | None,
    folder: Path | None,
    image_size: int | None,
    calibration: int,
) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate on and, of other inputs where there are enough, to compare on; of the size
    that the model was exported with."""
    from actzip.data import Loader
    from actzip.data.form import forward_names
    from actzip.errors import DataError, InputError
    from actzip.runtime.models import GraphNet, open_size, say_open

    fixed = getattr(network, "batch", None)
    if form.arrays:
        if data is not None:
            raise InputError("--data and --input exclude each other: both give the inputs")
        names = list(network.graph.inputs) if isinstance(network, GraphNet) else forward_names(network)
        batches = list(form.batches(names, fixed or 1))[: 2 * calibration]
    elif data is None:
        raise InputError("quantizing needs typical inputs: --data, or --input with arrays")
    else:
        images = form.images(
            data,
            shape,
            mean,
            std,
            size=image_size,
            split="train",
            folder=folder,
            limit=2 * calibration,
            takes=open_size(network),
        )
        if image_size is None:
            say_open(network, form.laid_shape(*images.shape))
        loader = Loader(images, fixed or min(50, calibration), drop_last=fixed is not None)
        batches = [form.laid_out(x) for x, _ in loader]
        if not batches:
            raise DataError(
                f"the model was exported for batches of {fixed}; {images.source} gives {len(images)} images"
            )
    first = -(-len(batches) // 2)
    return batches[:first], batches[first:] or batches


def _compared(network: Any, quantized: Any, batches: list[Any]) -> tuple[float | None, float, int]:
    """Share of equal answers (None where the first output is no scores), mean relative error of the
    first output, and inputs."""
    import torch

    from actzip.cli._engines import first_output

    same, differ, size, count = 0, 0.0, 0.0, 0
    scores = True
    with torch.no_grad():
        for batch in batches:
            args = batch if isinstance(batch, tuple) else (batch,)
            a, b = first_output(network(*args)), first_output(quantized(*args))
            if a.shape != b.shape:  # another number of boxes, say
                b = a.new_zeros(a.shape)
            scores = scores and a.ndim == 2
            same += int((a.argmax(1) == b.argmax(1)).sum()) if scores else 0
            differ, size = differ + float((a - b).abs().sum()), size + float(a.abs().sum())
            count += len(args[0])
    return same / count if scores else None, differ / size if size else 0.0, count
