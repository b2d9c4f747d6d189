"""``actzip.split``: a network in two."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from actzip.activations import eval_mode
from actzip.checks import flag, shown
from actzip.errors import InputError
from actzip.runtime import compile as compile_model
from actzip.runtime import graph as g
from actzip.runtime.compiled import CompiledModel
from actzip.runtime.from_torch import Builder
from actzip.runtime.models import GraphNet, load_model
from actzip.runtime.tracing import trace
from actzip.split.cut import Cut, Layers, cut_graph, cuts, find_cut, named_layers
from actzip.split.program import cut_program

__all__ = ["Network", "Parts", "open_network", "split"]


class Parts(NamedTuple):
    """The two sides of a cut network: ``tail(head(x))`` is what the network gives."""

    head: Any
    tail: Any


def split(
    model: Any,
    at: int | str,
    example: Any = None,
    *,
    compile: bool = False,
    threads: int | None = None,
    weights: str | None = None,
    trust: bool = False,
) -> Parts:
    """``head, tail = split(model, at)``: the network in two, whose composition is the network.

    Modules run the operators that the model runs, so ``tail(head(x))`` is ``model(x)`` bit for bit;
    the parts share the model's parameters. Compiled parts equal a compiled whole within float
    rounding. Where several maps cross, the head gives a tuple, and the tail takes it.

    Args:
        model: an ``nn.Module`` (taken in eval mode), a compiled model, or a name, an import path, a
            ``.pt2`` or an ``.onnx`` file, as :func:`actzip.load` takes.
        at: the name of a layer (of a submodule, or of a node of a file; the cut is behind it), or
            the number of a cut (:func:`actzip.split.api.Network.cuts`, first column of ``actzip
            split``).
        example: an input, float32 (N, ...); a module needs one, names and files know theirs.
        compile: give compiled models instead of modules; threads: of those.
        weights: a safetensors file for the model.
        trust: whether an exported program may be read (:func:`actzip.load`).

    Raises:
        LayerError: an unknown layer, or one that runs several times (a loop).
        InputError: a cut over constants, at the end, or past which the input is read; a model with
            several inputs.
        UnsupportedError: operators that the engine does not have.
    """
    flag(compile, "compile")
    if isinstance(model, CompiledModel):
        return _split_compiled(model, at)
    network = open_network(model, example, weights=weights, trust=trust)
    cut = find_cut(network.graph, at, network.layers)
    return network.compiled(cut, threads=threads) if compile else network.parts(cut)


@dataclass
class Network:
    """A network that can be cut.

    Attributes:
        name: how it is called.
        model: the module, in eval mode.
        graph: what it computes.
        layers: names of its layers.
        example: an input.
        program, nodes: of a module: its exported program, and its node for each value of the graph.
    """

    name: str
    model: nn.Module
    graph: g.Graph
    layers: Layers
    example: Tensor
    program: Any = None
    nodes: dict[str, fx.Node] = field(default_factory=dict)

    def cuts(self) -> list[Cut]:
        """Every place where it can be cut."""
        return [
            c
            for c in cuts(self.graph, self.layers)
            if self.program is None or self.nodes.keys() >= set(c.values)
        ]

    def parts(self, cut: Cut) -> Parts:
        """Two modules, bit for bit the network."""
        if self.program is None:
            return Parts(*map(GraphNet, cut_graph(self.graph, cut.values)))
        if missing := [v for v in cut.values if v not in self.nodes]:
            raise InputError(f"{missing[0]!r} is inside an operator of PyTorch, which cannot be cut")
        return Parts(*cut_program(self.program, [self.nodes[v] for v in cut.values]))

    def compiled(
        self, cut: Cut, *, example: Any = None, threads: int | None = None, tune: bool = True
    ) -> Parts:
        """Two compiled models; ``example``: typical inputs."""
        x = self.example if example is None else example
        head, tail = cut_graph(self.graph, cut.values)
        made = compile_model(head, x, threads=threads, tune=tune)
        return Parts(made, compile_model(tail, _maps(made(x)), threads=threads, tune=tune))


def _maps(out: Any) -> Any:
    """A compiled head's outputs as the example of its tail."""
    return tuple(out) if isinstance(out, (tuple, list)) else out


def open_network(
    model: Any, example: Any = None, *, weights: str | None = None, trust: bool = False
) -> Network:
    """The network of a module, a name or a file.

    Raises:
        InputError: another kind of model, or no example for a module, or several inputs.
        UnsupportedError: operators that the engine does not have.
    """
    name = type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        name = os.path.basename(os.fspath(model))
        net, shape, _, _ = load_model(os.fspath(model), trust=trust)
        generator = torch.Generator().manual_seed(0)
        fixed = getattr(net, "batch", None) or 1
        example = torch.randn((fixed, *shape), generator=generator) if example is None else example
        model = net
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, a compiled model, a name or a path, not {shown(model)}"
        )
    if weights is not None:
        from actzip.models import load_weights

        load_weights(model, weights)
    for m in model.modules():
        m.training = False
    if isinstance(model, GraphNet):
        return _graph_network(name, model, example)
    return _module_network(name, model, example)


def _graph_network(name: str, model: GraphNet, example: Any) -> Network:
    if len(model.graph.inputs) != 1:
        names = ", ".join(model.graph.inputs)
        raise InputError(
            f"the model has {len(model.graph.inputs)} inputs ({names}); a network that is cut takes one"
        )
    stacks = []
    for path in model.names:
        parts = path.split(".")
        folders = [".".join(parts[: i + 1]) for i in range(len(parts))]
        stacks.append({f: f for f in folders})
    x = _tensor(model.example() if example is None else example)
    graph = model.to_graph([tuple(x.shape)])
    return Network(name, model, graph, named_layers(stacks, []), x)


def _module_network(name: str, model: nn.Module, example: Any) -> Network:
    if example is None:
        raise InputError("an nn.Module needs an example input: split(model, at, example)")
    x = _tensor(example)
    with eval_mode(model), torch.no_grad():
        traced = trace(model, (x,), {}, x.shape[0] if x.ndim else None)
        builder = Builder(traced.program, name)
        graph = builder.build()
    if len(graph.inputs) != 1:
        raise InputError(f"the model reads {len(graph.inputs)} inputs; a network that is cut takes one")
    if (traced.least, traced.most) != (1, None):
        graph.meta["batches"] = (traced.least, traced.most)
    nodes: dict[str, fx.Node] = {}
    for node, found in builder.env.items():
        value = getattr(found, "name", None)
        if value in graph.values and node.op == "call_function":
            nodes.setdefault(value, node)
    stacks: list[dict[str, str]] = []
    before: dict[str, str] = {}
    owner = {v: _stack(n) for v, n in nodes.items()}
    for n in graph.nodes:  # an operator may become several nodes: all but the last are nameless values
        before = owner.get(n.output, before)
        stacks.append(before)
    layers = named_layers(stacks, [n for n, _ in model.named_modules()])
    return Network(name, model, graph, layers, x, traced.program, nodes)


def _stack(node: fx.Node) -> dict[str, str]:
    """Key of a module's call -> the module's path, of all modules that are running."""
    return {k: path for k, (path, _) in (node.meta.get("nn_module_stack") or {}).items()}


def _tensor(example: Any) -> Tensor:
    if isinstance(example, (tuple, list)) and len(example) == 1:
        example = example[0]
    if isinstance(example, (tuple, list, dict)):
        raise InputError(f"a network that is cut takes one input; the example holds {len(example)}")
    try:
        x = torch.as_tensor(example)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"example must be a tensor or an array, not {shown(example)}") from error
    if x.dtype != torch.float32:
        raise InputError(f"example of type {x.dtype}; the engine takes float32")
    return x


def _split_compiled(model: CompiledModel, at: int | str) -> Parts:
    if len(model.graph.inputs) != 1:
        raise InputError(f"the model has {len(model.graph.inputs)} inputs; a network that is cut takes one")
    stacks = [{n.name: n.name} for n in model.graph.nodes]
    cut = find_cut(model.graph, at, named_layers(stacks, []))
    head, tail = cut_graph(model.graph, cut.values)
    x = tuple(torch.from_numpy(a.copy()) for a in model._sample)
    made = compile_model(head, x, threads=model.threads, tune=False)
    return Parts(made, compile_model(tail, _maps(made(*x)), threads=model.threads, tune=False))
