"""Weights fitted to what thresholds left: each layer gives again, as well as a linear layer can,
what it gave before.

Least squares, layer after layer, between what the repaired layers before give and what the original
layer made of its own input, pulled towards the original weights. How strongly is chosen on some of
the inputs that are left out for it; where no fit helps those, nothing is fitted, and mean and
variance alone are put right (:mod:`actzip.sparsify.repair`). Where a ReLU reads the layer, only what
passes it has to be met: below the threshold any value does, as long as it stays below (as in Zhang
et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016, section 3.2). What is added to
a shortcut is fitted to the sum, so that it takes back what the shortcut has gathered (He et al.,
"Channel Pruning", ICCV 2017, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actzip.activations import ActivationTap, ComputeCall, Site, eval_mode, run_model
from actzip.activations.hooks import Hooks
from actzip.sparsify.shifts import Shifts

__all__ = ["HELD", "Additions", "Calls", "Fitted", "Reader", "Targets", "at", "fit", "targets"]

#: Output positions that a layer is fitted on, of all inputs together; and positions a weight (of one
#: output channel), at least and at most.
ROWS, FEWEST, MOST = 30_000, 2, 200
#: Weights of one output channel, at most: solving takes their cube.
WIDEST = 1300
#: How strongly weights may be pulled to the original ones, in units of the mean variance of what
#: they multiply.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
#: The share of the inputs that chooses among them.
HELD = 0.25
#: What functions that add two tensors are called.
_SUMS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
#: Rounds of a fit to what passes a ReLU.
ROUNDS = 3


@dataclass(frozen=True)
class Reader:
    """The ReLU that reads a convolution: x if x > threshold, at most ``high``, of x = scale * output
    + shift, all one a channel; behind a sum the shift has a row a position."""

    scale: Tensor
    shift: Tensor
    threshold: Tensor
    high: float

    def by_system(self) -> Reader:
        """The same for systems of one channel each, in dimension 0."""

        def each(v: Tensor) -> Tensor:
            return v.reshape(-1, v.shape[-1]).T[:, :, None]

        return Reader(each(self.scale), each(self.shift), each(self.threshold), self.high)

    def met(self, made: Tensor, wanted: Tensor) -> Tensor:
        """What ``made`` should have been (..., channels): ``wanted`` where that passes; else itself, if
        that is cut too, or the threshold."""
        x, y = made * self.scale + self.shift, wanted * self.scale + self.shift
        z = torch.where(y <= self.threshold, torch.minimum(x, self.threshold), y)
        z = torch.where(y >= self.high, x.clamp(min=self.high), z)
        return torch.where(self.scale.abs() > 1e-6, (z - self.shift) / self.scale, wanted)


@dataclass
class Targets:
    """What layers gave at some positions of their outputs, by module.

    Attributes:
        positions: of a flat map. values: rows x channels.
        sums: what the outputs and a shortcut gave together, where a sum alone reads them.
        norms: the BatchNorm that reads the output, if one does.
        readers: site and upper limit, where a ReLU alone reads the output, the BatchNorm's or the
            sum.
        held: so many inputs, the last, choose how strongly weights are pulled; the first ``hidden``
            are views of them.
    """

    positions: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)
    readers: dict[str, tuple[str, float]] = field(default_factory=dict)
    held: int = 0
    hidden: int = 0

    def reader(
        self,
        name: str,
        thresholds: Mapping[str, float | Tensor],
        shortcut: Tensor | float = 0.0,
        shifts: Shifts | None = None,
    ) -> Reader | None:
        """The ReLU behind a layer, with its threshold; ``shortcut`` is what is added before it."""
        if name not in self.readers:
            return None
        site, high = self.readers[name]
        scale, shift = self.affine(name)
        if shifts is not None and name in self.norms and site in shifts.sites:
            moved = shifts.sites[site]
            scale, shift = scale * moved.scale.to(scale.dtype), moved(shift)
        t = torch.as_tensor(thresholds.get(site, 0.0), dtype=scale.dtype).expand_as(scale)
        return Reader(scale, shift + shortcut, t, high)

    def affine(self, name: str) -> tuple[Tensor, Tensor]:
        """What the BatchNorm behind a layer multiplies by and adds: 1 and 0 where there is none."""
        return _affine(self.norms.get(name), self.values[name])

    def beside(self, name: str, shortcut: Tensor) -> Tensor:
        """What a layer has to give for the sum to be what it was, the shortcut being what it is."""
        scale, shift = self.affine(name)
        wanted = (self.sums[name] - shortcut - shift) / scale
        return torch.where(scale.abs() > 1e-6, wanted, self.values[name])

    def spans(self, inputs: int, rows: int) -> tuple[slice, slice, slice]:
        """Rows to fit, rows to choose by, and rows that may only be fitted once that is chosen."""
        each = rows // inputs
        held = self.held or math.ceil(inputs * HELD)
        first, last = self.hidden * each, (inputs - held) * each
        return slice(first, last), slice(last, rows), slice(first)


def _affine(norm: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """What a BatchNorm multiplies by and adds, channel by channel."""
    if norm is None:
        return like.new_ones(like.shape[1]), like.new_zeros(like.shape[1])
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def _size(m: nn.Module) -> int:
    """Weights of one output channel, 0 where a layer is of a kind that is not fitted."""
    if torch.nn.utils.parametrize.is_parametrized(m):
        return 0
    if isinstance(m, nn.Linear):
        return m.in_features
    if not isinstance(m, nn.Conv2d):
        return 0
    depthwise = m.groups == m.in_channels == m.out_channels
    return math.prod(m.weight.shape[1:]) if m.groups == 1 or depthwise else 0


class Additions(TorchFunctionMode):
    """Tells of sums of two tensors of one shape, before and after, and of what else reads tensors.

    Args:
        other: called with the arguments of any other function that gives a tensor.
        before: with both terms; after: with both and the sum.
    """

    def __init__(
        self,
        other: Callable[[Any], None] | None = None,
        *,
        before: Callable[[Tensor, Tensor], None] | None = None,
        after: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.other, self.before, self.after = other, before, after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_sum(func, args, kwargs):
            out = func(*args, **kwargs)
            if self.other is not None and isinstance(out, Tensor):
                self.other(args)
            return out
        if self.before is not None:
            self.before(*args)
        out = func(*args)
        if self.after is not None:
            self.after(args[0], args[1], out)
        return out


def _is_sum(func: Any, args: Any, kwargs: Any) -> bool:
    name = func._schema.name.partition("::")[2] if isinstance(func, torch._ops.OpOverload) else ""
    if (name or getattr(func, "__name__", "")) not in _SUMS or kwargs or len(args) != 2:
        return False
    return all(isinstance(a, Tensor) for a in args) and args[0].shape == args[1].shape


class _Recorder:
    """Writes down what convolutions give, and which ReLU or sum reads them."""

    def __init__(self, names: set[str]) -> None:
        self.names, self.found = names, Targets()
        self.generator = torch.Generator().manual_seed(0)
        self.name = ""
        self.last: Tensor | None = None  # what the convolution gave, or the BatchNorm or the sum behind it
        self.norm: nn.Module | None = None
        self.read = False

    def conv(self, name: str, m: nn.Module, out: Tensor) -> None:
        self.last, self.norm = None, None
        k = _size(m) if name in self.names else 0
        if not 0 < k <= WIDEST or out.dim() != (2 if isinstance(m, nn.Linear) else 4):
            return
        n, places = int(out.shape[0]), math.prod(out.shape[2:])
        kept = min(places, max(1, min(ROWS, MOST * k) // n))
        if n * kept < FEWEST * k:
            return
        chosen = torch.randperm(places, generator=self.generator)[:kept].sort().values
        self.found.positions[name] = chosen
        self.found.values[name] = at(out, chosen)
        self.name, self.last, self.read = name, out, False

    def normed(self, m: Any, x: Tensor, out: Tensor) -> None:
        """A BatchNorm ran."""
        if self.last is x and self.norm is None and m.running_mean is not None:
            self.norm = self.found.norms[self.name] = m
            self.last, self.read = out, False

    def sum(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Two tensors were added."""
        if self.last is None or (a is self.last) == (b is self.last):
            return
        if self.read or self.name in self.found.sums or out.dim() != 4:
            self.last = None
            return
        self.found.sums[self.name] = at(out, self.found.positions[self.name])
        self.last = out

    def other(self, args: Any) -> None:
        """Something else ran; what it reads cannot be changed later, at a sum."""
        self.read = self.read or any(a is self.last for a in args if self.last is not None)

    def site(self, site: Site, y: Tensor) -> None:
        """An activation ran: whether it is a ReLU of what the last convolution gave."""
        last, self.last = self.last, None
        if last is None or not site.sparse or y.shape != last.shape:
            return
        high = math.inf if site.high is None else float(site.high)
        values = self.found.values[self.name][:2000]
        scale, shift = self.found.affine(self.name)
        before = self.found.sums[self.name][:2000] if self.name in self.found.sums else values * scale + shift
        want = before.clamp(0, high)
        got = at(y, self.found.positions[self.name])[:2000]
        if torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().mean()) + 1e-9):
            self.found.readers[self.name] = site.name, high


def targets(model: nn.Module, inputs: Any, names: set[str]) -> Targets:
    """What the convolutions ``names`` of ``model`` give for ``inputs``, for those that can be fitted."""
    recorder = _Recorder(names)
    with Hooks() as hooks, eval_mode(model), torch.no_grad(), Additions(recorder.other, after=recorder.sum):
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                hooks.after(module, lambda m, args, out, name=name: recorder.conv(name, m, out))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                hooks.after(module, lambda m, args, out: recorder.normed(m, args[0], out))
        with ActivationTap(model, recorder.site):
            run_model(model, inputs)
    return recorder.found


def at(v: Tensor, positions: Tensor) -> Tensor:
    """Rows of a map (N, C, ...) at flat positions: rows, C."""
    return v.clone() if v.dim() == 2 else _rows(v.flatten(2)[:, :, positions])


def _rows(v: Tensor) -> Tensor:
    """N, C, positions -> rows, C."""
    return v.transpose(1, 2).reshape(-1, v.shape[1])


class Calls:
    """The operands of the convolutions of a pass, as they are when the module's hook runs."""

    def __init__(self, model: nn.Module) -> None:
        self.last: tuple[str, ComputeCall] | None = None
        self.tap = ActivationTap(model, None, self._see)

    def _see(self, site: Site, call: ComputeCall) -> None:
        self.last = (site.module, call)

    def of(self, name: str, module: Any) -> ComputeCall | None:
        """The call of this module, if it was the last one and used the module's own weight."""
        if self.last is None or self.last[0] != name or self.last[1].weight is not module.weight:
            return None
        return self.last[1]


@dataclass(frozen=True)
class Fitted:
    """A convolution's new output, and what a BatchNorm that reads it has to add to it."""

    output: Tensor
    shift: Tensor | None


def fit(
    module: Any,
    call: ComputeCall,
    targets: Targets,
    name: str,
    wanted: Tensor,
    reader: Reader | None,
    *,
    shifted: bool,
) -> Fitted | None:
    """Sets weights and bias of the convolution ``name`` so that it gives ``wanted`` at its positions.

    None, and nothing is changed, where no fit helps the inputs that are left out for that.

    Args:
        reader: the ReLU that reads it, if one alone does.
        shifted: give it a bias if it has none; False: the shift is for what reads it.
    """
    with torch._C.DisableTorchFunction():  # what is computed here is no layer of the model
        linear = isinstance(module, nn.Linear)
        positions = targets.positions[name]
        patches = call.input[:, :, None] if linear else _patches(call, positions)  # rows, channels, taps
        old = module.weight.detach()
        if call.groups == 1:  # one system with a column an output channel
            a, y, start = patches.flatten(1)[None], wanted[None], old.flatten(1).T[None]
        else:  # a system a channel
            a, y = patches.transpose(0, 1).contiguous(), wanted.T.contiguous()[:, :, None]
            start = old.reshape(len(old), -1, 1)
            if reader is not None:
                reader = reader.by_system()
        scale = targets.affine(name)[0]
        columns = scale.square() if call.groups == 1 else scale.square()[:, None, None]
        spans = targets.spans(int(call.input.shape[0]), a.shape[1])
        solved = _solve(a, y, start, reader, spans, columns)
        if solved is None:
            return None
        return _set(module, call, *solved, shifted=shifted)


def _set(module: Any, call: ComputeCall, weight: Tensor, bias: Tensor, *, shifted: bool) -> Fitted:
    old = module.weight.detach()
    module.weight.copy_((weight[0].T if call.groups == 1 else weight[:, :, 0]).reshape(old.shape))
    shift = bias.flatten().to(old.dtype)
    if module.bias is None and shifted:
        module.bias = nn.Parameter(shift, requires_grad=module.weight.requires_grad)
    elif module.bias is not None:
        module.bias.copy_(shift)
    return Fitted(_again(module, call), shift if module.bias is None else None)


def _again(m: Any, call: ComputeCall) -> Tensor:
    if isinstance(m, nn.Linear):
        return F.linear(call.input, m.weight, m.bias)
    return F.conv2d(_padded(call), m.weight, m.bias, call.stride, 0, call.dilation, call.groups)


def _solve(
    a: Tensor,
    y: Tensor,
    start: Tensor,
    reader: Reader | None,
    spans: tuple[slice, slice, slice],
    columns: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Weights (systems, k, columns) and shifts (systems, 1, columns) for a (systems, rows, k) and
    y (systems, rows, columns); ``spans`` as :meth:`Targets.spans` gives them, ``columns`` what the
    squared error of each column counts."""
    rows = a.shape[1]
    centre = a.mean(1, keepdim=True)
    a = a - centre
    parts = [(a[:, s], y[:, s] - y.mean(1, keepdim=True)) for s in spans]
    grams = [(p.transpose(1, 2) @ p).double() for p, _ in parts]
    crosses = [(p.transpose(1, 2) @ q).double() for p, q in parts]
    start = start.double()
    ridge = _ridge(grams, crosses, start, (parts[0][0].shape[1], parts[1][0].shape[1]), columns)
    if ridge is None:
        return None
    gram = (grams[0] + grams[1] + grams[2]) / rows
    pull = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    root, bad = torch.linalg.cholesky_ex(gram + pull * torch.eye(gram.shape[1], dtype=gram.dtype))
    goal = y
    for i in range(1 if reader is None else ROUNDS):
        mean = goal.mean(1, keepdim=True)
        cross = (a.transpose(1, 2) @ (goal - mean)).double() / rows
        weight = torch.cholesky_solve(cross + pull * start, root)
        if reader is not None and i + 1 < ROUNDS:
            goal = reader.met(a @ weight.to(a.dtype) + mean, y)
    if bool(bad.any()) or not bool(torch.isfinite(weight).all()):
        return None
    return weight, mean.double() - centre.double() @ weight


def _ridge(
    grams: list[Tensor],
    crosses: list[Tensor],
    start: Tensor,
    rows: tuple[int, int],
    columns: Tensor | float = 1.0,
) -> float | None:
    """Of RIDGES the one with which what is fitted on the first part does best on the second; None
    where the original weights do."""
    if min(rows) < 1:
        return None

    def error(w: Tensor) -> float:
        return float((columns * w * (grams[1] @ w - 2 * crosses[1])).sum())

    gram, cross = grams[0] / rows[0], crosses[0] / rows[0]
    pulls = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(gram.shape[1], dtype=gram.dtype)
    best, least = None, error(start)
    for ridge in RIDGES:
        pull = ridge * pulls + 1e-12
        root, bad = torch.linalg.cholesky_ex(gram + pull * eye)
        if bool(bad.any()):
            continue
        found = error(torch.cholesky_solve(cross + pull * start, root))
        if found < least:
            best, least = ridge, found
    return best


def _padded(call: ComputeCall) -> Tensor:
    (top, bottom), (left, right) = call.padding
    return F.pad(call.input, (left, right, top, bottom)) if top or bottom or left or right else call.input


def _patches(call: ComputeCall, positions: Tensor) -> Tensor:
    """What the outputs at ``positions`` are sums of: rows, input channels, taps."""
    x = _padded(call)
    height, width = int(call.weight.shape[2]), int(call.weight.shape[3])
    (sh, sw), (dh, dw) = call.stride, call.dilation
    across = (int(x.shape[3]) - dw * (width - 1) - 1) // sw + 1
    row, column = positions // across * sh, positions % across * sw
    flat = x.flatten(2)
    taps = [
        _rows(flat[:, :, (row + i * dh) * x.shape[3] + column + j * dw])
        for i in range(height)
        for j in range(width)
    ]
    return torch.stack(taps, 2)
