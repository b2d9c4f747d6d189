"""Sizes of a network that has left its model behind: in a file, in a pickle.

The model is asked for its graph at some sizes. What differs between them are numbers: the size of
a resized map, the shape of a reshape. Each is said by a rule that holds at all of them: a constant,
or a dimension of a value before it, or the product of some. A network for which no such rules are
found, or whose nodes are other ones at other sizes, keeps the size it has.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from actzip.errors import DataError, InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.acts import Act
from actzip.runtime.origin import Shapes
from actzip.runtime.sizes import Resizer, digest

__all__ = ["Rules", "find_rules"]

#: Dimensions of inputs, as (input, axis), that are the same number.
Dims = tuple[tuple[int, int], ...]

_PROBES = 14
_STEPS = (1, 2, 4, 8, 16, 32, 64)  # sizes may have to be multiples of
_OUTPUTS = ""  # stands for a node in the place of outputs that are numbers
_SKETCH = 997  # every so many-th number of a large array is compared
_WHOLE = 1 << 16  # numbers of an array that is compared whole


@dataclass(frozen=True)
class Rule:
    """A number is ``top / bottom`` times the product of some dimensions of ``value``, ``plus`` another;
    ``batch``: and that many times the batch."""

    top: int
    bottom: int
    batch: bool
    value: str
    axes: tuple[int, ...]
    plus: int = 0

    def number(self, graph: g.Graph) -> g.Dim:
        dims = [graph.shape(self.value)[a] for a in self.axes]
        n = int(np.prod([d.mul if isinstance(d, g.Sym) else d for d in dims])) * self.top
        if n % self.bottom:
            raise InputError(f"{self.bottom} does not divide {n}, a size within the network")
        return g.Sym(n // self.bottom) if self.batch else n // self.bottom + self.plus


# -- the numbers of a node, by place


def _numbers(value: Any, at: tuple[Any, ...], out: dict[tuple[Any, ...], Any]) -> Any:
    """What is left of ``value`` without its numbers, which go to ``out``."""
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, (int, float, g.Sym)):
        out[at] = value
        return "#"
    if isinstance(value, np.ndarray):
        return (value.shape, str(value.dtype))
    if isinstance(value, Act):
        rows = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        return [(k, _numbers(v, (*at, k), out)) for k, v in rows]
    if isinstance(value, tuple):
        return [_numbers(v, (*at, i), out) for i, v in enumerate(value)]
    return repr(value)


def _put(value: Any, at: Sequence[Any], number: Any) -> Any:
    if not at:
        return number
    if isinstance(value, Act):
        return dataclasses.replace(value, **{at[0]: _put(getattr(value, at[0]), at[1:], number)})
    items = list(value)
    items[at[0]] = _put(items[at[0]], at[1:], number)
    return tuple(items)


@dataclass
class _Outline:
    """A graph but for the numbers in its large arrays."""

    structure: str
    numbers: dict[tuple[Any, ...], Any]
    shapes: dict[str, g.Shape]
    sketch: list[Any]


def _sketch(a: g.Array) -> list[Any]:
    """What is compared of an array."""
    return [a.shape, np.array(a.flat[:: _SKETCH if a.size > _WHOLE else 1]).tobytes()]


def _outline(graph: g.Graph) -> _Outline:
    numbers: dict[tuple[Any, ...], Any] = {}
    rows: list[Any] = [graph.inputs, graph.outputs, sorted(graph.constants)]
    sketch = [_sketch(a) for _, a in sorted(graph.constants.items())]
    for n in graph.nodes:
        fields = [(k, _numbers(v, (n.name, k), numbers)) for k, v in n.fields()]
        rows.append([n.op, n.name, n.inputs, n.output, fields])
        for _, v in n.fields():
            if isinstance(v, np.ndarray):
                sketch.append(_sketch(v))
    for i, slot in enumerate(graph.meta.get("out_slots", ())):
        if isinstance(slot, int):
            continue
        if isinstance(slot[0], np.ndarray):  # the same for every input
            sketch.append(list(digest(slot[0])))
        rows.append(_numbers(slot[0], (_OUTPUTS, i), numbers))
    shapes = {v: value.shape for v, value in graph.values.items()}
    return _Outline(repr(rows), numbers, shapes, sketch)


# -- finding


def find_rules(resizer: Resizer) -> Rules | None:
    """The rules of a network, checked at :data:`_PROBES` sizes from a quarter of its own to eight times, or
    from half where it does not take a quarter; None where there are none."""
    free = _free(resizer)
    if not free:
        return None
    for step in _STEPS:
        for least in (4, 2):
            try:
                found = _at_step(resizer, free, step, least)
            except (InputError, UnsupportedError):
                continue  # the network does not take one of the sizes
            if found is not None:
                return found
            break
    return None


def _free(resizer: Resizer) -> list[Dims]:
    """Dimensions that may be other ones: each by itself, else with the like of the other inputs."""
    graph, shapes = resizer.plain, resizer.shapes

    def takes(dims: Dims) -> bool:
        try:
            resizer.outline(_changed(shapes, {(i, a): shapes[i][a] + 64 for i, a in dims}), quick=True)
        except (InputError, UnsupportedError):
            return False
        return True

    dims = [(i, a) for i, v in enumerate(graph.inputs) for a in range(1, len(graph.shape(v)))]
    found: list[Dims] = [(d,) for d in dims if takes((d,))]
    like: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, a in dims:
        if ((i, a),) not in found:
            like.setdefault((a, shapes[i][a]), []).append((i, a))
    return found + [tuple(t) for t in like.values() if len(t) > 1 and takes(tuple(t))]


def _changed(shapes: Shapes, sizes: dict[tuple[int, int], int]) -> list[tuple[int, ...]]:
    return [tuple(sizes.get((i, a), d) for a, d in enumerate(s)) for i, s in enumerate(shapes)]


def _at_step(resizer: Resizer, free: list[Dims], step: int, least: int) -> Rules | None:
    """Rules for multiples of ``step`` from the own size over ``least``.

    Raises:
        InputError, UnsupportedError: one of these sizes is refused.
    """
    rng = np.random.default_rng(step)
    bounds = []
    for (i, axis), *_ in free:
        own = resizer.shapes[i][axis]
        low = max(1, own // least // step)
        bounds.append((low * step, max(own * 8 // step, low + 4) * step))

    def sized(sizes: Sequence[int]) -> dict[tuple[int, int], int]:
        return {k: n for dims, n in zip(free, sizes, strict=True) for k in dims}

    corners = [sized([b[e] for b in bounds]) for e in (0, 1)]
    probes: list[dict[tuple[int, int], int]] = []
    while len(probes) < _PROBES - len(corners):
        probes.append(sized([int(rng.integers(lo // step, hi // step + 1)) * step for lo, hi in bounds]))
    all_shapes = [_changed(resizer.shapes, sizes) for sizes in [*probes, *corners]]
    outlines = [_outline(resizer.outline(s, quick=True)) for s in all_shapes]
    graph = resizer.at(all_shapes[0])
    first = outlines[0]
    if any(o.structure != first.structure or o.sketch != first.sketch for o in outlines):
        return None
    rules = {}
    for at in first.numbers:
        column = [o.numbers[at] for o in outlines]
        if any(d != column[0] for d in column):
            rule = _rule(graph, at[0], column, outlines)
            if rule is None:
                return None
            rules[at] = rule
    ranges = {k: (*b, step) for dims, b in zip(free, bounds, strict=True) for k in dims}
    return Rules(graph, resizer.shapes, ranges, rules, [dims for dims in free if len(dims) > 1])


def _rule(graph: g.Graph, name: str, column: list[Any], outlines: list[_Outline]) -> Rule | None:
    batch = isinstance(column[0], g.Sym)
    numbers = [d.mul if isinstance(d, g.Sym) else d for d in column]
    if any(isinstance(d, float) for d in numbers):
        return None
    before = list(itertools.takewhile(lambda n: n.name != name, graph.nodes))
    reads = () if name == _OUTPUTS else graph.nodes[len(before)].inputs
    near = [v for v in reads if v not in graph.constants]
    others = [v for v in [*graph.inputs, *(n.output for n in reversed(before))] if v not in near]
    for value in [*near, *others]:
        sides = [[d.mul if isinstance(d, g.Sym) else d for d in o.shapes[value]] for o in outlines]
        rank = len(sides[0])
        for count in (1, 2) if value in near else (1,):
            for axes in itertools.combinations(range(rank), count):
                products = [int(np.prod([s[a] for a in axes])) for s in sides]
                found = _line(numbers, products)
                if found is not None and not (batch and found[2]):
                    return Rule(found[0], found[1], batch, value, axes, found[2])
    return None


def _line(numbers: list[int], products: list[int]) -> tuple[int, int, int] | None:
    """Top, bottom and what is added, where each number is ``top / bottom`` times its product and that;
    None where there are none."""
    first = products[0]
    other = next((k for k, p in enumerate(products) if p != first), None)
    if other is None:
        return None
    factor = Fraction(numbers[other] - numbers[0], products[other] - first)
    rest = numbers[0] - factor * first
    top, bottom, plus = factor.numerator, factor.denominator, rest.numerator
    if rest.denominator != 1 or max(abs(top), bottom, abs(plus)) > 1 << 20:
        return None
    fits = all(p * top % bottom == 0 and p * top // bottom + plus == n for n, p in zip(numbers, products))
    return (top, bottom, plus) if fits else None


# -- using


@dataclass
class Rules:
    """A graph and what its numbers are at other sizes.

    ``free``: (input, axis) -> least and greatest size that the rules were checked between, and what
    a size is a multiple of; ``tied``: those that are one size. ``rules``: (node, field, place ...) ->
    rule.
    """

    graph: g.Graph
    shapes: Shapes
    free: dict[tuple[int, int], tuple[int, int, int]]
    rules: dict[tuple[Any, ...], Rule]
    tied: list[Dims] = field(default_factory=list)

    def at(self, shapes: Shapes) -> g.Graph:
        """The graph for inputs of these shapes, storages not chosen.

        Raises:
            InputError: a size that the rules were not checked for.
        """
        self._check(shapes)
        graph = self.graph.copy()
        if "out_slots" in graph.meta:
            graph.meta["out_slots"] = list(graph.meta["out_slots"])
        for v, shape in zip(graph.inputs, shapes, strict=True):
            dims = zip(graph.shape(v), shape, strict=True)
            graph.values[v].shape = tuple(d if isinstance(d, g.Sym) else n for d, n in dims)
        for n in graph.nodes:
            for at, rule in self._of(n.name):
                setattr(n, at[1], _put(getattr(n, at[1]), at[2:], rule.number(graph)))
            graph.values[n.output].shape = graph.infer(n)
        for at, rule in self._of(_OUTPUTS):
            graph.meta["out_slots"][at[1]] = [rule.number(graph)]
        graph.validate()
        return graph

    def _of(self, name: str) -> list[tuple[tuple[Any, ...], Rule]]:
        return [(k, r) for k, r in self.rules.items() if k[0] == name]

    def _check(self, shapes: Shapes) -> None:
        for i, (shape, own) in enumerate(zip(shapes, self.shapes, strict=True)):
            for axis, n in enumerate(shape):
                if axis == 0:
                    continue
                low, high, step = self.free.get((i, axis), (own[axis], own[axis], 1))
                if not low <= n <= high or n % step:
                    what = f"{low}" if low == high else f"{low} to {high}"
                    what += f" in steps of {step}" if step > 1 else ""
                    raise InputError(
                        f"a file of a compiled model takes sizes that were checked when it was saved: "
                        f"dimension {axis} of input {self.graph.inputs[i]!r} {what}, not {n}; for "
                        "others compile the model itself"
                    )
        for (i, axis), *more in self.tied:
            for k, other in more:
                if shapes[k][other] != shapes[i][axis]:
                    raise InputError(
                        f"dimension {other} of input {self.graph.inputs[k]!r} is {shapes[k][other]} and "
                        f"dimension {axis} of {self.graph.inputs[i]!r} {shapes[i][axis]}: they are one size"
                    )

    # as data: numbers, strings and lists

    def to_data(self) -> dict[str, Any]:
        """All but the graph."""
        return {
            "shapes": [list(s) for s in self.shapes],
            "free": [[*k, *b] for k, b in self.free.items()],
            "rules": [[list(k), *dataclasses.astuple(r)] for k, r in self.rules.items()],
            "tied": [[list(d) for d in dims] for dims in self.tied],
        }

    @staticmethod
    def from_data(graph: g.Graph, data: dict[str, Any]) -> Rules:
        """
        Raises:
            DataError: not what :meth:`to_data` gives.
        """
        try:
            shapes = [tuple(int(d) for d in s) for s in data["shapes"]]
            free = {(int(i), int(a)): (int(lo), int(hi), int(s)) for i, a, lo, hi, s in data["free"]}
            rules = {}
            nodes = {n.name: dict(n.fields()) for n in graph.nodes}
            for key, top, bottom, batch, value, axes, *plus in data["rules"]:
                rule = Rule(
                    int(top), int(bottom), bool(batch), str(value), tuple(map(int, axes)), *map(int, plus)
                )
                rule.number(graph)
                if key[0] == _OUTPUTS:
                    graph.meta["out_slots"][key[1]][0] + 0
                else:
                    _put(nodes[key[0]][key[1]], key[2:], 0)
                rules[tuple(key)] = rule
            tied = [tuple((int(i), int(a)) for i, a in dims) for dims in data.get("tied", ())]
            known = all(d in free for dims in tied for d in dims) and all(tied)
            if len(shapes) != len(graph.inputs) or any(b[2] < 1 for b in free.values()) or not known:
                raise DataError("the rules of sizes are damaged")
            return Rules(graph, shapes, free, rules, tied)
        except DataError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, InputError) as error:
            raise DataError(f"the rules of sizes are damaged: {type(error).__name__}: {error}") from error
