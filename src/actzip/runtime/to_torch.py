"""A Graph as a torch module: the other way round of the front ends, so that what works on modules
works on ONNX files.

Convolutions, linear layers, BatchNorm, activations and pools become modules of ``torch.nn`` under
the names of their nodes, with parameters of their own; every other node runs as in
:mod:`actzip.runtime.interpret`. :meth:`GraphNet.to_graph` gives the Graph back with the parameters
as they are then, and with thresholds.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import interpret, ops
from actzip.runtime.acts import ACTS, Act
from actzip.runtime.drawn import drawn
from actzip.runtime.ops.elsewhere import Elsewhere
from actzip.runtime.origin import Origin, Shapes, is_large
from actzip.runtime.sizes import Resizer, Sizes

__all__ = ["GraphNet", "NetOrigin", "to_torch"]


def to_torch(graph: g.Graph, origin: Origin | None = None) -> GraphNet:
    """``graph`` as an ``nn.Module`` in eval mode, one submodule a node.

    Inputs and outputs are float32 in the graph's order and shapes; a single output is given as a
    tensor, several as a tuple. ``origin``: what makes the graph for other sizes.
    """
    return GraphNet(graph, origin)


# --- modules --------------------------------------------------------------------------------------


class _NodeModule(nn.Module):
    """A node that no module of ``torch.nn`` stands for."""

    def __init__(self, node: g.Node) -> None:
        super().__init__()
        self.node = node

    def extra_repr(self) -> str:
        return self.node.op

    def forward(self, batch: int, *args: Tensor) -> Tensor:
        n = self.node
        if isinstance(n, ops.Reshape):  # -1, so that a traced or exported batch stays dynamic
            return args[0].reshape([-1 if isinstance(d, g.Sym) else d for d in n.shape])
        if isinstance(n, ops.Pad) and n.mode != "constant":
            return _pad(n, args[0])
        return interpret.run_node(n, list(args), batch)


def _pad(n: ops.Pad, x: Tensor) -> Tensor:
    """Reflection or edge padding, axis by axis, with a gradient."""
    for axis, (before, after) in enumerate(zip(n.before, n.after, strict=True)):
        size = x.shape[axis]
        if before == after == 0:
            continue
        i = torch.arange(-before, int(size) + after)
        if n.mode == "reflect":
            i = i.abs()
            i = torch.where(i >= size, 2 * (size - 1) - i, i)
        x = x.index_select(axis, interpret.within(i, size))
    return x


class _FixedBatchNorm(nn.Module):
    """A BatchNorm whose statistics stay as they are in training too: a graph keeps scale and shift only."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class FixedBatchNorm1d(_FixedBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with fixed statistics."""


class FixedBatchNorm2d(_FixedBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with fixed statistics."""


class FixedBatchNorm3d(_FixedBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with fixed statistics."""


class _UnevenConv2d(nn.Conv2d):
    """A convolution with other padding at the end than at the start (left, right, top, bottom)."""

    uneven: tuple[int, int, int, int] = (0, 0, 0, 0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, self.uneven))


class _UnevenPool(nn.Module):
    """Pads, then pools."""

    def __init__(self, pad: tuple[int, int, int, int], value: float, pool: nn.Module) -> None:
        super().__init__()
        self.pad, self.value, self.pool = pad, value, pool

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(F.pad(x, self.pad, value=self.value))
        return out


def _parameter(array: g.Array) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(array, np.float32)))


def _filled(module: nn.Module, **arrays: g.Array | None) -> nn.Module:
    """The module (made on the meta device) with these parameters."""
    for name, array in arrays.items():
        setattr(module, name, None if array is None else _parameter(array))
    return module


def _conv(n: ops.Conv2d, shape: g.Shape) -> nn.Module | None:
    if n.act is not None or n.pre_act is not None or len(n.inputs) > 1:
        return None
    o, ci, kh, kw = n.weight.shape
    top, left, bottom, right = n.padding
    even = (top, left) == (bottom, right)
    kind = nn.Conv2d if even else _UnevenConv2d
    made = kind(
        ci * n.groups,
        o,
        (kh, kw),
        n.stride,
        (top, left) if even else 0,
        n.dilation,
        n.groups,
        n.bias is not None,
        device="meta",
    )
    if isinstance(made, _UnevenConv2d):
        made.uneven = (left, right, top, bottom)
    return _filled(made, weight=n.weight, bias=n.bias)


def _conv_transpose(n: ops.ConvTranspose2d, shape: g.Shape) -> nn.Module | None:
    top, left, bottom, right = n.padding
    extra = n.output_padding
    fits = all(e < max(s, d) for e, s, d in zip(extra, n.stride, n.dilation, strict=True))
    if n.act is not None or (top, left) != (bottom, right) or not fits:
        return None
    c, og, kh, kw = n.weight.shape
    made = nn.ConvTranspose2d(
        c,
        og * n.groups,
        (kh, kw),
        n.stride,
        (top, left),
        extra,
        n.groups,
        n.bias is not None,
        n.dilation,
        device="meta",
    )
    return _filled(made, weight=n.weight, bias=n.bias)


def _linear(n: ops.Linear, shape: g.Shape) -> nn.Module | None:
    if n.act is not None or len(n.inputs) > 1:
        return None
    o, k = n.weight.shape
    return _filled(nn.Linear(k, o, n.bias is not None, device="meta"), weight=n.weight, bias=n.bias)


def _batch_norm(n: ops.BatchNorm, shape: g.Shape) -> nn.Module | None:
    kinds: dict[int, Any] = {
        2: FixedBatchNorm1d, 3: FixedBatchNorm1d, 4: FixedBatchNorm2d, 5: FixedBatchNorm3d,
    }  # fmt: skip
    if n.act is not None or len(shape) not in kinds:
        return None
    made: nn.Module = kinds[len(shape)](n.scale.shape[0], eps=0.0)
    return _filled(made, weight=n.scale, bias=n.shift)


def _activation(n: ops.Activation, shape: g.Shape) -> nn.Module | None:
    a = n.act
    if a.kind == "clip":
        if a.lo == 0 and a.hi == math.inf:
            return nn.ReLU()
        if a.lo == 0 and a.hi == 6:
            return nn.ReLU6()
        return (
            nn.Hardtanh(a.lo, a.hi) if math.isfinite(a.lo) and math.isfinite(a.hi) and a.lo < a.hi else None
        )
    if a.kind == "threshold":
        assert a.param is not None
        return nn.Threshold(float(a.param[0]), 0.0) if a.param.size == 1 and a.hi == math.inf else None
    if a.kind == "prelu":
        assert a.param is not None
        return _filled(nn.PReLU(a.param.size), weight=a.param)
    if a.kind == "hardsigmoid":
        return nn.Hardsigmoid() if abs(a.alpha - 1 / 6) <= 1e-6 and a.beta == 0.5 else None
    if a.kind == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    row = ACTS[a.kind]
    made = getattr(nn, row.module)(*(getattr(a, n) for n in row.numbers)) if row.module else None
    return cast("nn.Module | None", made)


def _pool(n: ops.Pool, shape: g.Shape) -> nn.Module | None:
    top, left, bottom, right = n.padding
    (kh, kw), even = n.kernel_size, (top, left) == (bottom, right)
    inside = even and top <= kh // 2 and left <= kw // 2
    if n.act is not None or n.bias is not None or (not inside and n.ceil_mode):
        return None
    pad = (top, left) if inside else (0, 0)
    made: nn.Module
    if n.kind == "max":
        made = nn.MaxPool2d(n.kernel_size, n.stride, pad, n.dilation, ceil_mode=n.ceil_mode)
    else:
        if not inside and not n.count_include_pad and not n.divisor:
            return None
        made = nn.AvgPool2d(n.kernel_size, n.stride, pad, n.ceil_mode, n.count_include_pad, n.divisor or None)
    return (
        made
        if inside
        else _UnevenPool((left, right, top, bottom), -math.inf if n.kind == "max" else 0.0, made)
    )


def _adaptive_pool(n: ops.AdaptivePool, shape: g.Shape) -> nn.Module | None:
    return (nn.AdaptiveMaxPool2d if n.kind == "max" else nn.AdaptiveAvgPool2d)(n.output_size)


_BUILDERS: dict[type[g.Node], Callable[[Any, g.Shape], nn.Module | None]] = {
    ops.Conv2d: _conv,
    ops.ConvTranspose2d: _conv_transpose,
    ops.Linear: _linear,
    ops.BatchNorm: _batch_norm,
    ops.Activation: _activation,
    ops.Pool: _pool,
    ops.AdaptivePool: _adaptive_pool,
}


# --- the network ----------------------------------------------------------------------------------


class GraphNet(nn.Module):
    """A :class:`actzip.runtime.graph.Graph` (of an ONNX file, say) as a module, one submodule a
    node.

    Inputs and outputs in the graph's order, float32 ``N, C, H, W`` as there; a single output is
    given as a tensor. With an ``origin`` inputs may have any size that the model takes: the graph
    is made again for it, parameters and hooks are those of the submodules.

    Attributes:
        graph: as it was given; :meth:`to_graph` has the parameters of now.
        names: path of the submodule -> name of the node.
        arity: number of inputs.
        numbers: how many the weights and constants hold together.
        batch: the number of images that the graph was made for, None for any number.
        origin: what makes the graph for other sizes; None: there are none.
        open: inputs whose sizes the file leaves open and nobody has said, each with its dimensions
            (:func:`actzip.runtime.open_sizes.open_inputs`).
    """

    def __init__(self, graph: g.Graph, origin: Origin | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.origin = origin
        self.open: dict[str, list[int | str] | None] = {}
        self.names: dict[str, str] = {}
        self.steps: list[tuple[nn.Module, g.Node]] = []
        for node in graph.nodes:
            path = self._path(node)
            step = _module_of(node, graph)
            self.names[path] = node.name
            self._place(path, step)
            self.steps.append((step, node))
        self._constants: list[str] = []
        for i, (name, array) in enumerate(graph.constants.items()):
            self.register_buffer(f"_constant{i}", torch.from_numpy(np.array(array)), persistent=False)
            self._constants.append(name)
        self.arity = len(graph.inputs)
        arrays = [v for node in graph.nodes for v in vars(node).values() if isinstance(v, np.ndarray)]
        self.numbers = sum(int(a.size) for a in (*arrays, *graph.constants.values()))
        first = graph.shape(graph.inputs[0])[0] if graph.inputs and graph.shape(graph.inputs[0]) else None
        self.batch: int | None = first if isinstance(first, int) else None
        self._begin()
        self.eval()

    def _begin(self) -> None:
        """What copies and pickles make anew: how to walk the graph, here and at other sizes."""
        self._own = self._walk(self.graph)
        self._resizer: Resizer | None = None
        self._others: Sizes[_Walk] | None = None
        if self.origin is not None:
            shapes = [g.concrete(self.graph.shape(v), 1) for v in self.graph.inputs]
            self._resizer = Resizer(self.origin, self.graph, shapes, lambda graph: graph)
            self._others = Sizes(self._walk_at, lambda walk, shapes: _takes(walk.graph, shapes))

    def _path(self, node: g.Node) -> str:
        """Where a node's module goes: its name, with dots, numbered where that is taken."""
        path = ".".join(p for p in node.name.replace("/", ".").split(".") if p) or node.op
        if self._blocked(path):
            path = path.replace(".", "_")
        base, i = path, 1
        while path in self.names or not self._free(path):
            path, i = f"{base}_{i}", i + 1
        return path

    def _blocked(self, path: str) -> bool:
        """Whether something else than a plain container lies on the way: a layer ``p`` before
        ``p/pool``."""
        at: Any = self
        for part in path.split(".")[:-1]:
            at = getattr(at, part, None)
            if at is None:
                return False
            if type(at) is not nn.Module:
                return True
        return False

    def _free(self, path: str) -> bool:
        """Whether a submodule can be put at ``path``: only plain containers lie on the way, and
        nothing is there."""
        at: Any = self
        parts = path.split(".")
        for i, part in enumerate(parts):
            found = getattr(at, part, None)
            if found is None:
                return True
            if i == len(parts) - 1 or type(found) is not nn.Module:
                return False
            at = found
        return False

    def _place(self, path: str, step: nn.Module) -> None:
        at: nn.Module = self
        *folders, last = path.split(".")
        for part in folders:
            if getattr(at, part, None) is None:
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, step)

    # -- walks

    def _walk(self, graph: g.Graph) -> _Walk:
        """How to run ``graph``: this one, or its like at another size, with the submodules' parameters."""
        known = {node.name: (step, node) for step, node in self.steps}
        steps = [_step_for(node, graph, known.get(node.name)) for node in graph.nodes]
        ours = {name: f"_constant{i}" for i, name in enumerate(self._constants)}
        constants = {
            v: ours[v] if v in ours and a is self.graph.constants[v] else torch.from_numpy(np.array(a))
            for v, a in graph.constants.items()
        }
        last = {v: i for i, n in enumerate(graph.nodes) for v in n.inputs}
        kept = {*graph.outputs, *graph.constants}
        done: list[list[str]] = [[] for _ in steps]
        for v, i in last.items():
            if v not in kept:
                done[i].append(v)
        return _Walk(graph, steps, constants, done)

    def _walk_at(self, shapes: Shapes) -> _Walk:
        assert self._resizer is not None
        return self._walk(self._resizer.at(shapes))

    def _walk_for(self, inputs: tuple[Tensor, ...]) -> _Walk:
        """The walk for inputs of these sizes.

        Raises:
            InputError, UnsupportedError: they do not fit the model.
        """
        if self._others is None:
            return self._own
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return self._traced(inputs)
        return self._at([tuple(x.shape) for x in inputs])

    def _at(self, shapes: Shapes) -> _Walk:
        if self._others is None or _takes(self.graph, shapes):
            return self._own
        try:
            return self._others.get(shapes)
        except (InputError, UnsupportedError) as error:
            given = ", ".join(map(str, shapes))
            raise type(error)(f"inputs of shape {given} do not fit the model: {error}") from error

    def _traced(self, inputs: tuple[Tensor, ...]) -> _Walk:
        """A walk that is there already: nothing can be made while a tracer watches."""
        assert self._others is not None
        if _traced_fits(self._own.graph, inputs):
            return self._own
        made = reversed(self._others.all())
        return next((walk for walk in made if _traced_fits(walk.graph, inputs)), self._own)

    def elsewhere(self) -> list[str]:
        """Nodes that ONNX Runtime runs: they have no gradient."""
        return [node.name for _, node in self.steps if isinstance(node, Elsewhere)]

    def changed(self) -> bool:
        """Whether it has other parameters than the graph that it was made of, or thresholds."""
        now = self._now()
        pairs = [
            (a, node.act.param if k == "slope" else getattr(node, k))  # type: ignore[attr-defined]
            for _, node in self.steps
            for k, a in now[node.name].items()
        ]
        same = all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)
        return not same or bool(self._thresholds())

    def takes(self, shapes: Shapes) -> bool:
        """Whether the model takes inputs of these shapes, the batch included."""
        try:
            return _takes(self._at(shapes).graph, shapes)
        except (InputError, UnsupportedError):
            return False

    def _actzip_sizes(self, shapes: Shapes) -> None:
        """Gets ready to be traced with inputs of these shapes."""
        if len(shapes) == self.arity:
            self._at(shapes)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphNet:
        memo[id(self.graph)] = self.graph  # is never written to
        memo[id(self.origin)] = self.origin
        for _, node in self.steps:
            memo[id(node)] = node
        made = GraphNet.__new__(GraphNet)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        made._begin()
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_own", "_resizer", "_others")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"origin": None, "open": {}, **state})  # type: ignore[no-untyped-call]
        self._begin()

    def _batch_of(self, graph: g.Graph, inputs: tuple[Tensor, ...]) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            for name, x in zip(graph.inputs, inputs, strict=True):
                for want, d in zip(graph.shape(name), x.shape, strict=True):
                    if isinstance(want, g.Sym):
                        return d if want.mul == 1 else d // want.mul
            return 1
        return interpret.batch_of(
            graph, {n: tuple(x.shape) for n, x in zip(graph.inputs, inputs, strict=True)}
        )

    def forward(self, *inputs: Any) -> Any:
        if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):  # several, as compiled models take them
            inputs = tuple(inputs[0])
        if len(inputs) != self.arity:
            names = ", ".join(self.graph.inputs)
            raise InputError(f"{len(inputs)} inputs given; the model takes {self.arity}: {names}")
        walk = self._walk_for(inputs)
        graph = walk.graph
        batch = self._batch_of(graph, inputs)
        values: dict[str, Tensor] = {
            v: getattr(self, c) if isinstance(c, str) else c for v, c in walk.constants.items()
        }
        values.update(zip(graph.inputs, map(interpret.as_computed, inputs), strict=True))
        for (step, other, node), done in zip(walk.steps, walk.done, strict=True):
            args = [values[v] for v in node.inputs]
            run = step if other is None else _replica(step, other)
            values[node.output] = run(batch, *args) if isinstance(run, _NodeModule) else run(*args)
            for v in done:
                del values[v]
        outputs = tuple(interpret.as_seen(graph, v, values[v]) for v in graph.outputs)
        slots = graph.meta.get("out_slots")
        if slots is not None:  # some are constants
            outputs = tuple(
                outputs[s] if isinstance(s, int) else torch.as_tensor(s[0]).clone() for s in slots
            )
        return outputs[0] if len(outputs) == 1 else outputs

    def example(self) -> Any:
        """Random inputs of the graph's shapes and types (N is 1): a tensor, or a tuple of several."""
        rng, values = np.random.default_rng(0), [self.graph.values[v] for v in self.graph.inputs]
        made = [torch.from_numpy(drawn(rng, g.concrete(v.shape, 1), v.dtype)) for v in values]
        return made[0] if len(made) == 1 else tuple(made)

    def to_graph(self, shapes: Shapes | None = None) -> g.Graph:
        """The Graph with the parameters and thresholds that the module has now, for inputs of
        ``shapes`` (None: those that it was made for).

        Raises:
            UnsupportedError: a threshold on an activation that is not a ReLU of the graph.
            InputError: shapes that do not fit the model.
        """
        graph = self.graph if shapes is None else self._at(shapes).graph
        return _changed(graph, self._now(), self._thresholds())

    def _now(self, *, large: bool = True) -> dict[str, dict[str, g.Array | None]]:
        """Parameters of now, by node and field; ``large``: also those that origins do not keep."""
        return {
            node.name: {
                k: _array(t)
                for k, t in _parameters_of(step).items()
                if large or t is None or not is_large(t.shape)
            }
            for step, node in self.steps
        }

    def _thresholds(self) -> dict[str, float | Tensor]:
        """Thresholds by node.

        Raises:
            UnsupportedError: one of no node.
        """
        from actzip.activations import get_thresholds

        thresholds = get_thresholds(self)
        lost = [path for path in thresholds if path not in self.names]
        if lost:
            raise UnsupportedError(f"thresholds of {', '.join(lost)}: no ReLU of the graph")
        return {self.names[path]: t for path, t in thresholds.items()}


@dataclass
class _Walk:
    """How a graph is run: of every node the submodule, what stands in for it at this size (None:
    itself) and the node; constants as buffers' names or tensors; values that no later step reads."""

    graph: g.Graph
    steps: list[tuple[nn.Module, nn.Module | None, g.Node]]
    constants: dict[str, Any]
    done: list[list[str]]


class NetOrigin:
    """A :class:`GraphNet` without its large weights: its origin, with the small parameters and the
    thresholds that it has now."""

    is_data = False

    def __init__(self, net: GraphNet) -> None:
        assert net.origin is not None
        self.origin = net.origin
        self.parameters = net._now(large=False)
        self.thresholds = net._thresholds()

    def graph(self, shapes: Shapes, seed: int = 0, *, quick: bool = False) -> g.Graph:
        made = self.origin.graph(shapes, seed, quick=quick)
        return _changed(made, self.parameters, self.thresholds)

    def simpler(self) -> bool:
        return False


def _module_of(node: g.Node, graph: g.Graph) -> nn.Module:
    build = _BUILDERS.get(type(node))
    step = build(node, graph.shape(node.inputs[0])) if build else None
    return _NodeModule(node) if step is None else step


def _takes(graph: g.Graph, shapes: Shapes) -> bool:
    """Whether the graph was made for inputs of these shapes."""
    try:
        interpret.batch_of(graph, dict(zip(graph.inputs, map(tuple, shapes), strict=True)))
    except InputError:
        return False
    return True


def _traced_fits(graph: g.Graph, inputs: Sequence[Tensor]) -> bool:
    """Whether a tracer's inputs have the graph's sizes, but for the batch.

    Raises:
        UnsupportedError: it traces for any size.
    """
    for v, x in zip(graph.inputs, inputs, strict=True):
        for want, d in zip(graph.shape(v), x.shape, strict=False):
            if isinstance(want, g.Sym):
                continue
            if isinstance(d, torch.SymInt):
                raise UnsupportedError("a graph is made for sizes in numbers")
            if want != int(d):
                return False
    return True


def _step_for(
    node: g.Node, graph: g.Graph, known: tuple[nn.Module, g.Node] | None
) -> tuple[nn.Module, nn.Module | None, g.Node]:
    """Submodule and stand-in of a node; ``known``: those of the node of this name."""
    if known is None or type(known[1]) is not type(node):
        return _module_of(node, graph), None, node  # there is none at the size that was loaded
    step, before = known
    if node is before:
        return step, None, node
    pairs = [(a, b) for (_, a), (_, b) in zip(node.fields(), before.fields(), strict=True)]
    if all(_equal(a, b) for a, b in pairs):
        return step, None, node
    made = _module_of(node, graph)
    if any(isinstance(x, np.ndarray) and a is not b for a, b in pairs for x in (a, b)):
        return made, None, node  # other numbers at this size
    made._parameters.clear()  # it is given those of `step`
    made._buffers.clear()
    return step, made, node


def _equal(a: Any, b: Any) -> bool:
    """Equal; arrays the same ones."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is b
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Act) and isinstance(b, Act):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Act))
    return bool(a == b)


def _replica(step: nn.Module, other: nn.Module) -> nn.Module:
    """``other`` with the parameters, hooks and watchers that ``step`` has now, as nn.DataParallel's
    replicas have them."""
    own = {
        k: v
        for k, v in step.__dict__.items()
        if "hooks" in k or k in ("_parameters", "_buffers", "forward", "training")
    }
    made = type(other).__new__(type(other))
    made.__dict__.update({**other.__dict__, **own})
    return made


def _array(t: Tensor | None) -> g.Array | None:
    return None if t is None else t.detach().float().contiguous().numpy().copy()


def _changed(
    graph: g.Graph,
    parameters: Mapping[str, Mapping[str, g.Array | None]],
    thresholds: Mapping[str, float | Tensor],
) -> g.Graph:
    """``graph`` with other parameters, by node and field, and with thresholds, by node.

    Raises:
        UnsupportedError: a threshold on what is no ReLU of the graph.
    """
    made = graph.copy()
    for i, node in enumerate(made.nodes):
        node = _with_parameters(node, parameters.get(node.name, {}))
        if node.name in thresholds:
            node = _with_threshold(node, thresholds[node.name])
        made.nodes[i] = node
    lost = thresholds.keys() - {n.name for n in made.nodes}
    if lost:
        raise UnsupportedError(f"thresholds of {', '.join(sorted(lost))}: no ReLU of the graph")
    return made


def _parameters_of(step: nn.Module) -> dict[str, Tensor | None]:
    """Fields of a node that its module's parameters give ("slope": that of its activation)."""
    if isinstance(step, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        return {"weight": step.weight, "bias": step.bias}
    if isinstance(step, _FixedBatchNorm):
        s: Any = step
        scale = s.weight.double() / (s.running_var.double() + s.eps).sqrt()
        return {"scale": scale, "shift": s.bias.double() - s.running_mean.double() * scale}
    return {"slope": step.weight} if isinstance(step, nn.PReLU) else {}


def _with_parameters(node: Any, fields: Mapping[str, g.Array | None]) -> g.Node:
    """A copy of the node with these parameters."""
    made: g.Node = dataclasses.replace(node, **{k: a for k, a in fields.items() if hasattr(node, k)})
    if "slope" in fields and isinstance(made, ops.Activation):
        made.act = dataclasses.replace(made.act, param=fields["slope"])
    return made


def _with_threshold(node: Any, threshold: float | Tensor) -> g.Node:
    """The node with its ReLU thresholded."""
    act: Act | None = getattr(node, "act", None)
    t = np.atleast_1d(np.asarray(threshold, np.float32))
    if act is None or not (act.kind in ("relu", "threshold") or (act.kind == "clip" and act.lo == 0)):
        raise UnsupportedError(f"{node.where()}: a threshold needs a ReLU")
    hi = math.inf if act.kind == "relu" else act.hi
    if act.kind == "threshold":
        assert act.param is not None
        t = np.maximum(t, act.param)
    t = np.where(t >= hi, np.float32(np.finfo(np.float32).max), t)  # nothing is left, as after clipping
    return dataclasses.replace(node, act=Act.of("threshold", param=t, hi=hi))  # type: ignore[no-any-return]
