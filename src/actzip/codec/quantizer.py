"""The linear quantizer of the codec: float to q-bit integers with zero exactly zero.

``q = clip(round_half_even(x / scale), qmin, qmax)`` in float32; ``x' = q * scale``. Maps without negative
values are unsigned (``0 .. 2**bits - 1``), others signed and symmetric
(``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from actzip.errors import InputError

__all__ = ["as_step", "dequantize", "limits", "quantize", "storage"]


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """(least, greatest) integer of a quantizer of ``bits`` bits."""
    if signed:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


@cache
def storage(bits: int, signed: bool) -> np.dtype[Any]:
    """The numpy dtype that holds ``bits``-bit integers, or the patterns of a floating-point type."""
    return np.dtype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2 if bits <= 16 else 4}")


def as_step(scale: float) -> np.float32:
    """A quantizer's step as blobs hold it.

    Raises:
        InputError: it is no positive finite float32 number.
    """
    with np.errstate(over="ignore"):
        s: np.float32 = np.float32(scale)
    if not 0 < s < np.inf:
        raise InputError(f"scale={scale}: a positive finite float32 number is needed")
    return s


def quantize(
    x: np.ndarray[Any, Any], bits: int, *, scale: float | None = None, signed: bool | None = None
) -> tuple[np.ndarray[Any, Any], float, bool]:
    """Quantize a finite floating-point array to ``bits`` bits; returns (integers, scale, signed).

    ``scale`` (float32, positive) defaults to the greatest magnitude divided by the greatest integer, so that
    nothing is clipped; ``signed`` defaults to whether there is a negative value. The integers are uint8,
    int8, uint16 or int16, in the memory order of ``x``.

    Raises:
        InputError: NaN or infinity in ``x``, ``bits`` outside 1..16 (2..16 where signed), ``scale``
            not positive.
    """
    if not 1 <= bits <= 16:
        raise InputError(f"bits={bits}: 1 to 16 are possible")
    given = x
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.float32) if x.dtype != np.float32 else x
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(x))
        at = ", ".join(str(int(i)) for i in np.unravel_index(int(bad[0]), x.shape))
        if bool(np.isfinite(given).all()):
            raise InputError(
                f"{bad.size} values are beyond float32, in which values are quantized; the first is "
                f"{given.flat[bad[0]]:g} at index ({at}): scale them down"
            )
        raise InputError(
            f"{bad.size} non-finite values, the first at index ({at}): they cannot be quantized; "
            "leave bits=None to keep floating point, NaN and infinity included"
        )
    if signed is None:
        signed = low < 0
    elif not signed and low < 0:
        raise InputError(f"signed=False, but there is a negative value, {low:g}")
    if signed and bits < 2:
        raise InputError("negative values need bits >= 2")
    qmin, qmax = limits(bits, signed)
    if scale is None:
        top = max(high, -low)
        scale = float(np.float32(top / qmax)) if top > 0 else 1.0
        scale = max(scale, float(np.finfo(np.float32).tiny))
    s = as_step(scale)
    q = np.asarray(np.divide(x, s))  # a scalar where x has no dimensions
    np.rint(q, out=q)
    np.clip(q, qmin, qmax, out=q)
    return q.astype(storage(bits, signed)), float(s), signed


def dequantize(q: np.ndarray[Any, Any], scale: float, zero: int = 0) -> np.ndarray[Any, Any]:
    """float32 values of quantized integers: ``(q - zero) * scale``."""
    x = q.astype(np.float32)
    if zero:
        x -= np.float32(zero)
    x *= np.float32(scale)
    return x
