"""Graph -> native Plan: layouts, storage of every edge, placement, and nodes in the executor's
terms (docs/engine.md).

Every value of rank 4 that a map operator (convolution, pool, resize ...) touches is kept channels
last, dense or packed; all others row-major. Where a reader needs another layout than the writer
gives, a copy is put between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actzip._native import _engine
from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.mapped import give_back
from actzip.runtime.registry import LOWER
from actzip.runtime.storage import can_pack, choose_storage, layouts, packable, projections
from actzip.runtime.winograd import is_winograd, tile_size

__all__ = ["Lowered", "Lowering", "can_pack", "choose_storage", "lower", "packable"]

_BAND_BYTES = 768 << 10  # of a banded map: what stays in the second-level cache
_WHOLE_BYTES = 2 << 20  # of a map that is left whole: bands would cost more than they save
# Winograd kernels: rows of whole tiles, about as many as share the weights' way from memory.
_TILED_BYTES = 3 << 20
_TILES = {2: 98, 4: 56, 6: 56}  # by the pixels of a tile's side


@dataclass
class Lowered:
    """A native plan, and what belongs to its nodes and values.

    ``nodes``: for each native node in order, the name of the graph's node (or of the copy that
    lowering put in). ``inside``: nodes that run as part of another's native node -> that other's name.
    ``values``: graph value -> index of the native value that holds it.
    """

    plan: Any
    nodes: list[str] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)
    variants: dict[str, list[str]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)


def _dims(shape: g.Shape) -> tuple[list[int], list[bool]]:
    return [d.mul if isinstance(d, g.Sym) else int(d) for d in shape], [isinstance(d, g.Sym) for d in shape]


class Lowering:
    """A plan as it is built: what :data:`~actzip.runtime.registry.LOWER`'s functions work with."""

    def __init__(
        self,
        graph: g.Graph,
        variants: Mapping[str, str],
        want_variants: bool,
        store: Any = None,
        three: bool = True,
    ) -> None:
        self.graph = graph
        self.variants = variants
        self.want_variants = want_variants
        self.builder = _engine.PlanBuilder(store)
        self.kind = layouts(graph)
        self.producers = graph.producers()
        self.behind: dict[str, ops.Pool | ops.Conv2d] = {  # what reads a map that is kept in bands
            n.inputs[0]: n
            for n in graph.nodes
            if isinstance(n, (ops.Pool, ops.Conv2d)) and graph.values[n.inputs[0]].storage == "band"
        }
        #: What a depthwise convolution leaves in a band -> the 1x1 convolution that takes it from there.
        self.last = projections(graph) if three else {}
        self.native: dict[str, int] = {}
        self.copies: dict[tuple[str, str], int] = {}
        self.views: set[str] = set()  # channel ranges of other maps: their pixels are apart
        self.aliased: set[str] = set()  # values that are views of others
        self.keepers: dict[
            int, str
        ] = {}  # weights of several layers -> the first, by whose name they are kept
        self.lent: list[list[g.Array]] = []  # weights of each native node
        self.out = Lowered(None)

    def keeper(self, n: ops.Conv2d | ops.Linear) -> str:
        """The layer under whose name packed weights of ``n`` are kept."""
        return self.keepers.setdefault(id(n.weight), n.name)

    # values

    def add_value(self, name: str, shape: g.Shape, layout: str, **kw: Any) -> int:
        dims, batch = _dims(shape)
        return int(self.builder.value(name, dims, batch, layout, **kw))

    def declare(self, name: str) -> int:
        """The native value for the output of a node (or an input), its parents first."""
        if name in self.native:
            return self.native[name]
        v = self.graph.values[name]
        if name in self.graph.constants:
            data = np.ascontiguousarray(self.graph.constants[name], np.float32)
            i = self.add_value(name, v.shape, "plain", data=data)
        elif name in self.graph.inputs:
            i = self.add_value(name, v.shape, "plain")
        else:
            layout = "plain" if self.kind[name] == "plain" else "packed" if v.storage == "packed" else "map"
            kw: dict[str, Any] = {}
            if v.place is not None and layout != "plain":
                parent = v.place[0]
                if self.kind[parent] == "map" and (self.graph.values[parent].storage == "packed") == (
                    layout == "packed"
                ):
                    kw = {"parent": self.declare(parent), "offset": v.place[1]}
            if layout == "packed":
                kw.update(self.packed_fields(name))
            elif v.storage == "band":
                kw["band"] = self.band(name)
            elif name in self.last:
                kw["band"] = self.second_band(name)
            i = self.add_value(name, v.shape, layout, **kw)
        self.native[name] = i
        return i

    def band(self, name: str) -> int:
        """Rows of a banded map that are kept: all of a small one, else those of eight rows of what
        reads it, fewer where they would leave the cache."""
        pool = self.behind[name]
        c, h, w = (int(d) for d in self.graph.shape(name)[1:])  # type: ignore[arg-type]
        high = pool.kernel_size[0] if isinstance(pool, ops.Pool) else int(pool.weight.shape[2])
        reach = (high - 1) * pool.dilation[0] + 1
        if 4 * c * h * w <= _WHOLE_BYTES:
            return max(h, reach)
        wide = w * pool.stride[0]
        if pool.output in self.last:  # its rows stay in the cache too
            wide += int(self.graph.shape(pool.output)[3])  # type: ignore[arg-type]
        step = max(2, min(8, _BAND_BYTES // (4 * c * wide)))
        kernel = self.variants.get(self.producers[name].name, "")
        if is_winograd(kernel):
            tile = tile_size(kernel)
            wide = -(-w // tile)
            rows = tile * max(1, round(_TILES[tile] / wide), -(-reach // tile))
            if 4 * c * w * rows <= _TILED_BYTES:
                step = rows // pool.stride[0]
        return min(h, (step - 1) * pool.stride[0] + reach) if h > reach else reach

    def second_band(self, name: str) -> int:
        """Rows of what a depthwise convolution leaves in a band: all that it computes in a turn."""
        n = self.producers[name]
        assert isinstance(n, ops.Conv2d)
        reach = (int(n.weight.shape[2]) - 1) * n.dilation[0] + 1
        return (self.band(n.inputs[0]) - reach) // n.stride[0] + 1

    def pools_in_tiles(self, n: ops.Conv2d, pool: g.Node, kernel: str) -> bool:
        """Whether ``kernel`` writes what ``pool`` makes of its output, and never that output."""
        if not isinstance(pool, ops.Pool):
            return False
        act = n.act
        rises = act is None or act.kind in ("relu", "clip", "quantize")
        if act is not None and act.kind == "threshold":
            rises = act.param is not None and bool(np.min(act.param) >= 0) and math.isinf(act.hi)
        plain = pool.kind == "max" and pool.kernel_size == pool.stride == (2, 2) and not any(pool.padding)
        h, w = (int(d) // 2 for d in self.graph.shape(n.output)[2:])  # type: ignore[arg-type]
        return (
            is_winograd(kernel)
            and plain
            and rises
            and pool.dilation == n.dilation == (1, 1)
            and len(n.inputs) == 1
            and self.graph.shape(pool.output)[2:] == (h, w)
        )

    def packed_fields(self, name: str) -> dict[str, Any]:
        v = self.graph.values[name]
        density = 0.5 if v.density is None else v.density
        kw: dict[str, Any] = {"density": density}
        if v.place is None:
            kw["parts"] = self.parts(name)
            kw.update(self.stored(name))
        return kw

    def stored(self, name: str) -> dict[str, Any]:
        """Type and quantizers of a packed value: integers where all that is written into it is quantized."""
        quants = self.quants(name)
        if all(q is not None for q in quants):
            found = [q for q in quants if q is not None]
            wide = max(bits for _, bits in found) > 8
            scales, tops = [s for s, _ in found], [float(2**bits - 1) for _, bits in found]
            return {"type": "u16" if wide else "u8", "scales": scales, "tops": tops}
        meta = self.graph.meta
        if meta.get("storage") == "float16" and name not in meta.get("float32_maps", ()):
            return {"type": "f16"}
        return {}

    def quants(self, name: str) -> list[tuple[float, int] | None]:
        """The quantizer of each of :meth:`parts`, None where a part has none."""
        p = self.producers.get(name)
        if isinstance(p, ops.Concat):
            return [q for v in p.inputs for q in self.quants(v)]
        if isinstance(p, ops.Pool) and p.kind == "max" and self.graph.values[p.inputs[0]].storage != "dense":
            return self.quants(p.inputs[0])  # the greatest of quantized values is one of them
        return [self.graph.values[name].quant] * len(self.parts(name))

    def parts(self, name: str) -> list[int]:
        """Channel counts of what is written into a packed value one after the other."""
        p = self.producers.get(name)
        if isinstance(p, ops.Concat):
            return [c for v in p.inputs for c in self.parts(v)]
        if p is not None and isinstance(p, (ops.Pool, ops.BatchNorm, ops.Activation)):
            x = self.graph.values[p.inputs[0]]
            if x.storage == "packed":  # block by block
                return self.parts(p.inputs[0])
        c = self.graph.shape(name)[1]
        assert isinstance(c, int)
        return [c]

    def read(self, name: str, layout: str) -> int:
        """The value in ``layout`` (plain, map; "any map": dense or packed), copied if need be."""
        i = self.declare(name)
        v = self.graph.values[name]
        have = (
            "plain"
            if self.kind[name] == "plain" or name in self.graph.inputs or name in self.graph.constants
            else v.storage
        )
        if have == "dense":
            have = "map"
        if layout == have or (layout == "any map" and have in ("map", "packed")):
            return i
        want = "map" if layout == "any map" else layout
        key = (name, want)
        if key in self.copies:
            return self.copies[key]
        shape = v.shape
        if (
            {have, want} == {"plain", "map"}
            and len(shape) == 4
            and shape[2:] == (1, 1)
            and v.place is None
            and name not in self.views
            and (name not in self.graph.inputs)
        ):
            j = self.add_value(f"{name}:{want}", shape, want, parent=i)
        elif have == "packed" and want == "plain":
            mid = self.read(name, "map")
            j = self.add_value(f"{name}:plain", shape, "plain")
            self.node("copy", f"{name}:to_plain", [mid], j, name)
        else:
            j = self.add_value(f"{name}:{want}", shape, want)
            self.node("copy", f"{name}:to_{want}", [i], j, name)
        self.copies[key] = j
        return j

    def node(
        self,
        op: str,
        name: str,
        inputs: list[int],
        output: int,
        owner: str,
        ints: dict[str, list[int]] | None = None,
        floats: dict[str, list[float]] | None = None,
        arrays: dict[str, Any] | None = None,
        strings: dict[str, str] | None = None,
    ) -> None:
        self.builder.node(op, name, inputs, output, ints or {}, floats or {}, arrays or {}, strings or {})
        self.out.nodes.append(owner)
        self.lent.append(list((arrays or {}).values()))

    def packed(self, node: int) -> None:
        """The engine has packed the weights of native node ``node``."""
        for a in self.lent[node]:
            give_back(a)

    # nodes

    def lower(self) -> Lowered:
        graph = self.graph
        for v in graph.inputs:
            self.builder.input(self.declare(v))
        for n in graph.nodes:
            self.emit(n)
        for v in graph.outputs:
            self.builder.output(self.output(v))
        try:
            self.out.plan = self.builder.build(self.packed)
        except ValueError as error:
            raise UnsupportedError(f"the engine refuses the plan: {error}") from error
        self.out.values = dict(self.native)
        return self.out

    def output(self, v: str) -> int:
        i = self.native.get(v)
        plain = self.kind.get(v) == "plain" and v not in self.graph.inputs and v not in self.graph.constants
        if i is not None and plain and v not in self.aliased and self.graph.outputs.count(v) == 1:
            return i
        layout = (
            "plain"
            if v in self.graph.inputs or v in self.graph.constants or self.kind[v] == "plain"
            else "map"
        )
        src = self.read(v, layout)
        j = self.add_value(f"{v}:out", self.graph.shape(v), "plain")
        self.node("copy", f"{v}:output", [src], j, v)
        return j

    def layout_of(self, name: str) -> str:
        return "map" if self.kind[name] == "map" else "plain"

    def emit(self, n: g.Node) -> None:
        handler = LOWER.get(type(n))
        if handler is None:
            raise UnsupportedError(f"{n.where()}: the engine does not have it")
        handler(self, n)

    def simple(self, n: g.Node, op: str, layout: str, **kw: Any) -> None:
        inputs = [self.read(v, layout) for v in n.inputs]
        self.node(op, n.name, inputs, self.declare(n.output), n.name, **kw)

    def dense(self, name: str) -> int:
        """The value in whatever dense layout it has."""
        self.declare(name)
        v = self.graph.values[name]
        if name in self.graph.inputs or name in self.graph.constants or self.kind[name] == "plain":
            return self.native[name]
        return self.read(name, "map") if v.storage == "packed" else self.native[name]


def lower(
    graph: g.Graph,
    variants: Mapping[str, str] | None = None,
    *,
    want_variants: bool = False,
    store: Any = None,
    three: bool = True,
) -> Lowered:
    """The native plan of ``graph`` as its values' ``storage`` and ``place`` say.

    Args:
        variants: node name -> kernel variant; others take the engine's first choice.
        want_variants: list the variants of every convolution in ``Lowered.variants``.
        store: an ``_engine.WeightStore`` that keeps packed weights for other plans of the same weights.
        three: an expansion, its depthwise convolution and its projection may run by turns; False: the
            projection is a node of its own.

    Raises:
        UnsupportedError: an operator, or a combination of storages, that the engine does not have.
        InputError: the graph does not fit together.
    """
    graph = _split_late_acts(graph)
    lowering = Lowering(graph, variants or {}, want_variants, store, three)
    try:
        return lowering.lower()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise UnsupportedError(f"the engine refuses the plan: {error}") from error


def _split_late_acts(graph: g.Graph) -> g.Graph:
    """A convolution with an activation before its residual becomes two nodes: the engine adds
    before it applies one, but for a quantizer."""
    graph = graph.copy()
    nodes: list[g.Node] = []
    for n in graph.nodes:
        if isinstance(n, ops.Conv2d) and n.pre_act is not None and n.pre_act.kind != "quantize":
            mid = graph.fresh(n.output + "_pre")
            graph.values[mid] = g.Value(mid, graph.shape(n.output))
            conv = dataclasses.replace(n, act=n.pre_act, pre_act=None)
            conv.inputs, conv.output = (n.inputs[0],), mid
            add = ops.Binary(
                n.name + ":add", (mid, n.inputs[1]), n.output, kind="add", act=n.act, source=n.source
            )
            nodes += [conv, add]
        else:
            nodes.append(n)
    graph.nodes = nodes
    return graph
