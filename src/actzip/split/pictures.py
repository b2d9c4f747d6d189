"""What sending the picture itself costs: JPEG at several qualities, and what the network makes of it."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actzip.accelerate.promise import Promise, Reference
from actzip.data.form import Form
from actzip.sparsify.judge import Judgement
from actzip.split.clock import timed

__all__ = ["Picture", "pictures"]

QUALITIES = (50, 75, 90, 95)


@dataclass(frozen=True)
class Picture:
    """Inputs as JPEG of one quality: bits each, milliseconds of both sides, what the outputs keep."""

    quality: int
    bits: float
    encode_ms: float
    decode_ms: float
    judged: Judgement
    kept: bool


def pictures(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Any]],
    promise: Promise,
    mean: Sequence[float],
    std: Sequence[float],
    form: Form,
) -> tuple[Picture | None, str]:
    """The least quality that keeps the promise (the highest, where none does), and why there is
    none."""
    x = form.channels_first(batches[0][0])
    if x.dim() != 4 or x.shape[1] not in (1, 3) or x.shape[1] != len(mean):
        return None, "the inputs are no pictures of one or three channels"
    if importlib.util.find_spec("PIL") is None:
        return None, "Pillow is not installed (`pip install actzip[data]`)"
    m, s = (torch.tensor(list(v)).reshape(1, -1, 1, 1) for v in (mean, std))
    reference = Reference(model, batches, promise)
    found = None
    for quality in QUALITIES:
        found = _picture(model, batches, reference, promise, (m, s, form), quality)
        if found.kept:
            break
    return found, ""


def _picture(
    model: nn.Module,
    batches: Any,
    reference: Reference,
    promise: Promise,
    normalised: tuple[Tensor, Tensor, Form],
    quality: int,
) -> Picture:
    m, s, form = normalised
    sizes, read = [], {}
    for x, _ in batches:
        pixels = ((form.channels_first(x) * s + m) * 255).round().clamp(0, 255).to(torch.uint8)
        files = [to_jpeg(p.numpy(), quality) for p in pixels]
        sizes += [8 * len(f) for f in files]
        back = torch.from_numpy(np.stack([from_jpeg(f) for f in files])).float() / 255
        read[id(x)] = form.laid_out((back - m) / s)

    class Sent(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return model(read[id(x)])

    judged = reference.judge(Sent())["promised"]
    one, file = pixels[0].numpy(), files[0]
    return Picture(
        quality,
        float(np.mean(sizes)),
        timed(lambda: to_jpeg(one, quality), rounds=3, least=0.02),
        timed(lambda: from_jpeg(file), rounds=3, least=0.02),
        judged,
        promise.kept(judged),
    )


def to_jpeg(pixels: Any, quality: int) -> bytes:
    """uint8 (C, H, W), C of 1 or 3, as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    shown = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1)
    Image.fromarray(np.ascontiguousarray(shown)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def from_jpeg(data: bytes) -> Any:
    """uint8 (C, H, W) of a JPEG."""
    from PIL import Image

    a = np.asarray(Image.open(io.BytesIO(data)))
    return a[None] if a.ndim == 2 else np.ascontiguousarray(np.moveaxis(a, -1, 0))
