"""How far a changed network is from the original, with a confidence interval, on inputs that
changed nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from actzip.errors import DataError, InputError
from actzip.training.batches import output_tensors

__all__ = [
    "Judgement",
    "agreement_of",
    "are_scores",
    "commonest",
    "error_of",
    "jackknife",
    "mean_of",
    "wilson",
]

#: Of a two-sided interval of 95 %.
Z = 1.959964


@dataclass(frozen=True)
class Judgement:
    """A share or a mean over held-out inputs, with its 95 % confidence interval.

    Attributes:
        kind: ``agreement`` (share of inputs whose highest output is the same, interval of Wilson),
            ``error`` (mean of ``|y - y0| / |y0|`` over inputs, all outputs together) or ``metric``
            (the user's).
        value, low, high: the estimate and its interval.
        samples: inputs that it was measured on.
        chance: what one and the same answer for every input would reach: where nearly all inputs
            are of one class, an agreement proves little.
    """

    kind: str
    value: float
    low: float
    high: float
    samples: int
    chance: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.kind == "agreement":
            text = f"{self.value:.1%} of {self.samples} (95 %: {self.low:.1%} to {self.high:.1%})"
            dull = self.samples > 1 and self.chance >= self.low
            return f"{text}; one answer for all would reach {self.chance:.1%}" if dull else text
        return f"{self.value:.4g} over {self.samples} (95 %: {self.low:.4g} to {self.high:.4g})"


def wilson(same: int, samples: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927).

    Raises:
        DataError: there is no sample.
    """
    if samples < 1:
        raise DataError("nothing is held out: an agreement needs one input at least")
    p, z2 = same / samples, Z * Z
    centre = (p + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z / (1 + z2 / samples) * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples * samples))
    return (centre - half if same else 0.0), (centre + half if same < samples else 1.0)


def are_scores(out: Any) -> bool:
    """Whether an output is one tensor of rows of scores, so that the highest is what counts."""
    return isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1 and out.is_floating_point()


def agreement_of(before: Sequence[Any], after: Sequence[Any]) -> Judgement:
    """Share of rows whose highest output is the same, of outputs a batch before and after."""
    pairs = [(b.argmax(1), a.argmax(1)) for b, a in zip(before, after, strict=True)]
    same, samples = sum(int((b == a).sum()) for b, a in pairs), sum(len(b) for b, _ in pairs)
    chance = commonest([b for b, _ in pairs]) / max(1, samples)
    return Judgement("agreement", same / max(1, samples), *wilson(same, samples), samples, chance)


def commonest(answers: Sequence[Tensor]) -> int:
    """How many of all answers are the most frequent one."""
    found = [t.reshape(-1) for t in answers if t.numel()]
    return int(torch.cat(found).unique(return_counts=True)[1].max()) if found else 0


def error_of(before: Sequence[Any], after: Sequence[Any]) -> Judgement:
    """Mean over inputs of ``|y - y0| / |y0|``, of outputs a batch before and after; scores are
    centred first.

    Raises:
        InputError: outputs whose shapes do not fit.
    """
    errors: list[float] = []
    for b, a in zip(before, after, strict=True):
        wants, gots = output_tensors(b), output_tensors(a)
        if [w.shape for w in wants] != [t.shape for t in gots]:
            raise InputError("the outputs before and after have other shapes")
        if are_scores(b):
            wants, gots = [_centred(t) for t in wants], [_centred(t) for t in gots]
        n = wants[0].shape[0] if all(w.dim() and w.shape[0] == wants[0].shape[0] for w in wants) else 1
        want = torch.cat([w.detach().reshape(n, -1).double() for w in wants], 1)
        got = torch.cat([t.detach().reshape(n, -1).double() for t in gots], 1)
        size = want.norm(dim=1)
        relative = (got - want).norm(dim=1) / torch.where(size > 0, size, torch.ones_like(size))
        errors += relative.tolist()
    return mean_of("error", errors)


def _centred(t: Tensor) -> Tensor:
    return t - t.mean(1, keepdim=True)


def mean_of(kind: str, values: Sequence[float]) -> Judgement:
    """The mean of numbers, one an input, with an interval by Student's t.

    Raises:
        DataError: there is no number.
    """
    n = len(values)
    if n < 1:
        raise DataError("nothing is held out: an error needs one input at least")
    mean = math.fsum(values) / n
    if n == 1:
        return Judgement(kind, mean, -math.inf, math.inf, n)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = _student(n - 1) * deviation / math.sqrt(n)
    return Judgement(kind, mean, mean - half, mean + half, n)


def jackknife(parts: Sequence[float]) -> float:
    """Half the 95 % confidence interval of a number, of what it is without each of two or more
    groups in turn (Tukey, 1958)."""
    n = len(parts)
    mean = math.fsum(parts) / n
    variance = (n - 1) / n * math.fsum((p - mean) ** 2 for p in parts)
    return _student(n - 1) * math.sqrt(variance)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact to 1 % (expansion of Cornish and Fisher)."""
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    v, z = freedom, Z
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return t + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
