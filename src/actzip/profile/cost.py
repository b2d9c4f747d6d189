"""A cost model of the engine, calibrated by timing convolutions of many shapes and densities on this machine.

Calibration (about a minute, once for each CPU, instruction set and number of threads; kept in the
cache folder) puts a grid of convolutions into plans of the engine's own and times the kernels that
it offers for each: direct kernels with dense input and with packed input of several densities,
Winograd kernels with tiles of several densities, kernels for few outputs and for long rows and
columns with dense input. In the large plan weights come from memory, as in
large networks; in the small ones they stay in the CPU's caches. Milliseconds an operation are then
a smooth function of the shape and the density (a Gaussian process in the logarithms, with a linear
trend): predicted is the time of the best of them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actzip.errors import ActzipError
from actzip.files import cache_dir, write_text
from actzip.runtime.winograd import is_winograd, tile_size, transforms

__all__ = ["Conv", "CostModel", "Sample", "calibrate", "is_small"]

_FORMAT = 12
#: Networks of at most so many bytes of weights and MACs an image stay in the CPU's caches from call to call.
SMALL_BYTES, SMALL_MACS = 16 << 20, 100e6
#: Walking over masks costs this share of the work at density 1.
_WALK = 0.02
#: Densities that are timed; the first decides which kernels the others are timed with.
_DENSITIES = (0.5, 1.0, 0.75, 0.35, 0.2, 0.1, 0.03)
_FEW = (0.5, 1.0, 0.2)
_KEPT = 3
_SMALL, _LARGE = "small", "large"
#: Tiles of Winograd kernels: pixels of their side -> areas of what a place depends on that are zero
#: independently of each other, measured over real maps (the place is zero where all of them are).
_AREAS = {2: 1.5, 4: 2.1, 6: 2.4}
#: Densities that Winograd kernels are timed at, with zeros in patches of so many pixels, so that whole tiles
#: are zero.
_TILED, _PATCH = (1.0, 0.5, 0.25), 8
#: MACs and weights of a small plan.
_LITTLE, _FEW_WEIGHTS = 24e6, 1.1e6

#: Kernels of lines: at most so many output channels. One-dimensional transforms: taps and channels at least.
_FEW_OUTPUTS, _LONG, _LONG_CHANNELS = 8, 12, 16
_LINES, _COOK_TOOM = "lines", "cook-toom-4"

Floats = npt.NDArray[np.float64]
#: Input channels, output channels, height and width, kernel, stride, groups.
Shape = tuple[int, int, tuple[int, int], tuple[int, int], int, int]


@dataclass(frozen=True)
class Conv:
    """The geometry of a convolution or linear layer: channels, output height and width, kernel,
    stride, groups."""

    inputs: int
    outputs: int
    height: int
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    groups: int = 1
    dilation: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image, padding included."""
        return self.height * self.width * math.prod(self.kernel) * self.inputs * self.outputs // self.groups

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.inputs

    @property
    def tiled(self) -> bool:
        """Whether Winograd kernels can compute it."""
        return self.kernel == (3, 3) and self.stride == 1 and self.groups == 1 and self.inputs >= 16

    def tile_products(self, m: int) -> int:
        """Products of transformed tiles of m x m pixels, none of them skipped; pixels a dilation apart
        are tiles together."""
        d = self.dilation
        tiles = [min(d, size) * math.ceil(math.ceil(size / d) / m) for size in (self.height, self.width)]
        return math.prod(tiles) * (m + 2) ** 2 * self.inputs * self.outputs

    @property
    def few(self) -> bool:
        """Whether kernels with vectors along the rows can compute it."""
        return self.outputs <= _FEW_OUTPUTS and self.groups == 1 and math.prod(self.kernel) > 1

    @property
    def long(self) -> bool:
        """Whether kernels that transform along a row or column can compute it."""
        single = self.stride == self.dilation == self.groups == 1 == min(self.kernel)
        return single and max(self.kernel) >= _LONG and min(self.inputs, self.outputs) >= _LONG_CHANNELS

    @property
    def long_products(self) -> int:
        """Products of those: seven for four outputs by four taps."""
        lines, along = (self.width, self.height) if self.kernel[1] == 1 else (self.height, self.width)
        groups = math.ceil(along / 4) * math.ceil(max(self.kernel) / 4)
        return 7 * lines * groups * self.inputs * self.outputs

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs // self.groups * math.prod(self.kernel)

    def features(self, density: float) -> list[float]:
        """Coordinates of the regression: logarithms to base 2, and the density."""
        inputs, kernel, outputs = self.inputs // self.groups, self.kernel, self.outputs
        if self.height * self.width == 1:  # one window: a linear layer over all that it reads
            inputs, kernel = inputs * math.prod(kernel), (1, 1)
        if self.groups > 1 and not self.depthwise:
            outputs //= self.groups
        return [
            math.log2(inputs),
            math.log2(outputs),
            math.log2(self.height * self.width),
            math.log2(self.width),
            math.log2(math.prod(kernel)),
            math.log2(self.stride),
            math.log2(density + 0.05),
        ]


@dataclass(frozen=True)
class Sample:
    """One timing: milliseconds of a convolution in a ``small`` or the large plan.

    ``storage``: ``dense`` or ``packed`` input of a direct kernel; ``lines`` or ``cook-toom-4`` with
    dense input; or a Winograd kernel's name, and ``density`` is that of its tiles.
    """

    conv: Conv
    storage: str
    small: bool
    density: float
    milliseconds: float


def _work(conv: Conv, storage: str, density: float) -> float:
    if storage == _COOK_TOOM:
        return float(conv.long_products)
    if storage in ("dense", _LINES) or conv.depthwise:
        return float(conv.macs)
    if is_winograd(storage):
        return conv.tile_products(tile_size(storage)) * (density + _WALK)
    return conv.macs * (density + _WALK)


def tile_share(density: float, m: int, areas: float = 1.0) -> float:
    """Share of the products of transformed tiles for m x m outputs that are not skipped where a share
    ``density`` of the pixels is not zero; ``areas``: 1 as over real maps (:func:`areas_of`)."""
    return 1.0 - math.pow(1.0 - min(1.0, density), max(1.0, _AREAS[m] * areas))


def areas_of(density: float, m: int, share: float) -> float:
    """How many areas of a tile are zero independently of each other, over those of real maps on average,
    where ``share`` of the products are not skipped: more than 1 where zeros are scattered."""
    if not 0 < density < 1 or not density < share < 1:
        return 1.0
    return math.log1p(-share) / math.log1p(-density) / _AREAS[m]


def is_small(convs: Iterable[Conv]) -> bool:
    """Whether a network of these layers stays in the caches: weights, and what branch predictors
    learn of its zeros."""
    layers = list(convs)
    return sum(4 * c.weights for c in layers) <= SMALL_BYTES and sum(c.macs for c in layers) <= SMALL_MACS


def is_light(convs: Iterable[Conv]) -> bool:
    """Whether the weights of a network of these layers stay in the caches: all that matters to dense
    kernels."""
    return sum(4 * c.weights for c in convs) <= SMALL_BYTES


# --- regression -----------------------------------------------------------------------------------

# how far apart two layers may be and still tell of each other, in the units of Conv.features
_SCALES = np.array([3.0, 3.0, 4.0, 3.0, 2.0, 2.0, 1.5])
_NOISE, _AMPLITUDE = 0.05, 0.5


class _Surface:
    """log(milliseconds / work) as a function of the features."""

    def __init__(self, points: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        x, y = np.array(points), np.array(values)
        self.low, self.high = x.min(0), x.max(0)
        design = np.c_[np.ones(len(x)), x]
        ridge = 1e-3 * len(x) * np.eye(design.shape[1])
        self.trend = np.linalg.solve(design.T @ design + ridge, design.T @ y)
        self.points = x / _SCALES
        kernel = self._kernel(self.points) + _NOISE**2 * np.eye(len(x))
        self.weights = np.linalg.solve(kernel, y - design @ self.trend)

    def _kernel(self, at: Floats) -> Floats:
        distance = ((at[:, None] - self.points[None]) ** 2).sum(-1)
        return np.asarray(_AMPLITUDE**2 * np.exp(-0.5 * distance), np.float64)

    def __call__(self, features: Sequence[float]) -> float:
        # beyond the grid a layer is taken to run as fast as at its edge
        x = np.clip(np.array(features), self.low, self.high)
        return float(np.r_[1.0, x] @ self.trend + self._kernel(x[None] / _SCALES)[0] @ self.weights)


class CostModel:
    """Predicted milliseconds of layers in the engine at batch 1.

    Args:
        samples: timings of convolutions.
        others: for other operators, milliseconds an element read or written (by operator; ``""``
            for all others); and ``call small``, ``call large``: time of a call over that of its
            nodes.
    """

    def __init__(self, samples: Sequence[Sample], others: dict[str, float] | None = None) -> None:
        self.samples = list(samples)
        self.others = dict(others or {})
        groups: dict[tuple[str, bool], tuple[list[list[float]], list[float]]] = {}
        for s in samples:
            kind = "depthwise" if s.conv.depthwise else s.storage
            x, y = groups.setdefault((kind, s.small), ([], []))
            x.append(s.conv.features(1.0 if s.conv.depthwise else s.density))
            y.append(math.log(s.milliseconds / _work(s.conv, s.storage, s.density)))
        self._surfaces = {k: _Surface(x, y) for k, (x, y) in groups.items() if len(x) >= 2}
        if not self._surfaces:
            raise ActzipError("the engine could not be timed on this machine")

    def _at(self, kind: str, small: bool, conv: Conv, density: float) -> float | None:
        surface = self._surfaces.get((kind, small)) or self._surfaces.get((kind, not small))
        if surface is None:
            return None
        storage = "dense" if kind == "depthwise" else kind
        return math.exp(surface(conv.features(density))) * _work(conv, storage, density)

    def kinds(
        self,
        conv: Conv,
        density: float,
        *,
        packed: bool = True,
        small: bool = False,
        light: bool = False,
        areas: float = 1.0,
    ) -> dict[str, float]:
        """Milliseconds by kind of kernel: ``dense``, ``packed``, ``depthwise``, ``lines``, ``cook-toom-4``,
        or a Winograd kernel.

        Args:
            density: share of non-zeros of the input.
            packed: the input comes from a ReLU or its kin, so that the engine may pack it.
            small: the network stays in the caches (:func:`is_small`). light: its weights do
                (:func:`is_light`).
            areas: :func:`areas_of` the input.
        """
        density = min(1.0, max(0.0, density))
        at = {"depthwise" if conv.depthwise else "dense": 1.0}
        if packed and conv.groups == 1:
            at["packed"] = density
        if conv.tiled:
            at |= {f"winograd-{m}x{m}": tile_share(density, m, areas) for m in _AREAS}
        at |= {kind: 1.0 for kind, can in ((_LINES, conv.few), (_COOK_TOOM, conv.long)) if can}
        dense = ("dense", "depthwise", _LINES, _COOK_TOOM)
        times = {k: self._at(k, small or (light and k in dense), conv, d) for k, d in at.items()}
        found = {kind: t for kind, t in times.items() if t is not None}
        if not found:
            raise ActzipError("the calibration has no convolution of this kind")
        return found

    def predict(self, conv: Conv, density: float, **how: Any) -> float:
        """Milliseconds of the quickest of :meth:`kinds`, whose arguments it takes."""
        return min(self.kinds(conv, density, **how).values())

    def predict_call(self, layers_ms: float, *, small: bool = False) -> float:
        """Milliseconds of a whole call whose nodes take ``layers_ms`` together."""
        return layers_ms * self.others.get(f"call {_SMALL if small else _LARGE}", 1.0)

    def predict_other(self, op: str, elements: float) -> float:
        """Milliseconds of an operator that is no convolution and reads and writes so many elements."""
        return self.others.get(op, self.others.get("", 0.0)) * elements

    @classmethod
    def of_this_machine(
        cls, threads: int, *, refresh: bool = False, on_step: Callable[[int, int], None] | None = None
    ) -> CostModel:
        """The model for this CPU, from the cache or calibrated now.

        Args:
            on_step: called with (steps done, steps in all) while the engine is being timed.
        """
        key, path = _place(threads)
        kept = None if refresh else cls._kept(threads)
        if kept is not None:
            return kept
        samples, others = calibrate(threads, on_step=on_step)
        model = cls(samples, others)
        text = json.dumps({"key": key, "samples": [asdict(s) for s in samples], "others": others})
        write_text(path, text)
        return model

    @staticmethod
    def kept_in(threads: int) -> Path:
        """The file that :meth:`of_this_machine` keeps a calibration in; without it, the next one is made."""
        return _place(threads)[1]

    @classmethod
    def quick(cls, threads: int) -> CostModel:
        """:meth:`of_this_machine` where it is in the cache; else one of few shapes, made now in some
        seconds and not kept."""
        kept = cls._kept(threads)
        if kept is not None:
            return kept
        plan = _Plan(_grid()[::4], threads)
        samples = plan.samples("dense", (1.0,), False, lambda: None) + plan.special(False)
        samples += plan.samples("packed", _FEW, False, lambda: None)
        return cls(samples + _tiled(_grid()[::3], threads, False))

    @classmethod
    def _kept(cls, threads: int) -> CostModel | None:
        key, path = _place(threads)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["key"] == key:
                return cls([_sample(s) for s in data["samples"]], data["others"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None


def _place(threads: int) -> tuple[str, Path]:
    """What a calibration is known by, and the file that it is kept in."""
    from actzip import cpu
    from actzip._version import __version__

    info = cpu.info()
    key = f"{_FORMAT}|{__version__}|{info['cpu']}|{info['isa']}|{threads}"
    return key, cache_dir("cost") / f"{hash_text(key):x}.json"


def _sample(data: dict[str, Any]) -> Sample:
    conv = data["conv"]
    return Sample(**{**data, "conv": Conv(**{**conv, "kernel": tuple(conv["kernel"])})})


def hash_text(text: str) -> int:
    """A stable hash (Python's own changes from process to process)."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- calibration ----------------------------------------------------------------------------------


# What CNNs are made of; heights are widths too.
#: Channels in and out: heights.
_SQUARE = {
    16: (32, 64), 32: (16, 64), 64: (8, 16, 28, 56, 112), 96: (17, 35), 128: (8, 14, 28),
    192: (17,), 256: (4, 7, 14, 28), 384: (8,), 512: (2, 4, 7),
}  # fmt: skip
#: Channels in, channels out, height; so in the next ones.
_WIDE = ((32, 64, 73), (80, 192, 20), (64, 128, 28), (128, 256, 14), (256, 128, 14))
_STRIDED = ((16, 32, 32), (64, 128, 56), (128, 256, 28), (256, 512, 14), (192, 320, 17))
_POINTWISE = (
    (16, 64, 56), (32, 16, 112), (64, 64, 56), (64, 256, 28), (256, 64, 56), (64, 64, 8),
    (128, 128, 16), (128, 512, 28), (512, 128, 28), (192, 48, 35), (288, 64, 35), (256, 1024, 14),
    (1024, 256, 14), (512, 512, 14), (768, 192, 17), (512, 2048, 7), (2048, 512, 7),
    (1280, 320, 8), (2048, 192, 8), (256, 256, 4), (1024, 1024, 2), (96, 24, 56), (24, 144, 56),
    (64, 384, 14), (384, 96, 14), (960, 160, 7), (160, 960, 7), (32, 64, 32),
)  # fmt: skip
_HALVED = ((64, 128, 56), (256, 512, 28), (512, 1024, 14), (1024, 2048, 14))
#: The same, and kernel.
_SHAPED = (
    (48, 64, 35, (5, 5)), (128, 128, 17, (1, 7)), (128, 192, 17, (7, 1)), (192, 192, 17, (1, 7)),
    (192, 192, 17, (7, 1)), (384, 384, 8, (1, 3)), (384, 384, 8, (3, 1)), (16, 32, 14, (5, 5)),
)  # fmt: skip
#: Channels out, height, kernel, stride.
_STEMS = (
    (32, 224, 3, 2), (64, 224, 7, 2), (64, 112, 3, 1), (32, 32, 3, 1), (16, 32, 3, 1),
    (96, 224, 4, 4),
)  # fmt: skip
#: Channels, height, kernel, stride.
_DEPTHWISE = (
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (64, 32, 3, 1), (128, 16, 3, 1),
    (256, 8, 3, 1), (512, 4, 3, 1), (384, 14, 3, 1), (960, 7, 3, 1), (144, 28, 5, 1),
    (480, 14, 5, 1), (96, 56, 7, 1), (128, 32, 3, 2), (576, 14, 3, 2), (512, 4, 3, 2),
    (256, 8, 3, 2), (1024, 2, 3, 1),
)  # fmt: skip
#: Channels in and out, height: for Winograd kernels, which are quick enough there.
_LARGE_MAPS = ((64, 224), (128, 112), (256, 56), (512, 14), (512, 28))
#: Channels in, channels out, height, width, kernel: for kernels of few outputs.
_TO_FEW = (
    (64, 1, 56, 56, (3, 3)), (16, 2, 112, 112, (3, 3)), (32, 1, 172, 264, (7, 3)), (8, 8, 172, 88, (3, 39)),
    (8, 1, 172, 264, (5, 5)), (128, 4, 28, 28, (3, 3)), (256, 8, 14, 14, (3, 3)), (32, 4, 56, 56, (5, 5)),
)  # fmt: skip
#: The same: long rows and columns.
_ONE_LINE = (
    (1024, 128, 128, 1, (64, 1)), (128, 128, 64, 1, (64, 1)), (128, 128, 32, 1, (64, 1)),
    (128, 256, 16, 1, (64, 1)), (256, 512, 8, 1, (64, 1)), (128, 16, 128, 1, (64, 1)),
    (128, 16, 64, 1, (64, 1)),
    (16, 16, 64, 1, (64, 1)), (16, 32, 16, 1, (64, 1)), (32, 64, 8, 1, (64, 1)),
    (64, 64, 60, 60, (1, 15)), (32, 32, 50, 100, (1, 31)), (64, 64, 1, 512, (1, 25)),
)  # fmt: skip
#: Channels out, height, kernel, stride: those of one channel.
_WAVES = ((1024, 1024, 512, 4), (128, 1024, 512, 4), (64, 4096, 80, 4))
#: Features in, features out.
_LINEAR = ((64, 10), (256, 128), (512, 1000), (2048, 1000), (1024, 10), (4096, 1024))


def _grid() -> list[Shape]:
    """What CNNs are made of."""

    def square(i: int, o: int, size: int, kernel: tuple[int, int], stride: int = 1, groups: int = 1) -> Shape:
        return i, o, (size, size), kernel, stride, groups

    out = [square(c, c, size, (3, 3)) for c, sizes in _SQUARE.items() for size in sizes]
    out += [square(i, o, size, (3, 3)) for i, o, size in _WIDE]
    out += [square(i, o, size, (3, 3), 2) for i, o, size in _STRIDED]
    out += [square(i, o, size, (1, 1)) for i, o, size in _POINTWISE]
    out += [square(i, o, size, (1, 1), 2) for i, o, size in _HALVED]
    out += [square(i, o, size, kernel) for i, o, size, kernel in _SHAPED]
    out += [square(3, o, size, (k, k), stride) for o, size, k, stride in _STEMS]
    out += [square(c, c, size, (k, k), stride, c) for c, size, k, stride in _DEPTHWISE]
    out += [(i, o, (h, w), kernel, 1, 1) for i, o, h, w, kernel in (*_TO_FEW, *_ONE_LINE)]
    out += [(1, o, (size, 1), (k, 1), stride, 1) for o, size, k, stride in _WAVES]
    return out + [square(i, o, 1, (1, 1)) for i, o in _LINEAR]


class _Plan:
    """A plan of the engine with a grid of convolutions side by side, each as it stands inside a network."""

    def __init__(self, shapes: Sequence[Shape], threads: int) -> None:
        from actzip.runtime import graph as g
        from actzip.runtime.lower import choose_storage

        self.rng = np.random.default_rng(0)
        self.threads = threads
        self.sizes = [(i, *size) for i, _, size, *_ in shapes]
        self.ratios: list[float] = []
        graph = g.Graph("calibration")
        self.convs: dict[str, Conv] = {}
        readers = []
        for k, (ic, oc, size, kernel, stride, groups) in enumerate(shapes):
            x = graph.add_input(f"x{k}", (g.Sym(), ic, *size))
            if ic > 3:  # the ReLU of a layer before, which writes the map packed
                ones = np.ones((ic, 1, 1, 1), np.float32)
                node = g.Conv2d(
                    name=f"r{k}", inputs=(x,), output=f"a{k}", weight=ones, groups=ic, act=g.Act("relu")
                )
                x = graph.add(node)
                readers.append(x)
            weight = self.rng.standard_normal((oc, ic // groups, *kernel), np.float32)
            pads = (0, 0) if kernel == (4, 4) else (kernel[0] // 2, kernel[1] // 2)
            y = graph.add(
                g.Conv2d(
                    name=f"c{k}",
                    inputs=(x,),
                    output=f"y{k}",
                    weight=weight,
                    bias=np.zeros(oc, np.float32),
                    stride=(stride, stride),
                    padding=(*pads, *pads),
                    groups=groups,
                    act=g.Act("relu"),
                )
            )
            shape = graph.shape(y)
            self.convs[f"c{k}"] = Conv(ic, oc, int(shape[2]), int(shape[3]), kernel, stride, groups)  # type: ignore[arg-type]
            # a reader of the output, so that it is written as it is inside a network
            last = self.rng.standard_normal((16, oc, 1, 1), np.float32)
            graph.outputs.append(graph.add(g.Conv2d(name=f"n{k}", inputs=(y,), output=f"z{k}", weight=last)))
        self.graphs = {"packed": choose_storage(graph), "dense": choose_storage(graph, set(readers))}
        self.outputs = [np.empty(g.concrete(graph.shape(v), 1), np.float32) for v in graph.outputs]
        stored = self.graphs["packed"]
        self.packed = {n.name for n in stored.nodes if stored.values[n.inputs[0]].storage == "packed"}

    def inputs(self, density: float, patch: int = 2) -> list[npt.NDArray[np.float32]]:
        """Maps whose zeros come in patches, channels of unlike density, as in real ones."""
        out = []
        for channels, *size in self.sizes:
            x = np.abs(self.rng.standard_normal((1, channels, *size), np.float32)) + np.float32(0.01)
            high, across = (-(-d // patch) + 1 for d in size)
            each = np.full((1, channels, 1, 1), density)
            if 0 < density < 1:
                a = 2 * density
                each = self.rng.beta(a, 2 - a, (1, channels, 1, 1))
            mask = (self.rng.random((1, channels, high, across)) < each).repeat(patch, 2).repeat(patch, 3)
            # patches begin anywhere, in every channel elsewhere
            y, x0 = (self.rng.integers(0, patch, (channels, 1)) + np.arange(d) for d in size)
            keep = mask[0, np.arange(channels)[:, None, None], y[:, :, None], x0[:, None, :]][None]
            out.append(np.where(keep, x, -x) if channels > 3 else x)
        return out

    def times(self, lowered: Any, inputs: list[Any], repeats: int) -> dict[str, float]:
        """Milliseconds of every node: the lower quartile, since other programs only make it longer."""
        seen: dict[str, list[float]] = {}
        for r in range(repeats + 1):
            once: dict[str, float] = {}
            rows = lowered.plan.profile(1, inputs, self.outputs, self.threads)
            for owner, row in zip(lowered.nodes, rows, strict=True):
                once[owner] = once.get(owner, 0.0) + 1e3 * row[4]
            if r:  # the first run touches the memory
                for name, t in once.items():
                    seen.setdefault(name, []).append(t)
        return {name: float(np.quantile(t, 0.25)) for name, t in seen.items()}

    def call(self, lowered: Any, inputs: list[Any]) -> float:
        """Milliseconds of a whole call (lower quartile), which is more than its nodes' together."""
        seen = []
        for _ in range(6):
            start = time.perf_counter()
            lowered.plan.run(1, inputs, self.outputs, self.threads)
            seen.append(1e3 * (time.perf_counter() - start))
        return float(np.quantile(seen[1:], 0.25))

    def best(
        self, storage: str, inputs: list[Any], options: dict[str, list[str]], repeats: int
    ) -> dict[str, list[str]]:
        """Kernels of each convolution, the quickest first."""
        from actzip.runtime.lower import lower

        found: dict[str, list[tuple[float, str]]] = {name: [] for name in options}
        for r in range(max(map(len, options.values()))):
            chosen = {name: o[r % len(o)] for name, o in options.items() if o}
            times = self.times(lower(self.graphs[storage], chosen, three=False), inputs, repeats)
            for name, o in options.items():
                if r < len(o):
                    found[name].append((times[name], o[r]))
        return {name: [kernel for _, kernel in sorted(pairs)] for name, pairs in found.items()}

    def samples(self, storage: str, densities: Iterable[float], small: bool, step: Any) -> list[Sample]:
        from actzip.runtime.lower import lower

        options = lower(self.graphs[storage], {}, want_variants=True, three=False).variants
        options = {n: [k for k in v if not _special(k)] for n, v in options.items() if n in self.convs}
        out = []
        for i, density in enumerate(densities):
            inputs = self.inputs(density)
            ranked = self.best(storage, inputs, options, 2 if i == 0 else 3)
            options = {name: kernels[:_KEPT] for name, kernels in ranked.items()}
            lowered = lower(
                self.graphs[storage], {name: kernels[0] for name, kernels in ranked.items()}, three=False
            )
            times = self.times(lowered, inputs, 15 if small else 5)
            self.ratios.append(self.call(lowered, inputs) / sum(times.values()))
            for name, conv in self.convs.items():
                if storage == "packed" and name not in self.packed:
                    continue
                if conv.depthwise and density < 1:
                    continue
                out.append(Sample(conv, storage, small, density, max(times[name], 1e-5)))
            step()
        return out

    def special(self, small: bool) -> list[Sample]:
        """Kernels of lines, and those that transform along one, with dense input."""
        from actzip.runtime.lower import lower

        options = lower(self.graphs["dense"], {}, want_variants=True, three=False).variants
        inputs, out = self.inputs(1.0), []
        for kind in (_LINES, _COOK_TOOM):
            found = {
                name: next((k for k in options.get(name, ()) if k.startswith(kind)), "")
                for name in self.convs
            }
            chosen = {name: kernel for name, kernel in found.items() if kernel}
            if not chosen:
                continue
            times = self.times(lower(self.graphs["dense"], chosen, three=False), inputs, 9 if small else 5)
            out += [Sample(self.convs[n], kind, small, 1.0, max(times[n], 1e-5)) for n in chosen]
        return out

    def tiled(self, small: bool) -> list[Sample]:
        """Winograd kernels, each in all convolutions at once; in a small plan of the better storage of the
        input: dense maps are quick to read where they stay in the caches."""
        from actzip.runtime.lower import lower
        from actzip.runtime.ops import Conv2d
        from actzip.runtime.winograd import tile_density

        graph = self.graphs["packed"]
        nodes = {n.name: n for n in graph.nodes if n.name in self.packed and isinstance(n, Conv2d)}
        options = lower(graph, {}, want_variants=True, three=False).variants
        inputs = [self.inputs(density, _PATCH) for density in _TILED]
        read = dict(zip(self.convs, range(len(self.convs)), strict=True))
        out = []
        for m in _AREAS:
            kernel = f"winograd-{m}x{m}"
            names = [n for n in nodes if n in self.convs and kernel in options[n]]
            plans = [
                lower(self.graphs[storage], dict.fromkeys(names, kernel), three=False)
                for storage in (("packed", "dense") if small else ("packed",))
            ]
            for arrays in inputs:
                times = [self.times(plan, arrays, 9 if small else 3) for plan in plans]
                for name in names:
                    share = tile_density(np.maximum(arrays[read[name]], 0), nodes[name], m)
                    best = min(t[name] for t in times)
                    out.append(Sample(self.convs[name], kernel, small, share, max(best, 1e-5)))
        return out


def _special(kernel: str) -> bool:
    """Whether it is timed by itself, as a kind of its own."""
    return transforms(kernel) or kernel.startswith(_LINES)


def _tiled(shapes: Sequence[Shape], threads: int, small: bool) -> list[Sample]:
    """Timings of Winograd kernels, for those of the ``shapes`` that they can compute."""
    fit = [s for s in shapes if s[0] >= 16 and s[3:] == ((3, 3), 1, 1)]
    return _Plan(fit, threads).tiled(small) if fit else []


def _little(grid: Sequence[Shape]) -> list[list[Shape]]:
    """Layers that small networks have, some in each plan: their weights stay in the caches from call
    to call, however many MACs use them."""
    plans: list[list[Shape]] = []
    room: list[tuple[float, float]] = []
    for shape in grid:
        ic, oc, size, kernel, stride, groups = shape
        weights = ic * oc // groups * math.prod(kernel)
        macs = weights * math.prod(-(-d // stride) for d in size)
        if macs > _LITTLE or weights > _FEW_WEIGHTS:
            continue
        fits = (i for i, (m, w) in enumerate(room) if macs <= m and weights <= w)
        at = next(fits, len(plans))
        if at == len(plans):
            plans.append([])
            room.append((_LITTLE, _FEW_WEIGHTS))
        plans[at].append(shape)
        room[at] = room[at][0] - macs, room[at][1] - weights
    return plans


def calibrate(
    threads: int, on_step: Callable[[int, int], None] | None = None
) -> tuple[list[Sample], dict[str, float]]:
    """Times the grid of convolutions, and other operators, in the engine: (samples, milliseconds an
    element)."""
    grid = _grid()
    plans = [(grid, False), *((shapes, True) for shapes in _little(grid))]
    total = len(plans) * (2 + len(_DENSITIES)) + 1
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    samples = []
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for shapes, little in plans:
        plan = _Plan(shapes, threads)
        samples += plan.samples("dense", (1.0,), little, step)
        samples += plan.samples("packed", _DENSITIES, little, step)
        samples += plan.special(little)
        more: list[Shape] = [] if little else [(c, c, (d, d), (3, 3), 1, 1) for c, d in _LARGE_MAPS]
        samples += _tiled(shapes + more, threads, little)
        step()
        ratios[little] += plan.ratios
    others = _others(threads)
    others |= {
        f"call {k}": float(np.median(v)) for k, v in ((_SMALL, ratios[True]), (_LARGE, ratios[False])) if v
    }
    step()
    return samples, others


def _others(threads: int) -> dict[str, float]:
    """Milliseconds an element (read and written) of operators that are no convolutions."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from actzip.runtime import compile

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 96, 1)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.conv(x)
            a, b = F.max_pool2d(y, 3, 2), F.silu(y)
            c = torch.sigmoid(y) * b
            return F.adaptive_avg_pool2d(c, 1), a

    fast = compile(Others().eval(), torch.rand(1, 16, 56, 56), threads=threads, tune=False, cache=False)
    rates: dict[str, list[float]] = {}
    sizes = elements(fast.graph)
    for row in fast.explain(runs=7).to_dict()["rows"]:
        if not row["macs"] and sizes.get(row["name"]):
            rates.setdefault(row["op"], []).append(row["milliseconds"] / sizes[row["name"]])
    means = {op: float(np.mean(v)) for op, v in rates.items()}
    return {"": float(np.median(list(means.values()))) if means else 0.0, **means}


def elements(graph: Any) -> dict[str, float]:
    """Elements that every node reads and writes at batch 1, by name; for copies of inputs by the
    value's name."""
    from actzip.runtime import graph as g

    def size(value: str) -> float:
        return float(np.prod(g.concrete(graph.shape(value), 1)))

    out = {v: 2 * size(v) for v in graph.values}
    out |= {n.name: sum(size(v) for v in n.inputs) + size(n.output) for n in graph.nodes}
    return out
