"""PyTorch's exporter of ONNX files by tracing, with the operators that it lacks and errors of one line."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actzip.errors import UnsupportedError

__all__ = ["OLDEST_OPSET", "TRACED_OPSET", "write_traced"]

OLDEST_OPSET = 11
TRACED_OPSET = 17  # the newest that takes operators of one's own; newer ones are converted to


def write_traced(
    model: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    names: tuple[Sequence[str], Sequence[str]],
    opset: int,
    dynamic_batch: bool,
    **options: Any,
) -> None:
    """Writes ``model``, as it is, to ``path``.

    Args:
        names: of the inputs and of the outputs.
        opset: that is asked for; the newest written is :data:`TRACED_OPSET`.
        dynamic_batch: the first dimension of inputs and outputs may vary.
        options: others of ``torch.onnx.export``.

    Raises:
        UnsupportedError: PyTorch cannot export an operator of the model.
    """
    ins, outs = names
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False  # which has no operators of one's own
    try:
        with warnings.catch_warnings(), _operators(), _without_log():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                inputs,
                str(path),
                input_names=list(ins),
                output_names=list(outs),
                opset_version=min(opset, TRACED_OPSET),
                dynamic_axes={n: {0: "N"} for n in (*ins, *outs)} if dynamic_batch else None,
                **options,
            )
    except UnsupportedError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"PyTorch cannot export this model: {type(error).__name__}: {first}"
        ) from error


def _threshold(graph: Any, x: Any, threshold: Any, value: Any) -> Any:
    """``nn.Threshold`` with any threshold; torch's own takes 0."""
    read = torch.onnx.symbolic_helper._maybe_get_const  # type: ignore[attr-defined]
    if float(read(value, "f")) != 0:
        raise UnsupportedError("a threshold with another value than 0")
    return graph.op("ThresholdedRelu", x, alpha_f=float(read(threshold, "f"))).setType(x.type())


def _lift_fresh(graph: Any, x: Any) -> Any:
    return x


def _sort(graph: Any, x: Any, *options: Any) -> Any:
    """All of a dimension in order, equal ones as they came."""
    read = torch.onnx.symbolic_helper._maybe_get_const  # type: ignore[attr-defined]
    axis, descending = int(read(options[-2], "i")), int(bool(read(options[-1], "b")))
    dim = graph.op("Constant", value_t=torch.tensor([axis]))
    count = graph.op("Gather", graph.op("Shape", x), dim, axis_i=0)
    return graph.op("TopK", x, count, axis_i=axis, largest_i=descending, sorted_i=1, outputs=2)


_OWN = {"aten::threshold": _threshold, "aten::lift_fresh": _lift_fresh, "aten::sort": _sort}


@contextmanager
def _without_log() -> Iterator[None]:
    """Where it fails PyTorch prints the whole graph."""
    log: Any = getattr(torch._C, "_jit_onnx_log", None)
    if log is None:
        yield
        return
    torch._C._jit_onnx_log = lambda *_: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log  # type: ignore[attr-defined]


@contextmanager
def _operators() -> Iterator[None]:
    """Operators of our own inside the block."""
    onnx: Any = torch.onnx
    for name, symbolic in _OWN.items():
        onnx.register_custom_op_symbolic(name, symbolic, OLDEST_OPSET)
    try:
        yield
    finally:
        for name in _OWN:
            onnx.unregister_custom_op_symbolic(name, OLDEST_OPSET)
