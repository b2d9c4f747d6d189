"""ONNX's Loop, whose number of steps is known: its steps one after the other, as exporters write
recurrent layers that they have no operator for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.runtime import ops
from actzip.runtime.graph import Sym
from actzip.runtime.onnx_file import tensor_array
from actzip.runtime.onnx_node import OnnxNode, reads
from actzip.runtime.registry import Mask, Probed

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer

__all__ = ["unrolled"]

_MOST_NODES = 8192  # of all steps


def unrolled(imp: Importer, node: OnnxNode, inputs: list[Any]) -> list[Any]:
    """What a Loop gives: its last states, then what it gathers of all steps.

    Raises:
        UnsupportedError: the number of steps depends on the input, or is very large.
        InputError: its body does not fit.
    """
    steps = _Steps(imp, node)
    most, goes_on = inputs[0], inputs[1] if len(inputs) > 1 else None
    if most is None and goes_on is None:
        raise node.refuse("it never ends")
    count = 2**31 if most is None else int(_number(node, most, "the number of steps"))
    states = inputs[2:]
    if len(states) != steps.states:
        raise node.wrong(f"{len(states)} states for a body of {steps.states}")
    gathered: list[list[Any]] = [[] for _ in steps.body.output[1 + steps.states :]]
    go, step = goes_on is None or bool(_number(node, goes_on, "its condition")), 0
    while go and step < count:
        go, states, more = steps.run(step, states)
        for row, value in zip(gathered, more, strict=True):
            row.append(value)
        step += 1
    imp.current = node
    return [*states, *(_stacked(imp, node, row) for row in gathered)]


def _number(node: OnnxNode, x: Any, what: str) -> Any:
    if not isinstance(x, np.ndarray) or x.size != 1:
        raise node.refuse(f"{what} depends on the input")
    return x.reshape(-1)[0]


def _stacked(imp: Importer, node: OnnxNode, row: list[Any]) -> Any:
    if not row:
        raise node.refuse("no step")
    if all(isinstance(x, np.ndarray) for x in row):
        return np.stack(row)
    if any(isinstance(x, (Probed, Mask)) for x in row):
        raise node.refuse("it gathers what is no tensor of numbers")
    parts = [imp.reshape(x, (1, *imp.shape(x))) for x in row]
    return parts[0] if len(parts) == 1 else imp.emit(ops.Concat, *parts, axis=0)


class _Steps:
    """The body of a Loop, whose nodes that read nothing of a step run in the first one only."""

    def __init__(self, imp: Importer, node: OnnxNode) -> None:
        self.imp, self.node = imp, node
        attribute = node.attributes.get("body")
        if attribute is None:
            raise node.wrong("no body")
        self.body = attribute.g
        self.states = len(self.body.input) - 2
        if self.states < 0 or len(self.body.output) < 1 + self.states:
            raise node.wrong(f"a body of {len(self.body.input)} inputs and {len(self.body.output)} outputs")
        for tensor in self.body.initializer:
            imp.env[tensor.name] = tensor_array(
                imp.onnx, tensor, f"{node.where}: initialiser {tensor.name!r}"
            )
        written = {o for inner in self.body.node for o in inner.output}
        for name in written:
            imp.env.pop(name, None)  # of the Loop's run before, inside another one
        for value in self.body.input:
            imp.env[value.name] = np.zeros(0)  # known to order()
        self.nodes = [OnnxNode(imp, n, i) for i, n in enumerate(imp.order(self.body.node))]
        self.changing = self._changing()

    def _changing(self) -> set[str]:
        """Values that differ from step to step."""
        inputs = [v.name for v in self.body.input]
        outputs = [v.name for v in self.body.output[1 : 1 + self.states]]
        same = {o: n.proto.input[0] for n in self.nodes if n.op == "Identity" for o in n.proto.output}
        changing = set(inputs[:2])
        for name, out in zip(inputs[2:], outputs, strict=True):
            while out in same:
                out = same[out]
            if out != name:
                changing.add(name)
        for n in self.nodes:
            if changing.intersection(reads(n.proto)):
                changing.update(n.proto.output)
        return changing

    def run(self, step: int, states: list[Any]) -> tuple[bool, list[Any], list[Any]]:
        """Whether another step follows, the states then, and what this one adds."""
        imp, node = self.imp, self.node
        if (step + 1) * len(self.nodes) > _MOST_NODES:
            raise node.refuse(f"more than {step} steps of {len(self.nodes)} nodes")
        given: list[Any] = [np.array(step, np.int64), np.array(True), *states]
        imp.env.update(zip((v.name for v in self.body.input), given, strict=True))
        for n in self.nodes:
            if step == 0 or self.changing.intersection(n.proto.output):
                imp.run(OnnxNode(imp, n.proto, n.index, f"{node.name}/{step}/"))
        imp.current = node
        missing = [v.name for v in self.body.output if v.name not in imp.env]
        if missing:
            raise node.wrong(f"its body does not write {missing[0]!r}")
        go, *values = (imp.env[v.name] for v in self.body.output)
        after, more = values[: self.states], values[self.states :]
        for before, value in zip(states, after, strict=True):
            if _form(imp, before) != _form(imp, value):
                raise node.refuse("a state changes its shape")
        return bool(_number(node, go, "its condition")), after, more


def _form(imp: Importer, x: Any) -> Any:
    """What a state must keep, so that every step is alike: its shape, where it is a tensor."""
    if not isinstance(x, (str, np.ndarray, Probed)):
        return None
    return [(d.mul, True) if isinstance(d, Sym) else (int(d), False) for d in imp.shape(x)]
