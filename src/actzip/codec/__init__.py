"""Stage 3: lossless entropy coding of activation maps.

``encode`` turns an array into a self-describing blob (format: docs/bitstream.md), ``decode`` gives it back,
``inspect`` says what is inside. numpy arrays and torch tensors go in and out without a copy where their
memory order allows it; importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy
from actzip.codec.decode import decode, decode_many
from actzip.codec.encode import encode, encode_many
from actzip.codec.info import Chunk, Info, chunks, inspect
from actzip.codec.maps import MapReader, MapWriter, iter_maps, load_maps, save_maps
from actzip.codec.quantizer import dequantize, quantize
from actzip.codec.registry import CodecInfo, available, codecs

__all__ = [
    "Chunk",
    "CodecInfo",
    "Info",
    "MapReader",
    "MapWriter",
    "available",
    "chunks",
    "codecs",
    "decode",
    "decode_many",
    "dequantize",
    "encode",
    "encode_many",
    "inspect",
    "iter_maps",
    "load_maps",
    "quantize",
    "save_maps",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)
