"""Running networks on packed activations: capture -> Graph -> passes -> Plan -> native engine."""

from __future__ import annotations

from actzip.runtime.compiled import CompiledModel, compile, compile_graph, load
from actzip.runtime.explain import Explanation

__all__ = ["CompiledModel", "Explanation", "compile", "compile_graph", "load"]
