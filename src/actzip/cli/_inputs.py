"""The options of every verb that runs a model: what its inputs are.

A command that is decorated with :func:`takes_inputs` gets them as ``inputs``, a
:class:`~actzip.data.form.Form`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from actzip.errors import InputError

if TYPE_CHECKING:
    from actzip.data.form import Form

__all__ = ["takes_inputs"]

_PANEL = "Inputs"
_OPTIONS: dict[str, tuple[Any, Any]] = {
    "shape": (
        list[str] | None,
        typer.Option(
            None,
            metavar="[NAME=]N,C,H,W",
            help="Shape of an input, the batch first; repeat it for several inputs.",
            rich_help_panel=_PANEL,
        ),
    ),
    "input": (
        list[str] | None,
        typer.Option(
            None,
            metavar="[NAME=]FILE",
            help="An .npy or .npz of inputs, taken as it is; repeat it for several inputs.",
            rich_help_panel=_PANEL,
        ),
    ),
    "mean": (
        str | None,
        typer.Option(
            None, help="Subtracted from pixels: a number, or one a channel.", rich_help_panel=_PANEL
        ),
    ),
    "std": (
        str | None,
        typer.Option(None, help="Then divided by: a number, or one a channel.", rich_help_panel=_PANEL),
    ),
    "layout": (
        str,
        typer.Option(
            "nchw", help="Order in which the model takes images: nchw or nhwc.", rich_help_panel=_PANEL
        ),
    ),
    "range": (
        str | None,
        typer.Option(
            None, help="Pixels before mean and std: 0..1 (usual), 0..255 or -1..1.", rich_help_panel=_PANEL
        ),
    ),
}


def takes_inputs(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the options of this file, which it gets as the argument ``inputs``."""
    hints = get_type_hints(command, localns={"Form": Any})  # which is there for type checkers
    own = [
        p.replace(annotation=hints.get(p.name, p.annotation))
        for p in inspect.signature(command).parameters.values()
        if p.name != "inputs"
    ]
    added = [
        inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option, annotation=kind)
        for n, (kind, option) in _OPTIONS.items()
    ]

    @wraps(command)
    def call(**given: Any) -> Any:
        options = {n: given.pop(n) for n in _OPTIONS}
        return command(**given, inputs=form(**options))

    tail = [p for p in own if p.name in ("trust", "json")]
    order = [p for p in own if p not in tail] + added + tail
    call.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in order}
    del call.__wrapped__  # type: ignore[attr-defined]
    return call


def form(
    shape: list[str] | None = None,
    input: list[str] | None = None,
    mean: str | None = None,
    std: str | None = None,
    layout: str = "nchw",
    range: str | None = None,
) -> Form:
    """The options as a :class:`~actzip.data.form.Form`.

    Raises:
        InputError: one that is not of its form. DataError: a file that cannot be read.
    """
    from actzip.data.form import LAYOUTS, RANGES, Form

    if layout not in LAYOUTS:
        raise InputError(f"--layout is {' or '.join(LAYOUTS)}, not {layout!r}")
    if range is not None and range not in RANGES:
        raise InputError(f"--range is one of {', '.join(RANGES)}, not {range!r}")
    deviations = _floats("std", std)
    if deviations and not all(deviations):
        raise InputError("--std holds a zero, and pixels are divided by it")
    return Form(
        shapes=dict(_shape(s) for s in shape or []),
        arrays=_arrays(input or []),
        mean=_floats("mean", mean),
        std=deviations,
        range=range,
        layout=layout,
    )


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, numbers = text.rpartition("=")
    try:
        dims = tuple(int(d) for d in numbers.replace("x", ",").split(","))
    except ValueError:
        dims = ()
    if not dims or min(dims) < 1:
        raise InputError(
            f"--shape is [NAME=] and whole numbers with commas, as in x=1,3,480,640, not {text!r}"
        )
    return name, dims


def _floats(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(float(v) for v in text.split(","))
    except ValueError:
        found = ()
    if not found or any(v != v or abs(v) == float("inf") for v in found):
        raise InputError(f"--{name} takes numbers with commas between them, not {text!r}")
    return found


def _arrays(files: list[str]) -> dict[str, Any]:
    from actzip.cli.common import read_arrays

    found: dict[str, Any] = {}
    for text in files:
        name, _, path = text.rpartition("=") if not Path(text).is_file() else ("", "", text)
        arrays = read_arrays(Path(path))
        if name and len(arrays) > 1:
            raise InputError(
                f"--input {text}: {path} holds {len(arrays)} arrays, each with a name of its own"
            )
        for own, array in arrays.items():
            key = name or own
            if key in found:
                raise InputError(f"--input gives {key or 'the first input'!r} twice")
            found[key] = array.numpy() if hasattr(array, "numpy") else array
    return found
