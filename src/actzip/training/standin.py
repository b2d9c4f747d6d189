"""Stand-ins: the size and type of a packed tensor without its memory, and backward passes that need no
more than that, or the memory for a part of their time only.

The backward pass of a convolution on the CPU holds five maps at its worst: the input and its gradient, the
gradient of the output, and two of them once more in oneDNN's order. The input is needed for the weight's
gradient alone: computed first, it leaves four. That of a ReLU needs a bit an element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from actzip.training.bits import NATIVE, PredicateKind, empty
from actzip.training.saved import Kept, Packed, Slot

__all__ = ["StandIn", "handed", "restore", "unseen"]

aten = torch.ops.aten
#: Smaller tensors are not worth a function written in Python.
_SMALL = 64 << 10


def unseen(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it with no function mode at work; they are back afterwards, whatever ends it."""
    seen, hush = torch._C._is_torch_function_enabled(), torch._C.DisableTorchFunction()
    try:
        with hush:
            return function(*arguments)
    finally:  # an interrupt kept the block from its own end
        if seen and not torch._C._is_torch_function_enabled():
            hush.__exit__(None, None, None)


def restore(slot: Slot) -> Tensor:
    """The tensor that was packed, or what answers its backward pass alike."""
    found: Tensor = unseen(type(slot).restore, slot)
    return found


def handed(slot: Slot) -> Tensor:
    """What autograd is given for a slot: the tensor, or a stand-in where its backward pass gains by one.

    Raises:
        TrainingError: the tensor was changed in place after it was saved.
    """
    # a backward pass that is itself recorded saves what it is given
    if torch.is_grad_enabled() or not isinstance(slot, (Kept, Packed)) or not _gains(slot):
        return restore(slot)
    slot.check()
    found: Tensor = unseen(StandIn.of, slot.size, slot.stride, slot.like, slot)
    return found


def _gains(slot: Kept | Packed) -> bool:
    if slot.convolved is None and not (isinstance(slot, Packed) and slot.by_mask()):
        return False
    nbytes = slot.size.numel() * slot.like.element_size()
    if slot.like.device.type != "cpu" or nbytes < _SMALL:
        return False
    return slot.convolved is None or (len(slot.size) > 3 and slot.convolved.frugal(nbytes))


class StandIn(Tensor):
    """Size, type and place of a packed tensor, without memory. Whatever reads it reads the tensor."""

    slot: Slot
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, size: Sequence[int], stride: Sequence[int], like: Tensor, slot: Slot) -> StandIn:
        """One for ``slot``, of ``like``'s type and device."""
        found: StandIn = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, dtype=like.dtype, device=like.device
        )
        found.slot = slot
        return found

    def detach(self) -> Tensor:
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return unseen(_computed, func, args, dict(kwargs or {}))


def restored(tensor: Tensor) -> Tensor:
    """What a stand-in stands for; any other tensor itself."""
    return restore(tensor.slot) if isinstance(tensor, StandIn) else tensor


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is aten.detach.default:
        stand_in = args[0]
        return StandIn.of(stand_in.shape, stand_in.stride(), stand_in, stand_in.slot)
    known = _KNOWN.get(func)
    found = None if known is None or kwargs else known(*args)
    if found is not None:
        return found
    args, kwargs = tree_map_only(StandIn, restored, (args, kwargs))
    return func(*args, **kwargs)


# Backward passes that know stand-ins: the result, or None where the tensor is needed as for any other.


def _convolution(grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    """The gradients of weight and bias, then, the input forgotten, its own."""
    *how, wanted = options
    slot = getattr(x, "slot", None)
    if not isinstance(slot, (Kept, Packed)) or slot.convolved is None:
        return None
    if not (wanted[0] and any(wanted[1:])) or isinstance(grad, StandIn) or isinstance(weight, StandIn):
        return None
    dense = restore(slot)
    if not _reads_sizes_only(dense, weight, *how):
        return aten.convolution_backward.default(grad, dense, weight, *options)
    gradients = _by_halves if slot.convolved.thorough and slot.coded() else _at_once
    others = gradients(grad, dense, weight, how, [False, *wanted[1:]])[1:]
    del dense
    slot.forget()
    untouched = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    return gradients(grad, untouched, weight, how, [True, False, False])[0], *others


def _at_once(grad: Tensor, x: Tensor, weight: Tensor, how: list[Any], wanted: list[bool]) -> Any:
    return aten.convolution_backward.default(grad, x, weight, *how, wanted)


def _by_halves(grad: Tensor, x: Tensor, weight: Tensor, how: list[Any], wanted: list[bool]) -> Any:
    """The same of half the batch after the other, for what oneDNN takes meanwhile; sums are rounded in
    another order."""
    n = x.shape[0] // 2
    if n == 0:
        return _at_once(grad, x, weight, how, wanted)
    halves = [_at_once(grad[i], x[i], weight, how, wanted) for i in (slice(n), slice(n, None))]
    own, *others = zip(*halves, strict=True)
    sums = (a if a is None else a.add_(b) for a, b in others)
    return torch.cat(own) if wanted[0] else None, *sums


#: Which of torch's implementations computes a convolution.
_backend: Callable[..., Any] | None = getattr(torch._C, "_select_conv_backend", None)
_ONEDNN = {getattr(getattr(torch._C, "_ConvBackend", None), "Mkldnn", None)} - {None}


def _reads_sizes_only(
    x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any, *others: Any
) -> bool:
    """The gradient of the input is computed without its values."""
    if _backend is None:
        return False
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if not x.is_contiguous() and not x.is_contiguous(memory_format=last):
        return False
    return _backend(x, weight, None, stride, padding, dilation, *others, bias_sizes) in _ONEDNN


def _threshold(grad: Tensor, x: Tensor, cut: Any) -> Tensor | None:
    return _selected(grad, x, PredicateKind.NOT_BELOW, cut)


def _hardtanh(grad: Tensor, x: Tensor, low: Any, high: Any) -> Tensor | None:
    return _selected(grad, x, PredicateKind.NOT_BEYOND, low, high)


def _selected(grad: Tensor, x: Tensor, kind: PredicateKind, low: Any, high: Any = None) -> Tensor | None:
    """``grad`` where the mask of ``x`` says so, zero elsewhere."""
    if not isinstance(x, StandIn) or type(grad) is not Tensor or not isinstance(x.slot, Packed):
        return None
    test = x.slot.by_mask()
    if test is None or (test.kind, test.low) != (kind, low) or high not in (None, test.high):
        return None
    if grad.dtype != x.dtype or not _same_order(grad, x):
        return None
    saved, size, stride = x.slot.map, grad.shape, grad.stride()
    return NATIVE.select(grad, saved.masks[test], saved.n, empty).as_strided(size, stride)


def _same_order(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and all(
        s == t or n == 1 for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


_KNOWN: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution,
    aten.threshold_backward.default: _threshold,
    aten.hardtanh_backward.default: _hardtanh,
}
