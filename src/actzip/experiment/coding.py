"""Stages 2 and 3 on real maps: quantize, encode, decode, compare, and run the rest of the network
on what was decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip import codec as codecs
from actzip.activations import ActivationTap, Site
from actzip.errors import CodecError, DataError
from actzip.quantize import dequantize_linear, quantization, without_quantization

__all__ = ["CodedMap", "Coding", "code_maps"]


@dataclass
class CodedMap:
    """One layer: elements and non-zeros of its maps, and bits coded by each codec (headers included)."""

    name: str
    shape: tuple[int, ...]
    bits: int
    elements: int = 0
    nonzeros: int = 0
    coded_bits: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bits/element and gain against float32 by codec."""
        rate = {c: b / max(1, self.elements) for c, b in self.coded_bits.items()}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "density": self.nonzeros / max(1, self.elements),
            "bits_per_element": rate,
            "gain_float32": {c: 32 / r for c, r in rate.items()},
        }


@dataclass
class Coding:
    """What coding every quantized map of some images gave.

    Attributes:
        images, blobs, elements: how many were coded. ``density``: of the integers.
        bits_per_element, gain_float32: by codec, headers included, over all maps.
        accuracy: of the network whose later layers ran on the decoded maps; ``quantized_accuracy``:
            of the quantized network on the same images, and ``same_predictions`` whether every
            prediction is the same.
        maps: a row a layer.
    """

    bits: int
    images: int
    blobs: int
    elements: int
    density: float
    bits_per_element: dict[str, float]
    gain_float32: dict[str, float]
    accuracy: float | None
    quantized_accuracy: float | None
    same_predictions: bool
    maps: list[dict[str, Any]]


def code_maps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    names: Sequence[str] = ("seg",),
    *,
    images_per_blob: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> Coding:
    """Encode every quantized map of every image, decode it, compare bit for bit, and go on with
    what was decoded.

    Each map of ``model`` (quantized) is turned into its integers, encoded by each codec in
    ``names`` and decoded again; the integers must be equal, and the map that the following layers
    see is made from the decoded ones.

    Args:
        batches: ``(x, y)``, y int64 class indices.
        images_per_blob: consecutive images of a batch whose maps share a blob.

    Raises:
        CodecError: a decoded map differs; the message names codec, layer and image.
        DataError: no batch.
        InputError: an unknown codec, or the model is not quantized.
    """
    for name in names:
        codecs.encode(np.zeros((1, 1, 1), np.uint8), codec=name)
    found = quantization(model)
    maps: dict[str, CodedMap] = {}
    state = {"images": 0, "blobs": 0}

    def through(site: Site, y: Tensor) -> Tensor | None:
        q = found.sites.get(site.name)
        if q is None:
            return None
        kept = np.ascontiguousarray(q.integers(y).numpy())
        row = maps.setdefault(site.name, CodedMap(site.name, tuple(y.shape[1:]), q.bits))
        row.elements += kept.size
        row.nonzeros += int(np.count_nonzero(kept))
        decoded = np.empty_like(kept)
        for name in names:
            coded = 0
            for i in range(0, len(kept), images_per_blob):
                part = kept[i : i + images_per_blob]
                part = part[0] if len(part) == 1 else part
                blob = codecs.encode(part, codec=name, bits=q.bits)
                back = codecs.decode(blob, framework="numpy")
                if not np.array_equal(back, part):
                    raise CodecError(
                        f"{name}: map {site.name} of image {state['images'] + i} decoded differently"
                    )
                decoded[i : i + images_per_blob] = back
                coded += 8 * len(blob)
                state["blobs"] += 1
            row.coded_bits[name] = row.coded_bits.get(name, 0) + coded
        again = torch.from_numpy(decoded.astype(np.int64)).to(y.device)
        return dequantize_linear(again, q.scale.detach()).to(y.dtype)

    right = quantized_right = 0
    same = True
    model.eval()
    for x, y in batches:
        with torch.no_grad():
            expected = model(x).argmax(1)
            with without_quantization(model), ActivationTap(model, through):
                predicted = model(x).argmax(1)
        same = same and bool(torch.equal(expected, predicted))
        right += int((predicted == y).sum())
        quantized_right += int((expected == y).sum())
        state["images"] += len(x)
        if on_batch is not None:
            on_batch(len(x))
    if not state["images"]:
        raise DataError("there is no image to encode the maps of")
    elements = sum(m.elements for m in maps.values())
    rate = {n: sum(m.coded_bits[n] for m in maps.values()) / max(1, elements) for n in names}
    return Coding(
        bits=max((m.bits for m in maps.values()), default=0),
        images=state["images"],
        blobs=state["blobs"],
        elements=elements,
        density=sum(m.nonzeros for m in maps.values()) / max(1, elements),
        bits_per_element=rate,
        gain_float32={n: 32 / r for n, r in rate.items()},
        accuracy=right / state["images"],
        quantized_accuracy=quantized_right / state["images"],
        same_predictions=same,
        maps=[m.as_dict() for m in maps.values()],
    )
