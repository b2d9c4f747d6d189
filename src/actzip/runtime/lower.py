"""Graph -> native Plan: layouts, storage of every edge, placement, and nodes in the executor's terms (docs/engine.md).

Every value of rank 4 that a map operator (convolution, pool, resize ...) touches is kept channels last, dense or packed;
all others row-major. Where a reader needs another layout than the writer gives, a copy is put between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actzip import _engine
from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime.passes import root_of

__all__ = ["Lowered", "can_pack", "lower", "packable"]

_BAND_BYTES = 768 << 10  # of a banded map: what stays in the second-level cache
_EPILOGUE = {"relu", "clip", "threshold"}
_MAP_OPS = (g.Conv2d, g.Pool, g.AdaptivePool, g.Resize, g.LocalResponseNorm)
_EITHER = (g.Activation, g.BatchNorm, g.Binary, g.GroupNorm, g.Concat, g.Slice, g.Pad, g.LayerNorm)


@dataclass
class Lowered:
    """A native plan, and what belongs to its nodes and values.

    ``nodes``: for each native node in order, the name of the graph's node (or of the copy that lowering put in).
    ``values``: graph value -> index of the native value that holds it.
    """

    plan: Any
    nodes: list[str] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)
    variants: dict[str, list[str]] = field(default_factory=dict)


def _is_map(shape: g.Shape) -> bool:
    return len(shape) == 4 and all(isinstance(d, int) for d in shape[1:])


def layouts(graph: g.Graph) -> dict[str, str]:
    """value -> "map" or "plain": maps where a map operator writes or reads them, and on from there through elementwise ones."""
    kind = dict.fromkeys(graph.values, "plain")
    for n in graph.nodes:
        shape = graph.shape(n.output)
        if (
            isinstance(n, _MAP_OPS)
            or (isinstance(n, g.LayerNorm) and n.channels)
            or isinstance(n, g.ConvTranspose2d)
        ):
            kind[n.output] = "map"
        elif isinstance(n, _EITHER) and _is_map(shape) and not isinstance(n, g.LayerNorm):
            kind[n.output] = "map" if any(kind[v] == "map" for v in n.inputs) else "plain"
    return kind


def packable(graph: g.Graph, node: g.Node) -> bool:
    """Whether the engine can write ``node``'s output packed."""
    if isinstance(node, (g.Conv2d, g.Pool, g.BatchNorm)):
        act = node.act
        if isinstance(node, g.Conv2d) and act is not None:
            if act.kind not in _EPILOGUE or (act.kind == "threshold" and not math.isinf(act.hi)):
                return False
            if node.pre_act is not None:
                return False
        return _is_map(graph.shape(node.output))
    if isinstance(node, g.Activation):
        return _is_map(graph.shape(node.output))
    return isinstance(node, g.Concat) and node.axis == 1 and node.placed and _is_map(graph.shape(node.output))


def _zeros(graph: g.Graph, producers: Mapping[str, g.Node], v: str) -> bool:
    """Whether exact zeros are to be expected in ``v``."""
    p = producers.get(v)
    if p is None:
        return False
    if isinstance(p, g.Concat):
        return any(_zeros(graph, producers, i) for i in p.inputs)
    act = getattr(p, "act", None)
    if act is not None:
        return bool(act.sparsifies)
    if isinstance(p, g.Pool) and p.kind == "max" and p.bias is None:
        return _zeros(graph, producers, p.inputs[0])
    return False


def can_pack(graph: g.Graph, value: str) -> bool:
    """Whether ``value`` may be stored packed: every writer can write it so, and every reader can read it so."""
    if value in graph.inputs or value in graph.constants or value in graph.outputs:
        return False
    producers = graph.producers()
    p = producers.get(value)
    if p is None or not packable(graph, p):
        return False
    for c in graph.nodes:
        if value not in c.inputs:
            continue
        if isinstance(c, g.Conv2d):
            continue
        if isinstance(c, (g.Pool, g.AdaptivePool, g.BatchNorm)):
            continue
        if isinstance(c, g.Activation) and _is_map(graph.shape(c.output)):
            continue
        if isinstance(c, g.Concat) and graph.values[value].place is not None:
            continue
        return False
    if isinstance(p, g.Concat):
        return all(can_pack(graph, v) for v in p.inputs)
    return True


def keeps_integers(graph: g.Graph, name: str) -> bool:
    """Whether all that is written into a value is quantized, so that it is stored as integers once it is packed."""
    producers = graph.producers()

    def quantized(v: str) -> bool:
        p = producers.get(v)
        if isinstance(p, g.Concat):
            return all(quantized(i) for i in p.inputs)
        if isinstance(p, g.Pool) and p.kind == "max":
            return quantized(p.inputs[0])
        return graph.values[v].quant is not None

    return quantized(name)


def banded(graph: g.Graph) -> set[str]:
    """Values that one convolution writes and one pool reads, and nothing else: they need never be there in whole."""
    producers = graph.producers()
    readers: dict[str, list[g.Node]] = {}
    for n in graph.nodes:
        for v in n.inputs:
            readers.setdefault(v, []).append(n)
    found = set()
    for v, nodes in readers.items():
        p, value = producers.get(v), graph.values[v]
        pool = nodes[0]
        if not isinstance(p, g.Conv2d) or len(nodes) > 1 or not isinstance(pool, g.Pool):
            continue
        # integers: the greatest of them is the integer of the greatest, but something has to round it
        rounded = value.quant is None or (
            pool.kind == "max" and graph.values[pool.output].storage == "packed"
        )
        if (
            rounded and pool.bias is None and pool.act is None and p.groups == 1 and packable(graph, p)
            and v not in graph.outputs and value.place is None
        ):  # fmt: skip
            found.add(v)
    return found


def choose_storage(graph: g.Graph, dense: frozenset[str] | set[str] = frozenset()) -> g.Graph:
    """Sets ``Value.storage``: packed where zeros are expected, the engine can, and nobody said ``dense``; band between a
    convolution and a pool.

    What is placed in one Concat is stored alike. Maps that only pools and the like read are packed where they are quantized, or
    where ``meta["pack"]`` is ``always``.
    """
    graph = graph.copy()
    producers = graph.producers()
    groups: dict[str, list[str]] = {}
    for v in graph.values:
        groups.setdefault(root_of(graph, v)[0], []).append(v)
    for root, members in groups.items():
        read = any(isinstance(n, g.Conv2d) and set(n.inputs) & set(members) for n in graph.nodes)
        quantized = any(graph.values[v].quant is not None for v in members)  # only packed maps are rounded
        ok = (
            (read or quantized or graph.meta.get("pack") == "always")
            and not any(v in dense for v in members)
            and all(can_pack(graph, v) for v in members)
            and _zeros(graph, producers, root)
        )
        for v in members:
            graph.values[v].storage = "packed" if ok else "dense"
    for v in banded(graph):
        graph.values[v].storage = "band"
    return graph


def _act(act: g.Act | None) -> tuple[dict[str, str], dict[str, list[float]], dict[str, Any]]:
    if act is None:
        return {}, {}, {}
    floats = {f"act_{k}": [float(getattr(act, k))] for k in ("alpha", "beta", "lo", "hi", "limit")}
    arrays = {} if act.param is None else {"act_param": np.ascontiguousarray(act.param, np.float32)}
    return {"act": act.kind}, floats, arrays


def _dims(shape: g.Shape) -> tuple[list[int], list[bool]]:
    return [d.mul if isinstance(d, g.Sym) else int(d) for d in shape], [isinstance(d, g.Sym) for d in shape]


def _blocks(parts: list[int]) -> list[int]:
    """Widths of the packed blocks that parts of so many channels are cut into."""
    return [min(64, c - i) for c in parts for i in range(0, c, 64)]


def _resize_table(
    size: int, out: int, n: g.Resize, scale: float | None
) -> tuple[list[int], list[int], g.Array]:
    i = np.arange(out, dtype=np.float64)
    if n.coordinates == "align_corners":
        at = i * ((size - 1) / (out - 1)) if out > 1 else i * 0
    elif n.coordinates == "half_pixel":
        at = (i + 0.5) * (size / out if scale is None else 1 / scale) - 0.5
    else:
        at = i * (size / out) if scale is None else i / scale
    if n.mode == "nearest":
        low = np.floor(at + 1e-9) if n.coordinates == "asymmetric" else np.ceil(at + 0.5) - 1
        low = np.clip(low, 0, size - 1).astype(np.int64)
        return low.tolist(), low.tolist(), np.zeros(out, np.float32)
    at = np.clip(at, 0, size - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    return low.tolist(), high.tolist(), (at - low).astype(np.float32)


class _Lowering:
    def __init__(self, graph: g.Graph, variants: Mapping[str, str], want_variants: bool) -> None:
        self.graph = graph
        self.variants = variants
        self.want_variants = want_variants
        self.builder = _engine.PlanBuilder()
        self.kind = layouts(graph)
        self.producers = graph.producers()
        self.pools = {
            n.inputs[0]: n
            for n in graph.nodes
            if isinstance(n, g.Pool) and graph.values[n.inputs[0]].storage == "band"
        }
        self.native: dict[str, int] = {}
        self.copies: dict[tuple[str, str], int] = {}
        self.out = Lowered(None)

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
            i = self.add_value(name, v.shape, layout, **kw)
        self.native[name] = i
        return i

    def band(self, name: str) -> int:
        """Rows of a banded map that are kept: those of eight rows of the pool, fewer where they would leave the cache."""
        pool = self.pools[name]
        c, h, w = (int(d) for d in self.graph.shape(name)[1:])  # type: ignore[arg-type]
        reach = (pool.kernel_size[0] - 1) * pool.dilation[0] + 1
        step = max(2, min(8, _BAND_BYTES // (4 * c * w * pool.stride[0])))
        return min(h, (step - 1) * pool.stride[0] + reach) if h > reach else reach

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
        if self.graph.meta.get("storage") == "float16":
            return {"type": "f16"}
        return {}

    def quants(self, name: str) -> list[tuple[float, int] | None]:
        """The quantizer of each of :meth:`parts`, None where a part has none."""
        p = self.producers.get(name)
        if isinstance(p, g.Concat):
            return [q for v in p.inputs for q in self.quants(v)]
        if isinstance(p, g.Pool) and p.kind == "max" and self.graph.values[p.inputs[0]].storage != "dense":
            return self.quants(p.inputs[0])  # the greatest of quantized values is one of them
        return [self.graph.values[name].quant] * len(self.parts(name))

    def parts(self, name: str) -> list[int]:
        """Channel counts of what is written into a packed value one after the other."""
        p = self.producers.get(name)
        if isinstance(p, g.Concat):
            return [c for v in p.inputs for c in self.parts(v)]
        if p is not None and isinstance(p, (g.Pool, g.BatchNorm, g.Activation)):
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
        if {have, want} == {"plain", "map"} and len(shape) == 4 and shape[2:] == (1, 1) and v.place is None and (
            name not in self.graph.inputs
        ):  # fmt: skip
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
            self.out.plan = self.builder.build()
        except ValueError as error:
            raise UnsupportedError(f"the engine refuses the plan: {error}") from error
        self.out.values = dict(self.native)
        return self.out

    def output(self, v: str) -> int:
        i = self.native.get(v)
        plain = self.kind.get(v) == "plain" and v not in self.graph.inputs and v not in self.graph.constants
        if i is not None and plain and v not in self._aliased and self.graph.outputs.count(v) == 1:
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

    @property
    def _aliased(self) -> set[str]:
        return self.__dict__.setdefault("_alias_set", set())  # type: ignore[no-any-return]

    def layout_of(self, name: str) -> str:
        return "map" if self.kind[name] == "map" else "plain"

    def emit(self, n: g.Node) -> None:
        method = getattr(self, "on_" + n.op, None)
        if method is None:
            raise UnsupportedError(f"{n.where()}: the engine does not have it")
        method(n)

    def simple(self, n: g.Node, op: str, layout: str, **kw: Any) -> None:
        inputs = [self.read(v, layout) for v in n.inputs]
        self.node(op, n.name, inputs, self.declare(n.output), n.name, **kw)

    def on_conv2d(self, n: g.Conv2d) -> None:
        if n.pre_act is not None:
            raise UnsupportedError(f"{n.where()}: an activation before the residual")
        strings, floats, arrays = _act(n.act)
        arrays["weight"] = np.ascontiguousarray(n.weight, np.float32)
        if n.bias is not None:
            arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
        ints = {
            "kernel": [int(k) for k in n.weight.shape[2:]],
            "stride": list(n.stride),
            "padding": list(n.padding),
            "dilation": list(n.dilation),
            "groups": [n.groups],
        }
        inputs = [self.read(n.inputs[0], "any map")]
        for v in n.inputs[1:]:  # a packed residual has to be cut into the blocks of the output
            c = n.weight.shape[0]
            packed = self.graph.values[v].storage == "packed" and self.kind[v] == "map"
            same = not packed or _blocks(self.parts(v)) == _blocks([c])
            inputs.append(self.read(v, "any map" if same else "map"))
        output = self.declare(n.output)
        pool = self.pools.get(n.output)
        if self.want_variants:
            self.out.variants[n.name] = list(
                self.builder.variants(
                    "conv",
                    n.name,
                    inputs,
                    output,
                    ints,
                    floats,
                    {k: v for k, v in arrays.items() if k == "act_param"},
                    strings,
                )
            )
        chosen = self.variants.get(n.name) or n.kernel
        if chosen:
            strings["variant"] = chosen
        if pool is None:
            self.node("conv", n.name, inputs, output, n.name, ints, floats, arrays, strings)
            return
        ints.update(
            band=[output], pool_kernel=list(pool.kernel_size), pool_stride=list(pool.stride),
            pool_padding=list(pool.padding), pool_dilation=list(pool.dilation),
            count_include_pad=[int(pool.count_include_pad)], divisor=[pool.divisor],
        )  # fmt: skip
        strings["pool"] = pool.kind
        self.node(
            "conv_pool", n.name, inputs, self.declare(pool.output), n.name, ints, floats, arrays, strings
        )

    def on_conv_transpose2d(self, n: g.ConvTranspose2d) -> None:
        """Zeros between the pixels, then a convolution with the flipped weights."""
        x = self.graph.shape(n.inputs[0])
        batch, c, h, w = x
        assert isinstance(c, int) and isinstance(h, int) and isinstance(w, int)
        og, kh, kw = n.weight.shape[1:]
        k = n.groups
        t, left, b, r = n.padding
        eh, ew = n.dilation[0] * (kh - 1), n.dilation[1] * (kw - 1)
        ops = n.output_padding
        pads = [eh - t, ew - left, eh - b + ops[0], ew - r + ops[1]]
        hh, ww = (h - 1) * n.stride[0] + 1, (w - 1) * n.stride[1] + 1
        # negative padding of the convolution: cut from the stretched map
        cut = [max(0, -p) for p in pads]
        pads = [max(0, p) for p in pads]
        src = self.read(n.inputs[0], "map")
        if n.stride != (1, 1):
            wide = self.add_value(n.output + ":wide", (batch, c, hh, ww), "map")
            self.node(
                "dilate",
                n.name + ":wide",
                [src],
                wide,
                n.name,
                {"starts": [0] * 4, "steps": [1, 1, *n.stride]},
            )
            src = wide
        if any(cut):
            hh, ww = hh - cut[0] - cut[2], ww - cut[1] - cut[3]
            less = self.add_value(n.output + ":cut", (batch, c, hh, ww), "map")
            self.node(
                "slice",
                n.name + ":cut",
                [src],
                less,
                n.name,
                {"starts": [0, 0, cut[0], cut[1]], "steps": [1] * 4},
            )
            src = less
        weight = n.weight.reshape(k, c // k, og, kh, kw).transpose(0, 2, 1, 3, 4)[..., ::-1, ::-1]
        strings, floats, arrays = _act(n.act)
        arrays["weight"] = np.ascontiguousarray(weight.reshape(k * og, c // k, kh, kw), np.float32)
        if n.bias is not None:
            arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
        ints = {
            "kernel": [kh, kw],
            "stride": [1, 1],
            "padding": pads,
            "dilation": list(n.dilation),
            "groups": [k],
        }
        self.node("conv", n.name, [src], self.declare(n.output), n.name, ints, floats, arrays, strings)

    def on_linear(self, n: g.Linear) -> None:
        strings, floats, arrays = _act(n.act)
        arrays["weight"] = np.ascontiguousarray(n.weight, np.float32)
        if n.bias is not None:
            arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
        self.simple(n, "linear", "plain", floats=floats, arrays=arrays, strings=strings)

    def on_matmul(self, n: g.MatMul) -> None:
        self.simple(n, "matmul", "plain")

    def on_batch_norm(self, n: g.BatchNorm) -> None:
        strings, floats, arrays = _act(n.act)
        if self.kind[n.output] == "map":
            arrays.update(scale=np.ascontiguousarray(n.scale), shift=np.ascontiguousarray(n.shift))
            self.simple(n, "batch_norm", "any map", floats=floats, arrays=arrays, strings=strings)
            return
        # plain: as multiplication and addition
        rank = len(self.graph.shape(n.output))
        shape: g.Shape = (1, int(n.scale.size), *([1] * (rank - 2)))
        s = self.add_value(n.output + ":s", shape, "plain", data=n.scale.reshape([int(d) for d in shape]))  # type: ignore[arg-type]
        t = self.add_value(n.output + ":t", shape, "plain", data=n.shift.reshape([int(d) for d in shape]))  # type: ignore[arg-type]
        mid = self.add_value(n.output + ":mul", self.graph.shape(n.output), "plain")
        self.node(
            "binary",
            n.name + ":mul",
            [self.read(n.inputs[0], "plain"), s],
            mid,
            n.name,
            strings={"kind": "mul"},
        )
        out = self.declare(n.output)
        if n.act is not None and n.act.param is not None and n.act.param.size > 1:
            low = self.add_value(n.output + ":add", self.graph.shape(n.output), "plain")
            self.node("binary", n.name + ":add", [mid, t], low, n.name, strings={"kind": "add"})
            self.node("activation", n.name, [low], out, n.name, floats=floats, arrays=arrays, strings=strings)
        else:
            self.node(
                "binary", n.name, [mid, t], out, n.name, None, floats, arrays, {**strings, "kind": "add"}
            )

    def on_layer_norm(self, n: g.LayerNorm) -> None:
        arrays = {
            k: np.ascontiguousarray(a.reshape(-1), np.float32)
            for k, a in (("weight", n.weight), ("bias", n.bias))
            if a is not None
        }
        ints = {"tail": [len(n.shape)], "channels": [int(n.channels)]}
        self.simple(
            n,
            "layer_norm",
            "map" if n.channels else "plain",
            ints=ints,
            floats={"eps": [n.eps]},
            arrays=arrays,
        )

    def on_group_norm(self, n: g.GroupNorm) -> None:
        arrays = {
            k: np.ascontiguousarray(a, np.float32)
            for k, a in (("weight", n.weight), ("bias", n.bias))
            if a is not None
        }
        self.simple(
            n,
            "group_norm",
            self.layout_of(n.output),
            ints={"groups": [n.groups]},
            floats={"eps": [n.eps]},
            arrays=arrays,
        )

    def on_lrn(self, n: g.LocalResponseNorm) -> None:
        self.simple(
            n,
            "lrn",
            "map",
            ints={"size": [n.size]},
            floats={"alpha": [n.alpha], "beta": [n.beta], "k": [n.k]},
        )

    def on_pool(self, n: g.Pool) -> None:
        if self.graph.values[n.inputs[0]].storage == "band":
            return  # its convolution does it
        strings, floats, arrays = _act(n.act)
        strings["kind"] = n.kind
        if n.bias is not None:
            arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
        ints = {
            "kernel": list(n.kernel_size), "stride": list(n.stride), "padding": list(n.padding),
            "dilation": list(n.dilation), "count_include_pad": [int(n.count_include_pad)], "divisor": [n.divisor],
        }  # fmt: skip
        self.simple(n, "pool", "any map", ints=ints, floats=floats, arrays=arrays, strings=strings)

    def on_adaptive_pool(self, n: g.AdaptivePool) -> None:
        self.simple(n, "adaptive_pool", "any map", strings={"kind": n.kind})

    def on_activation(self, n: g.Activation) -> None:
        strings, floats, arrays = _act(n.act)
        layout = "any map" if self.kind[n.output] == "map" else "plain"
        self.simple(n, "activation", layout, floats=floats, arrays=arrays, strings=strings)

    def on_binary(self, n: g.Binary) -> None:
        """Any mix of dense layouts; an activation with numbers per channel is a node of its own."""
        strings, floats, arrays = _act(n.act)
        per_channel = n.act is not None and n.act.param is not None and n.act.param.size > 1
        inputs = [self.dense(v) for v in n.inputs]
        out = self.declare(n.output)
        if self.graph.values[n.output].storage == "packed" and self.kind[n.output] == "map":
            raise UnsupportedError(f"{n.where()}: written packed")
        if not per_channel:
            self.node(
                "binary", n.name, inputs, out, n.name, None, floats, arrays, {**strings, "kind": n.kind}
            )
            return
        mid = self.add_value(n.output + ":raw", self.graph.shape(n.output), self.layout_of(n.output))
        self.node("binary", n.name + ":raw", inputs, mid, n.name, strings={"kind": n.kind})
        self.node("activation", n.name, [mid], out, n.name, None, floats, arrays, strings)

    def dense(self, name: str) -> int:
        """The value in whatever dense layout it has."""
        self.declare(name)
        v = self.graph.values[name]
        if name in self.graph.inputs or name in self.graph.constants or self.kind[name] == "plain":
            return self.native[name]
        return self.read(name, "map") if v.storage == "packed" else self.native[name]

    def on_concat(self, n: g.Concat) -> None:
        out = self.declare(n.output)
        values = self.graph.values
        packed = values[n.output].storage == "packed"
        if n.axis != 1 or self.kind[n.output] != "map":
            self.node(
                "concat",
                n.name,
                [self.dense(v) for v in n.inputs],
                out,
                n.name,
                {"axis": [n.axis % len(values[n.output].shape)]},
            )
            return
        left, offsets, at = [], [], 0
        for v in n.inputs:
            place = values[v].place
            c = values[v].shape[1]
            assert isinstance(c, int)
            same = (
                place is not None
                and place[0] == n.output
                and self.kind[v] == "map"
                and (values[v].storage == "packed") == packed
            )
            if not same:
                left.append(v)
                offsets.append(at)
            at += c
        if not left:
            return
        if packed:
            raise UnsupportedError(f"{n.where()}: copying into a packed map")
        self.node(
            "concat", n.name, [self.dense(v) for v in left], out, n.name, {"axis": [1], "offsets": offsets}
        )

    def on_slice(self, n: g.Slice) -> None:
        shape = self.graph.shape(n.inputs[0])
        axis = n.axis % len(shape)
        values = self.graph.values
        x = values[n.inputs[0]]
        dense_map = (
            self.kind[n.inputs[0]] == "map" and x.storage == "dense" and n.inputs[0] not in self.graph.inputs
        )
        if (
            dense_map and axis == 1 and n.step == 1 and self.kind[n.output] == "map" and values[n.output].place is None
            and values[n.output].storage == "dense"
        ):  # fmt: skip
            # a view of its input's channels
            self.native[n.output] = self.add_value(
                n.output, values[n.output].shape, "map", parent=self.declare(n.inputs[0]), offset=n.start
            )
            return
        starts, steps = [0] * len(shape), [1] * len(shape)
        starts[axis], steps[axis] = n.start, n.step
        self.node(
            "slice",
            n.name,
            [self.dense(n.inputs[0])],
            self.declare(n.output),
            n.name,
            {"starts": starts, "steps": steps},
        )

    def on_pad(self, n: g.Pad) -> None:
        self.node(
            "pad", n.name, [self.dense(n.inputs[0])], self.declare(n.output), n.name, {"before": list(n.before)},
            {"value": [n.value]}, None, {"mode": n.mode},
        )  # fmt: skip

    def on_reshape(self, n: g.Reshape) -> None:
        src = self.read(n.inputs[0], "plain")
        if n.inputs[0] in self.graph.inputs or n.output in self.graph.outputs:
            # memory of the caller: copied, flattened first so that the shapes agree
            if n.inputs[0] in self.graph.inputs:
                mid = self.add_value(n.output + ":copy", self.graph.shape(n.inputs[0]), "plain")
                self.node("copy", n.name, [src], mid, n.name)
                src = mid
            self.native[n.output] = self.add_value(n.output, n.shape, "plain", parent=src)
            self._aliased.add(n.output)
            return
        self.native[n.output] = self.add_value(n.output, n.shape, "plain", parent=src)
        self._aliased.add(n.output)

    def on_transpose(self, n: g.Transpose) -> None:
        self.node(
            "transpose",
            n.name,
            [self.dense(n.inputs[0])],
            self.declare(n.output),
            n.name,
            {"perm": list(n.perm)},
        )

    def on_expand(self, n: g.Expand) -> None:
        self.node("expand", n.name, [self.dense(n.inputs[0])], self.declare(n.output), n.name)

    def on_reduce(self, n: g.Reduce) -> None:
        rank = len(self.graph.shape(n.inputs[0]))
        axes = sorted(a % rank for a in n.axes)
        self.node(
            "reduce",
            n.name,
            [self.dense(n.inputs[0])],
            self.declare(n.output),
            n.name,
            {"axes": axes},
            strings={"kind": n.kind},
        )

    def on_softmax(self, n: g.Softmax) -> None:
        rank = len(self.graph.shape(n.inputs[0]))
        self.node(
            "softmax", n.name, [self.dense(n.inputs[0])], self.declare(n.output), n.name,
            {"axis": [n.axis % rank], "log": [int(n.log)]},
        )  # fmt: skip

    def on_resize(self, n: g.Resize) -> None:
        h, w = self.graph.shape(n.inputs[0])[2:]
        assert isinstance(h, int) and isinstance(w, int)
        sy, sx = n.scale if n.scale else (None, None)
        yl, yh, yp = _resize_table(h, n.size[0], n, sy)
        xl, xh, xp = _resize_table(w, n.size[1], n, sx)
        ints = {"y_low": yl, "y_high": yh, "x_low": xl, "x_high": xh}
        self.simple(n, "resize", "map", ints=ints, arrays={"y_part": yp, "x_part": xp})


def lower(
    graph: g.Graph, variants: Mapping[str, str] | None = None, *, want_variants: bool = False
) -> Lowered:
    """The native plan of ``graph`` as its values' ``storage`` and ``place`` say.

    Args:
        variants: node name -> kernel variant; others take the engine's first choice.
        want_variants: list the variants of every convolution in ``Lowered.variants``.

    Raises:
        UnsupportedError: an operator, or a combination of storages, that the engine does not have.
        InputError: the graph does not fit together.
    """
    graph = _split_late_acts(graph)
    lowering = _Lowering(graph, variants or {}, want_variants)
    try:
        return lowering.lower()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise UnsupportedError(f"the engine refuses the plan: {error}") from error


def _split_late_acts(graph: g.Graph) -> g.Graph:
    """Linear layers of rank other than 2 with per-channel activation numbers do not occur; pre_act becomes nodes of its own."""
    graph = graph.copy()
    nodes: list[g.Node] = []
    for n in graph.nodes:
        if isinstance(n, g.Conv2d) and n.pre_act is not None and len(n.inputs) > 1:
            mid = graph.fresh(n.output + "_pre")
            graph.values[mid] = g.Value(mid, graph.shape(n.output))
            conv = dataclasses.replace(n, act=n.pre_act, pre_act=None)
            conv.inputs, conv.output = (n.inputs[0],), mid
            add = g.Binary(
                n.name + ":add", (mid, n.inputs[1]), n.output, kind="add", act=n.act, source=n.source
            )
            nodes += [conv, add]
        else:
            nodes.append(n)
    graph.nodes = nodes
    return graph
