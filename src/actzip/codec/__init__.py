"""Stage 3: lossless entropy coding of activation maps.

``encode`` turns an array into a self-describing blob (format: docs/bitstream.md), ``decode`` gives it back,
``inspect`` says what is inside. numpy arrays and torch tensors go in and out without a copy where their
memory order allows it; importing this package does not import torch.
"""

from __future__ import annotations

from actzip.codec.container import Info, decode, encode, inspect
from actzip.codec.quantizer import dequantize, quantize
from actzip.codec.registry import CodecInfo, available, codecs

__all__ = [
    "CodecInfo",
    "Info",
    "available",
    "codecs",
    "decode",
    "dequantize",
    "encode",
    "inspect",
    "quantize",
]
