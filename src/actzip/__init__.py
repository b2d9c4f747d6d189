"""actzip: make the zeros of trained CNNs pay.

The public API and nothing else. Everything is imported on first use, so that ``import actzip`` and
``import actzip.codec`` stay quick and never import torch by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actzip.errors import ActzipError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from actzip.codec.decode import decode as decode
    from actzip.codec.encode import encode as encode
    from actzip.profile import profile as profile
    from actzip.quantize import quantize as quantize
    from actzip.runtime import compile as compile
    from actzip.runtime.models import load as load
    from actzip.sparsify import ActivationPenalty as ActivationPenalty
    from actzip.sparsify import sparsify as sparsify

_LAZY = {
    "encode": "actzip.codec",
    "decode": "actzip.codec",
    "profile": "actzip.profile",
    "sparsify": "actzip.sparsify",
    "ActivationPenalty": "actzip.sparsify",
    "quantize": "actzip.quantize",
    "compile": "actzip.runtime",
    "load": "actzip.runtime.models",
}

__all__ = [
    "ActivationPenalty",
    "ActzipError",
    "compile",
    "decode",
    "encode",
    "load",
    "profile",
    "quantize",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'actzip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
