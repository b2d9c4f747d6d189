"""What a backward pass asks of the tensors that its operator saves, for operators that ask little.

Autograd's hooks see a tensor, not who saves it. A torch function mode knows the function that runs;
what is found here for it says what suffices: a bit an element, the shape, a place in a window. Of a
function without a rule every saved tensor is kept by its values, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from actzip.training.bits import Predicate, PredicateKind

__all__ = ["CODED", "CONVOLVED", "ITSELF", "SHAPE", "Need", "Rule", "Window", "rule_of"]


@dataclass(frozen=True, slots=True)
class Window:
    """Indices of a two-dimensional max pool: the places are in windows of the input."""

    input: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


#: Nothing but sizes, strides and type.
SHAPE = "shape"
#: The tensor itself, which the function fills after it is saved.
ITSELF = "itself"
#: Values, of which unbiased estimates will do.
CODED = "coded"
#: The same, for a convolution.
CONVOLVED = "convolved"

#: What suffices; None: the values, exactly.
Need = Union[Predicate, Window, str, None]
Rule = Callable[[Tensor], Need]

_RELU = Predicate(PredicateKind.NOT_BELOW, 0.0, 0.0, 1.0, 0.0)
#: Backward passes of pools read nothing but sizes there; other devices have kernels of their own.
_KNOWN_DEVICES = ("cpu", "cuda")


@lru_cache(maxsize=256)
def _exactly(value: float, dtype: torch.dtype) -> bool:
    """``dtype`` has this number: kernels compare in it, or in a wider one."""
    return torch.tensor(value, dtype=dtype).double().item() == value


def _arg(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, *names: str, default: Any = None) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[index] if len(args) > index else default


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tested(kind: PredicateKind, low: float, high: float, on: float, off: float) -> Rule:
    test = Predicate(kind, float(low), float(high), float(on), float(off))

    def rule(t: Tensor) -> Need:
        known = t.is_floating_point() and all(
            not math.isfinite(v) or _exactly(v, t.dtype) for v in (test.low, test.high, test.on)
        )
        return test if known else None

    return rule


def _between(kind: PredicateKind, low: float, high: float) -> Rule | None:
    """A test for an interval: answered by its middle and by minus infinity."""
    if not low < high:
        return None
    return _tested(kind, low, high, low + (high - low) / 2, -math.inf)


def _relu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    return lambda t: _RELU if t.is_floating_point() else None


def _hardtanh(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    low, high = (
        _arg(args, kwargs, 1, "min_val", default=-1.0),
        _arg(args, kwargs, 2, "max_val", default=1.0),
    )
    return _between(PredicateKind.NOT_BEYOND, low, high) if _number(low) and _number(high) else None


def _relu6(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    return _between(PredicateKind.NOT_BEYOND, 0.0, 6.0)


def _leaky_relu(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    slope = _arg(args, kwargs, 1, "negative_slope", default=0.01)
    # in place the result is saved, which has the input's sign with a positive slope alone
    return _tested(PredicateKind.ABOVE, 0.0, 0.0, 1.0, -1.0) if _number(slope) and slope > 0 else None


def _threshold(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    cut = _arg(args, kwargs, 1, "threshold")
    return _tested(PredicateKind.NOT_BELOW, cut, 0.0, math.inf, -math.inf) if _number(cut) else None


def _clamp(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    low, high = _arg(args, kwargs, 1, "min"), _arg(args, kwargs, 2, "max")
    if _number(low) and high is None:
        return _tested(PredicateKind.INSIDE, low, math.inf, math.inf, -math.inf)
    if _number(low) and _number(high):
        return _between(PredicateKind.INSIDE, low, high)
    return None


def _clamp_min(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    low = _arg(args, kwargs, 1, "min")
    return _tested(PredicateKind.INSIDE, low, math.inf, math.inf, -math.inf) if _number(low) else None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    if len(values) == 1:
        values *= 2
    return (int(values[0]), int(values[1])) if len(values) == 2 else None


def _max_pool2d(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    x = _arg(args, kwargs, 0, "input")
    kernel = _arg(args, kwargs, 1, "kernel_size")
    stride = _arg(args, kwargs, 2, "stride")
    found = [
        _pair(kernel),
        _pair(kernel if stride is None or stride == () or stride == [] else stride),
        _pair(_arg(args, kwargs, 3, "padding", default=0)),
        _pair(_arg(args, kwargs, 4, "dilation", default=1)),
    ]
    if not isinstance(x, Tensor) or x.dim() < 3 or any(f is None for f in found):
        return _pooled(args, kwargs)
    window = Window((x.shape[-2], x.shape[-1]), *found)  # type: ignore[arg-type]
    return _shaped(x, window)


def _pooled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    x = _arg(args, kwargs, 0, "input")
    return _shaped(x, None) if isinstance(x, Tensor) else None


def _shaped(x: Tensor, window: Window | None) -> Rule:
    n, known = x.numel(), x.device.type in _KNOWN_DEVICES

    def rule(t: Tensor) -> Need:
        if t.is_floating_point():
            return SHAPE if known and t.numel() == n else None
        return window if t.dtype == torch.int64 else None

    return rule


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    return _coded_input(args, kwargs, CODED)


def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    return _coded_input(args, kwargs, CONVOLVED)


def _coded_input(args: Sequence[Any], kwargs: Mapping[str, Any], need: str) -> Rule | None:
    """The input of a convolution or linear layer: never its weight, in whatever type it is saved."""
    x, weight = _arg(args, kwargs, 0, "input"), _arg(args, kwargs, 1, "weight")
    if not isinstance(x, Tensor):
        return None
    n, last = x.numel(), x.shape[-1:]
    apart = not isinstance(weight, Tensor) or weight.numel() != n
    return lambda t: need if apart and t.numel() == n and t.shape[-1:] == last else None


def _coded_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    x = _arg(args, kwargs, 0, "input")
    if not isinstance(x, Tensor):
        return None
    n = x.numel()
    return lambda t: CODED if t.numel() == n else None


def _coded_maps(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """Smooth activations and products of maps: four dimensions and more."""
    return lambda t: CODED if t.dim() >= 4 else None


def _filled_later(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """Autograd saves the noise first, and the kernel writes it then."""
    return lambda t: ITSELF


def _methods(*names: str) -> list[Any]:
    """The functions of these names in torch, its functional namespace and Tensor."""
    homes = (torch, F, Tensor, torch._C._nn)
    return [f for n in names for home in homes if (f := getattr(home, n, None)) is not None]


def _table() -> dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Rule | None]]:
    table: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Rule | None]] = {}
    rows: list[tuple[Callable[[Sequence[Any], Mapping[str, Any]], Rule | None], list[Any]]] = [
        (_relu, _methods("relu", "relu_")),
        (_relu6, _methods("relu6", "relu6_")),
        (_hardtanh, _methods("hardtanh", "hardtanh_")),
        (_leaky_relu, _methods("leaky_relu", "leaky_relu_")),
        (_threshold, _methods("threshold", "threshold_")),
        (_clamp, _methods("clamp", "clamp_", "clip", "clip_")),
        (_clamp_min, _methods("clamp_min", "clamp_min_")),
        (_filled_later, _methods("rrelu", "rrelu_", "rrelu_with_noise", "rrelu_with_noise_")),
        (_max_pool2d, _methods("max_pool2d", "max_pool2d_with_indices")),
        (
            _pooled,
            _methods(
                "avg_pool2d",
                "avg_pool3d",
                "adaptive_avg_pool2d",
                "adaptive_avg_pool3d",
                "adaptive_max_pool2d",
                "adaptive_max_pool2d_with_indices",
                "adaptive_max_pool3d",
                "adaptive_max_pool3d_with_indices",
                "max_pool3d",
                "max_pool3d_with_indices",
            ),
        ),
        (
            _convolution,
            _methods(
                "conv1d",
                "conv2d",
                "conv3d",
                "conv_transpose1d",
                "conv_transpose2d",
                "conv_transpose3d",
            ),
        ),
        (_linear, _methods("linear")),
        (_coded_norm, _methods("batch_norm", "instance_norm", "group_norm", "layer_norm")),
        (
            _coded_maps,
            _methods(
                "silu",
                "gelu",
                "mish",
                "hardswish",
                "hardsigmoid",
                "sigmoid",
                "tanh",
                "elu",
                "celu",
                "selu",
                "softplus",
                "mul",
                "__mul__",
                "__rmul__",
            ),
        ),
    ]
    for make, functions in rows:
        for function in functions:
            table[function] = make
    return table


_TABLE = _table()


def rule_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rule | None:
    """The rule for the tensors that this call saves; None where their values are needed."""
    try:
        make = _TABLE.get(function)
    except TypeError:  # an unhashable callable
        return None
    return None if make is None else make(args, kwargs)
