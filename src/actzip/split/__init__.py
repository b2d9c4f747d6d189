"""Split inference: the first layers of a network here, the rest on another machine, few bits between.

    head, tail = actzip.split(model, at, example)   # tail(head(x)) is model(x), bit for bit

See :mod:`actzip.split.cut` (where a network can be cut), :mod:`~actzip.split.program` (modules cut
as PyTorch runs them), :mod:`~actzip.split.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.split.api import Parts, split
from actzip.split.cut import Cut

__all__ = ["Cut", "Parts", "split"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "split")
