"""Nested outputs (dicts, lists, tuples) from a flat list, as PyTorch's tree specifications in JSON
say it, without PyTorch; as PyTorch's own object where JSON cannot say it (a named tuple)."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from actzip.errors import UnsupportedError

__all__ = ["class_of", "is_plain", "plain_outputs", "unflattener"]

_PLAIN: dict[str | None, Callable[[Any, list[Any]], Any]] = {
    "builtins.list": lambda _, children: children,
    "builtins.tuple": lambda _, children: tuple(children),
    "builtins.dict": lambda keys, children: dict(zip(json.loads(keys), children, strict=True)),
    "collections.OrderedDict": lambda keys, children: OrderedDict(
        zip(json.loads(keys), children, strict=True)
    ),
}


def is_plain(spec: Any) -> bool:
    """Whether nothing but dicts, lists, tuples and leaves is in ``spec``."""
    if spec is not None and not isinstance(spec, str):
        return False

    def plain(node: dict[str, Any]) -> bool:
        return node["type"] is None or (node["type"] in _PLAIN and all(map(plain, node["children_spec"])))

    return spec is None or plain(json.loads(spec)[1])


def unflattener(spec: Any) -> Callable[[list[Any]], Any]:
    """``leaves -> structure``; other types than the plain ones (named tuples, registered classes)
    are PyTorch's business."""
    if not is_plain(spec):
        from torch.utils import _pytree as pytree

        tree = pytree.treespec_loads(spec) if isinstance(spec, str) else spec
        return lambda leaves: pytree.tree_unflatten(leaves, tree)
    root = json.loads(spec)[1]

    def build(node: dict[str, Any], leaves: Iterator[Any]) -> Any:
        if node["type"] is None:
            return next(leaves)
        return _PLAIN[node["type"]](node["context"], [build(c, leaves) for c in node["children_spec"]])

    return lambda leaves: build(root, iter(leaves))


def plain_outputs(spec: Any, leaves: int) -> tuple[str, list[int]]:
    """``spec`` in dicts, lists and tuples alone, as JSON, and the order in which it takes the ``leaves``: an
    object of a class becomes the dict of its fields, a named tuple a tuple.

    Raises:
        UnsupportedError: a class without fields.
    """
    from torch.utils import _pytree as pytree

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value] if type(value) is list else tuple(plain(v) for v in value)
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return {k: plain(v) for k, v in fields.items() if v is not None}
        if type(value) is not int:
            raise UnsupportedError(
                f"the model's outputs are of a class of their own, {class_of(spec)}; a file holds dicts, "
                "lists and tuples only"
            )
        return value

    try:
        tree = pytree.treespec_loads(spec) if isinstance(spec, str) else spec
        order, made = pytree.tree_flatten(plain(pytree.tree_unflatten(list(range(leaves)), tree)))
        return pytree.treespec_dumps(made), order
    except UnsupportedError:
        raise
    except Exception as error:  # classes that are not registered here, or that refuse numbers
        raise UnsupportedError(
            f"the model's outputs are of a class of their own, {class_of(spec)}, which has no fields to "
            f"be saved: {error}"
        ) from error


def class_of(spec: Any) -> str:
    """The name of the first class in ``spec`` that is not plain."""
    if isinstance(spec, str):
        nodes = [json.loads(spec)[1]]
        for node in nodes:
            if node["type"] is not None and node["type"] not in _PLAIN:
                return str(node["type"])
            nodes.extend(node["children_spec"])
        return "dict"
    context = getattr(spec, "context", None)
    kind = context if isinstance(context, type) else spec.type
    if kind in (list, tuple, dict, OrderedDict):
        return next((class_of(c) for c in spec.children_specs if not c.is_leaf()), kind.__name__)
    return str(kind.__qualname__)
