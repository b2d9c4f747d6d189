"""A Graph as plain data: what JSON can say, and the arrays beside it. Nothing of it is ever executed.

``to_data(graph)`` gives ``(data, arrays)``: ``data`` of dicts, lists, numbers and strings, in which
an array stands as ``{"array": key}``; ``from_data(data, arrays)`` gives the graph back and checks
it as any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actzip.errors import DataError, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops as _ops  # noqa: F401  (fills the table of operators)
from actzip.runtime.registry import node_classes

__all__ = ["all_to_data", "from_data", "to_data"]

_NUMBERS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class _Encoder:
    def __init__(self) -> None:
        self.arrays: dict[str, g.Array] = {}
        self._keys: dict[int, str] = {}  # an array that stands in two places is kept once

    def array(self, a: g.Array, hint: str) -> dict[str, str]:
        key = self._keys.get(id(a))
        if key is None:
            key = hint if hint not in self.arrays else f"{hint}#{len(self.arrays)}"
            self._keys[id(a)] = key
            self.arrays[key] = a
        return {"array": key}

    def encode(self, value: Any, hint: str) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, np.ndarray):
            return self.array(value, hint)
        if isinstance(value, np.generic):
            return self.encode(value.item(), hint)
        if isinstance(value, g.Sym):
            return {"N": value.mul}
        if isinstance(value, g.Act):
            return {"act": self.fields(value, hint)}
        if isinstance(value, tuple):
            return {"tuple": [self.encode(v, f"{hint}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, list):
            return [self.encode(v, f"{hint}.{i}") for i, v in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {"dict": {k: self.encode(v, f"{hint}.{k}") for k, v in value.items()}}
        raise UnsupportedError(f"{hint} is a {type(value).__name__}, which a file cannot hold as data")

    def fields(self, item: Any, hint: str) -> dict[str, Any]:
        """The fields of a dataclass that differ from their defaults."""
        found = {}
        for f in dataclasses.fields(item):
            value = getattr(item, f.name)
            if isinstance(value, np.ndarray) or f.default is dataclasses.MISSING or value != f.default:
                found[f.name] = self.encode(value, f"{hint}.{f.name}")
        return found


def to_data(graph: g.Graph) -> tuple[dict[str, Any], dict[str, g.Array]]:
    """The graph as data and the arrays that it names.

    Raises:
        UnsupportedError: a graph whose call takes arguments that are no data (objects of Python).
    """
    (data,), arrays = all_to_data([graph])
    return data, arrays


def all_to_data(graphs: Sequence[g.Graph]) -> tuple[list[dict[str, Any]], dict[str, g.Array]]:
    """:func:`to_data` of graphs that share arrays."""
    e = _Encoder()
    return [_graph_data(e, graph) for graph in graphs], e.arrays


def _graph_data(e: _Encoder, graph: g.Graph) -> dict[str, Any]:
    return {
        "name": graph.name,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "nodes": [{"op": n.op, **e.fields(n, n.name)} for n in graph.nodes],
        "values": [e.fields(v, v.name) for v in graph.values.values()],
        "constants": {k: e.array(a, k) for k, a in graph.constants.items()},
        "meta": e.encode(dict(graph.meta), "meta"),
    }


class _Decoder:
    def __init__(self, arrays: Mapping[str, g.Array]) -> None:
        self.arrays = arrays

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        if len(value) != 1:
            raise DataError(f"a value of {len(value)} kinds: {', '.join(map(repr, value))}")
        ((kind, inner),) = value.items()
        if kind == "array":
            if inner not in self.arrays:
                raise DataError(f"array {inner!r} is missing")
            return self.arrays[inner]
        if kind == "float":
            return _NUMBERS[inner]
        if kind == "N":
            return g.Sym(int(inner))
        if kind == "act":
            return g.Act(**self.fields(g.Act, inner))
        if kind == "tuple":
            return tuple(self.decode(v) for v in inner)
        if kind == "dict":
            return {str(k): self.decode(v) for k, v in inner.items()}
        raise DataError(f"a value of the unknown kind {kind!r}")

    def fields(self, cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(data) - known:
            raise DataError(f"{cls.__name__} has no field {', '.join(map(repr, sorted(unknown)))}")
        return {k: self.decode(v) for k, v in data.items()}

    def node(self, data: dict[str, Any]) -> g.Node:
        data = dict(data)
        op = data.pop("op")
        cls = node_classes().get(op)
        if cls is None:
            raise DataError(f"operator {op!r} is not known to this version of actzip")
        return cls(**self.fields(cls, data))

    def graph(self, data: dict[str, Any]) -> g.Graph:
        values = [g.Value(**self.fields(g.Value, v)) for v in data["values"]]
        return g.Graph(
            name=str(data["name"]),
            inputs=[str(v) for v in data["inputs"]],
            outputs=[str(v) for v in data["outputs"]],
            nodes=[self.node(n) for n in data["nodes"]],
            values={v.name: v for v in values},
            constants={str(k): self.decode(a) for k, a in data["constants"].items()},
            meta=self.decode(data["meta"]),
        )


def from_data(data: Mapping[str, Any], arrays: Mapping[str, g.Array]) -> g.Graph:
    """The graph that :func:`to_data` described.

    Raises:
        DataError: not the description of a graph: a field missing, unknown or of another type, a
            shape that does not fit.
    """
    try:
        graph = _Decoder(arrays).graph(dict(data))
        graph.validate()
    except DataError:
        raise
    except (InputError, UnsupportedError) as error:
        raise DataError(f"the graph is damaged: {error}") from error
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DataError(f"the graph is damaged: {type(error).__name__}: {error}") from error
    return graph
