"""An exported program in parts: what the engine has of it compiled, the rest left to PyTorch.

PyTorch's own partitioner cuts it. A part that does not compile is cut again at the node that it
fails at, which then stays in PyTorch with the reason.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from actzip.errors import ActzipError, UnsupportedError
from actzip.runtime.blame import MOST_CUTS, first_failing
from actzip.runtime.effects import untouched

__all__ = ["Closed", "Parts", "engine_of", "engine_parts", "growing", "parts_of", "trace_closed"]

_HEAVY = ("convolution", "conv1d", "conv2d", "linear", "addmm", "mm", "bmm", "matmul")


class Closed(nn.Module):
    """A graph of torch.compile as a module of its tensor inputs alone: parameters and sizes are filled in."""

    def __init__(self, gm: fx.GraphModule, plan: list[tuple[str, int, int]], static: list[Tensor]) -> None:
        super().__init__()
        self.gm = gm
        self.plan = plan
        for i, t in enumerate(static):
            self.register_buffer(f"static_{i}", t.detach())
        self.static = static

    def forward(self, *inputs: Tensor) -> Any:
        args: list[Any] = []
        for kind, i, dim in self.plan:
            if kind == "static":
                args.append(getattr(self, f"static_{i}"))
            elif kind == "size":
                args.append(inputs[i].shape[dim])
            elif kind == "number":
                args.append(i)
            else:
                args.append(inputs[i])
        return self.gm(*args)

    def of(self, gm: fx.GraphModule) -> Closed:
        """Another graph of the same arguments."""
        return Closed(gm, self.plan, self.static)


def trace_closed(module: nn.Module, examples: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """The module exported: it is known to run."""
    from actzip.runtime.tracing import trace

    batch = examples[0].shape[0] if examples[0].ndim else None
    if batch == 0:
        raise UnsupportedError("an empty batch")
    with torch.no_grad():
        dynamic = options.get("dynamic", True)
        return trace(module, examples, {}, batch, dynamic=dynamic, known=True, effects=True)


def engine_of(
    module: nn.Module, examples: tuple[Tensor, ...], options: dict[str, Any], traced: Any = None
) -> Any:
    from actzip.runtime import compile as compile_module
    from actzip.runtime.tracing import graph_of

    if any(t.dtype != torch.float32 for t in examples):
        raise UnsupportedError("an input that is not float32")
    traced = trace_closed(module, examples, options) if traced is None else traced
    return compile_module(graph_of(module, traced), examples, **options)


def growing(graph: Any, inputs: int) -> list[bool]:
    """Which inputs of an engine grow with the batch."""
    from actzip.runtime.graph import Sym

    shapes = [graph.shape(v) for v in graph.inputs]
    if len(shapes) != inputs:  # one that nothing reads is none of the engine's
        return [False] * inputs
    return [bool(s) and isinstance(s[0], Sym) for s in shapes]


def _support(views: set[str]) -> Any:
    """What the partitioner asks: whether a node may go to the engine."""
    from torch.fx.passes.operator_support import OperatorSupportBase

    from actzip.runtime.registry import TORCH

    class Support(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
            if node.op != "call_function" or node.name in views:
                return False
            if node.target is operator.getitem:
                return isinstance(node.args[0], fx.Node) and self.is_node_supported(submodules, node.args[0])
            schema = getattr(node.target, "_schema", None)
            if schema is None or any(
                not isinstance(v, Tensor) or v.dtype != torch.float32 for v in _results(node)
            ):
                return False
            operands = [n.meta.get("val") for n in node.all_input_nodes if n.op != "get_attr"]
            if any(isinstance(v, Tensor) and v.dtype != torch.float32 for v in operands):
                return False  # a part takes float32
            return schema.name.removeprefix("aten::") in TORCH

    return Support()


def _results(node: fx.Node) -> list[Any]:
    """What is read of what a node gives: of several results those that are picked."""
    value = node.meta.get("val")
    if not isinstance(value, (tuple, list)):
        return [value]
    picked = [n.args[1] if n.target is operator.getitem else None for n in node.users]
    return [value[i] if isinstance(i, int) else None for i in picked]


@dataclass
class Parts:
    """A program with its parts for the engine compiled.

    ``left``: how many operators are not in them; ``grows``: which inputs grow with the batch;
    ``failed``: nodes at which parts did not compile, and whole such parts, with the reasons.
    """

    module: fx.GraphModule
    built: int = 0
    left: int = 0
    grows: list[bool] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def parts_of(program: Any, views: set[str], examples: tuple[Tensor, ...], options: dict[str, Any]) -> Parts:
    """A program without effects with its largest supported parts, less ``views``, on the engine."""
    made: dict[tuple[str, ...], _Made] = {}
    failed: dict[str, str] = {}
    while True:
        cut = _Cut(program, views | failed.keys(), examples)
        more = cut.compile(options, made, len(failed) < MOST_CUTS)
        if not more:
            return cut.finished(made, failed, len(examples))
        failed |= more


@dataclass
class _Made:
    """What became of a part: its engine with what it reads, or why there is none."""

    call: Any = None
    dynamic: list[int] = field(default_factory=list)
    fixed: bool = False
    why: str = ""


class _Cut:
    """A program with its supported parts as modules of their own, and what each was given."""

    def __init__(self, program: Any, views: set[str], examples: tuple[Tensor, ...]) -> None:
        from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            gm = program.module()
            self.names = {n.name for n in gm.graph.nodes}
            support = _support(views)
            partitioner = CapabilityBasedPartitioner(gm, support, allows_single_node_partition=False)
            fused = partitioner.fuse_partitions(partitioner.propose_partitions(), prefix="fused_")
        self.module = fused
        calls = [n for n in fused.graph.nodes if n.op == "call_module"]
        self.nodes = [n for n in calls if str(n.target).startswith("fused_")]
        for module in (fused, *map(self.part, self.nodes)):
            _any_strides(module)
        self.values: dict[str, tuple[Any, ...]] = {}
        handles = [
            self.part(n).register_forward_pre_hook(
                lambda _m, a, name=n.target: self.values.__setitem__(name, a)
            )
            for n in self.nodes
        ]
        with torch.no_grad(), untouched(fused):
            fused(*(t.detach().clone() for t in examples))
        for handle in handles:
            handle.remove()

    def part(self, node: fx.Node) -> fx.GraphModule:
        found: fx.GraphModule = getattr(self.module, str(node.target))
        return found

    def key(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(n.name for n in self.part(node).graph.nodes)

    def compile(
        self, options: dict[str, Any], made: dict[tuple[str, ...], _Made], again: bool
    ) -> dict[str, str]:
        """Compiles the parts that are not in ``made`` yet; the nodes at which some failed, with the
        reasons, if they are to be cut ``again``."""
        blamed: dict[str, str] = {}
        for node in self.nodes:
            if self.key(node) in made or not any(_is_heavy(n) for n in self.part(node).graph.nodes):
                continue
            found = made[self.key(node)] = _Made()
            closed = _close_part(self.part(node), node, self.values.get(str(node.target), ()))
            if closed is None:
                found.why = "a part takes float32 tensors and sizes of them alone"
                continue
            module, inputs, found.dynamic, found.fixed = closed
            try:
                found.call = engine_of(module, inputs, options)
            except ActzipError as error:
                found.why = str(error)
                name = _failing(module, inputs, options) if again else ""
                if name in self.names:
                    blamed[name] = found.why
        return blamed

    def finished(self, made: dict[tuple[str, ...], _Made], failed: dict[str, str], inputs: int) -> Parts:
        """The program with the engines in the place of the parts that they were made of."""
        found, free = Parts(self.module, failed=dict(failed)), True
        for node in self.nodes:
            part, own = self.part(node), made.get(self.key(node), _Made())
            if own.call is None:
                found.failed |= {str(node.target): own.why} if own.why else {}
                continue
            output = next(n for n in part.graph.nodes if n.op == "output").args[0]
            single = not isinstance(output, (tuple, list))
            setattr(self.module, str(node.target), Part(own.call, own.dynamic, single))
            found.built += 1
            values = [_val(node.args[i]) for i in own.dynamic]
            free = free and not own.fixed and _grows_with(own.call.graph, values)
        found.left = sum(n.op == "call_function" for n in self.module.graph.nodes)
        own_inputs = [n.meta.get("val") for n in self.module.graph.nodes if n.op == "placeholder"][-inputs:]
        found.grows = [
            free and isinstance(v, Tensor) and v.ndim > 0 and not isinstance(v.shape[0], int)
            for v in own_inputs
        ]
        if len(found.grows) != inputs:
            found.grows = [False] * inputs
        return found


def _failing(module: Closed, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> str:
    """The name of the node at which a part that does not compile fails."""
    quick = {**options, "tune": False, "cache": False}
    calls = [n for n in module.gm.graph.nodes if n.op == "call_function"]

    def fails(count: int) -> bool:
        first = _first_nodes(module.gm, set(calls[:count]))
        if first is None:
            return False
        try:
            engine_of(module.of(first), inputs, quick)
        except ActzipError:
            return True
        return False

    node = calls[first_failing(len(calls), fails)]
    while node.target is operator.getitem:
        node = node.args[0]
    return str(node.name)


def _first_nodes(part: fx.GraphModule, kept: set[fx.Node]) -> fx.GraphModule | None:
    """A part's nodes ``kept`` alone, which give what is read of them behind; None if that is no tensor."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in part.graph.nodes:
        if node.op in ("placeholder", "get_attr") or node in kept:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    ends = [n for n in part.graph.nodes if n in kept and isinstance(n.meta.get("val"), Tensor)]
    ends = [n for n in ends if not n.users or any(u not in kept for u in n.users)]
    graph.output(tuple(copies[n] for n in ends))
    return fx.GraphModule(part, graph) if ends else None


def _grows_with(graph: Any, values: Sequence[Any]) -> bool:
    """Whether a part takes every batch that its inputs, as the whole program has them, can have."""
    if "batches" in graph.meta:
        return False
    for value, grows in zip(values, growing(graph, len(values)), strict=True):
        symbolic = [not isinstance(d, int) for d in value.shape]
        if any(symbolic[1:]) or (symbolic[:1] == [True] and not grows):
            return False
    return True


def _any_strides(module: fx.GraphModule) -> None:
    """Views become reshapes: torch.export chose them for strides that an operator promised (attention
    does), and another machine's kernel, or the engine, may give others."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    module.recompile()


def engine_parts(module: nn.Module) -> list[Part]:
    """The parts of what :func:`parts_of` gave that run on the engine."""
    return [m for m in module.children() if isinstance(m, Part)]


def _is_heavy(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.removeprefix("aten::") in _HEAVY


def _close_part(
    part: fx.GraphModule, node: fx.Node, values: tuple[Any, ...]
) -> tuple[Closed, tuple[Tensor, ...], list[int], bool] | None:
    """A part as a module of its float32 inputs alone, these, their positions, and whether a size among
    its arguments is none of theirs, so that the part is for this size; None where that cannot be."""
    plan: list[tuple[str, int, int]] = []
    static: list[Tensor] = []
    dynamic = [
        i
        for i, (source, v) in enumerate(zip(node.args, values))
        if isinstance(v, Tensor) and not (isinstance(source, fx.Node) and source.op == "get_attr")
    ]
    if not dynamic or any(values[i].dtype != torch.float32 for i in dynamic):
        return None
    fixed = False
    for i, v in enumerate(values):
        if i in dynamic:
            plan.append(("tensor", dynamic.index(i), 0))
        elif isinstance(v, Tensor):
            plan.append(("static", len(static), 0))
            static.append(v)
        elif isinstance(v, int):
            size = str(_val(node.args[i]))
            firsts = [[str(d) for d in _val(node.args[k]).shape[:1]] for k in dynamic]
            if [size] in firsts:
                plan.append(("size", firsts.index([size]), 0))
            else:
                plan.append(("number", v, 0))
                fixed = fixed or isinstance(_val(node.args[i]), torch.SymInt)
        else:
            return None
    inputs = tuple(values[i].detach().clone() for i in dynamic)
    return Closed(part, plan, static), inputs, dynamic, fixed


def _val(source: Any) -> Any:
    return source.meta.get("val") if isinstance(source, fx.Node) else source


class Part(nn.Module):
    """A part of a graph on the engine, in the place of the module that PyTorch would run."""

    def __init__(self, call: Callable[..., Any], dynamic: list[int], single: bool) -> None:
        super().__init__()
        self.call = call
        self.dynamic = dynamic
        self.single = single

    def forward(self, *inputs: Any) -> Any:
        out = self.call(*(inputs[i] for i in self.dynamic))
        return out if self.single else tuple(out)
