"""A PyTorch model as an ONNX file that other engines run too: thresholded ReLUs become standard operators.

A threshold that is one number is ONNX's ``ThresholdedRelu`` (x where x > T, else 0), in the place
of the ReLU; one a channel is ``Where(LessOrEqual(x, T), 0, x)``. Quantized models:
:func:`actzip.quantize.onnx.export_qdq`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.activations import ActivationTap, Site, clear_thresholds, get_thresholds, threshold_activation
from actzip.errors import DataError, InputError
from actzip.files import write_bytes
from actzip.quantize.torch_onnx import OLDEST_OPSET, TRACED_OPSET, write_traced

__all__ = ["export_onnx"]


class _Threshold(torch.autograd.Function):
    """threshold_activation with one number, and ThresholdedRelu in an exported graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float) -> Tensor:
        return threshold_activation(x, threshold)

    @staticmethod
    def symbolic(g: Any, x: Any, threshold: float) -> Any:
        return g.op("ThresholdedRelu", x, alpha_f=threshold).setType(x.type())


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    opset: int = 17,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Writes ``model`` with the thresholds that it carries as ONNX; gives the path.

    Args:
        model: taken in eval mode, left as it is.
        example: an input (a tensor, or a tuple of tensors).
        opset: 11 or newer.
        dynamic_batch: the first dimension of inputs and outputs may vary.

    Raises:
        InputError: the opset is too old or not known to the installed onnx, or the model does not
            take the example.
        UnsupportedError: PyTorch cannot export an operator of the model.
        DataError: onnx is not installed, or the file cannot be written.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise DataError("onnx is not installed; `pip install actzip[onnx]` brings it") from error
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset}; {OLDEST_OPSET} to {newest} can be written")
    inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    plain = copy.deepcopy(model).eval()
    thresholds = get_thresholds(plain)
    clear_thresholds(plain)
    for module in plain.modules():
        if hasattr(module, "inplace"):
            module.__dict__["inplace"] = False  # a plain attribute of torch's own modules

    def visit(site: Site, y: Tensor) -> Tensor | None:
        t = thresholds.get(site.name)
        if t is None:
            return None
        if isinstance(t, Tensor) and t.numel() > 1:
            return threshold_activation(y, t)
        out: Tensor = _Threshold.apply(y, float(t))  # type: ignore[no-untyped-call]
        return out

    try:
        with torch.no_grad():
            result = plain(*inputs)
    except Exception as error:
        raise InputError(f"the model does not take this example: {type(error).__name__}: {error}") from error
    count = len(result) if isinstance(result, (tuple, list, dict)) else 1
    ins = list(input_names or (["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]))
    outs = list(output_names or (["output"] if count == 1 else [f"output{i}" for i in range(count)]))
    with tempfile.TemporaryDirectory() as folder, ActivationTap(plain, visit), torch.no_grad():
        raw = Path(folder) / "raw.onnx"
        write_traced(plain, inputs, raw, (ins, outs), opset, dynamic_batch)
        graph = onnx.load(str(raw))
    if opset > TRACED_OPSET:
        graph = onnx.version_converter.convert_version(graph, opset)
    _without_relus(graph)
    onnx.checker.check_model(graph)
    return write_bytes(path, graph.SerializeToString())


def _without_relus(model: Any) -> None:
    """In place: Relu that a ThresholdedRelu alone reads goes; every threshold is at least 0, so it
    changes nothing."""
    nodes = model.graph.node
    readers: dict[str, int] = {}
    for node in nodes:
        for i in node.input:
            readers[i] = readers.get(i, 0) + 1
    for o in model.graph.output:
        readers[o.name] = readers.get(o.name, 0) + 1
    makers = {n.output[0]: n for n in nodes if n.op_type == "Relu"}
    gone = []
    for node in nodes:
        relu = makers.get(node.input[0]) if node.op_type == "ThresholdedRelu" else None
        if relu is not None and readers[relu.output[0]] == 1:
            node.input[0] = relu.input[0]
            gone.append(relu)
    for relu in gone:
        nodes.remove(relu)
