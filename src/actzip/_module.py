"""Packages that are called like the function of the same name: ``actzip.quantize(...)``, ``actzip.quantize.lsq``.

``actzip.profile``, ``actzip.sparsify`` and ``actzip.quantize`` are functions of the public API and packages at the
same time. Importing a package binds it to its name in ``actzip``, so the package itself must be callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["make_callable"]


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__dict__["_call"])(*args, **kwargs)


def make_callable(module: str, function: str) -> None:
    """Calling the imported ``module`` calls its attribute ``function`` from now on."""
    this = sys.modules[module]
    this.__dict__["_call"] = function
    this.__class__ = _CallableModule
