"""Sizes that an ONNX file leaves open: which to take where nobody says any.

A network with open sizes takes many, so any that fits shows its layers; whoever runs it makes the
graph again for the size of the inputs (:class:`~actzip.runtime.to_torch.GraphNet`,
:func:`actzip.compile`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.onnx_file import inputs_of

__all__ = ["batch_is_open", "open_inputs", "settled", "shown_dims", "usual_shapes"]

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]

#: Height and width of images, width of lines of text, lengths of signals: the most usual first.
#: The last two images are lines of text.
_IMAGES = (
    (224, 224), (320, 320), (640, 640), (64, 64), (512, 512), (128, 128), (256, 256), (112, 112), (48, 320),
    (32, 320),
)  # fmt: skip
_WIDTHS = (320, 640, 224, 100, 128, 512, 64, 256, 96, 32)
_LENGTHS = (128, 16000, 512, 576, 1, 64, 2048, 32, 256, 1024)
_BEFORE_CONV = {"Cast", "Sub", "Add", "Mul", "Div", "Identity", "Pad", "Clip"}


def _declared(value: Any) -> list[int | str] | None:
    """Dimensions as the file has them: a number, or the name of an open one ("" without)."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [int(d.dim_value) if d.dim_value > 0 else str(d.dim_param) for d in tensor.shape.dim]


def open_inputs(model: Any) -> dict[str, list[int | str] | None]:
    """The inputs whose sizes, but for the batch, the file (a ``ModelProto``) leaves open: declared
    dimensions (:func:`shown_dims`)."""
    found = {v.name: _declared(v) for v in inputs_of(model)}
    return {n: d for n, d in found.items() if d is None or any(isinstance(k, str) for k in d[1:])}


def batch_is_open(model: Any) -> bool:
    """Whether the file leaves the first input's first dimension open."""
    dims = next((_declared(v) for v in inputs_of(model)), None)
    return not dims or isinstance(dims[0], str)


def shown_dims(dims: Sequence[int | str] | None) -> str:
    """Dimensions for people: "N, 3, height, width"."""
    if dims is None:
        return "no shape"
    letters = ["N", *("CHW" if len(dims) == 4 else [f"D{i}" for i in range(1, len(dims))])]
    return ", ".join(
        str(d) if isinstance(d, int) else d if d.isidentifier() else k
        for d, k in zip(dims, letters, strict=True)
    )


def _channels(model: Any, name: str) -> int:
    """What the first convolution behind an input takes; 3 where that is not said."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        if name not in node.input:
            continue
        if node.op_type == "Conv" and node.input[0] == name and node.input[1] in shapes:
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            return int(shapes[node.input[1]][1]) * int(groups or 1)
        if node.op_type in _BEFORE_CONV and node.output:
            name = node.output[0]
    return 3


def _filled(model: Any, name: str, dims: list[int | str], k: int, named: dict[str, int]) -> tuple[int, ...]:
    """``dims`` with the ``k``-th usual sizes; ``named``: those of dimensions with a name."""
    last = len(dims) > 1 and isinstance(dims[-1], int) and dims[-1] in (1, 3, 4) and isinstance(dims[-2], str)
    rows = len(dims) - 3 if last else len(dims) - 2

    def usual(i: int) -> int:
        if i == 0 or (len(dims) == 3 and i == 1 and isinstance(dims[0], int)):
            return 1  # the batch; of a recurrent state behind the layers
        if len(dims) == 4 and i in (rows, rows + 1):
            if i == rows + 1 and isinstance(dims[rows], int):
                return _WIDTHS[k]
            return _IMAGES[k][i - rows]
        return _channels(model, name) if len(dims) == 4 else _LENGTHS[k]

    sizes = []
    for i, d in enumerate(dims):
        size = d if isinstance(d, int) else named.get(d) or usual(i)
        if isinstance(d, str) and d:
            named[d] = size
        sizes.append(size)
    return tuple(sizes)


def usual_shapes(model: Any, given: Shapes | None = None) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shapes of all inputs, the batch included, the most usual first; those ``given`` as they are."""
    given = dict(given or {})
    declared = [(v.name, _declared(v)) for v in inputs_of(model)]
    for k in range(len(_IMAGES)):
        named: dict[str, int] = {}
        for name, dims in declared:
            for d, n in zip(dims or (), given.get(name, ()), strict=False):
                if isinstance(d, str) and d:
                    named[d] = n
        yield {
            n: given[n] if n in given else _filled(model, n, dims, k, named) if dims else ()
            for n, dims in declared
            if n in given or dims is not None
        }


def settled(
    model: Any, label: str, given: Shapes | Sequence[Sequence[int]] | None, make: Callable[[Any], T]
) -> T:
    """``make(shapes)`` for the shapes given; where an open one is not, with usual sizes that fit.

    Args:
        model: a ``ModelProto``; label: how it is called.

    Raises:
        InputError: none fits; it names the input, its dimensions and how to say them.
        DataError, UnsupportedError: as ``make``, where no size is to blame.
    """
    names = [v.name for v in inputs_of(model)]
    if given is not None and not isinstance(given, Mapping):
        given = {n: tuple(s) for n, s in zip(names, given, strict=False)}
    missing = {n: d for n, d in open_inputs(model).items() if n not in (given or {})}
    if not missing:
        return make(given)
    first: Exception | None = None
    before = ""
    for shapes in usual_shapes(model, given):
        try:
            return make(shapes)
        except (InputError, UnsupportedError) as error:
            if isinstance(error, UnsupportedError) and str(error) == before:
                raise  # at every size
            first, before = first or error, str(error)
    raise InputError(_ask(label, missing, first)) from first


def _ask(label: str, missing: Mapping[str, list[int | str] | None], first: Exception | None) -> str:
    """What is to be said about open inputs, and how."""
    inputs = "; ".join(f"input {n!r} is ({shown_dims(d)})" for n, d in missing.items())
    flags = " ".join(
        f"--shape {n}={shown_dims(d).replace(' ', '') if d else 'N,C,H,W'}" for n, d in missing.items()
    )
    return (
        f"{label} leaves sizes open, and none of the usual ones fits: {inputs}. Say them: {flags} (or "
        f"--input {next(iter(missing))}=file.npy) on the command line, an example or shape= in "
        f"Python. The first that was tried: {first}"
    )
