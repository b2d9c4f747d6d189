"""What modules of the package can do that plain modules cannot: load names when they are asked for,
and be called.

:func:`lazy` keeps imports quick, and makes every dotted name that the documentation writes exist
from the first line of a program. :func:`make_callable` is for packages called like the function of
the same name: ``actzip.profile``, ``actzip.sparsify``, ``actzip.split`` ... are functions of the
public API and packages at the same time. Each such name stands for the package, whoever imports
what first, and the package is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    import inspect

__all__ = ["CallablePackage", "as_package", "lazy", "make_callable"]

P = ParamSpec("P")
R = TypeVar("R")


def lazy(package: str, homes: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``: names that are imported on first use, and its submodules.

    Args:
        homes: for each name the submodule that defines it (``{"mixed": "mixup"}``). None of them
            may be a submodule's name itself: importing that submodule would put it into the name's
            place.
    """
    homes = homes or {}

    def __getattr__(name: str) -> Any:
        if name in homes:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        if name.isidentifier() and not name.startswith("_"):
            path = f"{package}.{name}"
            try:
                return importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name != path:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


class CallablePackage(ModuleType, Generic[P, R]):
    """A package that can be called; its signature is the function's, and it pickles and copies as itself."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        function: Callable[P, R] = getattr(self, self.__dict__["_call"])
        return function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect

        return inspect.signature(getattr(self, self.__dict__["_call"]))

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return importlib.import_module, (self.__name__,)


def make_callable(module: str, function: str) -> None:
    """Calling the imported ``module`` calls its attribute ``function`` from now on, which may be one
    that :func:`lazy` finds."""
    this = sys.modules[module]
    this.__dict__["_call"] = function
    this.__class__ = CallablePackage


def as_package(function: Callable[P, R]) -> CallablePackage[P, R]:
    """For type checkers alone: the type of a package that is called like ``function``."""
    raise NotImplementedError
