"""``actzip export``: a model with its thresholds or scales as an ONNX file that other engines run too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from actzip.cli._inputs import takes_inputs
from actzip.cli.common import JSON, TRUST, WEIGHTS, errors, other_than, print_json
from actzip.text import visible

if TYPE_CHECKING:
    from actzip.data.form import Form

_EPILOG = (
    "Example:  actzip export resnet18 resnet18.onnx --weights sparse.safetensors --thresholds "
    "sparse.thresholds.json\n\n"
    "`actzip reproduce` writes weights, thresholds and scales of every stage into its folder; "
    "`actzip quantize` writes scales."
)


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command(epilog=_EPILOG)
    @takes_inputs
    def export(
        model: str = typer.Argument(
            ..., help="Ours, torchvision's or timm's name, package.module:attribute, a .pt2 or an .onnx file."
        ),
        target: Path = typer.Argument(..., help="The ONNX file to write."),
        weights: str | None = WEIGHTS,
        thresholds: Path | None = typer.Option(
            None, help="JSON: thresholds of ReLUs, {site: number or one a channel}."
        ),
        scales: Path | None = typer.Option(
            None, help="JSON of actzip quantize: maps become QuantizeLinear and DequantizeLinear."
        ),
        size: int | None = typer.Option(None, min=1, help="Images are this square."),
        opset: int | None = typer.Option(
            None, help="11 or newer; 17 where not given (21 for more than 8 bits)."
        ),
        dynamic: bool = typer.Option(True, help="Any batch, else one image."),
        trust: bool = TRUST,
        json: bool = JSON,
        *,
        inputs: Form,
    ) -> None:
        """Write a sparsified or quantized model as ONNX: thresholds as ThresholdedRelu, scales as QDQ."""
        result = run(model, target, weights, thresholds, scales, size, opset, dynamic, trust, inputs)
        if json:
            print_json(result)
        else:
            errors.print(f"written: {target}")
            typer.echo(visible(", ".join(f"{n} {op}" for op, n in result["operators"].items())))


def run(
    model: str,
    target: Path,
    weights: str | None,
    thresholds: Path | None,
    scales: Path | None,
    size: int | None,
    opset: int | None,
    dynamic: bool,
    trust: bool,
    form: Form | None = None,
) -> dict[str, Any]:
    """Writes the file; what is in it."""
    from collections import Counter

    import torch

    from actzip.activations import load_thresholds, set_thresholds
    from actzip.data.form import Form
    from actzip.errors import InputError
    from actzip.models import load_weights
    from actzip.quantize.files import load_quantization
    from actzip.quantize.onnx import export_qdq
    from actzip.runtime.from_onnx import load_onnx
    from actzip.runtime.models import GraphNet, load_whole, say_open
    from actzip.runtime.onnx_export import export_onnx

    if thresholds is not None and scales is not None:
        raise InputError(
            "--thresholds and --scales exclude each other: give the one that the model was made with"
        )
    other_than(Path(model), target)
    torch.manual_seed(0)
    form = form or Form()
    first = None if form.first is None else form.first[1:]
    net, shape, _, _ = load_whole(model, first, shapes=form.given, trust=trust, parts=False)
    if size is not None:
        shape = (shape[0], size, size)
        net = load_whole(model, shape, trust=trust, parts=False)[0] if isinstance(net, GraphNet) else net
    for m in net.modules():
        m.training = False
    say_open(net)
    if weights is not None:
        load_weights(net, weights)
    example = net.example() if isinstance(net, GraphNet) else torch.randn(1, *shape)
    if form.arrays:
        names = list(net.graph.inputs) if isinstance(net, GraphNet) else [""]
        example = next(form.batches(names, getattr(net, "batch", None)))
    cuts = {} if thresholds is None else load_thresholds(thresholds)
    if cuts:
        set_thresholds(net, cuts, example)
    if scales is not None:
        load_quantization(net, scales)
        export_qdq(net, example, target, opset=opset, dynamic_batch=dynamic)
    else:
        export_onnx(net, example, target, opset=opset or 17, dynamic_batch=dynamic)
    written = load_onnx(target)
    return {
        "out": str(target),
        "opset": written.opset_import[0].version,
        "input": [None if dynamic else 1, *shape],
        "thresholds": len(cuts),
        "operators": dict(sorted(Counter(n.op_type for n in written.graph.node).items())),
    }
