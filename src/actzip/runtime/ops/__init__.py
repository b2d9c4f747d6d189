"""Operators, one file a family: node, shape rule, layout, front ends' handlers and lowering.
Importing it fills the registry."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from actzip.runtime.ops.activation import Activation
from actzip.runtime.ops.arithmetic import BINARY_KINDS, Binary
from actzip.runtime.ops.conv import Conv2d, ConvTranspose2d
from actzip.runtime.ops.copy import Copy
from actzip.runtime.ops.linear import Linear, MatMul
from actzip.runtime.ops.norm import BatchNorm, GroupNorm, LayerNorm, LocalResponseNorm
from actzip.runtime.ops.pool import AdaptivePool, Pool
from actzip.runtime.ops.reduce import REDUCE_KINDS, Reduce, Softmax
from actzip.runtime.ops.reshape import Expand, Reshape, Transpose
from actzip.runtime.ops.resize import Resize
from actzip.runtime.ops.select import Concat, Pad, Slice, Take
from actzip.runtime.ops.shapes import probed_shape, repeated

__all__ = [
    "BINARY_KINDS",
    "REDUCE_KINDS",
    "Activation",
    "AdaptivePool",
    "BatchNorm",
    "Binary",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "Copy",
    "Expand",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "LocalResponseNorm",
    "MatMul",
    "Pad",
    "Pool",
    "Reduce",
    "Reshape",
    "Resize",
    "Slice",
    "Softmax",
    "Take",
    "Transpose",
    "probed_shape",
    "repeated",
]

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
