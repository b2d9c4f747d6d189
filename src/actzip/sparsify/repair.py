"""What thresholds shift, put right without training: mean and variance of every layer, channel by
channel.

Thresholds remove small values, so the sums behind them have another mean and a smaller variance
than the layers that read them were trained for. :func:`repair` gives every channel its old ones
back, on a few unlabelled inputs: in the BatchNorm that reads a convolution, else in the
convolution's own weights and bias; where inputs abound, weights are fitted
(:mod:`actzip.sparsify.reconstruct`). One pass does it, layer after layer, so that each layer sees
what the repaired layers before it give. :func:`distil` then makes the repaired network give what
the original gives, for some steps, without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actzip.activations import ComputeCall, eval_mode, get_thresholds, run_model
from actzip.activations.hooks import Hooks
from actzip.errors import TrainingError
from actzip.sparsify.reconstruct import HELD, Additions, Calls, Fitted, Reader, Targets, at, fit, targets
from actzip.sparsify.shifts import Shifts, shared
from actzip.training.batches import output_tensors

__all__ = ["Moments", "augmented", "distil", "moments", "repair", "with_views"]

_Norm = nn.modules.batchnorm._BatchNorm
_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Values a channel that a variance is estimated from, at least, and a shift of the mean.
LEAST, FEWEST = 256, 8
#: A channel's standard deviation is changed by this factor at most.
MOST = 2.0


@dataclass
class Moments:
    """Mean and variance of what layers give, one a channel.

    Attributes:
        norms: BatchNorm modules by name: of their input.
        convs: convolutions and linear layers that no BatchNorm reads: of their output.
        targets: what convolutions give at some positions, for those that are to be fitted.
    """

    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    convs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    targets: Targets = field(default_factory=Targets)


def _of(v: Tensor) -> tuple[Tensor, Tensor]:
    v = v.detach().transpose(0, 1).flatten(1).double()
    return v.mean(1), v.var(1, unbiased=False)


def _by_channel(module: nn.Module, v: Tensor) -> Tensor:
    """A layer's output with its channels in dimension 1."""
    return v.reshape(-1, v.shape[-1]) if isinstance(module, nn.Linear) else v


def _values(v: Tensor) -> int:
    """Values a channel."""
    return v.numel() // v.shape[1] if v.dim() > 1 and v.shape[1] else 0


@contextmanager
def _watching(model: nn.Module, norm: Callable[..., Any], conv: Callable[..., Any]) -> Iterator[None]:
    """``norm(name, module, input)`` before each BatchNorm, ``conv(name, module, output)`` after
    each convolution."""
    with Hooks() as hooks, eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _Norm):
                hooks.before(module, lambda m, args, name=name: norm(name, m, args[0]))
            elif isinstance(module, (*_Conv, nn.Linear)):
                hooks.after(module, lambda m, args, out, name=name: conv(name, m, out))
        yield


def moments(model: nn.Module, inputs: Any, *, fitted: bool = False, views: int = 0) -> Moments:
    """Moments of ``model`` in eval mode over ``inputs`` (one batch), of all layers that can be
    repaired.

    With ``fitted``, also what :mod:`actzip.sparsify.reconstruct` fits convolutions to; so many
    ``views`` in front (:func:`with_views`) do not choose how strongly weights are pulled.

    Left out are layers that run more than once a pass, that share a parameter, whose weights are
    made by a parametrization, and those with fewer than 8 values a channel.
    """
    found, calls = Moments(), dict[str, int]()
    made: dict[int, tuple[str, Tensor]] = {}

    def norm(name: str, module: nn.Module, x: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        source = made.get(id(x))
        if source is not None and source[1] is x:
            found.convs.pop(source[0], None)
        if _values(x) >= FEWEST:
            found.norms[name] = _of(x)

    def conv(name: str, module: nn.Module, out: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        made.clear()  # only what runs right behind it counts; the tensor is not kept alive longer
        made[id(out)] = (name, out)
        out = _by_channel(module, out)
        if _values(out) >= FEWEST:
            found.convs[name] = _of(out)

    with _watching(model, norm, conv):
        run_model(model, inputs)
    unfit = {n for n, count in calls.items() if count > 1} | shared(model)
    for table in (found.norms, found.convs):
        for name in unfit & set(table):
            del table[name]
    if fitted:
        found.targets = targets(model, inputs, set(calls) - unfit)
        if views:
            seen = len(inputs) - views
            found.targets.held = math.ceil(seen * HELD)
            found.targets.hidden = views // seen * found.targets.held
    return found


def repair(model: nn.Module, wanted: Moments, inputs: Any, shifts: Shifts | None = None) -> Any:
    """Gives every layer of ``model`` the moments ``wanted``, in place; one pass over ``inputs`` in
    eval mode.

    Args:
        model: with its thresholds set.
        wanted: :func:`moments` of the network without them, on the same inputs.
        shifts: what was shifted for the thresholds; what layers should give is shifted likewise.

    Returns:
        What the repaired model gives for ``inputs``.
    """
    work = _Repair(model, wanted, shifts or Shifts())
    with work.calls.tap, _watching(model, work.norm, work.conv), Hooks() as hooks:
        for module in model.modules():
            if isinstance(module, _Norm):
                hooks.after(module, lambda m, args, out: work.normed(m, args[0], out))
        with Additions(before=work.add):
            return run_model(model, inputs)


@dataclass
class _Waiting:
    """A convolution that is fitted when its output is added to a shortcut.

    Attributes:
        out: what it gave; head: what is added: that, or what the BatchNorm made of it.
    """

    name: str
    module: Any
    call: ComputeCall
    out: Tensor
    head: Tensor
    norm: Any = None


class _Repair:
    """One pass: what is done behind each convolution, before and behind each BatchNorm, before each sum."""

    def __init__(self, model: nn.Module, wanted: Moments, shifts: Shifts) -> None:
        self.wanted, self.targets, self.shifts = wanted, wanted.targets, shifts
        self.calls, self.thresholds = Calls(model), get_thresholds(model)
        self.names = {m: name for name, m in model.named_modules()}
        self.made: Fitted | None = None  # of the convolution that was fitted just now
        self.waiting: _Waiting | None = None

    def conv(self, name: str, module: Any, out: Tensor) -> Tensor | None:
        self.made = self.waiting = None
        call = self.calls.of(name, module) if name in self.targets.values else None
        if call is not None and name in self.targets.sums:
            self.waiting = _Waiting(name, module, call, out, out)
            return None
        if call is not None:
            reader = self.targets.reader(name, self.thresholds, shifts=self.shifts)
            values = self.targets.values[name]
            if name in self.shifts.convs:
                values = self.shifts.convs[name](values)
            self.made = self.fit(name, module, call, values, reader)
            if self.made is not None:
                return self.made.output
        return self.moved(name, module, out)

    def fit(
        self, name: str, module: Any, call: ComputeCall, values: Tensor, reader: Reader | None
    ) -> Fitted | None:
        return fit(module, call, self.targets, name, values, reader, shifted=name in self.wanted.convs)

    def moved(self, name: str, module: Any, out: Tensor) -> Tensor | None:
        """Mean and variance put right in the convolution itself, if no BatchNorm reads it."""
        if name not in self.wanted.convs:
            return None
        seen, wanted = _by_channel(module, out), self.wanted.convs[name]
        if name in self.shifts.convs:
            shift = self.shifts.convs[name]
            wanted = shift(wanted[0]), wanted[1] * shift.scale.square()
        ratio, mean, mean0 = _change(wanted, seen, 1e-12)
        return _repair_conv(module, out, ratio, mean0 - mean * ratio)

    def norm(self, name: str, module: Any, x: Tensor) -> None:
        if self.waiting is not None and self.waiting.out is x:
            return
        if self.made is not None and self.made.output is x and module.running_mean is not None:
            if self.made.shift is not None:
                module.running_mean.sub_(self.made.shift)
        elif name in self.wanted.norms:
            eps = max(float(module.eps), 1e-12)
            ratio, mean, mean0 = _change(self.wanted.norms[name], x, eps)
            _repair_norm(module, ratio, mean, mean0)

    def normed(self, module: Any, x: Tensor, out: Tensor) -> None:
        if self.waiting is not None and self.waiting.out is x:
            self.waiting.head, self.waiting.norm = out, module

    def add(self, a: Tensor, b: Tensor) -> None:
        """Two tensors are about to be added: a convolution that waited for it is fitted to the sum."""
        w = self.waiting
        if w is None or (a is w.head) == (b is w.head):
            return
        self.waiting = None
        shortcut = at(b if a is w.head else a, self.targets.positions[w.name])
        reader = self.targets.reader(w.name, self.thresholds, shortcut)
        with torch._C.DisableTorchFunction():
            made = self.fit(w.name, w.module, w.call, self.targets.beside(w.name, shortcut), reader)
            out = made.output if made is not None else self.moved(w.name, w.module, w.out)
            self.made = made
            out = w.out if out is None else out
            if w.norm is not None:
                self.norm(self.names[w.norm], w.norm, out)
                out = w.norm.forward(out)
            w.head.copy_(out)


def _change(wanted: tuple[Tensor, Tensor], v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor of the standard deviation, mean now, mean wanted. Of few values the mean alone is put
    right: the inputs are the same, so what moved it is known better than a variance."""
    mean, variance = _of(v)
    if _values(v) < LEAST:
        return torch.ones_like(mean), mean, wanted[0]
    return ((wanted[1] + eps) / (variance + eps)).sqrt().clamp(1 / MOST, MOST), mean, wanted[0]


def _repair_norm(m: Any, ratio: Tensor, mean: Tensor, mean0: Tensor) -> None:
    """What the BatchNorm gives for an input x is now what it gave for (x - mean) * ratio + mean0."""
    if m.running_mean is None:  # it normalises by the batch itself
        return
    old = m.running_mean.double()
    if m.weight is None:
        m.running_mean.copy_(mean - (mean0 - old) / ratio)
        m.running_var.copy_(((m.running_var.double() + m.eps) / ratio.square() - m.eps).clamp(min=0))
        return
    gain = m.weight.detach().double() / (m.running_var.double() + m.eps).sqrt()
    m.bias.copy_(m.bias.detach().double() + gain * (mean0 - old - ratio * (mean - old)))
    m.weight.mul_(ratio.to(m.weight.dtype))


def _repair_conv(m: Any, out: Tensor, ratio: Tensor, shift: Tensor) -> Tensor:
    """The layer's weights and bias for ratio * output + shift, and that output."""
    if getattr(m, "transposed", False):  # C, O / groups, ...
        channels, out_a_group = m.weight.shape[:2]
        each = ratio.reshape(m.groups, out_a_group).repeat_interleave(channels // m.groups, 0)
        scale = each.reshape(channels, out_a_group, *([1] * (m.weight.dim() - 2)))
    else:
        scale = ratio.reshape(-1, *([1] * (m.weight.dim() - 1)))
    m.weight.mul_(scale.to(m.weight.dtype))
    if m.bias is None:
        m.bias = nn.Parameter(shift.to(m.weight.dtype), requires_grad=m.weight.requires_grad)
    else:
        m.bias.copy_(m.bias.detach().double() * ratio + shift)
    view = [-1] if isinstance(m, nn.Linear) else [1, -1, *([1] * (out.dim() - 2))]
    return out * ratio.to(out.dtype).reshape(view) + shift.to(out.dtype).reshape(view)


# --- more inputs of the same kind --------------------------------------------------------------


def with_views(x: Tensor, inputs: int, seed: int = 0) -> Tensor:
    """About ``inputs`` of them: crops of the images ``x``, flipped or not, and behind them ``x``.

    The views of the images that choose (:data:`actzip.sparsify.reconstruct.HELD`, the last of x)
    come first. What is no image is as it was.
    """
    times = inputs // max(1, len(x)) - 1
    if times < 1 or not _is_image(x):
        return x
    held = math.ceil(len(x) * HELD)
    generator = torch.Generator().manual_seed(seed)
    kinds = x[len(x) - held :], x[: len(x) - held]
    views = [augmented(part, generator, mix=0) for part in kinds for _ in range(times) if len(part)]
    return torch.cat([*views, x]).contiguous(memory_format=torch.channels_last)


def _is_image(x: Tensor) -> bool:
    return x.dim() == 4 and min(x.shape[2:]) >= 16


# --- distillation without labels ----------------------------------------------------------------


def augmented(x: Tensor, generator: torch.Generator, *, mix: float = 0.5) -> Tensor:
    """Images like those of ``x`` (N, C, H, W): cropped (to half the area at least), flipped and
    mixed in pairs.

    What is no image (not four dimensions, or a side below 16) is mixed only.
    """
    rows = []
    for image in x.split(1):
        if _is_image(x):
            side = math.sqrt(float(torch.empty(1).uniform_(0.5, 1.0, generator=generator)))
            h, w = max(1, round(x.shape[2] * side)), max(1, round(x.shape[3] * side))
            top = int(torch.randint(x.shape[2] - h + 1, (1,), generator=generator))
            left = int(torch.randint(x.shape[3] - w + 1, (1,), generator=generator))
            part = image[:, :, top : top + h, left : left + w]
            image = F.interpolate(part, tuple(x.shape[2:]), mode="bilinear", align_corners=False)
            if float(torch.rand(1, generator=generator)) < 0.5:
                image = image.flip(3)
        rows.append(image)
    made = torch.cat(rows)
    share = torch.rand(len(made), *([1] * (x.dim() - 1)), generator=generator) * mix
    return made * (1 - share) + made.flip(0) * share


def _distance(student: Any, teacher: Any) -> Tensor:
    """How far outputs are apart: relative squared error, and the divergence where they are scores."""
    total: Any = 0.0
    for s, t in zip(output_tensors(student), output_tensors(teacher), strict=True):
        if t.dim() == 2 and t.shape[1] > 1:
            difference = (s - t) - (s - t).mean(1, keepdim=True)
            spread = (t - t.mean(1, keepdim=True)).square().mean().clamp(min=1e-12)
            total = total + difference.square().mean() / spread
            total = total + F.kl_div(
                s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean"
            )
        else:
            total = total + (s - t).square().mean() / t.square().mean().clamp(min=1e-12)
    return total  # type: ignore[no-any-return]


def _apart(model: nn.Module, teacher: nn.Module, inputs: Sequence[Tensor]) -> float:
    with eval_mode(model), eval_mode(teacher), torch.no_grad():
        return sum(float(_distance(model(x), teacher(x))) * len(x) for x in inputs)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    inputs: Sequence[Tensor],
    *,
    steps: int,
    lr: float = 1e-3,
    batch: int = 16,
    mix: float = 0.5,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> None:
    """Makes ``model`` give what ``teacher`` gives, in place: scale and shift of every channel learn
    for ``steps`` steps.

    What learns are weights and biases of BatchNorm and the biases of convolutions that no BatchNorm
    follows; inputs are :func:`augmented`, labels are not needed. Both run in eval mode; statistics
    of BatchNorm stay. Where the outputs for other crops of the inputs are further from the teacher's
    afterwards, everything is as it was before.

    Args:
        inputs: a few batches (N, ...).
        batch: images a step. mix: largest share of a second image in each.

    Raises:
        TrainingError: the loss is not finite.
    """
    x = torch.cat(list(inputs))
    learn: list[Tensor] = [
        p for m in model.modules() if isinstance(m, _Norm) for p in m.parameters(recurse=False)
    ]
    learn += [m.bias for m in model.modules() if isinstance(m, _Conv) and m.bias is not None]
    if not learn or steps < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    kept = {p: p.requires_grad for p in model.parameters()}
    for p in kept:
        p.requires_grad_(False)
    for q in learn:
        q.requires_grad_(True)
    before = [p.detach().clone() for p in learn]
    others = [augmented(x, torch.Generator().manual_seed(seed + 1), mix=0)]  # x itself was fitted
    start = _apart(model, teacher, others)
    optimizer = torch.optim.Adam(learn, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, 5 * (k + 1) / steps) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    try:
        with eval_mode(model), eval_mode(teacher):
            for _ in range(steps):
                chosen = x[torch.randperm(len(x), generator=generator)[:batch]]
                images = augmented(chosen, generator, mix=mix)
                with torch.no_grad():
                    want = teacher(images)
                loss = _distance(model(images), want)
                if not bool(torch.isfinite(loss.detach())):
                    raise TrainingError("distillation without labels: the loss is not finite")
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                if on_step is not None:
                    on_step()
        if not _apart(model, teacher, others) < start:
            with torch.no_grad():
                for q, old in zip(learn, before, strict=True):
                    q.copy_(old)
    finally:
        for p, was in kept.items():
            p.requires_grad_(was)
            p.grad = None
