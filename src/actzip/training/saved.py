"""Saved tensors, packed: what takes the place of a tensor in autograd's graph, and how it comes back.

A :class:`SavedMap` is one run of memory at one version, whoever saves it and in whatever shape;
packed once, it lives as long as one of the :class:`Slot`\\ s that the graph holds. None of them
holds the tensor it stands for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from actzip._native import _engine
from actzip.errors import TrainingError
from actzip.training.bits import (
    Backend,
    Codes,
    Mask,
    Predicate,
    PredicateKind,
    backend_for,
    empty,
)
from actzip.training.buffers import Buffers
from actzip.training.rules import Window

__all__ = [
    "Indices",
    "Kept",
    "Narrowed",
    "Packed",
    "SavedMap",
    "ShapeOnly",
    "Slot",
    "Version",
    "dense_order",
    "fingerprint",
]

#: Packing is worth it below this share of the tensor's bytes.
GAIN = 0.9


class Version:
    """A tensor's version counter without its memory, and where it stood."""

    __slots__ = ("counter", "saved")

    def __init__(self, tensor: Tensor) -> None:
        self.saved = tensor._version
        self.counter = tensor.detach()
        self.counter.data = tensor.new_empty(0)  # the counter stays that of `tensor`

    def check(self, size: torch.Size, dtype: torch.dtype) -> None:
        """Raises what PyTorch raises where the tensor was changed in place since."""
        if self.counter._version != self.saved:
            _modified(size, dtype, self.counter._version, self.saved)


def _modified(size: torch.Size, dtype: torch.dtype, now: int, saved: int) -> NoReturn:
    raise TrainingError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"a tensor of {dtype} {list(size)} is at version {now}; expected version {saved} instead. "
        "torch.autograd.set_detect_anomaly(True) shows the operation that failed to compute its gradient"
    )


def dense_order(t: Tensor) -> bool:
    """True where the elements fill one run of memory, each once, in whatever order of the dimensions."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def fingerprint(flat: Tensor) -> int:
    """A sample of the memory: ``x.data`` and its like change a tensor without its version counter."""
    if flat.device.type != "cpu":
        return 0
    return int(_engine.training.fingerprint(flat.data_ptr(), flat.nbytes))


class Slot:
    """What autograd's graph holds for one saved tensor."""

    __slots__ = ()

    def restore(self) -> Tensor:
        """The tensor, or what answers its backward pass alike.

        Raises:
            TrainingError: the tensor was changed in place after it was saved.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """What :meth:`restore` gave is not asked for again soon."""

    def coded(self) -> bool:
        """What it gives are estimates."""
        return False


class Kept(Slot):
    """The tensor itself; ``convolved``: a convolution saved it, in a pass with these buffers."""

    __slots__ = ("convolved", "tensor", "version")

    def __init__(self, tensor: Tensor, convolved: Buffers | None = None) -> None:
        self.tensor = tensor.detach()  # a tensor that its own node holds would never be freed
        self.version, self.convolved = tensor._version, convolved

    @property
    def size(self) -> torch.Size:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def stride(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tensor.stride()

    @property
    def like(self) -> Tensor:
        """A tensor of its type and device."""
        return self.tensor

    def check(self) -> None:
        """Raises TrainingError where the tensor was changed in place since."""
        if self.tensor._version != self.version:
            _modified(self.tensor.shape, self.tensor.dtype, self.tensor._version, self.version)

    def restore(self) -> Tensor:
        self.check()
        return self.tensor


class ShapeOnly(Slot):
    """Sizes, strides and type; the memory that comes back is never read."""

    __slots__ = ("device", "dtype", "size", "stride", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride = tensor.shape, tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.version = Version(tensor)

    def restore(self) -> Tensor:
        self.version.check(self.size, self.dtype)
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class Narrowed(Slot):
    """Integers in the smallest type that holds them."""

    __slots__ = ("dtype", "tensor", "version")

    def __init__(self, tensor: Tensor, narrow: Tensor) -> None:
        self.tensor, self.dtype, self.version = narrow, tensor.dtype, Version(tensor)

    @classmethod
    def of(cls, tensor: Tensor) -> Narrowed | None:
        """None where no smaller type does."""
        if not tensor.numel():
            return None
        low, high = (int(v) for v in torch.aminmax(tensor))
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
            info = torch.iinfo(dtype)
            if info.min <= low and high <= info.max and dtype.itemsize < tensor.dtype.itemsize:
                return cls(tensor, tensor.to(dtype))
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tensor.nbytes

    def restore(self) -> Tensor:
        self.version.check(self.tensor.shape, self.dtype)
        return self.tensor.to(self.dtype)


class Indices(Slot):
    """Indices of a max pool, as places in their windows."""

    __slots__ = ("codes", "pool", "size", "stride", "version")

    def __init__(self, tensor: Tensor, pool: tuple[int, ...], codes: Tensor) -> None:
        self.pool, self.codes = pool, codes
        self.size, self.stride, self.version = tensor.shape, tensor.stride(), Version(tensor)

    @classmethod
    def of(cls, tensor: Tensor, window: Window) -> Indices | None:
        """None where they are not those of ``window``, or not in the memory of the CPU."""
        if tensor.device.type != "cpu" or tensor.dim() not in (3, 4):
            return None
        oh, ow = tensor.shape[-2:]
        if tensor.is_contiguous():
            outer, inner = tensor.numel() // (oh * ow), 1
        elif tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            outer, inner = tensor.shape[0], tensor.shape[1]
        else:
            return None
        pool = (
            outer,
            oh,
            ow,
            inner,
            *window.input,
            *window.kernel,
            *window.stride,
            *window.padding,
            *window.dilation,
        )
        bits = _engine.training.index_bits(pool)
        if bits == 0:
            return None
        codes = torch.empty((tensor.numel() * bits + 7) // 8, dtype=torch.uint8)
        packed = _engine.training.pack_indices(
            tensor.data_ptr(), pool, codes.data_ptr(), torch.get_num_threads()
        )
        return cls(tensor, pool, codes) if packed else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes

    def restore(self) -> Tensor:
        self.version.check(self.size, torch.int64)
        flat = empty(self.size.numel(), torch.int64)
        _engine.training.unpack_indices(
            self.codes.data_ptr(), self.pool, flat.data_ptr(), torch.get_num_threads()
        )
        return flat.as_strided(self.size, self.stride)


class SavedMap:
    """One run of memory, packed: masks, the values under the mask of the zeros, or their codes.

    ``grew`` is called with every number of bytes that it takes; ``buffers`` are where it is restored.
    """

    __slots__ = (
        "__weakref__",
        "backend",
        "buffers",
        "coded",
        "dense",
        "dtype",
        "fingerprint",
        "grew",
        "masks",
        "n",
        "no_gain",
        "scalar",
        "values",
        "version",
        "zeros",
    )

    def __init__(
        self, tensor: Tensor, grew: Callable[[int], None], fingerprint: int, buffers: Buffers
    ) -> None:
        self.fingerprint, self.buffers = fingerprint, buffers
        self.n, self.dtype = tensor.numel(), tensor.dtype
        self.backend: Backend = backend_for(tensor)
        self.version = Version(tensor)
        self.scalar = tensor.new_empty(0)
        self.grew = grew
        self.masks: dict[Predicate, Mask] = {}
        self.zeros: Mask | None = None  # of the elements that are not zero
        self.values: Tensor | None = None
        self.coded: dict[int, tuple[Codes, Mask | None]] = {}
        self.no_gain = False
        # as last restored, from codes of so many bits or exactly; other threads may forget it
        self.dense: tuple[Tensor, int | None, int] | None = None

    # -- packing; `flat` is the memory

    def share_restored(self, flat: Tensor) -> None:
        """Where ``flat`` is a map as it was just restored, as in a recomputed block: that one's values."""
        last = None if _last is None else _last()
        if last is None or last.values is None or flat._version != 0:
            return
        dense = last.restored(None)
        if dense is not None and _same_memory(dense, flat):
            self.masks, self.zeros, self.values = dict(last.masks), last.zeros, last.values

    def pack_test(self, flat: Tensor, test: Predicate) -> bool:
        """The answers to ``test``; False where bits do not say them."""
        if test in self.masks:
            return True
        mask = self.backend.test(flat, test)
        if mask is None:
            return False
        self.masks[test] = mask
        self.grew(mask.nbytes)
        return True

    def pack_bits(self, flat: Tensor) -> None:
        """A tensor of bools: the mask is all there is."""
        if self.zeros is None:
            self.zeros = self.backend.nonzero(flat)
            self.grew(self.zeros.nbytes)

    def pack_values(self, flat: Tensor) -> bool:
        """Exactly; False where that does not gain."""
        if self.values is not None:
            return True
        if self.no_gain or not self._sparse_enough(flat, GAIN):
            self.no_gain = True
            return False
        values, mask = self._compressed(flat)
        if values is None or mask is None:
            self.no_gain = True
            return False
        self._take_zeros(mask)
        self.values = values
        self.grew(values.nbytes)
        return True

    def pack_coded(self, flat: Tensor, bits: int, seed: int) -> bool:
        """As codes; False where a value is not finite."""
        if bits in self.coded:
            return True
        mask, codes = self._known_zeros(), None
        if mask is not None:
            codes = self.backend.quantize(flat, bits, seed, mask)
        if codes is None and (mask is not None or self._sparse_enough(flat, 0.98)):
            mask = self.backend.nonzero(flat)
            codes = self.backend.quantize(flat, bits, seed, mask)
        elif codes is None:
            codes = self.backend.quantize(flat, bits, seed, None)
        if codes is None:
            return False
        if mask is not None:
            self._take_zeros(mask)
        self.coded[bits] = codes, mask
        self.grew(codes.nbytes)
        return True

    def _sparse_enough(self, flat: Tensor, limit: float) -> bool:
        if self._known_zeros() is not None:
            return True
        if flat.device.type != "cpu":
            some = flat[:: max(1, self.n // 512)]
            return bool((some != 0).double().mean() < limit)
        return bool(_engine.training.sample_density(flat.data_ptr(), self.n, flat.element_size()) < limit)

    def _known_zeros(self) -> Mask | None:
        """The mask of the zeros, or what is most likely the same: what a ReLU asked for."""
        return self.zeros or self.masks.get(RELU)

    def _take_zeros(self, mask: Mask) -> None:
        if self.zeros is None:
            if mask is not self.masks.get(RELU):
                self.grew(mask.nbytes)
            self.zeros = mask

    def _compressed(self, flat: Tensor) -> tuple[Tensor, Mask] | tuple[None, None]:
        mask = self._known_zeros()
        if mask is not None and self._gains(mask):
            values = self.backend.compress(flat, mask)
            if values is not None:
                return values, mask
        mask = self.backend.nonzero(flat)
        values = self.backend.compress(flat, mask) if self._gains(mask) else None
        return (None, None) if values is None else (values, mask)

    def _gains(self, mask: Mask) -> bool:
        width = self.dtype.itemsize
        return mask.ones * width + self.n // 8 <= GAIN * self.n * width

    # -- restoring

    def restored(self, bits: int | None) -> Tensor | None:
        """What was restored last, if from so many bits and still the same: functions of others read it."""
        if (last := self.dense) is None or last[1] != bits:
            return None
        dense, _, before = last
        return dense if dense._version == 0 and fingerprint(dense) == before else None

    def _remember(self, dense: Tensor, bits: int | None) -> Tensor:
        self.dense = dense, bits, fingerprint(dense)
        return dense

    def forget(self) -> None:
        """The restored memory; what asks for it again restores it again."""
        self.dense = None

    def restore_test(self, test: Predicate) -> Tensor:
        """Memory that passes ``test`` where the saved one did."""
        mask = self.masks[test]
        bits = None if (last := self.dense) is None else last[1]
        # codes of positive values stay positive
        answers = bits is None or (test == RELU and mask is self.coded[bits][1])
        if answers and (dense := self.restored(bits)) is not None:
            return dense
        _forget_last(self)
        on, off = (torch.tensor(v, dtype=self.dtype) for v in (test.on, test.off))
        return self.backend.fill(mask, self.n, self.scalar, on, off, self.buffers.empty)

    def restore_bits(self) -> Tensor:
        """Bools."""
        assert self.zeros is not None
        on, off = torch.tensor(True), torch.tensor(False)
        return self.backend.fill(self.zeros, self.n, self.scalar, on, off, self.buffers.empty)

    def restore_values(self) -> Tensor:
        """The memory, bit for bit."""
        if (dense := self.restored(None)) is not None:
            return dense
        assert self.values is not None and self.zeros is not None
        _forget_last(self)
        return self._remember(self.backend.expand(self.values, self.zeros, self.n, self.buffers.empty), None)

    def restore_coded(self, bits: int) -> Tensor:
        """Estimates, zeros exact."""
        if (dense := self.restored(bits)) is not None:
            return dense
        _forget_last(self)
        codes, mask = self.coded[bits]
        return self._remember(
            self.backend.dequantize(codes, mask, self.n, self.dtype, self.buffers.empty), bits
        )


#: The test of ReLU: where nothing is negative, it is the mask of the zeros.
RELU = Predicate(PredicateKind.NOT_BELOW, 0.0, 0.0, 1.0, 0.0)

# One map keeps what was restored last: the layer before asks for the same one next, as ReLU does
# after a convolution.
_last: weakref.ref[SavedMap] | None = None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.numel() == b.numel() > 0
        and a.device == b.device
        and a.data_ptr() == b.data_ptr()
    )


def _forget_last(current: SavedMap) -> None:
    global _last
    previous = None if _last is None else _last()
    if previous is not None:
        previous.dense = None
    _last = weakref.ref(current)


class Packed(Slot):
    """A view of a :class:`SavedMap`: ``how`` is a test, a number of bits, "bits" or None for the values;
    ``convolved``: a convolution saved it."""

    __slots__ = ("convolved", "how", "map", "size", "stride")

    def __init__(
        self,
        saved: SavedMap,
        tensor: Tensor,
        how: Predicate | int | str | None,
        convolved: Buffers | None = None,
    ) -> None:
        self.map, self.how, self.convolved = saved, how, convolved
        self.size, self.stride = tensor.shape, tensor.stride()

    @property
    def like(self) -> Tensor:
        """A tensor of its type and device."""
        return self.map.scalar

    def forget(self) -> None:
        self.map.forget()

    def check(self) -> None:
        """Raises TrainingError where the tensor was changed in place since."""
        self.map.version.check(self.size, self.map.dtype)

    def coded(self) -> bool:
        return isinstance(self.how, int)

    def by_mask(self) -> Predicate | None:
        """The test whose answers are the factors of the gradient, where they are."""
        how = self.how
        masks = isinstance(how, Predicate) and how.kind in (
            PredicateKind.NOT_BELOW,
            PredicateKind.NOT_BEYOND,
        )
        return how if masks else None  # type: ignore[return-value]

    def restore(self) -> Tensor:
        self.check()
        saved = self.map
        if isinstance(self.how, Predicate):
            flat = saved.restore_test(self.how)
        elif isinstance(self.how, int):
            flat = saved.restore_coded(self.how)
        elif self.how == "bits":
            flat = saved.restore_bits()
        else:
            flat = saved.restore_values()
        return flat.as_strided(self.size, self.stride, 0)
