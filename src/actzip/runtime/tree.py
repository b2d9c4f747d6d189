"""Nested outputs (dicts, lists, tuples) from a flat list, as PyTorch's tree specifications in JSON
say it, without PyTorch."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["is_plain", "unflattener"]

_PLAIN: dict[str | None, Callable[[Any, list[Any]], Any]] = {
    "builtins.list": lambda _, children: children,
    "builtins.tuple": lambda _, children: tuple(children),
    "builtins.dict": lambda keys, children: dict(zip(json.loads(keys), children, strict=True)),
    "collections.OrderedDict": lambda keys, children: OrderedDict(
        zip(json.loads(keys), children, strict=True)
    ),
}


def is_plain(spec: str | None) -> bool:
    """Whether nothing but dicts, lists, tuples and leaves is in ``spec``."""

    def plain(node: dict[str, Any]) -> bool:
        return node["type"] is None or (node["type"] in _PLAIN and all(map(plain, node["children_spec"])))

    return spec is None or plain(json.loads(spec)[1])


def unflattener(spec: str) -> Callable[[list[Any]], Any]:
    """``leaves -> structure``; other types than the plain ones (named tuples, registered classes)
    are PyTorch's business."""
    if not is_plain(spec):
        from torch.utils import _pytree as pytree

        tree = pytree.treespec_loads(spec)
        return lambda leaves: pytree.tree_unflatten(leaves, tree)
    root = json.loads(spec)[1]

    def build(node: dict[str, Any], leaves: Iterator[Any]) -> Any:
        if node["type"] is None:
            return next(leaves)
        return _PLAIN[node["type"]](node["context"], [build(c, leaves) for c in node["children_spec"]])

    return lambda leaves: build(root, iter(leaves))
