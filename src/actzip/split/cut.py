"""Where a Graph can be cut: between two of its nodes, and which values cross there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actzip.checks import shown, whole
from actzip.errors import InputError, LayerError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.passes import optimize

__all__ = ["Cut", "Layers", "crossing", "cut_graph", "cuts", "find_cut"]


@dataclass(frozen=True)
class Cut:
    """A place where a network can be cut.

    Attributes:
        index: its number in :func:`cuts`, which ``at`` takes.
        name: of the layer behind which the cut is.
        values: what crosses, as names of the Graph's values, in order of execution.
        shapes: of those, the batch first.
    """

    index: int
    name: str
    values: tuple[str, ...]
    shapes: tuple[g.Shape, ...]

    @property
    def elements(self) -> int:
        """Elements that cross for one input."""
        return sum(g.numel(g.concrete(s, 1))[0] for s in self.shapes)


@dataclass
class Layers:
    """The names that a model's layers have besides those of the Graph's nodes and values.

    Attributes:
        last: name of a layer -> position behind the last node that it runs.
        calls: name of a layer -> how often it runs, where that is more than once.
        idle: layers that compute nothing from the input.
    """

    last: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)


def crossing(graph: g.Graph, position: int) -> tuple[str, ...]:
    """The values that the nodes from ``position`` on, or the caller, read of those before it."""
    before = [*graph.inputs, *(n.output for n in graph.nodes[:position])]
    read = {v for n in graph.nodes[position:] for v in n.inputs} | set(graph.outputs)
    return tuple(v for v in before if v in read)


def cuts(graph: g.Graph, layers: Layers) -> list[Cut]:
    """Every place where the engine would cut, in order of execution.

    Left out are those within what the engine runs as one node (a convolution and its ReLU), those
    that the input itself crosses, those where the batch is not the first dimension of what crosses
    (in a recurrent layer), and those behind which nothing is left.
    """
    kept = set(optimize(graph).values)
    made: list[Cut] = []
    seen: set[tuple[str, ...]] = set()
    for position in range(1, len(graph.nodes)):
        values = crossing(graph, position)
        floats = all(graph.values[v].dtype == "float32" for v in values)
        if values in seen or not floats or not kept.issuperset(values) or _useless(graph, values):
            continue
        if _batch_within(graph, values):
            continue
        seen.add(values)
        made.append(_cut(graph, values, len(made), position, layers))
    return made


def _useless(graph: g.Graph, values: Sequence[str]) -> bool:
    return not values or any(v in graph.inputs for v in values) or set(values) <= set(graph.outputs)


def _batch_within(graph: g.Graph, values: Sequence[str]) -> bool:
    """Whether a value has the batch, which an input has first, elsewhere or not at all."""
    grows = any(graph.shape(v)[:1] == (g.Sym(),) for v in graph.inputs)
    return grows and any(graph.shape(v)[:1] != (g.Sym(),) for v in values)


def _cut(graph: g.Graph, values: tuple[str, ...], index: int, position: int, layers: Layers) -> Cut:
    last = graph.nodes[position - 1]
    name = last.output if last.name in layers.calls else last.name  # one that find_cut takes
    return Cut(index, name, values, tuple(graph.shape(v) for v in values))


def find_cut(graph: g.Graph, at: int | str, layers: Layers) -> Cut:
    """The cut that ``at`` means: a number of :func:`cuts`, or the name of a layer, node or value;
    behind it.

    Raises:
        LayerError: no such layer (near names are said), or one that runs several times.
        InputError: ``at`` is of another kind, or nothing can be cut there.
    """
    if isinstance(at, str):
        position = _position(graph, at, layers)
        values = crossing(graph, position)
        if set(values) & set(graph.inputs):
            raise InputError(
                f"behind {at!r} the network still reads its input, which would cross too: cut later"
            )
        if _batch_within(graph, values):
            raise InputError(
                f"behind {at!r} the batch is not the first dimension of what crosses: cut earlier or later"
            )
        if _useless(graph, values):
            raise InputError(f"behind {at!r} nothing is left to compute: cut earlier")
        return _cut(graph, values, -1, position, layers)
    found = cuts(graph, layers)
    if not found:
        raise InputError("the network has no place to cut: it is one layer, or its input is read at the end")
    if isinstance(at, bool) or not hasattr(at, "__index__"):
        raise InputError(f"at must be a layer's name or a cut's number, not {shown(at)}")
    return found[whole(at, "at (a cut's number)", 0, len(found) - 1)]


def _position(graph: g.Graph, name: str, layers: Layers) -> int:
    if name in layers.calls:
        raise LayerError(
            f"layer {name!r} runs {layers.calls[name]} times, so a cut there is inside a loop: "
            "give a cut's number, or the name of one of its values"
        )
    if name in layers.last:
        return layers.last[name]
    for i, node in enumerate(graph.nodes):
        if name in (node.name, node.output):
            return i + 1
    if name in graph.constants or name in layers.idle:
        raise InputError(
            f"{name!r} is a constant: it computes nothing from the input, so no map crosses there"
        )
    if name in graph.inputs:
        raise InputError(f"{name!r} is the network's input: a cut there would send it as it is")
    known = [*layers.last, *layers.calls, *(n.name for n in graph.nodes), *(n.output for n in graph.nodes)]
    near = list(dict.fromkeys(difflib.get_close_matches(name, known, 4)))
    hint = f"; near: {', '.join(near)}" if near else ""
    raise LayerError(f"the model has no layer {name!r}{hint}")


def cut_graph(graph: g.Graph, values: Sequence[str]) -> tuple[g.Graph, g.Graph]:
    """The Graph that computes ``values`` from the input, and the one that computes the outputs from
    them.

    Raises:
        UnsupportedError: the outputs need something else than ``values`` too.
    """
    head = _part(graph, graph.inputs, values, "head")
    tail = _part(graph, values, graph.outputs, "tail")
    for key in ("out_spec", "out_slots"):  # belongs to the outputs
        head.meta.pop(key, None)
    return head, tail


def _part(graph: g.Graph, given: Sequence[str], wanted: Sequence[str], name: str) -> g.Graph:
    makers, needed, todo = graph.producers(), set[str](), list(wanted)
    while todo:
        value = todo.pop()
        if value in needed:
            continue
        needed.add(value)
        if value in given or value in graph.constants:
            continue
        if value not in makers:
            raise UnsupportedError(f"the {name} would need {value!r} as well, which does not cross")
        todo += makers[value].inputs
    made = graph.copy()
    made.name = f"{graph.name}, {name}"
    made.inputs, made.outputs = list(given), list(wanted)
    made.nodes = [n for n in made.nodes if n.output in needed and n.output not in given]
    made.constants = {k: a for k, a in made.constants.items() if k in needed}
    made.values = {k: _plain(v) for k, v in made.values.items() if k in needed or k in given}
    made.meta.pop("call", None)  # says how the whole is called
    made.validate()
    return made


def _plain(value: g.Value) -> g.Value:
    """Without the decisions of a compiled whole."""
    return dataclasses.replace(value, storage="dense", place=None)


def named_layers(nodes: Sequence[Mapping[str, str]], every: Sequence[str]) -> Layers:
    """Layers from the calls that each node of a Graph belongs to.

    Args:
        nodes: for each node: key of a call -> the layer's name.
        every: all names of layers.
    """
    found = Layers()
    keys: dict[str, set[str]] = {}
    for i, stack in enumerate(nodes):
        for key, name in stack.items():
            found.last[name] = i + 1
            keys.setdefault(name, set()).add(key)
    found.calls = {name: len(k) for name, k in keys.items() if len(k) > 1}
    found.last = {n: i for n, i in found.last.items() if n and n not in found.calls}
    found.idle = {n for n in every if n and n not in keys}
    return found
