"""Training in bfloat16 on a CPU: autocast, with the gradients of depthwise convolutions that oneDNN
is slow at in float32.

On a CPU for which oneDNN has no bfloat16 at all, training stays in float32, and a warning says so.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from actzip.errors import ActzipWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["autocast", "has_bfloat16", "usable"]


def has_bfloat16(device: str) -> bool:
    """Whether convolutions in bfloat16 have kernels of their own on ``device``.

    x86 needs AVX-512 for them. Without it torch falls back to a loop: a step of CIFAR ResNet-20,
    batch 128, took 11.6 s against 1.1 s in float32 on a Zen 3 core that had other work too.
    """
    if device != "cpu":
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


def usable(precision: str, device: str) -> str:
    """``precision``, ``float32`` or ``bfloat16``, as training on ``device`` is to use it: float32
    where bfloat16 would be slow.

    The latter is an ActzipWarning.
    """
    if precision == "bfloat16" and not has_bfloat16(device):
        warnings.warn(
            "precision: bfloat16 was asked for, and training is in float32: torch has no bfloat16 "
            "convolutions for this CPU (x86 needs AVX-512) and would be many times slower with "
            "them",
            ActzipWarning,
            stacklevel=3,
        )
        return "float32"
    return precision


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """Forward passes inside run in bfloat16 where that is safe (``torch.autocast``); weights stay float32.

    On a CPU, depthwise convolutions compute the gradient of their weights, and with a stride that
    of their input, in float32: in bfloat16 oneDNN has no fast kernel for these (128 maps of 64
    channels, 32x32, stride 2: 120 ms, against 20 ms in float32), which made training a MobileNet-V1
    in bfloat16 slower than in float32.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if device == "cpu":
            stack.enter_context(_Depthwise())
        yield


class _Depthwise(TorchFunctionMode):
    """Sends the depthwise 2-d convolutions inside through :class:`_DepthwiseConv`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            call: dict[str, Any] = {**dict(zip(names, args)), **kwargs}
            x, weight = call.get("input"), call.get("weight")
            if (
                torch.is_grad_enabled()
                and isinstance(x, Tensor)
                and isinstance(weight, Tensor)
                and x.dim() == 4
                and weight.shape[1] == 1
                and call.get("groups", 1) == x.shape[1] == weight.shape[0]
                and not isinstance(call.get("padding", 0), str)
            ):
                bias = call.get("bias")
                out: Tensor = _DepthwiseConv.apply(  # type: ignore[no-untyped-call]
                    x,
                    weight,
                    _pair(call.get("stride", 1)),
                    _pair(call.get("padding", 0)),
                    _pair(call.get("dilation", 1)),
                )
                return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)
        return func(*args, **kwargs)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
    ) -> Tensor:
        ctx.types = x.dtype, weight.dtype
        ctx.options = stride, padding, dilation
        x, weight = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        type_x, type_w = ctx.types

        def gradients(g: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                g, x, w, None, stride, padding, dilation, False, [0, 0], x.shape[1], wanted
            )

        dx = dw = None
        strided = max(stride) > 1
        whole = grad.float(), x.float(), weight.float()
        if ctx.needs_input_grad[0] and not strided:
            dx = gradients(grad, x, weight, [True, False, False])[0].to(type_x)
        if ctx.needs_input_grad[0] and strided:
            dx, dw, _ = gradients(*whole, [True, ctx.needs_input_grad[1], False])
            dx = dx.to(type_x)
        elif ctx.needs_input_grad[1]:
            dw = gradients(*whole, [False, True, False])[1]
        return dx, None if dw is None else dw.to(type_w), None, None, None


def _pair(value: Any) -> list[int]:
    return [int(value)] * 2 if isinstance(value, int) else [int(v) for v in value]
