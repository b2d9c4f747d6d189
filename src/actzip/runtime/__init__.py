"""Running networks on packed activations: capture -> Graph -> passes -> Plan -> native engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy
from actzip.runtime.compiled import CompiledModel, compile, compile_graph, load
from actzip.runtime.explain import Explanation

__all__ = ["CompiledModel", "Explanation", "compile", "compile_graph", "load"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)
