"""A module cut as PyTorch runs it: an exported program in two, operator by operator, so that the
numbers stay what they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from actzip.errors import InputError, UnsupportedError

__all__ = ["Part", "cut_program"]


class Part(nn.Module):
    """One side of a cut network: the head gives the maps that cross, a tuple where there are
    several; the tail takes them, one by one or as that tuple.

    In eval mode, whatever is asked; parameters are the model's own, not copies.
    """

    def __init__(self, body: fx.GraphModule, spec: Any = None) -> None:
        super().__init__()
        self.body = body
        self._spec = spec
        self.train(False)

    def forward(self, *maps: Any) -> Any:
        if len(maps) == 1 and isinstance(maps[0], (tuple, list)):
            maps = tuple(maps[0])
        out = self.body(*maps)
        if self._spec is not None:
            return pytree.tree_unflatten(list(out), self._spec)
        return out[0] if len(out) == 1 else tuple(out)

    def train(self, mode: bool = True) -> Part:
        """Stays in eval mode: the operators are those of inference."""
        return super().train(False)


def cut_program(program: Any, values: Sequence[fx.Node]) -> tuple[Part, Part]:
    """Head and tail of an exported program at the nodes ``values``.

    Raises:
        InputError: the program has several inputs.
        UnsupportedError: the outputs need something else of the head too.
    """
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in _user_inputs(program)]
    if len(inputs) != 1:
        raise InputError(f"the model has {len(inputs)} inputs; a network that is cut takes one")
    outputs = next(n for n in program.graph.nodes if n.op == "output").args[0]
    head = _Side(program, inputs, "head").build(list(values))
    tail = _Side(program, list(values), "tail").build(list(outputs))
    return Part(head), Part(tail, program.call_spec.out_spec)


def _user_inputs(program: Any) -> set[str]:
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return {s.arg.name for s in program.graph_signature.input_specs if s.kind is kind}


class _Side:
    """Copies the part of a program's graph that computes something from ``given``."""

    def __init__(self, program: Any, given: list[fx.Node], name: str) -> None:
        self.program, self.given, self.name = program, given, name
        self.graph = fx.Graph()
        self.copied: dict[fx.Node, Any] = {}
        self.root: dict[str, Any] = {}
        self.lifted = _lifted(program)

    def build(self, wanted: list[Any]) -> fx.GraphModule:
        nodes = [n for n in wanted if isinstance(n, fx.Node)]
        needed = self._needed(nodes)
        for n in self.given:
            self.copied[n] = self.graph.placeholder(n.name)
        for n in self.program.graph.nodes:
            if n in needed and n not in self.copied:
                self.copied[n] = self._copy(n)
        self.graph.output([self.copied[n] if isinstance(n, fx.Node) else n for n in wanted])
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _needed(self, wanted: list[fx.Node]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            n = todo.pop()
            if n not in found:
                found.add(n)
                if n not in self.given and self._dimension(n) is None:
                    todo += n.all_input_nodes
        return found

    def _copy(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            if n.name not in self.lifted:
                raise UnsupportedError(
                    f"the {self.name} would need the input {n.name!r} too, which does not cross"
                )
            target, value = self.lifted[n.name]
            self.root[target] = value
            return self.graph.get_attr(target)
        place = self._dimension(n)
        if place is not None:
            shaped, axis = place
            return self.graph.call_function(torch.ops.aten.sym_size.int, (self.copied[shaped], axis))
        return self.graph.node_copy(n, lambda x: self.copied[x])

    def _dimension(self, n: fx.Node) -> tuple[fx.Node, int] | None:
        """Where a size that ``n`` computes stands in a shape of what is given."""
        size = n.meta.get("val")
        if not isinstance(size, torch.SymInt):
            return None
        for value in self.given:
            for axis, d in enumerate(value.meta["val"].shape):
                if isinstance(d, torch.SymInt) and d.node.expr == size.node.expr:
                    return value, axis
        return None


def _lifted(program: Any) -> dict[str, tuple[str, Tensor]]:
    """Placeholder -> (where it goes, value) of parameters, buffers and constants."""
    sig = program.graph_signature
    tables = (sig.inputs_to_parameters, sig.inputs_to_buffers, sig.inputs_to_lifted_tensor_constants)
    found = {}
    for table in tables:
        for name, target in table.items():
            state = program.state_dict
            found[name] = (target, state[target] if target in state else program.constants[target])
    return found
