"""The least bits that keep a promise: the price of a bit is bisected, on inputs that chose nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from actzip.accelerate.inputs import Inputs
from actzip.accelerate.promise import Promise, Reference
from actzip.activations import eval_mode
from actzip.checks import whole
from actzip.sparsify.judge import Judgement
from actzip.split.coder import MapCoder
from actzip.split.quantizer import MapQuantizer
from actzip.split.rate import Rates, sensitivity
from actzip.split.sides import as_arrays

__all__ = ["Choice", "Coded", "choose", "rates_of"]

#: Prices of a bit, in the error of sending nothing over the elements, as powers of two.
_CHEAP, _DEAR = -16.0, 3.0


class Coded(nn.Module):
    """A cut network whose maps are rounded as the coder rounds them; heads of inputs seen before
    are kept."""

    def __init__(self, head: nn.Module, tail: nn.Module, quantizers: Sequence[MapQuantizer]) -> None:
        super().__init__()
        self.head, self.tail, self.quantizers = head, tail, list(quantizers)
        self.kept: dict[int, tuple[Tensor, list[Any]]] = {}

    def maps(self, x: Tensor) -> list[Any]:
        """What crosses for ``x``."""
        found = self.kept.get(id(x))
        if found is None:
            with torch.no_grad(), eval_mode(self.head):
                found = self.kept[id(x)] = (x, as_arrays(self.head(x)))
        return found[1]

    def forward(self, x: Tensor) -> Any:
        pairs = zip(self.quantizers, self.maps(x), strict=True)
        return self.tail(*(torch.from_numpy(q.values(q.integers(m))) for q, m in pairs))


@dataclass
class Choice:
    """Quantizers, and what they keep.

    Attributes:
        coder: of the cut's maps.
        bits: of a frame an input, headers included, over inputs of the proof; elements: of its maps.
        judged: ``promised`` and, where outputs are scores, ``agreement``, on inputs that chose
            nothing.
        met: the promise is kept there; proven: by the whole 95 % interval.
        price: of a bit. tried: (price, bits an element by entropy, kept) of every try.
    """

    coder: MapCoder
    bits: float
    elements: int
    judged: dict[str, Judgement]
    met: bool
    proven: bool
    price: float = 0.0
    tried: list[tuple[float, float, bool]] = field(default_factory=list)

    @property
    def bits_per_element(self) -> float:
        """Bits on the wire / elements of the maps."""
        return self.bits / self.elements


def rates_of(
    head: nn.Module, tail: nn.Module, batches: Sequence[Tensor], names: Sequence[str], *, bits: int, per: str
) -> list[Rates]:
    """Rates and errors of the maps of a cut, weighed by what they do to the outputs, on
    ``batches``."""
    with torch.no_grad(), eval_mode(head):
        maps = [as_arrays(head(x)) for x in batches]
    sums: list[Any] = []
    for m in maps:
        found = sensitivity(tail, [torch.from_numpy(a) for a in m])
        sums = (
            [s * len(m[0]) for s in found] if not sums else [t + s * len(m[0]) for t, s in zip(sums, found)]
        )
    return [
        Rates(n, [m[i] for m in maps], sums[i], bits=max(bits, 2) if _negative(maps, i) else bits, per=per)
        for i, n in enumerate(names)
    ]


def _negative(maps: Sequence[Sequence[Any]], i: int) -> bool:
    return any(float(m[i].min()) < 0 for m in maps)


def choose(
    head: nn.Module,
    tail: nn.Module,
    inputs: Inputs,
    promise: Promise,
    names: Sequence[str],
    *,
    bits: int = 8,
    per: str = "channel",
    codec: str = "rans",
    attempts: int = 7,
    on_step: Callable[[int, int], None] | None = None,
) -> Choice:
    """The quantizers of least bits whose outputs keep ``promise``, and their proof on held-out
    inputs.

    Args:
        inputs: to calibrate, to choose by, and to prove.
        bits: greatest width of an integer, 1 to 8; per: a step a ``channel`` or one a ``map``.
        attempts: prices of a bit that are tried.
    """
    whole(attempts, "attempts", 1)
    rates = rates_of(head, tail, inputs.calibrate, names, bits=bits, per=per)
    chosen = Reference(_whole(head, tail), inputs.choose, promise)
    coded = Coded(head, tail, [])
    scale = sum(r.dropped for r in rates) / sum(r.elements for r in rates) or 1.0
    tried: list[tuple[float, float, bool]] = []
    kept: list[tuple[float, list[MapQuantizer]]] = []

    def attempt(power: float) -> bool:
        found = [r.at(scale * 2.0**power) for r in rates]
        coded.quantizers = [q for q, _ in found]
        ok = promise.kept(chosen.judge(coded)["promised"])
        share = sum(b * r.elements for (_, b), r in zip(found, rates)) / sum(r.elements for r in rates)
        tried.append((scale * 2.0**power, share, ok))
        if ok:
            kept.append((power, coded.quantizers))
        if on_step is not None:
            on_step(len(tried), attempts)
        return ok

    low, high = _CHEAP, _DEAR
    for i in range(attempts):
        power = -6.0 if i == 0 else (low + high) / 2
        low, high = (power, high) if attempt(power) else (low, power)
    coded.kept.clear()
    candidates = sorted(kept, key=lambda k: -k[0]) or [
        (_CHEAP, [r.at(scale * 2.0**_CHEAP)[0] for r in rates])
    ]
    return _proven(
        coded, candidates, Reference(_whole(head, tail), inputs.prove, promise), promise, codec, scale, tried
    )


def _whole(head: nn.Module, tail: nn.Module) -> nn.Module:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return tail(head(x))

    return Whole()


def _proven(
    coded: Coded,
    candidates: Sequence[tuple[float, list[MapQuantizer]]],
    reference: Reference,
    promise: Promise,
    codec: str,
    scale: float,
    tried: list[tuple[float, float, bool]],
) -> Choice:
    """The cheapest candidate that keeps the promise on inputs that chose nothing, else the last."""
    for candidate in candidates:
        power, coded.quantizers = candidate
        judged = reference.judge(coded)
        if promise.kept(judged["promised"]):
            break
    coder = MapCoder(coded.quantizers, codec)
    bits, elements, count = measured_bits(coder, coded, [x for x, _ in reference.batches])
    return Choice(
        coder,
        bits / count,
        elements // count,
        judged,
        promise.kept(judged["promised"]),
        promise.proven(judged["promised"]),
        scale * 2.0**power,
        tried,
    )


def measured_bits(
    coder: MapCoder, coded: Coded, batches: Sequence[Tensor], most: int = 64
) -> tuple[float, int, int]:
    """(bits of frames, elements, inputs): inputs one by one, as a client sends them."""
    bits = elements = count = 0
    for x in batches:
        maps = coded.maps(x)
        for i in range(len(x)):
            one = [m[i : i + 1] for m in maps]
            bits += 8 * len(coder.encode(one))
            elements += sum(m.size for m in one)
            count += 1
            if count >= most:
                return bits, elements, count
    return bits, elements, count
