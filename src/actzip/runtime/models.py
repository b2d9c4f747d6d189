"""Models as every verb takes them: by name, import path, exported program or ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actzip.checks import flag, shown, text, whole
from actzip.errors import DataError, InputError, UnsupportedError, told
from actzip.runtime import graph as g
from actzip.runtime.to_torch import GraphNet, to_torch

__all__ = ["GraphNet", "load", "load_model"]


def load(
    model: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
) -> nn.Module:
    """The ``nn.Module``, in eval mode, of a name, an import path, or a ``.pt2`` or ``.onnx`` file.

    The module of a file has one submodule a node, under the node's name
    (:class:`actzip.runtime.to_torch.GraphNet`): :func:`actzip.profile`, ``calibrate_thresholds``,
    ``sparsify``, ``quantize``, ``accelerate`` and ``compile`` take it. It takes every size that the
    file leaves open, as the file does.

    Args:
        model: a torchvision or timm name, one of ours, ``package.module:attribute``, or the path of
            an exported program or an ONNX file (opset 7 or newer).
        weights: a safetensors file for it.
        shape: the first input's shape without the batch, C, H, W; or shapes by input, the batch
            included: the size at which the module shows its layers, where a file leaves it open and
            no usual one fits.
        trust: whether an exported program may be read: PyTorch runs code that its file holds. ONNX
            files hold none.

    Raises:
        InputError: an unknown name (near matches are named); open sizes that no usual ones fit.
        DataError: a file that is missing, damaged, of another kind, or not trusted.
        UnsupportedError: operators of an ONNX file that are not known.
    """
    from actzip.models import load_weights

    for name, value in (("model", model), ("weights", weights)):
        if not isinstance(value, (str, os.PathLike)) and (name == "model" or value is not None):
            raise InputError(f"{name} must be a name or a path, not {shown(value)}")
    shapes = None
    if isinstance(shape, Mapping):
        shapes, shape = {text(n, "an input"): _dims(s) for n, s in shape.items()}, None
    elif shape is not None:
        shape = _dims(shape)
    flag(trust, "trust")
    net = load_model(os.fspath(model), shape, shapes=shapes, trust=trust, parts=True)[0]
    for m in net.modules():  # an exported program's module refuses eval()
        m.training = False
    if weights is not None:
        load_weights(net, weights)
    _say_quantized(net)
    return net


def _dims(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise InputError(f"shape must be the input's C, H, W, not {shown(shape)}")
    return tuple(whole(d, "a dimension of shape", 1, 2**31 - 1) for d in shape)


def load_model(
    ref: str,
    shape: tuple[int, ...] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    parts: bool = False,
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """(model, input shape C, H, W, mean, std) for a name, an import path, a ``.pt2`` or an ``.onnx`` file.

    Args:
        shape: input shape C, H, W where it is not the usual one for the name.
        shapes: of an ONNX file's inputs by name, the batch included; ``""`` is the first.
        trust: see :func:`load`.
        parts: nodes of an ONNX file that the engine lacks run with ONNX Runtime, with a warning.

    A file gives a :class:`GraphNet` where its operators are known. Of several inputs the shape
    given is that of the first.

    Raises:
        InputError: an unknown name (near matches are named).
        DataError: a file that is missing, cannot be read, or is not trusted.
        UnsupportedError: an operator that is not known, with its place.
    """
    from actzip.models import model_info, resolve

    path = Path(ref)
    if path.suffix == ".actzip":
        raise InputError(f"{path} is compiled already: actzip.runtime.load reads it")
    if path.suffix == ".onnx":
        read = _onnx_net(path, shape, shapes, parts)
        first = read.graph.shape(read.graph.inputs[0])
        return _with_shape(read, shape or tuple(d if isinstance(d, int) else 1 for d in first[1:]))
    if path.suffix in (".pt2", ".pt", ".pth"):
        if not path.is_file():
            raise DataError(f"there is no file {path}")
        if path.suffix != ".pt2":
            raise DataError(
                f"{path}: a pickled model runs code when it is read; give an ONNX file, or a name "
                "and its weights as safetensors"
            )
        if not trust:
            raise DataError(
                f"{path}: reading an exported program runs code that the file holds, and it is not "
                "said to be trusted: --trust on the command line, actzip.load(path, trust=True) "
                "in Python; an ONNX file holds no code"
            )
        net, dims = _exported(path)
        return _with_shape(net, shape or dims)
    model = resolve(ref)
    info = model_info(ref)
    return model, tuple(shape or info.input_shape), info.mean, info.std


def load_whole(
    ref: str,
    shape: tuple[int, ...] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    trust: bool = False,
    parts: bool = True,
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """:func:`load_model` for what looks into a model; ``parts``: where ONNX Runtime may run some nodes.

    Raises:
        UnsupportedError: nodes that the engine lacks, with what can be done with the file.
    """
    try:
        found = load_model(ref, shape, shapes=shapes, trust=trust, parts=parts)
        _say_quantized(found[0])
        return found
    except UnsupportedError as error:
        if Path(ref).suffix != ".onnx" or parts:  # which ONNX Runtime has refused, or is not there for
            raise
        hint = (
            "compile, bench, profile and quantize run such nodes with ONNX Runtime where it is "
            "installed, all else needs every node"
        )
        raise UnsupportedError(f"{error}; {hint}") from error


def _onnx_net(
    path: Path,
    shape: tuple[int, ...] | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    parts: bool,
) -> GraphNet:
    """The module of an ONNX file, for any size that it takes."""
    from actzip.runtime.from_onnx import at_least_opset, from_onnx
    from actzip.runtime.onnx_file import load_onnx
    from actzip.runtime.open_sizes import open_inputs, settled
    from actzip.runtime.origin import OnnxOrigin

    model = at_least_opset(load_onnx(path))
    if shape:
        shapes = {"": (1, *shape), **{k: v for k, v in (shapes or {}).items() if k}}
    known, left = onnx_shapes(path, model, shapes or {}), open_inputs(model)
    try:
        graph = settled(model, str(path), known, lambda sizes: from_onnx(model, sizes))
    except UnsupportedError as error:
        if not parts:
            raise
        net = _net_in_parts(path, model, known, error)
    else:
        shapes_now = [g.concrete(graph.shape(v), 1) for v in graph.inputs]
        net = to_torch(graph, OnnxOrigin(model, str(path), shapes_now))
    graph = net.graph
    net.open = {n: d for n, d in left.items() if n in graph.inputs and n not in known}
    return net


def _net_in_parts(
    path: Path, model: Any, shapes: Mapping[str, tuple[int, ...]], refused: UnsupportedError
) -> GraphNet:
    """The module of a file of which the engine lacks nodes: ONNX Runtime runs them.

    Raises:
        UnsupportedError: it is not installed; ``refused``, where it does not take the model.
    """
    from actzip.runtime.open_sizes import batch_is_open
    from actzip.runtime.parts import runtime
    from actzip.runtime.whole import WholeOrigin

    runtime(refused)
    origin = WholeOrigin(model, str(path))
    net = to_torch(origin.first(shapes), origin)
    if batch_is_open(model):
        net.batch = None
    told(
        f"{len(net.elsewhere())} of {len(net.steps)} nodes run with ONNX Runtime in this module and "
        f"have no gradient: {refused}"
    )
    return net


def onnx_shapes(path: Path, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """``shapes`` by the names of the inputs of ``model``, the file's.

    Raises:
        InputError: the model has no input of a name.
    """
    from actzip.runtime.onnx_file import inputs_of

    names = [v.name for v in inputs_of(model)]
    for name in shapes:
        if name and name not in names:
            raise InputError(f"{path} has no input {name!r}; it has {', '.join(map(repr, names))}")
    return {name or names[0]: tuple(dims) for name, dims in shapes.items()}


def _with_shape(
    net: nn.Module, dims: tuple[int, ...]
) -> tuple[nn.Module, tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """What :func:`load_model` gives for a file; three channels are taken for photographs,
    normalised as usual."""
    from actzip.models import model_info

    info = model_info("resnet18")
    channels = dims[0] if dims else 1
    if channels == 3:
        return net, dims, info.mean, info.std
    return net, dims, (0.0,) * channels, (1.0,) * channels


def _exported(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """(module, input shape C, H, W) of an exported program: its graph, or its own module where an
    operator is unknown."""
    from actzip.runtime.tracing import capture, flat_inputs

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
        return to_torch(capture(program.module(), example)), shape
    except UnsupportedError:  # hooks see what it does; the engine will say what it lacks
        module = program.module()
        sizes = [
            n.meta["val"].shape[0]
            for n in program.graph.nodes
            if n.op == "placeholder" and n.name in program.graph_signature.user_inputs and n.meta["val"].ndim
        ]
        module.batch = sizes[0] if sizes and isinstance(sizes[0], int) else None  # type: ignore[assignment]
        return module, shape


def open_size(net: nn.Module) -> Callable[[tuple[int, ...]], bool] | None:
    """Whether a file's module takes images of a shape, without the batch, where the file leaves
    sizes open and nobody has said any; None for other modules."""
    if not isinstance(net, GraphNet) or net.arity != 1 or not net.open:
        return None
    return lambda shape: net.takes([(1, *shape)])


def _say_quantized(net: nn.Module) -> None:
    if isinstance(net, GraphNet) and net.graph.meta.get("quantized"):
        told(
            "the file is quantized: its module computes the same in float32, and so does what is exported "
            "or compiled of it"
        )


def say_open(net: nn.Module, taken: tuple[int, ...] | None = None) -> None:
    """Warns of a size that a file leaves open and that was taken without anybody's word.

    Args:
        taken: shape of the images without the batch; None: the one that the module was made for.
    """
    if not isinstance(net, GraphNet) or not net.open:
        return
    from actzip.runtime.open_sizes import shown_dims

    name, dims = next(iter(net.open.items()))
    size = "x".join(map(str, taken or net.graph.shape(name)[1:]))
    asked = shown_dims(dims).replace(" ", "") if dims else "N,C,H,W"
    told(f"the file leaves the size of {name!r} open; {size} is taken: --shape {name}={asked} says another")
