"""Accuracy and coded size of a quantized model over a data set: the table accuracy x bits x codec,
a layer at a time.

One pass, streaming: each batch's integer maps are coded as they are made and dropped. Sizes are
those of whole blobs, headers, chunk index and checksums included, one blob a map and batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.activations import eval_mode
from actzip.errors import DataError, InputError
from actzip.quantize import IntegerMap, capture, quantization

__all__ = ["BEST", "LayerRate", "RateReport", "measure_rates"]

#: Name of the column that takes, map by map, the codec that is smallest there in total.
BEST = "best"


@dataclass
class LayerRate:
    """One map over all images.

    Attributes:
        elements, nonzeros: of the integer maps, all images.
        bits: of the integers.
        coded: {codec: bits of its blobs}.
        entropy: order-0 entropy of all integers of the map, total bits.
    """

    name: str
    bits: int
    signed: bool = False
    elements: int = 0
    nonzeros: int = 0
    entropy: float = 0.0
    coded: dict[str, int] = field(default_factory=dict)

    @property
    def density(self) -> float:
        return self.nonzeros / self.elements if self.elements else 0.0

    def size(self, codec: str) -> int:
        """Bits coded by ``codec``, or by the smallest of all for :data:`BEST`."""
        return min(self.coded.values()) if codec == BEST else self.coded[codec]


@dataclass
class RateReport:
    """All maps of a network over a data set.

    Attributes:
        accuracy: of the fake-quantized model over the images, 0 to 1; None without labels.
        images: how many; ``batch``: images a blob.
    """

    layers: list[LayerRate]
    codecs: list[str]
    images: int
    batch: int
    accuracy: float | None = None

    @property
    def elements(self) -> int:
        return sum(r.elements for r in self.layers)

    @property
    def density(self) -> float:
        return sum(r.nonzeros for r in self.layers) / max(1, self.elements)

    def size(self, codec: str) -> int:
        """Bits of all maps."""
        return sum(r.size(codec) for r in self.layers)

    def gain(self, codec: str) -> float:
        """Compression gain: bits of the float32 tensors / bits coded."""
        return 32 * self.elements / max(1, self.size(codec))

    def gain_q(self, codec: str) -> float:
        """The same against the q-bit tensors."""
        return sum(r.elements * r.bits for r in self.layers) / max(1, self.size(codec))

    def bits_per_element(self, codec: str) -> float:
        return self.size(codec) / max(1, self.elements)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: totals a codec, and every layer."""
        columns = [*self.codecs, BEST]
        return {
            "images": self.images,
            "batch": self.batch,
            "accuracy": self.accuracy,
            "elements_per_image": self.elements // max(1, self.images),
            "density": self.density,
            "entropy_bits_per_element": sum(r.entropy for r in self.layers) / max(1, self.elements),
            "codecs": {
                c: {
                    "bits_per_element": self.bits_per_element(c),
                    "gain_float32": self.gain(c),
                    "gain_q": self.gain_q(c),
                }
                for c in columns
            },
            "layers": [
                {
                    **{k: v for k, v in asdict(r).items() if k != "coded"},
                    "density": r.density,
                    "entropy": r.entropy / max(1, r.elements),
                    "bits_per_element": {c: r.size(c) / max(1, r.elements) for c in columns},
                }
                for r in self.layers
            ],
        }


def _parse(codec: str) -> tuple[str, dict[str, int]]:
    """``seg:per_channel=1`` -> ("seg", {"per_channel": 1})."""
    name, _, rest = codec.partition(":")
    options = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key.strip()] = int(value)
        except ValueError as error:
            raise InputError(f"codec {codec!r}: option {part!r} is not NAME=INTEGER") from error
    return name, options


def measure_rates(
    model: nn.Module,
    data: Iterable[Any],
    *,
    codecs: Sequence[str] = ("zvc", "seg", "rans"),
    images: int | None = None,
    threads: int = 0,
    verify: bool = False,
    chunk_elements: int | None = None,
) -> RateReport:
    """Runs a quantized model over ``data`` and codes every quantized map.

    Args:
        model: quantized by :func:`actzip.quantize`.
        data: batches (images, labels), or images alone.
        codecs: names of :func:`actzip.codec.available`, with options after a colon: ``seg:per_channel=1``.
        images: stop after so many.
        threads: of the codecs, 0 for all.
        verify: decode every blob too and compare.
        chunk_elements: symbols a chunk; the codecs' default where None.

    Raises:
        InputError: the model is not quantized, an unknown codec, NaN or infinite values in a map
            (the layer is named).
        DataError: no batch, or with ``verify`` a blob that does not decode to what was encoded (the
            layer is named).
    """
    from actzip.codec import available, decode, encode

    quantization(model)
    parsed = {c: _parse(c) for c in codecs}
    unknown = [c for c, (name, _) in parsed.items() if name not in available() or name == "auto"]
    if unknown or not codecs:
        known = ", ".join(a for a in available() if a != "auto")
        raise InputError(f"codecs must be of {known}, not {', '.join(unknown) or 'none'}")
    extra: dict[str, Any] = {} if chunk_elements is None else {"chunk_elements": chunk_elements}
    layers: dict[str, LayerRate] = {}
    counts: dict[str, np.ndarray[Any, Any]] = {}

    def sink(m: IntegerMap) -> None:
        row = layers.get(m.name)
        if row is None:
            row = layers[m.name] = LayerRate(m.name, m.bits, m.signed, coded=dict.fromkeys(codecs, 0))
            counts[m.name] = np.zeros(1 << m.bits, np.int64)
        q = np.ascontiguousarray(m.numpy())
        low = 1 << (m.bits - 1) if m.signed else 0
        counts[m.name] += np.bincount((q.astype(np.int64) + low).reshape(-1), minlength=1 << m.bits)
        row.elements += q.size
        scale = float(m.scale[0]) if m.scale.numel() == 1 else None
        for c, (codec, options) in parsed.items():
            blob = encode(q, codec=codec, bits=m.bits, scale=scale, options=options, threads=threads, **extra)
            row.coded[c] += 8 * len(blob)
            if verify and not np.array_equal(np.asarray(decode(blob)), q):
                raise DataError(f"layer {m.name!r}: codec {c!r} did not give back what was encoded")

    seen, right, batch_size = 0, 0, 0
    labelled = True
    with eval_mode(model), torch.no_grad(), capture(model, sink):
        for batch in data:
            if images is not None and seen >= images:
                break
            x, y = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
            if images is not None and len(x) > images - seen:
                x = x[: images - seen]
                y = None if y is None else y[: len(x)]
            out = model(x)
            seen += len(x)
            batch_size = max(batch_size, len(x))
            if isinstance(y, Tensor):
                right += int((out.argmax(1) == y).sum())
            else:
                labelled = False
    if not seen:
        raise DataError("the data has no batch")
    for name, row in layers.items():
        c = counts[name]
        zero = int(c[1 << (row.bits - 1)] if row.signed else c[0])
        row.nonzeros = row.elements - zero
        p = c[c > 0] / max(1, row.elements)
        row.entropy = float(-(p * np.log2(p)).sum()) * row.elements
    return RateReport(
        list(layers.values()), list(codecs), seen, batch_size, right / seen if labelled else None
    )
