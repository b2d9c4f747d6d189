"""LSTM and GRU layers: what their inputs give is a linear layer of all steps, what the hidden state
gives is added step after step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from actzip.errors import InputError
from actzip.runtime.graph import Array, Node, Shape, check_rank, numel
from actzip.runtime.onnx_node import OnnxNode
from actzip.runtime.ops.linear import Linear
from actzip.runtime.ops.reshape import Expand, Reshape, Transpose
from actzip.runtime.ops.select import Concat, Slice
from actzip.runtime.registry import Absent, Probed, lowers, onnx_op, torch_op

if TYPE_CHECKING:
    from actzip.runtime.from_onnx import Importer
    from actzip.runtime.from_torch import Builder
    from actzip.runtime.lower import Lowering

    Maker: TypeAlias = Builder | Importer

__all__ = ["Recurrent"]

#: Kind -> gates, in PyTorch's order: input, forget, cell, output; reset, update, new.
GATES = {"lstm": 4, "gru": 3}


@dataclass(eq=False)
class Recurrent(Node):
    """x (T, N, D * G * H), what the inputs give each gate, biases added -> hidden states (T, N, D * H).

    ``weight`` (D, G * H, H) for D directions (the second runs backward; ``reverse``: the only one does)
    and G gates as :data:`GATES` has them. A GRU has ``bias`` (D, H), added to what the hidden state
    gives its last gate before that is reset; with ``reset_before`` the state is reset before it is
    multiplied. States begin with zeros.
    """

    kind: str = field(kw_only=True)
    weight: Array = field(kw_only=True)
    bias: Array | None = None
    reverse: bool = False
    reset_before: bool = False

    op = "recurrent"

    def infer(self, shapes: Sequence[Shape]) -> Shape:
        x = shapes[0]
        check_rank(x, 3)
        if self.kind not in GATES:
            raise InputError(f"kind {self.kind!r} is not one of {', '.join(GATES)}")
        if self.weight.ndim != 3 or self.weight.shape[1] != GATES[self.kind] * self.weight.shape[2]:
            raise InputError(f"weight of shape {list(self.weight.shape)}")
        d, wide, size = self.weight.shape
        if d not in (1, 2) or x[2] != d * wide or (self.reverse and d == 2):
            raise InputError(f"weight of shape {list(self.weight.shape)} does not fit gates of shape {x}")
        if (self.bias is None) != (self.kind == "lstm") or (
            self.bias is not None and self.bias.shape != (d, size)
        ):
            raise InputError("a GRU, and no LSTM, has a bias (D, H)")
        return (x[0], x[1], d * size)

    def macs(self, shapes: Sequence[Shape], out: Shape) -> int:
        return numel(shapes[0][:2])[0] * int(self.weight.size)


@dataclass
class _Way:
    """One direction of a layer: weights (G * H, I) and (G * H, H), biases (G * H)."""

    inputs: Array
    hidden: Array
    input_bias: Array
    hidden_bias: Array


def _layer(
    b: Maker, x: Any, kind: str, ways: list[_Way], *, reverse: bool = False, reset_before: bool = False
) -> Any:
    """The hidden states (T, N, D * H) of x (T, N, I)."""
    size = int(ways[0].hidden.shape[1])
    biases, last = [], []
    for way in ways:
        bias = way.input_bias + way.hidden_bias
        if kind == "gru":
            bias[2 * size :] = way.input_bias[2 * size :]
            last.append(way.hidden_bias[2 * size :])
        biases.append(bias)
    gates = b.emit(Linear, x, weight=np.concatenate([w.inputs for w in ways]), bias=np.concatenate(biases))
    return b.emit(
        Recurrent,
        gates,
        kind=kind,
        weight=np.stack([w.hidden for w in ways]),
        bias=np.stack(last) if last else None,
        reverse=reverse,
        reset_before=reset_before,
    )


def _last(b: Maker, y: Any, directions: int, reverse: bool = False) -> Any:
    """The hidden states (D, N, H) behind the last step of each direction; None where the number of steps
    depends on the batch."""
    steps, _, wide = b.shape(y)
    if not isinstance(steps, int) or not isinstance(wide, int):
        return None
    size, found = wide // directions, []
    for d in range(directions):
        at = 0 if d == 1 or reverse else steps - 1
        part = b.emit(Slice, y, axis=0, start=at, stop=at + 1)
        if directions > 1:
            part = b.emit(Slice, part, axis=2, start=d * size, stop=(d + 1) * size)
        found.append(part)
    return found[0] if directions == 1 else b.emit(Concat, *found, axis=0)


def _is_zero(b: Maker, x: Any) -> bool:
    """Whether a first state is known to be zeros."""
    if x is None:
        return True
    if isinstance(x, Probed):
        return not any(np.asarray(v).any() for v in x.values)
    if hasattr(x, "detach") or isinstance(x, np.ndarray):
        return not np.asarray(x).any()
    name = x if isinstance(x, str) else getattr(x, "name", None)
    made = next((n for n in b.graph.nodes if n.output == name), None)
    while isinstance(made, (Expand, Reshape, Transpose, Slice)):
        value = b.graph.constants.get(made.inputs[0])
        if value is not None:
            return not value.any()
        name = made.inputs[0]
        made = next((n for n in b.graph.nodes if n.output == name), None)
    return False


@torch_op("lstm", "gru")
def torch_recurrent(b: Builder, a: dict[str, Any]) -> Any:
    kind = b.node.target._schema.name.removeprefix("aten::")
    if "input" not in a or "batch_sizes" in a:
        raise b.refuse("packed sequences are not supported")
    x, hx = a["input"], a["hx"]
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if len(b.shape(x)) != 3:
        raise b.refuse("an input without a batch is not supported")
    if not all(_is_zero(b, s) for s in states):
        raise b.refuse("a first state other than zeros is not supported")
    layers, two = int(a["num_layers"]), 2 if a["bidirectional"] else 1
    each = 4 if a["has_biases"] else 2
    params = [b.array(p) for p in a["params"]]
    if len(params) != layers * two * each:
        raise b.refuse("projected hidden states are not supported")
    y = b.emit(Transpose, x, perm=(1, 0, 2)) if a["batch_first"] else x
    last: list[Any] = []
    for k in range(0, len(params), two * each):
        ways = []
        for d in range(two):
            own = params[k + d * each : k + (d + 1) * each]
            zeros = np.zeros(own[0].shape[0], np.float32)
            ways.append(_Way(own[0], own[1], *(own[2:] if each == 4 else (zeros, zeros))))
        y = _layer(b, y, kind, ways)
        last.append(_last(b, y, two))
    out = b.emit(Transpose, y, perm=(1, 0, 2)) if a["batch_first"] else y
    state: Any = Absent("the last states of steps whose number depends on the batch")
    if all(h is not None for h in last):
        state = last[0] if len(last) == 1 else b.emit(Concat, *last, axis=0)
    return (out, state, Absent("the cells of an LSTM")) if kind == "lstm" else (out, state)


#: ONNX's order of gates (input, output, forget, cell; update, reset, new) -> ours
_ORDER = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2)}
_USUAL = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}


@onnx_op("LSTM", "GRU")
def onnx_recurrent(imp: Importer, node: OnnxNode) -> Any:
    x, kind = node.need(0), node.op.lower()
    w, r = node.floats(1, "the weights"), node.floats(2, "the recurrent weights")
    if w is None or r is None or w.ndim != 3 or r.ndim != 3:
        raise node.wrong("weights (inputs 1 and 2) of three dimensions are needed")
    d, size = int(r.shape[0]), int(r.shape[2])
    direction = node.attribute("direction", "forward")
    given = node.attribute("activations", None) or []
    names = [(n.decode() if isinstance(n, bytes) else str(n)).lower() for n in given]
    if names and names != _USUAL[node.op] * d:
        raise node.refuse(f"activations {', '.join(names)}")
    if "clip" in node.attributes or node.integer("input_forget", 0) or node.has(7):
        raise node.refuse("clipped cells, joined gates or peepholes")
    first = 1 if node.integer("layout", 0) else 0
    shape = imp.shape(x)
    if len(shape) != 3 or d != (2 if direction == "bidirectional" else 1):
        raise node.wrong(f"an input of shape {shape}, weights for {d} directions ({direction})")
    lengths = node.constant(4, "the lengths of the sequences") if node.has(4) else None
    if node.has(4) and (lengths is None or (lengths != shape[first]).any()):
        raise node.refuse("sequences of several lengths")
    if not all(_is_zero(imp, node.input(k)) for k in (5, 6) if node.has(k)):
        raise node.refuse("a first state other than zeros")
    bias = node.floats(3, "the biases") if node.has(3) else None
    if bias is None:
        bias = np.zeros((d, 2 * r.shape[1]), np.float32)

    def ordered(array: Array) -> Array:
        parts = array.reshape(len(_ORDER[kind]), size, -1)[list(_ORDER[kind])]
        return np.ascontiguousarray(parts.reshape(array.shape))

    wide = int(r.shape[1])
    ways = [_Way(*map(ordered, (w[i], r[i], bias[i, :wide], bias[i, wide:]))) for i in range(d)]
    reverse = direction == "reverse"
    steps = imp.emit(Transpose, x, perm=(1, 0, 2)) if first else x
    before = kind == "gru" and not node.integer("linear_before_reset", 0)
    y = _layer(imp, steps, kind, ways, reverse=reverse, reset_before=before)
    t, n, _ = imp.shape(y)
    split = imp.emit(Reshape, y, shape=(t, n, d, size))
    last = _last(imp, y, d, reverse)
    if last is None:
        raise node.refuse("a number of steps that depends on the batch")
    # Y (T, D, N, H) and Y_h (D, N, H), the batch first with `layout`
    all_steps = imp.emit(Transpose, split, perm=(1, 0, 2, 3) if first else (0, 2, 1, 3))
    return [all_steps, imp.emit(Transpose, last, perm=(1, 0, 2)) if first else last]


@lowers(Recurrent)
def lower_recurrent(low: Lowering, n: Recurrent) -> None:
    arrays = {"weight": np.ascontiguousarray(n.weight, np.float32)}
    if n.bias is not None:
        arrays["bias"] = np.ascontiguousarray(n.bias, np.float32)
    ints = {
        "directions": [int(n.weight.shape[0])],
        "reverse": [int(n.reverse)],
        "reset_before": [int(n.reset_before)],
    }
    low.simple(n, "recurrent", "plain", ints=ints, arrays=arrays, strings={"kind": n.kind})
