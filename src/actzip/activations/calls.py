"""Which of torch's functions are activations, convolutions and linear layers, and how their
arguments read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actzip.activations.sites import ComputeCall

__all__ = [
    "ATEN",
    "CONVOLUTIONS",
    "LINEARS",
    "activation_kind",
    "argument",
    "compute_call",
    "is_in_place",
    "with_argument",
]

_RELU = {torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_}
_RELU6 = {F.relu6, torch.nn.functional.relu6}
_HARDTANH = {F.hardtanh, F.hardtanh_}
_THRESHOLD = {F.threshold, getattr(F, "threshold_"), torch.threshold, torch.threshold_}
_CLAMP = {
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    Tensor.clamp,
    Tensor.clamp_,
    Tensor.clip,
    Tensor.clip_,
}
_CLAMP_MIN = {torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_}
_OTHER: dict[Any, str] = {
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.prelu: "prelu",
    torch.prelu: "prelu",
    F.elu: "elu",
    F.elu_: "elu",
    F.selu: "selu",
    F.celu: "celu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.softplus: "softplus",
    F.mish: "mish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
}
CONVOLUTIONS: dict[Any, tuple[str, bool]] = {
    torch.conv1d: ("conv1d", False),
    torch.conv2d: ("conv2d", False),
    torch.conv3d: ("conv3d", False),
    F.conv1d: ("conv1d", False),
    F.conv2d: ("conv2d", False),
    F.conv3d: ("conv3d", False),
    torch.conv_transpose1d: ("conv_transpose1d", True),
    torch.conv_transpose2d: ("conv_transpose2d", True),
    torch.conv_transpose3d: ("conv_transpose3d", True),
    F.conv_transpose1d: ("conv_transpose1d", True),
    F.conv_transpose2d: ("conv_transpose2d", True),
    F.conv_transpose3d: ("conv_transpose3d", True),
}
LINEARS = {F.linear}
#: What the operators of exported programs are called in ``torch``.
ATEN: dict[str, Any] = {
    f"aten::{name}": found
    for name in (
        "relu",
        "relu_",
        "clamp",
        "clamp_",
        "clamp_min",
        "clamp_min_",
        "threshold",
        "threshold_",
        "prelu",
        "sigmoid",
        "tanh",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "silu",
        "gelu",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "celu",
        "hardswish",
        "hardsigmoid",
        "softplus",
        "mish",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "linear",
    )
    if (found := getattr(torch, name, None) or getattr(F, name, None)) is not None
}
ATEN |= {f"aten::{n}": getattr(F, n) for n in ("selu", "celu")}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_T_ARGS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def argument(
    args: Sequence[Any], kwargs: dict[str, Any], index: int, *names: str, default: Any = None
) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[index] if len(args) > index else default


def with_argument(
    args: Any, kwargs: dict[str, Any], index: int, name: str, value: Any
) -> tuple[Any, dict[str, Any]]:
    """The arguments with another value in one place."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:index], value, *args[index + 1 :]), kwargs


def activation_kind(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, float | None] | None:
    """The kind and upper clip of an activation call, or None where the call is not an activation."""
    if func in _RELU:
        return "relu", None
    if func in _RELU6:
        return "relu6", 6.0
    if func in _HARDTANH:
        low = argument(args, kwargs, 1, "min_val", default=-1.0)
        high = argument(args, kwargs, 2, "max_val", default=1.0)
        return ("relu6", float(high)) if low == 0 and high > 0 else ("hardtanh", None)
    if func in _THRESHOLD:
        cut = argument(args, kwargs, 1, "threshold")
        value = argument(args, kwargs, 2, "value")
        return ("threshold", None) if value == 0 and cut is not None and cut >= 0 else None
    if func in _CLAMP:
        low = argument(args, kwargs, 1, "min")
        high = argument(args, kwargs, 2, "max")
        if isinstance(low, (int, float)) and low == 0:
            if high is None:
                return "relu", None
            if isinstance(high, (int, float)) and high > 0:
                return "relu6", float(high)
        return None
    if func in _CLAMP_MIN:
        low = argument(args, kwargs, 1, "min")
        return ("relu", None) if isinstance(low, (int, float)) and low == 0 else None
    kind = _OTHER.get(func)
    return None if kind is None else (kind, None)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    values = tuple(int(v) for v in value)
    return values * n if len(values) == 1 and n > 1 else values


def compute_call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, ComputeCall] | None:
    if func in LINEARS:
        x = argument(args, kwargs, 0, "input")
        return "linear", ComputeCall(x, argument(args, kwargs, 1, "weight"))
    found = CONVOLUTIONS.get(func)
    if found is None:
        return None
    kind, transposed = found
    order = _CONV_T_ARGS if transposed else _CONV_ARGS
    values = dict(zip(order, args)) | kwargs
    x, weight = values["input"], values["weight"]
    dims = weight.dim() - 2
    if x.dim() == dims + 1:  # unbatched
        x = x.unsqueeze(0)
    if x.dim() != dims + 2:  # PyTorch says what is wrong
        return None
    stride = _tuple(values.get("stride", 1), dims)
    dilation = _tuple(values.get("dilation", 1), dims)
    padding = values.get("padding", 0)
    if padding == "valid":
        pads: tuple[tuple[int, int], ...] = ((0, 0),) * dims
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        pads = tuple((t // 2, t - t // 2) for t in totals)
    else:
        pads = tuple((p, p) for p in _tuple(padding, dims))
    return kind, ComputeCall(
        x,
        weight,
        stride,
        pads,
        dilation,
        _tuple(values.get("output_padding", 0), dims),
        int(values.get("groups", 1)),
        transposed,
    )


def is_in_place(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    index = {"relu": 1, "relu6": 1, "hardtanh": 3, "threshold": 3, "silu": 1, "elu": 2, "leaky_relu": 2}.get(
        name
    )
    if index is None or getattr(func, "__module__", "") != "torch.nn.functional":
        return bool(kwargs.get("inplace", False))
    return bool(argument(args, kwargs, index, "inplace", default=False))
