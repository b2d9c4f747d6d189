"""A cost model of the engine's convolutions, calibrated by timing some on this machine.

Convolutions of a grid of shapes and densities are compiled and timed once for each CPU, instruction set and number of
threads (some seconds; kept in the cache folder). A layer's time is then predicted from its nearest neighbours among
them: the neighbours' achieved MACs per second, weighted by closeness in the logarithms of channels, positions and taps
and in density, times the layer's own work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actzip.errors import ActzipError
from actzip.files import cache_dir, write_text

__all__ = ["CostModel", "Sample"]

_FORMAT = 2
# (input channels, output channels, height = width, kernel, stride, groups): what CNNs are made of
_SHAPES = (
    (3, 32, 75, 3, 2, 1), (3, 64, 56, 7, 2, 1), (16, 16, 32, 3, 1, 1), (32, 32, 74, 3, 1, 1), (32, 64, 74, 3, 1, 1),
    (32, 32, 16, 3, 1, 1), (64, 64, 8, 3, 1, 1), (64, 64, 56, 3, 1, 1), (64, 96, 35, 3, 1, 1), (96, 96, 35, 3, 1, 1),
    (128, 128, 28, 3, 1, 1), (256, 256, 14, 3, 1, 1), (512, 512, 7, 3, 1, 1), (384, 384, 8, 3, 1, 1), (64, 128, 56, 3, 2, 1),
    (256, 512, 14, 3, 2, 1), (48, 64, 35, 5, 1, 1), (64, 64, 56, 1, 1, 1), (256, 64, 56, 1, 1, 1), (192, 64, 35, 1, 1, 1),
    (288, 64, 35, 1, 1, 1), (128, 256, 28, 1, 1, 1), (512, 512, 14, 1, 1, 1), (768, 192, 17, 1, 1, 1), (1024, 256, 14, 1, 1, 1),
    (1280, 320, 8, 1, 1, 1), (2048, 448, 8, 1, 1, 1), (256, 512, 4, 1, 1, 1), (1024, 1024, 2, 1, 1, 1), (32, 64, 32, 1, 1, 1),
    (64, 64, 32, 3, 1, 64), (256, 256, 8, 3, 1, 256), (512, 512, 4, 3, 1, 512), (128, 128, 56, 3, 1, 128),
)  # fmt: skip
_DENSITIES = (1.0, 0.6, 0.4, 0.2)


@dataclass(frozen=True)
class Sample:
    """One timed convolution: its features and milliseconds."""

    features: tuple[float, ...]
    log_rate: float


def _features(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    groups: int,
    density: float,
) -> tuple[float, ...]:
    ic = float(input_shape[0])
    oc = float(weight_shape[0])
    positions = max(1.0, math.prod(input_shape[1:]) / max(1, math.prod(stride)))
    taps = float(math.prod(weight_shape[2:]))
    return (
        0.7 * math.log2(ic / groups),
        0.7 * math.log2(oc),
        0.5 * math.log2(positions),
        1.0 * math.log2(taps),
        0.5 * math.log2(math.prod(stride)),
        6.0 * density,
        4.0 * (groups > 1),
    )


class CostModel:
    """Predicted milliseconds of a convolution in the engine at batch 1."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._points = np.array([s.features for s in samples])
        self._rates = np.array([s.log_rate for s in samples])

    def predict(
        self,
        input_shape: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        groups: int,
        density: float,
        *,
        macs: float,
        effective_macs: float,
    ) -> float:
        """Milliseconds.

        Args:
            input_shape: C, H, W. weight_shape: OC, IC / groups, KH, KW.
            density: of the input. macs, effective_macs: of one image.
        """
        point = np.array(_features(input_shape, weight_shape, stride, groups, density))
        distance = np.sqrt(((self._points - point) ** 2).sum(1))
        order = np.argsort(distance)[:6]
        weight = 1 / (distance[order] ** 2 + 0.05)
        log_rate = float((weight * self._rates[order]).sum() / weight.sum())
        return _work(macs, effective_macs) / math.exp(log_rate)

    @classmethod
    def of_this_machine(cls, threads: int, *, refresh: bool = False) -> CostModel:
        """The model for this CPU, from the cache or calibrated now."""
        from actzip import __version__, cpu

        info = cpu.info()
        key = f"{_FORMAT}|{__version__}|{info['cpu']}|{info['isa']}|{threads}"
        path = cache_dir("cost") / f"{abs(hash_text(key)):x}.json"
        if not refresh:
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                if data["key"] == key:
                    return cls([Sample(tuple(f), r) for f, r in data["samples"]])
            except (OSError, ValueError, KeyError, TypeError):
                pass
        samples = calibrate(threads)
        text = json.dumps({"key": key, "samples": [[s.features, s.log_rate] for s in samples]})
        write_text(path, text)
        return cls(samples)


def hash_text(text: str) -> int:
    """A stable hash (Python's own changes from process to process)."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _work(macs: float, effective_macs: float) -> float:
    """What a convolution costs, in MACs: those on non-zeros, and a share for walking over the zeros."""
    return effective_macs + 0.02 * macs + 2e4


def calibrate(threads: int) -> list[Sample]:
    """Times the grid of convolutions through the engine: relu -> convolution -> relu, as inside a network."""
    import torch
    from torch import nn

    from actzip.runtime import compile

    torch_rng = torch.Generator().manual_seed(0)
    samples: list[Sample] = []
    for ic, oc, size, kernel, stride, groups in _SHAPES:
        conv = nn.Conv2d(ic, oc, kernel, stride, kernel // 2, groups=groups)
        model = nn.Sequential(nn.ReLU(), conv, nn.ReLU()).eval()
        for density in _DENSITIES if ic > 3 else (1.0,):
            x = torch.randn((1, ic, size, size), generator=torch_rng).abs() + 0.01
            # zeros of real maps come in patches: the mask is decided for 2x2 blocks
            coarse = torch.rand((1, ic, -(-size // 2), -(-size // 2)), generator=torch_rng)
            mask = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :size, :size] < density
            x = torch.where(mask, x, -x)
            try:
                rows = (
                    compile(model, x, threads=threads, tune=False, cache=False)
                    .explain(runs=5)
                    .to_dict()["rows"]
                )
            except ActzipError:
                continue
            row: dict[str, Any] | None = next((r for r in rows if r["macs"]), None)
            if row is None or row["milliseconds"] <= 0:
                continue
            work = _work(row["macs"], row["effective_macs"])
            features = _features(
                (ic, size, size), tuple(conv.weight.shape), (stride, stride), groups, density
            )
            samples.append(Sample(features, math.log(work / row["milliseconds"])))
    if not samples:
        raise ActzipError("the engine could not be timed on this machine")
    return samples
