"""numpy arrays and torch tensors as the native codec sees them, without copies and without
importing torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from actzip.errors import InputError

__all__ = [
    "FLOATS",
    "View",
    "bfloat16_to_float32",
    "empty",
    "float32_to_bfloat16",
    "has_torch",
    "is_tensor",
    "listed",
    "to_numpy_dtype",
    "to_torch",
    "view",
]

_INTEGERS = {"bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"}
FLOATS = {"float16", "bfloat16", "float32", "float64"}
_KNOWN = _INTEGERS | FLOATS


@dataclass
class View:
    """An array to encode: its elements (bfloat16 as uint16 patterns), its dtype's name, where it
    came from."""

    array: np.ndarray[Any, Any]
    dtype: str
    torch: bool
    channels_last: bool

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS


def is_tensor(x: Any) -> bool:
    """Whether ``x`` is a torch tensor (without importing torch)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def has_torch() -> bool:
    """Whether torch can be imported."""
    import importlib.util

    return "torch" in sys.modules or importlib.util.find_spec("torch") is not None


def view(x: Any) -> View:
    """The array in ``x`` (numpy array, torch tensor, or anything with ``__array__`` or a buffer),
    shared, not copied.

    Raises:
        InputError: dtype that cannot be coded, no elements, more than 16 dimensions, sparse or
            quantized tensor.
    """
    if is_tensor(x):
        return _view_tensor(x)
    if not isinstance(x, np.ndarray):
        try:
            x = np.asarray(x)
        except Exception as e:  # whatever its __array__ raises
            raise InputError(f"cannot make an array of {type(x).__name__}: {e}") from None
    name = _name(x.dtype)
    if any(step % x.itemsize for step in x.strides):  # a field of records
        x = x.copy(order="K")
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if name == "bfloat16":
        x = x.view(np.uint16)
    elif name not in _KNOWN:
        raise InputError(
            f"dtype {name} cannot be encoded; integers, bool, float16, bfloat16, float32 and float64 can"
        )
    return _checked(View(x, name, False, _channels_last(x)))


@cache
def _name(dtype: np.dtype[Any]) -> str:
    """numpy makes the name anew each time it is asked: 1 microsecond."""
    return str(dtype.name)


def _view_tensor(t: Any) -> View:
    import torch

    name = str(t.dtype).removeprefix("torch.")
    if t.layout != torch.strided or t.is_quantized or t.is_complex():
        raise InputError(
            f"a {name} tensor with layout {t.layout} cannot be encoded: give a dense one, or its int_repr()"
        )
    if name not in _KNOWN:
        raise InputError(f"dtype {name} cannot be encoded")
    if t.is_meta:
        raise InputError("a meta tensor cannot be encoded: it has a shape and no values")
    try:
        t = t.detach()
        if t.is_conj() or t.is_neg():
            t = t.resolve_conj().resolve_neg()
        if t.device.type != "cpu":
            t = t.cpu()
        a = t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()
    except (RuntimeError, TypeError) as e:  # a tensor of a trace, of torch.func, without memory
        raise InputError(f"a {type(t).__name__} that holds no plain memory cannot be encoded: {e}") from None
    return _checked(View(a, name, True, _channels_last(a)))


def _checked(v: View) -> View:
    if v.array.size == 0:
        raise InputError(f"nothing to encode: the array has no elements (shape {tuple(v.array.shape)})")
    if v.array.ndim > 16:
        raise InputError(f"{v.array.ndim} dimensions: at most 16 are possible")
    return v


def _channels_last(a: np.ndarray[Any, Any]) -> bool:
    return a.ndim >= 3 and not a.flags.c_contiguous and np.moveaxis(a, -3, -1).flags.c_contiguous


def to_numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype called ``name``; bfloat16 through ml_dtypes.

    Raises:
        InputError: bfloat16 without ml_dtypes installed.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise InputError(
                "numpy has no bfloat16: install ml_dtypes, or ask for a tensor with framework='torch', "
                "or for a .safetensors or .pt file"
            ) from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def empty(shape: tuple[int, ...], dtype: Any, channels_last: bool) -> np.ndarray[Any, Any]:
    """An uninitialised array of ``shape``, its memory in C order or with the channel axis (-3) innermost."""
    if not channels_last:
        return np.empty(shape, dtype)
    inner = (*shape[:-3], shape[-2], shape[-1], shape[-3])
    return np.moveaxis(np.empty(inner, dtype), -1, -3)


def to_torch(a: np.ndarray[Any, Any], dtype: str) -> Any:
    """A torch tensor of type ``dtype`` sharing the memory of ``a`` (bfloat16 given as uint16 patterns)."""
    import torch

    if dtype == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def bfloat16_to_float32(patterns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 numbers of bfloat16 given as uint16 patterns."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint16 patterns of finite float32 numbers, rounded to nearest even."""
    u = x.view(np.uint32)
    return ((u + (((u >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def listed(values: Iterable[Any], what: str) -> list[Any]:
    """``values`` as a list.

    Raises:
        InputError: it cannot be iterated over.
    """
    try:
        return list(values)
    except (TypeError, RuntimeError):
        raise InputError(f"{what}: several are needed, in a list, not {type(values).__name__}") from None
