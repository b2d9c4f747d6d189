"""Stage 2: activation maps as integers of 4 to 16 bits, zero exactly zero.

    quantized = actzip.quantize(model, calibration, bits=8)   # fake-quantized, same class and state_dict
    maps = integers(quantized, x)                             # site -> IntegerMap: what codecs store

See :mod:`actzip.quantize.linear` (the formula), :mod:`~actzip.quantize.observers` (how scales are chosen),
:mod:`~actzip.quantize.calibrate` (what is learned of maps), :mod:`~actzip.quantize.allocate` (bits
per layer), :mod:`~actzip.quantize.model` (models), :mod:`~actzip.quantize.train` (low-bit
training).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.quantize.api import quantize
from actzip.quantize.linear import (
    IntegerMap,
    QuantRange,
    dequantize_linear,
    fake_quantize,
    quantize_linear,
)
from actzip.quantize.model import (
    Quantization,
    SiteQuantizer,
    capture,
    get_quantization,
    integers,
    quantization,
    remove_quantization,
    watch_saturation,
    without_quantization,
)
from actzip.quantize.observers import OBSERVERS, MapObserver

__all__ = [
    "OBSERVERS",
    "IntegerMap",
    "MapObserver",
    "QuantRange",
    "Quantization",
    "SiteQuantizer",
    "capture",
    "dequantize_linear",
    "fake_quantize",
    "get_quantization",
    "integers",
    "quantization",
    "quantize",
    "quantize_linear",
    "remove_quantization",
    "watch_saturation",
    "without_quantization",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "quantize")
