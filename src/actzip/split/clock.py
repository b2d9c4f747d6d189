"""Time on each side of every cut: the engine's layers, timed here or predicted by the cost model,
and the coding of maps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actzip.codec import decode, encode
from actzip.errors import InputError
from actzip.profile.cost import CostModel
from actzip.profile.timing import predict_nodes
from actzip.runtime import compile as compile_model
from actzip.runtime import graph as g
from actzip.split.coder import MapCoder
from actzip.split.quantizer import Floats, MapQuantizer

#: Bytes that are written so that caches hold nothing of a map.
_CACHES = 32 << 20

__all__ = ["Coding", "Timed", "code_time", "plain_quantizer", "time_layers", "timed"]


@dataclass
class Timed:
    """Milliseconds of the compiled network's nodes, scaled so that they add up to a whole call."""

    graph: g.Graph
    nodes: dict[str, float]
    predicted: bool

    @property
    def total(self) -> float:
        """Of the whole network."""
        return sum(self.nodes.values())

    def head(self, values: Sequence[str]) -> float:
        """Of the nodes that compute ``values``."""
        makers, seen, todo = self.graph.producers(), set[str](), list(values)
        while todo:
            node = makers.get(todo.pop())
            if node is not None and node.name not in seen:
                seen.add(node.name)
                todo += node.inputs
        return sum(self.nodes.get(name, 0.0) for name in seen)


def timed(
    run: Callable[[], Any],
    *,
    least: float = 0.15,
    rounds: int = 5,
    before: Callable[[], Any] | None = None,
) -> float:
    """Median milliseconds of a call, after two that are not counted; ``before`` each call, untimed."""
    run()
    run()
    times: list[float] = []
    end = time.perf_counter() + least
    while len(times) < rounds or (time.perf_counter() < end and len(times) < 200):
        if before is not None:
            before()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def time_layers(
    graph: g.Graph,
    x: torch.Tensor,
    *,
    threads: int | None,
    cost: CostModel | None = None,
    tune: bool = True,
) -> Timed:
    """Times the compiled network on ``x``, one input; with ``cost`` its prediction instead."""
    fast = compile_model(graph.copy(), x, threads=threads, tune=tune)
    one = x[: max(1, len(fast._sample[0]))]
    explained = fast.explain(one, runs=10).to_dict()["rows"]
    if cost is not None:
        predict_nodes(fast.graph, explained, cost)
        return Timed(fast.graph, {r["name"]: float(r["predicted_ms"]) for r in explained}, True)
    whole = timed(lambda: fast(one))
    nodes: dict[str, float] = {}
    for r in explained:
        nodes[r["name"]] = nodes.get(r["name"], 0.0) + float(r["milliseconds"])
    scale = whole / (sum(nodes.values()) or 1.0)
    return Timed(fast.graph, {k: scale * v for k, v in nodes.items()}, False)


@dataclass(frozen=True)
class Coding:
    """One way to code a map: bits an input and milliseconds of each side."""

    codec: str
    bits: int
    size: float
    encode_ms: float
    decode_ms: float


def plain_quantizer(name: str, maps: Floats, bits: int) -> MapQuantizer:
    """One step for the map, rounding to the nearest, the clip of least squared error."""
    if not np.isfinite(maps).all():
        raise InputError(f"map {name!r} of the network holds values that are not finite")
    signed = float(maps.min()) < 0
    levels = 2 ** (max(bits, 1 + signed) - signed) - 1
    flat = np.abs(maps.reshape(-1)[:: max(1, maps.size // 50_000)]).astype(np.float64)
    top = float(np.abs(maps).max()) or 1.0
    best = (np.inf, top)
    for clip in top * np.geomspace(1, 0.05, 16):
        step = clip / levels
        error = float(((np.minimum(np.rint(flat / step), levels) * step - flat) ** 2).sum())
        best = min(best, (error, float(clip)))
    step = np.array([max(best[1] / levels, np.finfo(np.float32).tiny)], np.float32)
    points = np.arange(levels + 1, dtype=np.float32)
    return MapQuantizer(name, tuple(maps.shape[1:]), signed, step, levels, 0.5, points)


def map_codings(name: str, maps: Floats, codecs: Sequence[str], bits: Sequence[int]) -> list[Coding]:
    """A map of several inputs, coded one input at a time in each way."""
    found = []
    one = maps[:1]
    for width in bits:
        quantizer = plain_quantizer(name, maps, width)
        q = quantizer.integers(one)
        rounding = timed(partial(quantizer.integers, one), least=0, rounds=3)
        putting = timed(partial(quantizer.values, q), least=0, rounds=3)
        for codec in codecs:
            code = partial(encode, codec=codec, bits=quantizer.bits, threads=1)
            blobs = [code(quantizer.integers(m[None])) for m in maps]
            coding = timed(partial(code, q), least=0, rounds=3)
            reading = timed(partial(decode, blobs[0], threads=1), least=0, rounds=3)
            size = 8.0 * float(np.mean([len(b) for b in blobs]))
            found.append(Coding(codec, width, size, rounding + coding, putting + reading))
    return found


def code_time(coder: MapCoder, maps: Sequence[NDArray[Any]], *, cold: bool = True) -> tuple[float, float]:
    """Milliseconds of encoding and of decoding one input's maps.

    Args:
        cold: with caches that hold something else, as after a network's layers, or a wait.
    """
    given = list(maps)
    frame = coder.encode(given)
    scratch = np.zeros(_CACHES if cold else 1, np.uint8)

    def before() -> None:
        np.add(scratch, 1, out=scratch)

    return (
        timed(lambda: coder.encode(given), before=before),
        timed(lambda: coder.decode(frame), before=before),
    )
