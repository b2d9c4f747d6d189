"""Random inputs of a model, where nobody gives any."""

from __future__ import annotations

import numpy as np

from actzip.runtime.graph import Array

__all__ = ["drawn"]


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    """Normal numbers; of ``uint8`` any pixel, of wider integers, which may be indices, 0 and 1."""
    kind = np.dtype(dtype)
    if kind.kind in "iub":
        return rng.integers(0, 256 if kind == np.uint8 else 2, shape).astype(kind)
    return rng.standard_normal(shape, np.float32).astype(kind)
