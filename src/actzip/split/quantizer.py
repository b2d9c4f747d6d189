"""A map's quantizer: a step a channel or one for all, a dead zone, a clip, and where levels are put
back.

``q = sign(x) * min(levels, floor(|x| / step + rounding))``; ``x' = sign(q) * points[|q|] * step``.
Rounding of 0.5 is to the nearest; less widens the zone that becomes zero and costs fewer bits. Zero is
exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actzip._native import _codec
from actzip.errors import DataError, InputError

__all__ = ["MapQuantizer"]

Floats = NDArray[np.float32]
_MOST_LEVELS = 255


@dataclass(frozen=True)
class MapQuantizer:
    """Integers of 1 to 8 bits for a map of a fixed shape (N, C, ...), and the map back.

    Attributes:
        name: of the value that crosses.
        shape: of one input's map: C, H, W, or features.
        signed: whether values may be negative.
        steps: float32, one a channel, or one for all.
        levels: greatest magnitude of an integer; what is beyond is clipped.
        rounding: what is added before rounding down, above 0, at most 0.5.
        points: float32, levels + 1 magnitudes in steps, from 0.
    """

    name: str
    shape: tuple[int, ...]
    signed: bool
    steps: Floats
    levels: int
    rounding: float
    points: Floats
    _table: Floats = field(init=False, repr=False, compare=False)
    _inverse: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        most = 127 if self.signed else _MOST_LEVELS
        if not 1 <= self.levels <= most:
            raise InputError(f"{self.levels} levels; 1 to {most} are possible")
        if not 0 < self.rounding <= 0.5:
            raise InputError(f"rounding {self.rounding}; above 0 and at most 0.5 is possible")
        channels = self.shape[0] if self.shape else 1
        if self.steps.shape not in ((1,), (channels,)):
            raise InputError(f"{self.steps.shape[0]} steps for {channels} channels")
        if not (np.isfinite(self.steps).all() and (self.steps > 0).all()):
            raise InputError("steps must be positive finite numbers")
        if self.points.shape != (self.levels + 1,) or not np.isfinite(self.points).all():
            raise InputError(f"{self.points.shape[0]} points for {self.levels} levels and zero")
        k = np.arange(256)
        magnitude = np.where(k < 128, k, 256 - k) if self.signed else k
        table = self.points[np.minimum(magnitude, self.levels)]
        with np.errstate(over="ignore", divide="ignore"):
            inverse = np.float32(1) / self.steps
        put = object.__setattr__
        put(self, "_table", np.where((k >= 128) & self.signed, -table, table).astype(np.float32))
        put(self, "_inverse", inverse)

    @property
    def bits(self) -> int:
        """Of an integer."""
        return self.levels.bit_length() + self.signed

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or int8."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def integers(self, x: Any) -> NDArray[Any]:
        """uint8 or int8 integers of a float32 map (N, C, ...).

        Raises:
            InputError: another shape, or values that are not finite.
        """
        a = np.asarray(x.detach() if hasattr(x, "detach") else x, np.float32)
        if a.ndim != len(self.shape) + 1 or a.shape[1:] != self.shape:
            raise InputError(
                f"map {self.name!r} has shape {a.shape}, not (N, {', '.join(map(str, self.shape))})"
            )
        q = np.empty(a.shape, self.dtype)
        x = np.ascontiguousarray(a)
        if not _codec.to_levels(x, self._inverse, self.rounding, self.levels, self.signed, q):
            raise InputError(f"map {self.name!r} holds values that are not finite")
        return q

    def values(self, q: NDArray[Any]) -> Floats:
        """The float32 map that integers stand for."""
        y = np.empty(q.shape, np.float32)
        few = self.levels < 32 and not self.signed
        _codec.from_levels(np.ascontiguousarray(q), self._table, self.steps, few, y)
        return y

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :meth:`from_dict` gives the same numbers back."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "signed": self.signed,
            "steps": [float(s) for s in self.steps],
            "levels": self.levels,
            "rounding": self.rounding,
            "points": [float(p) for p in self.points],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MapQuantizer:
        """
        Raises:
            DataError: not what :meth:`to_dict` gives.
        """
        try:
            return cls(
                str(data["name"]),
                tuple(int(d) for d in data["shape"]),
                bool(data["signed"]),
                np.asarray(data["steps"], np.float32),
                int(data["levels"]),
                float(data["rounding"]),
                np.asarray(data["points"], np.float32),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"a quantizer is damaged: {type(error).__name__}: {error}") from error
