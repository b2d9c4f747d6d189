"""The meaning of a Graph, node by node with PyTorch: slow, plain, and what every pass and the
engine are checked with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actzip.errors import InputError, UnsupportedError
from actzip.runtime import graph as g
from actzip.runtime import ops
from actzip.runtime.acts import ACTS, Act
from actzip.runtime.ops.depth_to_space import DepthToSpace
from actzip.runtime.ops.elsewhere import Elsewhere
from actzip.runtime.ops.grid_sample import GridSample
from actzip.runtime.ops.recurrent import Recurrent
from actzip.runtime.ops.reduce import ArgMax
from actzip.runtime.ops.topk import TopKIndices, TopKValues
from actzip.runtime.ops.volume import Regroup

__all__ = ["apply_act", "interpret"]


def _param(act: Act, x: Tensor) -> Tensor:
    assert act.param is not None
    p = torch.from_numpy(act.param.copy())  # a mapped file is not writable
    return p.reshape(1, -1, *([1] * (x.ndim - 2))) if p.numel() > 1 else p


def _threshold(act: Act, x: Tensor) -> Tensor:
    return torch.where(x <= _param(act, x), torch.zeros((), dtype=x.dtype), x).clamp(max=act.hi)


def _cut(x: Tensor, top: float) -> Tensor:
    """``x`` between 0 and ``top``; not by clamp, which is seen as an activation with zeros."""
    return torch.minimum(torch.maximum(x, x.new_zeros(())), x.new_full((), top))


def within(i: Tensor, size: int) -> Tensor:
    """Indices cut to 0 ... size - 1."""
    return _cut(i, int(size) - 1)


# those that are not a function of PyTorch of the same name, called with the row's numbers in order
_OWN: dict[str, Callable[[Act, Tensor], Tensor]] = {
    "clip": lambda act, x: x.clamp(act.lo, act.hi),
    "threshold": _threshold,
    "prelu": lambda act, x: torch.where(x < 0, x * _param(act, x), x),
    "hardsigmoid": lambda act, x: _cut(x * act.alpha + act.beta, 1.0),
    "scaled_hardswish": lambda act, x: F.hardswish(x) * act.alpha + act.beta,
    "quantize": lambda act, x: (x / act.alpha).clamp(act.lo, act.hi).round() * act.alpha,
    "gelu_tanh": lambda act, x: F.gelu(x, approximate="tanh"),
}


def apply_act(act: Act | None, x: Tensor) -> Tensor:
    """``act`` of ``x``; NaN stays NaN for those functions of PyTorch that keep it."""
    if act is None:
        return x
    if act.kind in _OWN:
        return _OWN[act.kind](act, x)
    if act.kind not in ACTS:
        raise UnsupportedError(f"activation {act.kind!r}")
    f: Callable[..., Tensor] = getattr(torch, act.kind, None) or getattr(F, act.kind)
    return f(x, *(getattr(act, k) for k in ACTS[act.kind].numbers))


def _t(a: g.Array | None) -> Tensor | None:
    if a is None:
        return None
    a = np.ascontiguousarray(a)
    return torch.from_numpy(
        a if a.flags.writeable else a.copy()
    )  # PyTorch warns of memory that is read alone


def _padded(x: Tensor, padding: tuple[int, int, int, int], value: float) -> Tensor:
    t, left, b, r = padding
    return F.pad(x, (left, r, t, b), value=value) if any(padding) else x


def _conv(n: ops.Conv2d, x: Tensor, *rest: Tensor) -> Tensor:
    y = F.conv2d(_padded(x, n.padding, 0.0), _t(n.weight), _t(n.bias), n.stride, 0, n.dilation, n.groups)  # type: ignore[arg-type]
    y = apply_act(n.pre_act, y)
    return apply_act(n.act, y + rest[0] if rest else y)


def _conv_transpose(n: ops.ConvTranspose2d, x: Tensor) -> Tensor:
    op = n.output_padding
    y = F.conv_transpose2d(x, _t(n.weight), None, n.stride, 0, 0, n.groups, n.dilation)  # type: ignore[arg-type]
    t, left, b, r = n.padding
    y = F.pad(y, (-left, op[1] - r, -t, op[0] - b))
    bias = _t(n.bias)
    return apply_act(n.act, y if bias is None else y + bias.reshape(1, -1, 1, 1))


def _depth_to_space(n: DepthToSpace, x: Tensor) -> Tensor:
    (bh, bw), (k, c, h, w) = n.block, x.shape
    blocks = x.reshape(k, bh, bw, c // (bh * bw), h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(k, -1, h * bh, w * bw)


def _linear(n: ops.Linear, x: Tensor, *rest: Tensor) -> Tensor:
    y = F.linear(x, _t(n.weight), _t(n.bias))  # type: ignore[arg-type]
    return apply_act(n.act, y + rest[0] if rest else y)


def _batch_norm(n: ops.BatchNorm, x: Tensor) -> Tensor:
    shape = (1, -1, *([1] * (x.ndim - 2)))
    scale, shift = _t(n.scale), _t(n.shift)
    assert scale is not None and shift is not None
    return apply_act(n.act, x * scale.reshape(shape) + shift.reshape(shape))


def _lrn(n: ops.LocalResponseNorm, x: Tensor) -> Tensor:
    turned = x.flip(1) if n.behind else x
    y = F.local_response_norm(turned, n.size, n.alpha, n.beta, n.k)
    return y.flip(1) if n.behind else y


def _pool(n: ops.Pool, x: Tensor) -> Tensor:
    """By plain sums over shifted windows, so that uneven padding and ceil_mode need no special case."""
    h, w = x.shape[2:]
    shape = n.infer([(1, x.shape[1], h, w)])
    oh, ow = int(shape[2]), int(shape[3])  # type: ignore[arg-type]
    t, left, b, r = n.padding
    (kh, kw), (sh, sw), (dh, dw) = n.kernel_size, n.stride, n.dilation
    extra_h = max(0, (oh - 1) * sh + dh * (kh - 1) + 1 - (h + t + b))
    extra_w = max(0, (ow - 1) * sw + dw * (kw - 1) + 1 - (w + left + r))
    is_max = n.kind == "max"
    xp = F.pad(x, (left, r + extra_w, t, b + extra_h), value=-torch.inf if is_max else 0.0)
    windows = [
        xp[:, :, i * dh : i * dh + sh * (oh - 1) + 1 : sh, j * dw : j * dw + sw * (ow - 1) + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    stack = torch.stack(windows)
    if is_max:
        return stack.amax(0)
    if n.divisor:
        return stack.sum(0) / n.divisor
    inside = torch.ones(1, 1, h, w)
    inside = F.pad(inside, (left, r, t, b), value=1.0 if n.count_include_pad else 0.0)
    counted = F.avg_pool2d(F.pad(inside, (0, extra_w, 0, extra_h)), (kh, kw), (sh, sw), divisor_override=1)
    return stack.sum(0) / counted


def _adaptive(n: ops.AdaptivePool, x: Tensor) -> Tensor:
    f: Callable[..., Tensor] = F.adaptive_max_pool2d if n.kind == "max" else F.adaptive_avg_pool2d
    return f(x, n.output_size)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: torch.maximum(a, b),
    "min": lambda a, b: torch.minimum(a, b),
    "pow": lambda a, b: torch.pow(a, b),
    "gt": lambda a, b: (a > b).to(torch.float32),
    "ge": lambda a, b: (a >= b).to(torch.float32),
    "lt": lambda a, b: (a < b).to(torch.float32),
    "le": lambda a, b: (a <= b).to(torch.float32),
    "eq": lambda a, b: (a == b).to(torch.float32),
    "ne": lambda a, b: (a != b).to(torch.float32),
    "keep": lambda a, b: torch.where(a != 0, b, torch.zeros_like(b)),
    "drop": lambda a, b: torch.where(a != 0, torch.zeros_like(b), b),
}


def _slice(n: ops.Slice, x: Tensor) -> Tensor:
    if n.step < 0:
        return x.index_select(n.axis, torch.arange(n.stop - 1, n.start - 1, n.step))
    index = [slice(None)] * x.ndim
    index[n.axis] = slice(n.start, n.stop, n.step)
    return x[tuple(index)]


def _pad(n: ops.Pad, x: Tensor) -> Tensor:
    if n.mode == "constant":
        flat = [v for b, a in zip(reversed(n.before), reversed(n.after), strict=True) for v in (b, a)]
        return F.pad(x, flat, value=n.value)
    pairs = list(zip(n.before, n.after, strict=True))
    y = np.pad(x.numpy(), pairs, mode="reflect" if n.mode == "reflect" else "edge")
    return torch.from_numpy(y)


def _reduce(n: ops.Reduce, x: Tensor) -> Tensor:
    axes, keep = tuple(a % x.ndim for a in n.axes), n.keepdims
    if n.kind == "prod":
        for a in sorted(axes, reverse=True):
            x = x.prod(a, keepdim=keep)
        return x
    f: Callable[[], Tensor] = {
        "mean": lambda: x.mean(axes, keep),
        "sum": lambda: x.sum(axes, keep),
        "max": lambda: x.amax(axes, keep),
        "min": lambda: x.amin(axes, keep),
        "l1": lambda: x.abs().sum(axes, keep),
        "l2": lambda: x.square().sum(axes, keep).sqrt(),
        "sum_square": lambda: x.square().sum(axes, keep),
        "log_sum_exp": lambda: torch.logsumexp(x, axes, keep),
    }[n.kind]
    return f()


def _argmax(n: ArgMax, x: Tensor) -> Tensor:
    f = torch.argmax if n.kind == "max" else torch.argmin
    if n.last:
        return (x.shape[n.axis] - 1 - f(x.flip(n.axis), n.axis, n.keepdims)).float()
    return f(x, n.axis, n.keepdims).float()


def _topk(n: TopKValues | TopKIndices, x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(stable=True, dim=n.axis, descending=n.largest)
    return values.narrow(n.axis, 0, n.k), indices.narrow(n.axis, 0, n.k)


def _source(size: int, out: int, coordinates: str, scale: float) -> Tensor:
    i = torch.arange(out, dtype=torch.float64)
    if coordinates == "align_corners":
        return i * ((size - 1) / (out - 1)) if out > 1 else i * 0
    return (i + 0.5) / scale - 0.5 if coordinates == "half_pixel" else i / scale


def _resize(n: ops.Resize, x: Tensor) -> Tensor:
    aten, scales = torch.ops.aten, n.scale or (None, None)
    if n.mode == "given":
        return x[:, :, list(n.rows)][..., list(n.columns)]
    if n.mode == "nearest_exact" or (n.mode == "nearest" and n.coordinates == "asymmetric"):
        exact = n.mode == "nearest_exact"
        if (
            not exact and torch.onnx.is_in_onnx_export()
        ):  # in the words that torch's exporter of ONNX files knows
            by = {"scale_factor": n.scale} if n.scale else {"size": n.size}
            return F.interpolate(x, **by, mode="nearest", recompute_scale_factor=False if n.scale else None)
        made: Tensor = (aten._upsample_nearest_exact2d if exact else aten.upsample_nearest2d)(
            x, n.size, *scales
        )
        return made
    for axis in (0, 1):
        size, out = x.shape[2 + axis], n.size[axis]
        scale = n.scale[axis] if n.scale else out / size
        at = _source(size, out, n.coordinates, scale)
        if n.mode == "nearest":
            at = (at + 0.5).ceil() - 1  # round half down, ONNX's default
            x = x.index_select(2 + axis, within(at.floor().long(), size))
            continue
        at = within(at, size)
        low = at.floor().long()
        high = within(low + 1, size)
        shape = [1, 1, 1, 1]
        shape[2 + axis] = out
        f = (at - low).float().reshape(shape)
        x = x.index_select(2 + axis, low) * (1 - f) + x.index_select(2 + axis, high) * f
    return x


def _softmax(n: ops.Softmax, x: Tensor) -> Tensor:
    return F.log_softmax(x, n.axis) if n.log else F.softmax(x, n.axis)


def _layer_norm(n: ops.LayerNorm, x: Tensor) -> Tensor:
    y = F.layer_norm(x.movedim(1, -1) if n.channels else x, n.shape, _t(n.weight), _t(n.bias), n.eps)
    return y.movedim(-1, 1) if n.channels else y


def _biased_pool(n: ops.Pool, x: Tensor) -> Tensor:
    y, bias = _pool(n, x), _t(n.bias)
    return apply_act(n.act, y if bias is None else y + bias.reshape(1, -1, 1, 1))


def _regroup(n: Regroup, x: Tensor) -> Tensor:
    images, c, h, w = [-1 if isinstance(d, g.Sym) else int(d) for d in n.shape]
    return x.permute(0, 2, 3, 1).reshape(images, h, w, c).permute(0, 3, 1, 2)


def _recurrent(n: Recurrent, x: Tensor) -> Tensor:
    d, wide, size = n.weight.shape
    weight, bias = _t(n.weight), _t(n.bias)
    assert weight is not None
    zeros = x.new_zeros(x.shape[1], size)
    ways = []
    for k in range(d):
        back = k == 1 or n.reverse
        own = x[:, :, k * wide : (k + 1) * wide]
        own = own.flip(0) if back else own
        if n.reset_before:
            h, steps = zeros, []
            for gates in own:
                h = _reset_before(gates, h, weight[k], None if bias is None else bias[k])
                steps.append(h)
            y = torch.stack(steps)
        else:
            added = x.new_zeros(wide)
            if bias is not None:
                added[2 * size :] = bias[k]
            # the gates come ready: as inputs of weights that change nothing
            params = [torch.eye(wide, dtype=x.dtype), weight[k].to(x.dtype), x.new_zeros(wide), added]
            first = zeros[None]
            how = (True, 1, 0.0, False, False, False)
            if n.kind == "lstm":
                y = torch.lstm(own, (first, first), params, *how)[0]
            else:
                y = torch.gru(own, first, params, *how)[0]
        ways.append(y.flip(0) if back else y)
    return torch.cat(ways, 2)


def _reset_before(gates: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A step of a GRU whose state is reset before it is multiplied."""
    size = h.shape[1]
    r, z = torch.sigmoid(gates[:, : 2 * size] + F.linear(h, weight[: 2 * size])).chunk(2, 1)
    new = torch.tanh(gates[:, 2 * size :] + F.linear(r * h, weight[2 * size :], bias))
    return (1 - z) * new + z * h


# node class -> what it computes of its inputs; integers are held as float32
_MEANING: dict[type[g.Node], Callable[..., Tensor]] = {
    ops.Conv2d: _conv,
    ops.ConvTranspose2d: _conv_transpose,
    ops.Copy: lambda n, x: x,
    DepthToSpace: _depth_to_space,
    ops.Linear: _linear,
    ops.MatMul: lambda n, a, b: torch.matmul(a, b),
    ops.BatchNorm: _batch_norm,
    ops.LayerNorm: _layer_norm,
    ops.GroupNorm: lambda n, x: F.group_norm(x, n.groups, _t(n.weight), _t(n.bias), n.eps),
    ops.LocalResponseNorm: _lrn,
    ops.Pool: _biased_pool,
    ops.AdaptivePool: _adaptive,
    ops.Activation: lambda n, x: apply_act(n.act, x),
    ops.Binary: lambda n, a, b: apply_act(n.act, _BINARY[n.kind](a, b)),
    ops.Concat: lambda n, *parts: torch.cat(parts, n.axis),
    ops.Slice: _slice,
    ops.Take: lambda n, x: x.index_select(n.axis, torch.as_tensor(n.index)),
    ops.Pad: _pad,
    ops.Transpose: lambda n, x: x.permute(n.perm),
    ops.Reduce: _reduce,
    ArgMax: _argmax,
    TopKValues: lambda n, x: _topk(n, x)[0],
    TopKIndices: lambda n, x: _topk(n, x)[1].float(),
    ops.Softmax: _softmax,
    ops.Resize: _resize,
    Recurrent: _recurrent,
    Regroup: _regroup,
    GridSample: lambda n, x, at: F.grid_sample(x, at, n.mode, n.padding, n.align_corners),
}


def run_node(n: g.Node, args: list[Tensor], batch: int) -> Tensor:
    """What one node computes of its inputs.

    Raises:
        UnsupportedError: an operator without a meaning here.
    """
    if isinstance(n, ops.Reshape):
        return args[0].reshape(g.concrete(n.shape, batch))
    if isinstance(n, ops.Expand):
        return args[0].expand(g.concrete(n.shape, batch))
    if isinstance(n, Elsewhere):
        return n.run(args)
    meaning = _MEANING.get(type(n))
    if meaning is None:
        raise UnsupportedError(f"{n.where()}: the interpreter does not know it")
    return meaning(n, *args)


def as_computed(x: Tensor) -> Tensor:
    """An input of any type as the engine takes it: in float32 (float64 stays, for comparisons)."""
    return x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)


def as_seen(graph: g.Graph, value: str, x: Tensor) -> Tensor:
    """A value as callers see it: of the type that the graph says."""
    dtype = graph.values[value].dtype
    return x if dtype == "float32" else x.to(getattr(torch, dtype))


def batch_of(graph: g.Graph, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The batch N that the shapes of the graph's inputs imply.

    Raises:
        InputError: an input is missing, or its shape is not what the graph was made for.
    """
    batch: int | None = None
    for name in graph.inputs:
        want, got = graph.shape(name), shapes.get(name)
        if got is None or len(want) != len(got):
            raise InputError(f"input {name!r} has shape {got}, not {want}")
        for w, d in zip(want, got, strict=True):
            if isinstance(w, g.Sym):
                if d % w.mul or (batch is not None and batch != d // w.mul):
                    raise InputError(f"input {name!r} has shape {got}, not {want}")
                batch = d // w.mul
            elif w != d:
                raise InputError(f"input {name!r} has shape {got}, not {want}")
    return 1 if batch is None else batch


@torch.no_grad()
def interpret(
    graph: g.Graph, inputs: Mapping[str, Tensor], keep: Iterable[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Runs ``graph`` on ``inputs`` (name -> tensor): its outputs, and the values named in ``keep``.

    Raises:
        InputError: inputs that do not fit the graph.
        UnsupportedError: an operator without a meaning here.
    """
    batch = batch_of(graph, {k: tuple(v.shape) for k, v in inputs.items()})
    env: dict[str, Tensor] = {k: torch.from_numpy(np.array(v)) for k, v in graph.constants.items()}
    env.update({k: as_computed(inputs[k]) for k in graph.inputs})
    wanted = set(keep)
    last: dict[str, int] = {v: i for i, n in enumerate(graph.nodes) for v in n.inputs}
    for i, n in enumerate(graph.nodes):
        env[n.output] = run_node(n, [env[v] for v in n.inputs], batch)
        for v in set(n.inputs):
            if last[v] == i and v not in graph.outputs and v not in wanted:
                del env[v]
    return [as_seen(graph, v, env[v]) for v in graph.outputs], {k: env[k] for k in wanted if k in env}
