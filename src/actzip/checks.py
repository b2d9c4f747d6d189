"""Arguments that callers give: each check says the argument's name, what was given and what would
be right.

>>> from actzip.checks import whole
>>> whole(3, "epochs", 1)
3
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from actzip.errors import InputError

__all__ = ["flag", "function", "number", "one_of", "shown", "text", "texts", "whole"]


def shown(value: Any) -> str:
    """A value of any type, short, for a message."""
    kind = type(value).__name__
    if not isinstance(value, (str, bytes, int, float, complex, bool, type(None), tuple, list, dict, slice)):
        return f"a {kind}"
    try:
        said = repr(value)
    except Exception:
        return f"a {kind}"
    return said if len(said) <= 60 else f"{said[:50]} ... ({kind})"


def whole(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an int, at least ``low`` and at most ``high``.

    Raises:
        InputError: it is no whole number, or outside.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        x = int(value)
        if low <= x and (high is None or x <= high):
            return x
    span = f"from {low} to {high}" if high is not None else f"of at least {low}"
    raise InputError(f"{name} must be a whole number {span}, not {shown(value)}")


def number(
    value: Any,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    finite: bool = True,
) -> float:
    """``value`` as a float from ``low`` (or ``above`` it) to ``high``; NaN never is.

    Raises:
        InputError: it is no real number, or outside.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:
            x = math.inf
        inside = (low < x if above else low <= x) and x <= high
        if inside and (math.isfinite(x) or not finite):
            return x
    least = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
    most = "" if high == math.inf else f"{' and' if least else ''} at most {high:g}"
    raise InputError(f"{name} must be a {'finite ' if finite else ''}number{least}{most}, not {shown(value)}")


def one_of(value: Any, name: str, allowed: Iterable[str]) -> str:
    """``value``, one of the names ``allowed``.

    Raises:
        InputError: it is another, or no str.
    """
    names = list(allowed)
    if isinstance(value, str) and value in names:
        return value
    near = difflib.get_close_matches(value, names, 1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name} must be one of {', '.join(names)}, not {shown(value)}{hint}")


def flag(value: Any, name: str) -> bool:
    """``value``, True or False.

    Raises:
        InputError: it is something else, an array of several, say.
    """
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise InputError(f"{name} must be True or False, not {shown(value)}")


def text(value: Any, name: str) -> str:
    """``value``, a str.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, str):
        return value
    raise InputError(f"{name} must be a str, not {shown(value)}")


def texts(values: Any, name: str) -> list[str]:
    """``values``, several str, as a list.

    Raises:
        InputError: it is something else.
    """
    if isinstance(values, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in values):
        return list(values)
    raise InputError(f"{name} must be a list of str, not {shown(values)}")


def function(value: Any, name: str) -> Any:
    """``value``, which is None or can be called.

    Raises:
        InputError: it is something else.
    """
    if value is None or callable(value):
        return value
    raise InputError(f"{name} must be a function, not {shown(value)}")
