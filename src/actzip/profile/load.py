"""Models as the profiler takes them: by name, import path, exported program or ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.errors import DataError, UnsupportedError

__all__ = ["GraphNet", "load_model"]


class _NodeModule(nn.Module):
    """One node of a graph, run with PyTorch."""

    def __init__(self, node: Any) -> None:
        super().__init__()
        self.node = node

    def forward(self, batch: int, *args: Tensor) -> Tensor:
        from actzip.runtime import interpret

        return interpret._run(self.node, list(args), batch)


class GraphNet(nn.Module):
    """A :class:`actzip.runtime.graph.Graph` (of an ONNX file, say) as a module, one submodule a node.

    Inputs and outputs in the graph's order, float32 ``N, C, H, W`` as there; a single output is given as a tensor.
    """

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph
        self.steps: list[tuple[str, Any]] = []
        for node in graph.nodes:
            name = node.name.strip("/").replace("/", "_").replace(".", "_") or node.op
            base, i = name, 1
            while hasattr(self, name):
                name, i = f"{base}_{i}", i + 1
            self.add_module(name, _NodeModule(node))
            self.steps.append((name, node))

    def forward(self, *inputs: Tensor) -> Any:
        from actzip.runtime import interpret

        shapes = {n: tuple(x.shape) for n, x in zip(self.graph.inputs, inputs, strict=True)}
        batch = interpret.batch_of(self.graph, shapes)
        values: dict[str, Tensor] = {k: torch.from_numpy(v.copy()) for k, v in self.graph.constants.items()}
        values.update(zip(self.graph.inputs, inputs, strict=True))
        for name, node in self.steps:
            values[node.output] = getattr(self, name)(batch, *(values[v] for v in node.inputs))
        outputs = tuple(values[v] for v in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def load_model(
    ref: str, shape: tuple[int, ...] | None = None
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """(model, input shape C, H, W, mean, std) for a name, an import path, a ``.pt2`` or an ``.onnx`` file.

    Args:
        shape: input shape C, H, W where it is not the usual one for the name.

    Raises:
        InputError: an unknown name (near matches are named).
        DataError: a file that is missing or cannot be read.
        UnsupportedError: an ONNX model with several inputs, or an operator that is not known.
    """
    from actzip.models import model_info, resolve

    path = Path(ref)
    if path.suffix == ".onnx":
        from actzip.runtime.onnx_import import from_onnx

        graph = from_onnx(path, [(1, *shape)] if shape else None)
        if len(graph.inputs) != 1:
            raise UnsupportedError(
                f"{path} has {len(graph.inputs)} inputs; profile it from Python with a loader of dicts"
            )
        dims = tuple(int(d) if isinstance(d, int) else 1 for d in graph.shape(graph.inputs[0])[1:])
        info = model_info("resnet18")
        channels = dims[0] if dims else 3
        return (
            GraphNet(graph),
            dims,
            info.mean if channels == 3 else (0.0,) * channels,
            info.std if channels == 3 else (1.0,) * channels,
        )
    if path.suffix in (".pt2", ".pt", ".pth"):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix != ".pt2":
            raise DataError(
                f"{path}: a pickled model runs code when it is read; give an exported program (.pt2) or ONNX"
            )
        try:
            program = torch.export.load(str(path))
        except Exception as error:
            raise DataError(f"{path} is not an exported program: {error}") from error
        example = next(
            (
                t
                for t in torch.utils._pytree.tree_leaves(program.example_inputs or ())
                if isinstance(t, Tensor)
            ),
            None,
        )
        dims = tuple(shape or (tuple(example.shape[1:]) if example is not None else (3, 224, 224)))
        info = model_info("resnet18")
        return program.module(), dims, info.mean, info.std
    model = resolve(ref)
    info = model_info(ref)
    return model, tuple(shape or info.input_shape), info.mean, info.std
