"""Masks, the values under them and their codes: packing of dense memory, on the CPU natively,
elsewhere by torch.

Everything here takes and gives 1-d contiguous tensors. ``Native`` and ``Portable`` do the same;
what one packs, it alone unpacks.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from actzip import heap
from actzip._native import _engine

__all__ = [
    "NATIVE",
    "PORTABLE",
    "Backend",
    "Codes",
    "Mask",
    "Memory",
    "Predicate",
    "PredicateKind",
    "backend_for",
    "empty",
    "fresh",
]

_native = _engine.training


def _openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch computes with; 0 where it has none."""
    if "OpenMP" not in torch.__config__.parallel_info().partition("parallel backend:")[2].split("\n")[0]:
        return 0
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        try:
            parallel = ctypes.CDLL(str(path)).GOMP_parallel  # of what it links to, too
        except (OSError, AttributeError):
            continue
        return ctypes.cast(parallel, ctypes.c_void_p).value or 0
    return 0


_native.use_openmp(_openmp())
#: Fresh memory of this size and more is worth asking large pages for.
_LARGE = 4 << 20


class PredicateKind(enum.IntEnum):
    """What a bit of a mask says of its element; the numbers are those of ``csrc/training/kernels.h``."""

    NONZERO = 0
    NOT_BELOW = 1
    NOT_BEYOND = 2
    ABOVE = 3
    INSIDE = 4


class Predicate(NamedTuple):
    """A test that is all a backward pass asks of a tensor, and two values that answer it."""

    kind: PredicateKind
    low: float
    high: float
    on: float
    off: float

    def of(self, x: Tensor) -> Tensor:
        """The answers, as a bool tensor."""
        if self.kind == PredicateKind.NOT_BELOW:
            return ~(x <= self.low)
        if self.kind == PredicateKind.NOT_BEYOND:
            return ~((x <= self.low) | (x >= self.high))
        if self.kind == PredicateKind.ABOVE:
            return x > self.low
        return (x >= self.low) & (x <= self.high)


@dataclass(slots=True)
class Mask:
    """A bit an element (bit i % 8 of byte i / 8), and how many are set."""

    bits: Tensor
    counts: Tensor | None
    ones: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bits.nbytes + (0 if self.counts is None else self.counts.nbytes)


@dataclass(slots=True)
class Codes:
    """Values of ``bits`` bits with a range a group."""

    bits: int
    codes: Tensor
    ranges: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.ranges.nbytes


#: What memory of so many elements comes from.
Memory = Callable[[int, torch.dtype], Tensor]


def empty(n: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of ``n`` elements, for what lives for a moment."""
    heap.give_back() if n * dtype.itemsize >= heap.LARGE else heap.look()
    return fresh(n, dtype)


def fresh(n: int, dtype: torch.dtype) -> Tensor:
    """The same, whatever the heap is like."""
    x = torch.empty(n, dtype=dtype)
    if x.nbytes >= _LARGE:
        _native.advise_large_pages(x.data_ptr(), x.nbytes)
    return x


class Backend(Protocol):
    """What packs and unpacks. What is unpacked may lie in memory of the caller's (``memory``)."""

    def nonzero(self, x: Tensor) -> Mask:
        """The elements whose bits are not all zero."""

    def test(self, x: Tensor, test: Predicate) -> Mask | None:
        """The elements that pass; None where a bit does not say it."""

    def compress(self, x: Tensor, mask: Mask) -> Tensor | None:
        """The elements under ``mask``; None where it is not :meth:`nonzero`'s."""

    def expand(self, values: Tensor, mask: Mask, n: int, memory: Memory = empty) -> Tensor:
        """The inverse."""

    def fill(
        self, mask: Mask, n: int, like: Tensor, on: Tensor, off: Tensor, memory: Memory = empty
    ) -> Tensor:
        """``on`` where the mask is set, ``off`` elsewhere."""

    def quantize(self, x: Tensor, bits: int, seed: int, mask: Mask | None) -> Codes | None:
        """Codes of all elements, or of those under ``mask`` (:meth:`nonzero`'s); None where one is
        not finite."""

    def dequantize(
        self, codes: Codes, mask: Mask | None, n: int, dtype: torch.dtype, memory: Memory = empty
    ) -> Tensor:
        """The inverse; zeros outside the mask."""


def padded(n: int, dtype: torch.dtype) -> Tensor:
    """The same, readable a little beyond its end."""
    return torch.empty(n + -(-_native.SLACK // dtype.itemsize), dtype=dtype)[:n]


_REAL = {torch.float32: 0, torch.bfloat16: 1}
_QUIET = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _raw(value: Tensor) -> int:
    """The bits of a scalar."""
    width = value.element_size()
    return int(value.reshape(1).view(_QUIET[width]).item()) & ((1 << 8 * width) - 1)


class Native:
    """On the CPU, by ``csrc/training``; ``torch.get_num_threads()`` threads."""

    def nonzero(self, x: Tensor) -> Mask:
        n = x.numel()
        bits, counts = _mask_memory(n)
        ones = _native.nonzero_mask(
            x.data_ptr(), n, x.element_size(), bits.data_ptr(), counts.data_ptr(), torch.get_num_threads()
        )
        return Mask(bits, counts, ones)

    def test(self, x: Tensor, test: Predicate) -> Mask | None:
        if x.dtype not in _REAL:
            # hardtanh's vectors stop the gradient at a NaN, the scalars after them do not
            unclear = test.kind == PredicateKind.NOT_BEYOND and bool(x.isnan().any())
            return None if unclear else self.nonzero(test.of(x))
        n = x.numel()
        bits, counts = _mask_memory(n)
        ones = _native.test_mask(
            x.data_ptr(),
            n,
            _REAL[x.dtype],
            int(test.kind),
            test.low,
            test.high,
            bits.data_ptr(),
            counts.data_ptr(),
            torch.get_num_threads(),
        )
        return None if ones < 0 else Mask(bits, counts, ones)

    def compress(self, x: Tensor, mask: Mask) -> Tensor | None:
        assert mask.counts is not None
        values = padded(mask.ones, x.dtype)
        same = _native.compress(
            x.data_ptr(),
            x.numel(),
            x.element_size(),
            mask.bits.data_ptr(),
            mask.counts.data_ptr(),
            values.data_ptr(),
            torch.get_num_threads(),
        )
        if not same:
            return None
        if values.numel() > 1 and _native.is_uniform(values.data_ptr(), values.numel(), x.element_size()):
            return values[:1].clone()
        return values

    def expand(self, values: Tensor, mask: Mask, n: int, memory: Memory = empty) -> Tensor:
        assert mask.counts is not None
        if values.numel() < mask.ones:  # one value for all
            return self.fill(mask, n, values, values, torch.zeros_like(values), memory)
        out = memory(n, values.dtype)
        _native.expand(
            values.data_ptr(),
            mask.bits.data_ptr(),
            mask.counts.data_ptr(),
            n,
            values.element_size(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def fill(
        self, mask: Mask, n: int, like: Tensor, on: Tensor, off: Tensor, memory: Memory = empty
    ) -> Tensor:
        out = memory(n, like.dtype)
        _native.fill(
            mask.bits.data_ptr(),
            n,
            out.element_size(),
            _raw(on),
            _raw(off),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def select(self, x: Tensor, mask: Mask, n: int, memory: Memory = empty) -> Tensor:
        """``x``, whatever its shape, where the mask of its memory is set, zero elsewhere."""
        out = memory(n, x.dtype)
        _native.select(
            x.data_ptr(),
            mask.bits.data_ptr(),
            n,
            x.element_size(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def quantize(self, x: Tensor, bits: int, seed: int, mask: Mask | None) -> Codes | None:
        if x.dtype not in _REAL:
            x = x.float()
        n = x.numel()
        if mask is None:
            size = _full_size(n, bits)
        else:
            assert mask.counts is not None
            size = _native.coded_size(mask.counts.data_ptr(), mask.counts.numel(), bits)
        codes = padded(size[0], torch.uint8)
        ranges = torch.empty((size[1], 2), dtype=torch.float32)
        done = _native.quantize(
            x.data_ptr(),
            n,
            _REAL[x.dtype],
            *_addresses(mask),
            bits,
            seed,
            codes.data_ptr(),
            ranges.data_ptr(),
            torch.get_num_threads(),
        )
        return Codes(bits, codes, ranges) if done == 0 else None

    def dequantize(
        self, codes: Codes, mask: Mask | None, n: int, dtype: torch.dtype, memory: Memory = empty
    ) -> Tensor:
        out = memory(n, dtype if dtype in _REAL else torch.float32)
        _native.dequantize(
            codes.codes.data_ptr(),
            codes.ranges.data_ptr(),
            n,
            _REAL[out.dtype],
            *_addresses(mask),
            codes.bits,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.to(dtype)


def _mask_memory(n: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((n + 7) // 8, dtype=torch.uint8),
        torch.empty(-(-n // _native.CHUNK), dtype=torch.int32),
    )


def _addresses(mask: Mask | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    assert mask.counts is not None
    return mask.bits.data_ptr(), mask.counts.data_ptr()


def _full_size(n: int, bits: int) -> tuple[int, int]:
    """Bytes of codes and number of groups of ``n`` values; whole chunks are whole groups."""
    return (n if bits == 8 else -(-n // 32) * 16), -(-n // _native.GROUP)


_GROUP = 256


class Portable:
    """On any device and for any type, by torch's operations."""

    def nonzero(self, x: Tensor) -> Mask:
        return self._mask(x if x.dtype == torch.bool else x.view(_QUIET[x.element_size()]) != 0)

    def test(self, x: Tensor, test: Predicate) -> Mask:
        return self._mask(test.of(x))

    def _mask(self, answers: Tensor) -> Mask:
        n = answers.numel()
        answers = torch.nn.functional.pad(answers, (0, -n % 8)).view(-1, 8)
        bits = torch.zeros(answers.shape[0], dtype=torch.uint8, device=answers.device)
        for j in range(8):  # a sum over eight would take temporaries of eight bytes a bit
            bits |= answers[:, j].to(torch.uint8) << j
        return Mask(bits, None, int(answers.sum()))

    def _answers(self, mask: Mask, n: int) -> Tensor:
        steps = torch.arange(8, dtype=torch.uint8, device=mask.bits.device)
        return ((mask.bits[:, None] >> steps) & 1).view(-1)[:n].view(torch.bool)

    def compress(self, x: Tensor, mask: Mask) -> Tensor | None:
        answers = self._answers(mask, x.numel())
        if not torch.equal(answers, x.view(_QUIET[x.element_size()]) != 0):
            return None
        values = x[answers]
        return values[:1].clone() if values.numel() > 1 and bool((values == values[0]).all()) else values

    def expand(self, values: Tensor, mask: Mask, n: int, memory: Memory = empty) -> Tensor:
        out = torch.zeros(n, dtype=values.dtype, device=values.device)
        answers = self._answers(mask, n)
        if values.numel() < mask.ones:
            return out.masked_fill_(answers, values[0])
        return out.masked_scatter_(answers, values)

    def fill(
        self, mask: Mask, n: int, like: Tensor, on: Tensor, off: Tensor, memory: Memory = empty
    ) -> Tensor:
        return torch.where(self._answers(mask, n), on.to(like.device), off.to(like.device)).to(like.dtype)

    def quantize(self, x: Tensor, bits: int, seed: int, mask: Mask | None) -> Codes | None:
        values = (x if mask is None else x[self._answers(mask, x.numel())]).float()
        n = values.numel()
        top = (1 << bits) - 1
        if n == 0:
            none = torch.empty(0, dtype=torch.uint8, device=x.device)
            return Codes(bits, none, torch.empty((0, 2), device=x.device))
        values = torch.cat([values, values[-1:].expand(-n % _GROUP)]).view(-1, _GROUP)
        low = values.amin(1, keepdim=True)
        width = values.amax(1, keepdim=True) - low
        if not bool(torch.isfinite(width).all()):
            return None
        fine = width > 2.0**-100
        step = torch.where(fine, width / top, 0.0)
        inverse = torch.where(fine, top / width, 0.0)
        generator = torch.Generator(x.device).manual_seed(seed & 0x7FFFFFFFFFFFFFFF)
        noise = torch.rand(values.shape, device=x.device, generator=generator)
        codes = ((values - low) * inverse + noise).clamp_(max=top).to(torch.uint8).view(-1)[: n + n % 2]
        if bits == 4:
            codes = codes[0::2] | codes[1::2] << 4
        return Codes(bits, codes.clone(), torch.cat([low, step], 1))

    def dequantize(
        self, codes: Codes, mask: Mask | None, n: int, dtype: torch.dtype, memory: Memory = empty
    ) -> Tensor:
        count = n if mask is None else mask.ones
        parts = codes.codes
        if codes.bits == 4:
            parts = torch.stack([parts & 15, parts >> 4], 1).view(-1)
        parts = torch.nn.functional.pad(parts[:count].float(), (0, -count % _GROUP)).view(-1, _GROUP)
        values = (parts * codes.ranges[:, 1:] + codes.ranges[:, :1]).view(-1)[:count].to(dtype)
        if mask is None:
            return values
        return torch.zeros(n, dtype=dtype, device=values.device).masked_scatter_(
            self._answers(mask, n), values
        )


NATIVE = Native()
PORTABLE = Portable()


def backend_for(x: Tensor) -> Backend:
    """The one for a tensor's device."""
    return NATIVE if x.device.type == "cpu" else PORTABLE
