"""Elementwise functions: one row each, and an :class:`Act` with its numbers.

Everything that enumerates them reads the rows: both front ends, the reference interpreter, the
passes and the engine's lowering. Their arithmetic is elsewhere twice, on purpose: in the engine
(``csrc``) and in PyTorch, which the interpreter calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actzip.errors import InputError, UnsupportedError
from actzip.runtime.graph import Array, show


@dataclass(frozen=True)
class ActRow:
    """An elementwise function.

    ``numbers``: what it takes, in PyTorch's order, with PyTorch's defaults. ``keeps_zero``: f(0) =
    0. ``sparsifies``: exact zeros for a whole range of inputs. ``param``: takes the array
    ``Act.param``. ``torch``: aten operators that are this function of one tensor;
    ``torch_numbers``: what these call the numbers. ``onnx``: ONNX's operator; ``onnx_numbers``: its
    attributes, with its defaults. ``module``: the class of ``torch.nn`` that takes ``numbers``.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    keeps_zero: bool = True
    sparsifies: bool = False
    param: bool = False
    torch: tuple[str, ...] = ()
    torch_numbers: tuple[str, ...] = ()
    onnx: str = ""
    onnx_numbers: Mapping[str, float] = field(default_factory=dict)
    module: str = ""


def _row(name: str, onnx: str = "", numbers: Mapping[str, float] | None = None, **more: Any) -> ActRow:
    return ActRow(numbers or {}, torch=(name,), onnx=onnx, **more)


# fmt: off
ACTS: dict[str, ActRow] = {
    "relu": _row("relu", "Relu", sparsifies=True, module="ReLU"),
    "clip": ActRow({"lo": -math.inf, "hi": math.inf}),  # zeros: by its numbers
    "threshold": ActRow({"hi": math.inf}, sparsifies=True, param=True),  # x > theta ? min(x, hi) : 0
    "leaky_relu": _row("leaky_relu", "LeakyRelu", {"alpha": 0.01}, torch_numbers=("negative_slope",),
                       onnx_numbers={"alpha": 0.01}, module="LeakyReLU"),
    "prelu": ActRow(param=True),
    "elu": ActRow({"alpha": 1.0}, onnx="Elu", onnx_numbers={"alpha": 1.0}, module="ELU"),
    "selu": _row("selu", module="SELU"),
    "celu": _row("celu", "Celu", {"alpha": 1.0}, torch_numbers=("alpha",), onnx_numbers={"alpha": 1.0},
                 module="CELU"),
    "softplus": _row("softplus", "Softplus", {"beta": 1.0, "limit": 20.0},
                     torch_numbers=("beta", "threshold"), keeps_zero=False, module="Softplus"),
    "softsign": _row("softsign", "Softsign", module="Softsign"),
    "sigmoid": _row("sigmoid", "Sigmoid", keeps_zero=False, module="Sigmoid"),
    "logsigmoid": ActRow(torch=("log_sigmoid", "log_sigmoid_forward"), keeps_zero=False, module="LogSigmoid"),
    "hardsigmoid": _row("hardsigmoid", "HardSigmoid", {"alpha": 1.0 / 6.0, "beta": 0.5},
                        onnx_numbers={"alpha": 0.2, "beta": 0.5}, keeps_zero=False, sparsifies=True),
    "tanh": _row("tanh", "Tanh", module="Tanh"),
    "hardtanh": _row("hardtanh", "", {"lo": -1.0, "hi": 1.0}, torch_numbers=("min_val", "max_val")),  # a clip
    "silu": _row("silu", module="SiLU"),
    "gelu": ActRow(module="GELU"),
    "gelu_tanh": ActRow(),
    "hardswish": _row("hardswish", "HardSwish", sparsifies=True, module="Hardswish"),
    "scaled_hardswish": ActRow({"alpha": 1.0, "beta": 1.0}, keeps_zero=False),  # alpha * hardswish(x) + beta
    "mish": _row("mish", "Mish", module="Mish"),
    "exp": _row("exp", "Exp", keeps_zero=False),
    "log": _row("log", "Log", keeps_zero=False),
    "sqrt": _row("sqrt", "Sqrt"),
    "rsqrt": _row("rsqrt", keeps_zero=False),
    "reciprocal": _row("reciprocal", "Reciprocal", keeps_zero=False),
    "square": _row("square"),
    "neg": _row("neg", "Neg"),
    "abs": _row("abs", "Abs"),
    "sign": _row("sign", "Sign"),
    "floor": _row("floor", "Floor"),
    "ceil": _row("ceil", "Ceil"),
    "round": _row("round", "Round"),
    # alpha * clip(round(x / alpha), lo, hi)
    "quantize": ActRow({"alpha": 1.0, "lo": -math.inf, "hi": math.inf}),
    "trunc": _row("trunc"),
    "erf": _row("erf", "Erf"),
    "sin": _row("sin", "Sin"),
    "cos": _row("cos", "Cos", keeps_zero=False),
    "tan": _row("tan", "Tan"),
    "atan": _row("atan", "Atan"),
    "asin": _row("asin", "Asin"),
    "acos": _row("acos", "Acos", keeps_zero=False),
    "sinh": _row("sinh", "Sinh"),
    "cosh": _row("cosh", "Cosh", keeps_zero=False),
    "asinh": _row("asinh", "Asinh"),
    "acosh": _row("acosh", "Acosh", keeps_zero=False),
    "atanh": _row("atanh", "Atanh"),
}
# fmt: on
ACT_KINDS: dict[str, dict[str, float]] = {kind: dict(row.numbers) for kind, row in ACTS.items()}
ACT_PARAM = {kind for kind, row in ACTS.items() if row.param}


@dataclass(frozen=True, eq=False)
class Act:
    """An elementwise function: ``kind`` of :data:`ACTS` with its numbers.

    ``param``: float32 array of 1 or C numbers for ``threshold`` (theta: ``x > theta ? x : 0``, NaN stays NaN)
    and ``prelu`` (slope). Channels are dimension 1.
    """

    kind: str
    alpha: float = 0.0
    beta: float = 0.0
    lo: float = -math.inf
    hi: float = math.inf
    limit: float = 0.0
    param: Array | None = None

    @staticmethod
    def of(kind: str, *, param: Array | None = None, **numbers: float) -> Act:
        """An activation with PyTorch's defaults for the numbers not given.

        Raises:
            UnsupportedError: the kind is unknown.
            InputError: a number that the kind does not take, or a parameter array that is missing.
        """
        if kind not in ACTS:
            raise UnsupportedError(f"activation {kind!r} is not known; these are: {', '.join(ACTS)}")
        row = ACTS[kind]
        extra = set(numbers) - set(row.numbers)
        if extra:
            raise InputError(f"activation {kind!r} does not take {', '.join(sorted(extra))}")
        if kind == "hardtanh":
            merged = {**row.numbers, **numbers}
            return Act("clip", lo=merged["lo"], hi=merged["hi"])
        if (param is not None) != row.param:
            raise InputError(f"activation {kind!r} {'needs' if row.param else 'takes no'} array")
        if param is not None:
            param = np.ascontiguousarray(param, dtype=np.float32).reshape(-1)
        return Act(kind, param=param, **{**row.numbers, **numbers})

    @property
    def sparsifies(self) -> bool:
        """Whether it gives exact zeros for a whole range of inputs."""
        if self.kind in ("clip", "quantize"):
            return self.lo == 0.0 or self.hi == 0.0
        return ACTS[self.kind].sparsifies

    @property
    def keeps_zero(self) -> bool:
        """Whether f(0) = 0."""
        if self.kind in ("clip", "quantize"):
            return self.lo <= 0.0 <= self.hi
        if self.kind == "threshold":
            assert self.param is not None
            return bool((self.param >= 0).all())
        return ACTS[self.kind].keeps_zero

    def __str__(self) -> str:
        numbers = [f"{k}={getattr(self, k):g}" for k in ACTS[self.kind].numbers]
        if self.param is not None:
            numbers.append(f"param={show(self.param)}")
        return self.kind + (f"({', '.join(numbers)})" if numbers else "")


def act_fields(act: Act | None) -> tuple[dict[str, str], dict[str, list[float]], dict[str, Any]]:
    if act is None:
        return {}, {}, {}
    floats = {f"act_{k}": [float(getattr(act, k))] for k in ("alpha", "beta", "lo", "hi", "limit")}
    arrays = {} if act.param is None else {"act_param": np.ascontiguousarray(act.param, np.float32)}
    return {"act": act.kind}, floats, arrays
