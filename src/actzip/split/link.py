"""The link between the machines, and units as people write them: 20Mbit, 1.5 Gbit/s, 10ms."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Any

from actzip.checks import number, shown
from actzip.errors import InputError

__all__ = ["Link", "bits_per_second", "seconds"]

_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
# Beyond these a total would no longer be a number.
_LEAST, _MOST = 1.0, 1e18  # bits a second
_LATEST = 1e6  # seconds


def bits_per_second(text: Any) -> float:
    """``"20Mbit"``, ``"2.5MB/s"``, ``"1Gbps"``, or a number of bits a second.

    Raises:
        InputError: no such rate; less than 1 bit/s, or more than 10^18.
    """
    if isinstance(text, Real) and not isinstance(text, bool):
        return number(text, "bandwidth", _LEAST, _MOST)
    found = re.fullmatch(
        r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)(bit|bits|b|byte|bytes)?(?:/s|ps)?\s*", str(text), re.I
    )
    try:
        value = float(found.group(1)) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or not math.isfinite(value) or value <= 0:
        raise InputError(f"bandwidth must be above 0, as in 20Mbit or 2.5MB/s, not {shown(text)}")
    unit = found.group(3) or "bit"
    in_bytes = unit.lower().startswith("byte") or unit == "B"
    return number(value * _BITS[found.group(2).lower()] * (8 if in_bytes else 1), "bandwidth", _LEAST, _MOST)


def seconds(text: Any) -> float:
    """``"10ms"``, ``"0.5s"``, or a number of seconds; zero is allowed.

    Raises:
        InputError: no such time, or more than 10^6 s.
    """
    if isinstance(text, Real) and not isinstance(text, bool):
        return number(text, "latency", 0, _LATEST)
    found = re.fullmatch(r"\s*([\d.]+)\s*(ms|us|s)\s*", str(text), re.I)
    try:
        value = float(found.group(1)) if found else -1.0
    except ValueError:
        value = -1.0
    if not found or value < 0:
        raise InputError(f"latency must be a time, as in 10ms or 0.5s, not {shown(text)}")
    return number(value * _TIMES[found.group(2).lower()], "latency", 0, _LATEST)


@dataclass(frozen=True)
class Link:
    """A link of so many bits a second, each message ``latency`` seconds late; both ways alike."""

    bandwidth: float
    latency: float

    @classmethod
    def of(cls, bandwidth: Any, latency: Any) -> Link:
        """From units as people write them."""
        return cls(bits_per_second(bandwidth), seconds(latency))

    def ms(self, bits: float, answer_bits: float) -> float:
        """Milliseconds of a message and its answer."""
        return 1e3 * (2 * self.latency + (bits + answer_bits) / self.bandwidth)
