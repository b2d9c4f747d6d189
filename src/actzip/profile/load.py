"""Models as the profiler takes them: by name, import path, exported program or ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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

    Attributes:
        names: path of the submodule -> name of the node.
        arity: number of inputs.
        numbers: how many the weights and constants hold together.
        batch: the number of images that the graph was made for, None for any number.
    """

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph
        self.names: dict[str, str] = {}
        self.steps: list[tuple[nn.Module, Any]] = []
        for node in graph.nodes:
            path = ".".join(p for p in node.name.replace("/", ".").split(".") if p) or node.op
            base, i = path, 1
            while path in self.names or not self._free(path):
                path, i = f"{base}_{i}", i + 1
            self.names[path] = node.name
            step = _NodeModule(node)
            self._place(path, step)
            self.steps.append((step, node))
        self.arity = len(graph.inputs)
        arrays = [v for node in graph.nodes for v in vars(node).values() if isinstance(v, np.ndarray)]
        self.numbers = sum(int(a.size) for a in (*arrays, *graph.constants.values()))
        first = graph.shape(graph.inputs[0])[0] if graph.inputs and graph.shape(graph.inputs[0]) else None
        self.batch: int | None = first if isinstance(first, int) else None

    def _free(self, path: str) -> bool:
        """Whether a submodule can be put at ``path``: nothing is called that on the way to it or at it."""
        at: Any = self
        parts = path.split(".")
        for i, part in enumerate(parts):
            found = getattr(at, part, None)
            if found is None:
                return True
            if i == len(parts) - 1 or not isinstance(found, nn.Module):
                return False
            at = found
        return False

    def _place(self, path: str, step: nn.Module) -> None:
        at: nn.Module = self
        *folders, last = path.split(".")
        for part in folders:
            if getattr(at, part, None) is None:
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, step)

    def forward(self, *inputs: Tensor) -> Any:
        from actzip.runtime import interpret

        shapes = {n: tuple(x.shape) for n, x in zip(self.graph.inputs, inputs, strict=True)}
        batch = interpret.batch_of(self.graph, shapes)
        values: dict[str, Tensor] = {k: torch.from_numpy(v.copy()) for k, v in self.graph.constants.items()}
        values.update(zip(self.graph.inputs, inputs, strict=True))
        for step, node in self.steps:
            values[node.output] = step(batch, *(values[v] for v in node.inputs))
        outputs = tuple(values[v] for v in self.graph.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def load_model(
    ref: str, shape: tuple[int, ...] | None = None
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """(model, input shape C, H, W, mean, std) for a name, an import path, a ``.pt2`` or an ``.onnx`` file.

    Args:
        shape: input shape C, H, W where it is not the usual one for the name.

    A file gives a :class:`GraphNet` where its operators are known. Of several inputs the shape given is that of the first.

    Raises:
        InputError: an unknown name (near matches are named).
        DataError: a file that is missing or cannot be read.
        UnsupportedError: an operator that is not known, with its place.
    """
    from actzip.models import model_info, resolve

    path = Path(ref)
    if path.suffix == ".onnx":
        from actzip.runtime.onnx_import import from_onnx

        graph = from_onnx(path, [(1, *shape)] if shape else None)
        dims = tuple(int(d) if isinstance(d, int) else 1 for d in graph.shape(graph.inputs[0])[1:])
        return _with_shape(GraphNet(graph), shape or dims)
    if path.suffix in (".pt2", ".pt", ".pth"):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix != ".pt2":
            raise DataError(
                f"{path}: a pickled model runs code when it is read; give an exported program (.pt2) or ONNX"
            )
        net, dims = _exported(path)
        return _with_shape(net, shape or dims)
    model = resolve(ref)
    info = model_info(ref)
    return model, tuple(shape or info.input_shape), info.mean, info.std


def _with_shape(
    net: nn.Module, dims: tuple[int, ...]
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """What :func:`load_model` gives for a file; three channels are taken for photographs, normalised as usual."""
    from actzip.models import model_info

    info = model_info("resnet18")
    channels = dims[0] if dims else 1
    if channels == 3:
        return net, dims, info.mean, info.std
    return net, dims, (0.0,) * channels, (1.0,) * channels


def _exported(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """(module, input shape C, H, W) of an exported program: its graph, or its own module where an operator is unknown."""
    from actzip.runtime.capture import capture, flat_inputs

    try:
        program = torch.export.load(str(path))
    except Exception as error:
        raise DataError(f"{path} is not an exported program: {error}") from error
    if program.example_inputs is None:
        raise DataError(f"{path} has no example inputs; torch.export.export keeps those that it is given")
    args, kwargs = program.example_inputs
    example = dict(kwargs) if kwargs and not args else tuple(args)
    tensors = [t for t in torch.utils._pytree.tree_leaves(flat_inputs(example)) if isinstance(t, Tensor)]
    shape = tuple(int(d) for d in tensors[0].shape[1:]) if tensors else ()
    try:
        return GraphNet(capture(program.module(), example)), shape
    except UnsupportedError:  # hooks see what it does; the engine will say what it lacks
        module = program.module()
        sizes = [
            n.meta["val"].shape[0]
            for n in program.graph.nodes
            if n.op == "placeholder" and n.name in program.graph_signature.user_inputs and n.meta["val"].ndim
        ]
        module.batch = sizes[0] if sizes and isinstance(sizes[0], int) else None  # type: ignore[assignment]
        return module, shape
