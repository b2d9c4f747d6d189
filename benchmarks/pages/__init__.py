"""The tables of README.md and docs, one module a page. A table is a function marked ``@table``."""

from importlib import import_module
from pkgutil import iter_modules

from .common import ROOT, TABLES

__all__ = ["ROOT", "TABLES"]

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")
