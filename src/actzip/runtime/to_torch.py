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
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.errors import UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import interpret, ops
from actzip.runtime.acts import ACTS, Act

__all__ = ["GraphNet", "to_torch"]


def to_torch(graph: g.Graph) -> GraphNet:
    """``graph`` as an ``nn.Module`` in eval mode, one submodule a node.

    Inputs and outputs are float32 in the graph's order and shapes; a single output is given as a
    tensor, several as a tuple.
    """
    return GraphNet(graph)


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
        x = x.index_select(axis, i.clamp(0, size - 1))
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
    given as a tensor.

    Attributes:
        graph: as it was given; :meth:`to_graph` has the parameters of now.
        names: path of the submodule -> name of the node.
        arity: number of inputs.
        numbers: how many the weights and constants hold together.
        batch: the number of images that the graph was made for, None for any number.
    """

    def __init__(self, graph: g.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.names: dict[str, str] = {}
        self.steps: list[tuple[nn.Module, g.Node]] = []
        for node in graph.nodes:
            path = self._path(node)
            build = _BUILDERS.get(type(node))
            step = build(node, graph.shape(node.inputs[0])) if build else None
            step = _NodeModule(node) if step is None else step
            self.names[path] = node.name
            self._place(path, step)
            self.steps.append((step, node))
        self._constants: list[str] = []
        for i, (name, array) in enumerate(graph.constants.items()):
            self.register_buffer(f"_constant{i}", torch.from_numpy(np.array(array)), persistent=False)
            self._constants.append(name)
        last = {v: i for i, (_, n) in enumerate(self.steps) for v in n.inputs}
        kept = {*graph.outputs, *graph.constants}
        self._done: list[list[str]] = [[] for _ in self.steps]  # values that no later step reads
        for v, i in last.items():
            if v not in kept:
                self._done[i].append(v)
        self.arity = len(graph.inputs)
        arrays = [v for node in graph.nodes for v in vars(node).values() if isinstance(v, np.ndarray)]
        self.numbers = sum(int(a.size) for a in (*arrays, *graph.constants.values()))
        first = graph.shape(graph.inputs[0])[0] if graph.inputs and graph.shape(graph.inputs[0]) else None
        self.batch: int | None = first if isinstance(first, int) else None
        self.eval()

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

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphNet:
        memo[id(self.graph)] = self.graph  # is never written to
        for _, node in self.steps:
            memo[id(node)] = node
        made = GraphNet.__new__(GraphNet)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _batch_of(self, inputs: tuple[Tensor, ...]) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            for name, x in zip(self.graph.inputs, inputs, strict=True):
                for want, d in zip(self.graph.shape(name), x.shape, strict=True):
                    if isinstance(want, g.Sym):
                        return d if want.mul == 1 else d // want.mul
            return 1
        return interpret.batch_of(
            self.graph, {n: tuple(x.shape) for n, x in zip(self.graph.inputs, inputs, strict=True)}
        )

    def forward(self, *inputs: Any) -> Any:
        if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)):  # several, as compiled models take them
            inputs = tuple(inputs[0])
        batch = self._batch_of(inputs)
        values: dict[str, Tensor] = {
            name: getattr(self, f"_constant{i}") for i, name in enumerate(self._constants)
        }
        values.update(zip(self.graph.inputs, map(interpret.as_computed, inputs), strict=True))
        for (step, node), done in zip(self.steps, self._done, strict=True):
            args = [values[v] for v in node.inputs]
            values[node.output] = step(batch, *args) if isinstance(step, _NodeModule) else step(*args)
            for v in done:
                del values[v]
        outputs = tuple(interpret.as_seen(self.graph, v, values[v]) for v in self.graph.outputs)
        slots = self.graph.meta.get("out_slots")
        if slots is not None:  # some are constants
            outputs = tuple(
                outputs[s] if isinstance(s, int) else torch.as_tensor(s[0]).clone() for s in slots
            )
        return outputs[0] if len(outputs) == 1 else outputs

    def example(self) -> Any:
        """Random inputs of the graph's shapes (N is 1): a tensor, or a tuple of several."""
        generator = torch.Generator().manual_seed(0)
        made = [
            torch.randn(g.concrete(self.graph.shape(v), 1), generator=generator) for v in self.graph.inputs
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def to_graph(self) -> g.Graph:
        """The Graph with the parameters and thresholds that the module has now.

        Raises:
            UnsupportedError: a threshold on an activation that is not a ReLU of the graph.
        """
        from actzip.activations import get_thresholds

        made = self.graph.copy()
        thresholds = get_thresholds(self)
        for i, ((step, node), path) in enumerate(zip(self.steps, self.names, strict=True)):
            made.nodes[i] = _with_parameters(node, step)
            if path in thresholds:
                made.nodes[i] = _with_threshold(made.nodes[i], thresholds.pop(path))
        if thresholds:
            raise UnsupportedError(f"thresholds of {', '.join(thresholds)}: no ReLU of the graph")
        return made


def _array(t: Tensor | None) -> g.Array | None:
    return None if t is None else t.detach().float().contiguous().numpy().copy()


def _with_parameters(node: Any, step: nn.Module) -> g.Node:
    """A copy of the node with the module's parameters."""
    made: g.Node = dataclasses.replace(node)
    if isinstance(step, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        made = dataclasses.replace(node, weight=_array(step.weight), bias=_array(step.bias))
    if isinstance(step, _FixedBatchNorm):
        s: Any = step
        scale = s.weight.double() / (s.running_var.double() + s.eps).sqrt()
        shift = s.bias.double() - s.running_mean.double() * scale
        made = dataclasses.replace(node, scale=_array(scale), shift=_array(shift))
    if isinstance(step, nn.PReLU):
        made = dataclasses.replace(node, act=dataclasses.replace(node.act, param=_array(step.weight)))
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
