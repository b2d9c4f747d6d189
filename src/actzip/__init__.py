"""actzip: make the zeros of trained CNNs pay.

The public API and nothing else. Everything is imported on first use, so that ``import actzip`` and
``import actzip.codec`` stay quick and never import torch by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy
from actzip._version import __version__ as __version__
from actzip.errors import ActzipError

if TYPE_CHECKING:
    from actzip._module import as_package
    from actzip.accelerate import accelerate as _accelerate
    from actzip.codec.decode import decode as decode
    from actzip.codec.encode import encode as encode
    from actzip.profile import profile as _profile
    from actzip.quantize import quantize as _quantize
    from actzip.runtime import compile as compile
    from actzip.runtime.models import load as load
    from actzip.sparsify import ActivationPenalty as ActivationPenalty
    from actzip.sparsify import sparsify as _sparsify
    from actzip.split import split as _split

    accelerate = as_package(_accelerate)
    profile = as_package(_profile)
    quantize = as_package(_quantize)
    sparsify = as_package(_sparsify)
    split = as_package(_split)
else:
    #: Functions and classes and their homes. Other public names are packages; ``accelerate``,
    #: ``profile``, ``quantize``, ``sparsify`` and ``split`` are called like functions.
    __getattr__ = lazy(
        __name__,
        {
            "ActivationPenalty": "sparsify",
            "compile": "runtime",
            "decode": "codec",
            "encode": "codec",
            "load": "runtime.models",
        },
    )

__all__ = [
    "ActivationPenalty",
    "ActzipError",
    "accelerate",
    "compile",
    "decode",
    "encode",
    "load",
    "profile",
    "quantize",
    "sparsify",
    "split",
]


def __dir__() -> list[str]:
    import pkgutil

    packages = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted({*__all__, *packages, "__version__"})
