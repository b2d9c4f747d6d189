"""Split inference: the first layers of a network here, the rest on another machine, few bits between.

    head, tail = actzip.split(model, at, example)   # tail(head(x)) is model(x), bit for bit

    head = actzip.split.load("head.actzip"); frame = head.encode(x)     # on the client
    tail = actzip.split.load("tail.actzip"); y = tail(frame)            # on the server

See :mod:`actzip.split.cut` (where a network can be cut), :mod:`~actzip.split.program` (modules cut
as PyTorch runs them), :mod:`~actzip.split.quantizer` and :mod:`~actzip.split.rate` (maps in few
bits), :mod:`~actzip.split.choose` (the fewest that keep a promise), :mod:`~actzip.split.frames` and
:mod:`~actzip.split.coder` (what goes over the wire), :mod:`~actzip.split.sides` (the files).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable

if TYPE_CHECKING:
    from actzip.split.api import Parts, split
    from actzip.split.coder import MapCoder, Receiver, Sender
    from actzip.split.cut import Cut
    from actzip.split.planning import plan
    from actzip.split.quantizer import MapQuantizer
    from actzip.split.result import Plan, Row
    from actzip.split.sides import Head, Tail, load
else:
    #: On first use: heads and tails that are loaded do without PyTorch.
    __getattr__ = lazy(
        __name__,
        {
            "Cut": "cut",
            "Head": "sides",
            "MapCoder": "coder",
            "MapQuantizer": "quantizer",
            "Parts": "api",
            "Plan": "result",
            "Receiver": "coder",
            "Row": "result",
            "Sender": "coder",
            "Tail": "sides",
            "load": "sides",
            "plan": "planning",
            "split": "api",
        },
    )

__all__ = [
    "Cut",
    "Head",
    "MapCoder",
    "MapQuantizer",
    "Parts",
    "Plan",
    "Receiver",
    "Row",
    "Sender",
    "Tail",
    "load",
    "plan",
    "split",
]

make_callable(__name__, "split")
