"""The table of operators: which function reads PyTorch's, which ONNX's, and which makes the
engine's of a node.

The functions are in :mod:`actzip.runtime.ops`, one file a family, and enter the table where they
are defined. The front ends and the lowering look there and nowhere else; what the table lacks, they
refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actzip.runtime.graph import Array, Dim, Node

if TYPE_CHECKING:
    from torch import Tensor

    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering
    from actzip.runtime.onnx_node import OnnxNode


@dataclass(frozen=True)
class Ref:
    """A value of the graph under construction."""

    name: str


@dataclass
class Compare:
    """``x <op> t`` with a constant ``t``, kept in case a ``where`` makes a threshold of it."""

    op: str
    x: Ref
    t: Tensor


@dataclass(frozen=True)
class Stacked:
    """Values of one shape, joined along the batch or (``apart``) stacked in front of it, of which
    nothing is read but what they are together, or one of them."""

    parts: tuple[Ref, ...]
    shape: tuple[Dim, ...]
    apart: bool = False


@dataclass(frozen=True)
class Absent:
    """An output that the engine does not compute: refused where something reads it."""

    what: str


@dataclass(frozen=True)
class Mask:
    """``x > limit``, kept in case a Where or Mul makes a threshold of it; ``inverse``: where x is at
    most that. ``dtype``: bool, or float32 behind a Cast."""

    x: str
    limit: Array
    inverse: bool
    dtype: str = "bool"


#: Batches at which values that depend on the batch are worked out.
PROBES = (1, 2, 3, 7)


@dataclass(frozen=True)
class Probed:
    """A tensor that depends on the batch and nothing else, a Shape and what is computed of it: its
    value at each of PROBES: arrays of ONNX's front end, tensors of PyTorch's."""

    values: tuple[Any, ...]


#: ``builder, arguments by the schema's names -> Ref``, or a tuple of them for several outputs.
TorchHandler = Callable[["Builder", dict[str, Any]], Any]
#: ``importer, node -> value``, or a list for several outputs.
OnnxHandler = Callable[["Importer", "OnnxNode"], Any]
LowerHandler = Callable[["Lowering", Any], None]

#: What layers of three dimensions are made of, by name: :mod:`actzip.runtime.ops.volume` fills it.
VOLUME: dict[str, Callable[..., Any]] = {}

TORCH: dict[str, TorchHandler] = {}  # by the aten operator's name, without overloads
ONNX: dict[str, OnnxHandler] = {}
LOWER: dict[type[Node], LowerHandler] = {}

_F = TypeVar("_F", bound=Callable[..., Any])


def torch_op(*names: str) -> Callable[[_F], _F]:
    """Enters a function as the handler of PyTorch's operators ``names``."""

    def register(f: _F) -> _F:
        TORCH.update(dict.fromkeys(names, f))
        return f

    return register


def onnx_op(*names: str) -> Callable[[_F], _F]:
    """Enters a function as the handler of ONNX's operators ``names``."""

    def register(f: _F) -> _F:
        ONNX.update(dict.fromkeys(names, f))
        return f

    return register


def lowers(node: type[Node]) -> Callable[[_F], _F]:
    """Enters a function as what makes native nodes of a ``node``."""

    def register(f: _F) -> _F:
        LOWER[node] = f
        return f

    return register


def node_classes() -> dict[str, type[Node]]:
    """Every operator of the graph by its name."""
    return {cls.op: cls for cls in LOWER}
