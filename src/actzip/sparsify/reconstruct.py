"""Weights fitted to what thresholds left: each layer gives again, as well as a linear layer can,
what it gave before.

Least squares, layer after layer, between what the repaired layers before give and what the original
layer made of its own input, pulled towards the original weights. Only where there are many more
values than weights: elsewhere a few inputs say more about themselves than about the network, and
mean and variance alone are put right (:mod:`actzip.sparsify.repair`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import ActivationTap, ComputeCall, Site, eval_mode, run_model
from actzip.activations.hooks import Hooks

__all__ = ["Targets", "fit", "targets"]

#: Output positions that a layer is fitted on, of all inputs together.
ROWS = 30_000
#: Positions a weight (of one output channel), at least.
RATIO = 50
#: Weights of one output channel, at most: solving takes their cube.
WIDEST = 1300
#: How strongly weights are pulled to the original ones, in units of the mean variance of what they multiply.
RIDGE = 0.03


@dataclass
class Targets:
    """What layers gave at some positions of their outputs, by module: positions of a flat map, and
    rows x channels."""

    positions: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


def _size(m: nn.Module) -> int:
    """Weights of one output channel, 0 where a layer is of a kind that is not fitted."""
    if not isinstance(m, nn.Conv2d) or torch.nn.utils.parametrize.is_parametrized(m):
        return 0
    depthwise = m.groups == m.in_channels == m.out_channels
    return math.prod(m.weight.shape[1:]) if m.groups == 1 or depthwise else 0


def targets(model: nn.Module, inputs: Any, names: set[str]) -> Targets:
    """What the convolutions ``names`` of ``model`` give for ``inputs``, for those that can be fitted."""
    found = Targets()
    generator = torch.Generator().manual_seed(0)

    def see(name: str, k: int, out: Tensor) -> None:
        n, places = int(out.shape[0]), out.shape[2] * out.shape[3]
        kept = min(places, max(1, ROWS // n))
        if n * kept < RATIO * k:
            return
        chosen = torch.randperm(places, generator=generator)[:kept].sort().values
        found.positions[name] = chosen
        found.values[name] = _rows(out.flatten(2)[:, :, chosen])

    with Hooks() as hooks, eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            k = _size(module) if name in names else 0
            if 0 < k <= WIDEST:
                hooks.after(module, lambda m, args, out, name=name, k=k: see(name, k, out))
        run_model(model, inputs)
    return found


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


def fit(module: Any, call: ComputeCall, positions: Tensor, wanted: Tensor, *, shifted: bool) -> Tensor | None:
    """Sets weights and bias of a convolution so that it gives ``wanted``; gives its output then.

    None, and nothing is changed, where the system cannot be solved.

    Args:
        shifted: give it a bias if it has none; False: what reads it puts the mean right.
    """
    with torch._C.DisableTorchFunction():  # what is computed here is no layer of the model
        return _fit(module, call, positions, wanted, shifted)


def _fit(module: Any, call: ComputeCall, positions: Tensor, wanted: Tensor, shifted: bool) -> Tensor | None:
    patches = _patches(call, positions)  # rows, channels, taps
    n, y = patches.shape[0], wanted.double()
    shift = y.mean(0)
    old = module.weight.detach().double()
    if call.groups == 1:
        a = patches.reshape(n, -1)
        centre = a.mean(0)
        a = (a - centre).double()
        gram, cross = a.T @ a / n, a.T @ (y - shift) / n
        start = old.reshape(old.shape[0], -1).T
        pull = RIDGE * gram.diagonal().mean() + 1e-12
        eye = torch.eye(len(gram), dtype=torch.float64)
        new, bad = torch.linalg.solve_ex(gram + pull * eye, cross + pull * start)
        weight, bias = new.T.reshape(old.shape), shift - centre.double() @ new
    else:
        centre = patches.mean(0)
        b = (patches - centre).transpose(0, 1).double()  # channels, rows, taps
        gram = b.transpose(1, 2) @ b / n
        cross = b.transpose(1, 2) @ (y - shift).T[:, :, None] / n
        pulls = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
        eye = torch.eye(gram.shape[1], dtype=torch.float64)
        new, bad = torch.linalg.solve_ex(gram + pulls * eye, cross + pulls * old.reshape(len(old), -1, 1))
        weight, bias = new.reshape(old.shape), shift - (centre.double() * new[:, :, 0]).sum(1)
    if bool(bad.any()) or not bool(torch.isfinite(weight).all()):
        return None
    module.weight.copy_(weight)
    if module.bias is None and shifted:
        module.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=module.weight.requires_grad)
    elif module.bias is not None:
        module.bias.copy_(bias)
    padded = _padded(call)
    return F.conv2d(padded, module.weight, module.bias, call.stride, 0, call.dilation, call.groups)


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
