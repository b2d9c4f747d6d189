"""What modules of the package can do that plain modules cannot: load names when they are asked for, and be called.

:func:`lazy` keeps imports quick, and makes every dotted name that the documentation writes exist from the first line
of a program. :func:`make_callable` is for packages called like the function of the same name: ``actzip.profile``,
``actzip.sparsify`` and ``actzip.quantize`` are functions of the public API and packages at the same time. Importing a
package binds it to its name in ``actzip``, so the package itself must be callable.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["lazy", "make_callable"]


def lazy(package: str, homes: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: names that are imported on first use, and its submodules.

    Args:
        homes: for each name the submodule that defines it (``{"mixed": "mixup"}``). A name that is also a submodule's
            stands for that submodule, so such a submodule has to be callable.
    """
    homes = homes or {}

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if not name.startswith("_"):
            path = f"{package}.{name}"
            try:
                return importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__dict__["_call"])(*args, **kwargs)


def make_callable(module: str, function: str) -> None:
    """Calling the imported ``module`` calls its attribute ``function`` from now on."""
    this = sys.modules[module]
    this.__dict__["_call"] = function
    this.__class__ = _CallableModule
