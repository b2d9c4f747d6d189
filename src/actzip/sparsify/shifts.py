"""Maps shifted so that thresholds cost less: what is removed counts as its mean, not as zero.

A channel without zeros of its own has no cheap ones either: next to its other values a zero is far
off. Shifted by the mean s of what a threshold T removes, clip((x - s) * c, 0, high) with zeros up
to (T - s) * c tells all that lies above the threshold exactly, and a zero stands for s. The BatchNorm
(or the convolution) in front shifts; what reads the map has its weights divided by c, and its mean is
put back by the repair (:mod:`actzip.sparsify.repair`). c = high / (high - s) keeps the upper limit
of a ReLU6 where it was; it is 1 where values do not reach that. Where a reader pads its map, the
padding stands for s too, which is charged.

Channels of a ReLU6 that are denser near the limit than near 0 are flipped first: 6 - clip(x, 0, 6) is
clip(6 - x, 0, 6), and what reads it takes the other sign.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actzip.activations import ActivationTap, Site, eval_mode, run_model
from actzip.activations.calls import CONVOLUTIONS, LINEARS
from actzip.activations.hooks import Hooks
from actzip.training.batches import output_tensors

__all__ = ["MOST", "Shift", "Shiftable", "Shifts", "denser_above", "shared", "shiftable"]

_Norm = nn.modules.batchnorm._BatchNorm
_READERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: A shift is at most this share of an upper limit: what stays is stretched to fill the rest.
MOST = 0.5
#: A channel of whose values more are at the upper limit keeps that limit.
FULL = 1e-4
#: Values of a channel that tell from which end they are removed.
PLACES = 4096
#: A channel is flipped where that leaves this share of what is lost otherwise.
CLEARLY = 0.9
#: Inputs that tell how maps are read; values a channel that a mean is put back by, at least.
FEW, FEWEST = 8, 8
#: Methods that give a tensor's values as no tensor.
_ELSEWHERE = {"numpy", "tolist", "__array__", "__dlpack__"}


@dataclass(frozen=True)
class Shiftable:
    """A ReLU in front of which a channel can be shifted.

    Attributes:
        producer: the BatchNorm, or convolution without one, that it reads.
        norm: which of both.
        readers: the convolutions that read it, and nothing else does.
        high: its upper limit, inf for none.
        padding: the share of what they read that is padding.
        pooled: whether maxima are read.
    """

    producer: str
    norm: bool
    readers: tuple[str, ...]
    high: float
    padding: float
    pooled: bool = False

    def shift(self, by: Tensor, full: Tensor, flipped: Tensor | None = None) -> Shift:
        """By so much, in ``flipped`` channels down from the upper limit; ``full`` is the share of each
        channel's values that is at that limit, in those at 0."""
        one, top = torch.ones_like(by), torch.zeros_like(by)
        if not math.isfinite(self.high):
            return Shift(by, one, top)
        scale = torch.where(full > FULL, self.high / (self.high - by), one)
        if flipped is None or not self.flips:
            return Shift(by, scale, top)
        top = torch.where(flipped, self.high, top)
        return Shift(torch.where(flipped, top - by, by), torch.where(flipped, -scale, scale), top)

    @property
    def flips(self) -> bool:
        """Whether channels can be flipped: high less a ReLU6 is a ReLU6 too, but no maximum is."""
        return math.isfinite(self.high) and not self.pooled


class Shift(NamedTuple):
    """x becomes (x - by) * scale, channel by channel. Thresholds of flipped channels, whose scale is
    negative, are of top - x."""

    by: Tensor
    scale: Tensor
    top: Tensor

    def threshold(self, t: Tensor) -> Tensor:
        """What a threshold becomes."""
        return self(torch.where(self.scale < 0, self.top - t, t)).clamp(min=0)

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.by.to(x.dtype)) * self.scale.to(x.dtype)


@dataclass
class Shifts:
    """What was shifted: by the name of the ReLU, and of convolutions in front without a BatchNorm."""

    sites: dict[str, Shift] = field(default_factory=dict)
    convs: dict[str, Shift] = field(default_factory=dict)

    @classmethod
    def put(cls, model: nn.Module, where: Mapping[str, Shiftable], shifts: Mapping[str, Shift]) -> Shifts:
        """Shifts the maps of ``model`` in place; the means of what reads them are not put back."""
        made, modules = cls(dict(shifts)), dict(model.named_modules())
        for name, shift in shifts.items():
            place = where[name]
            producer: Any = modules[place.producer]
            with torch.no_grad():
                producer.bias.copy_(shift(producer.bias))
                producer.weight.mul_(_along(shift.scale, producer.weight, 0))
                for reader in place.readers:
                    _divide(modules[reader], shift.scale)
            if not place.norm:
                made.convs[place.producer] = shift
        return made


def _along(v: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return v.reshape(shape).to(like.dtype)


def _divide(reader: Any, scale: Tensor) -> None:
    """The weights of each input channel of a convolution or linear layer."""
    groups = getattr(reader, "groups", 1)
    w = reader.weight
    parts = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    w.copy_((parts / scale.to(w.dtype).reshape(groups, 1, -1, 1)).reshape(w.shape))


def denser_above(y: Tensor, place: Shiftable) -> Tensor:
    """The channels of a map that had better be flipped: half of their values, and padding, are nearer to
    their mean, which can be shifted by, if removed from the upper limit down."""
    if not place.flips:
        return torch.zeros(int(y.shape[1]), dtype=torch.bool)
    v = y.detach().transpose(0, 1).flatten(1)
    v = v[:, :: max(1, v.shape[1] // PLACES)].sort(1).values.double()
    half = max(1, v.shape[1] // 2)

    def lost(part: Tensor) -> Tensor:
        """With padding at the mean."""
        return part.var(1, unbiased=False) / 2 + place.padding * part.mean(1).square()

    upper, lower = v[:, -half:], v[:, :half]
    near = place.high - upper.mean(1) <= MOST * place.high
    return near & (v[:, half] > 0) & (lost(upper) < CLEARLY * lost(lower))


def shared(model: nn.Module) -> set[str]:
    """Layers whose parameters are another's too, or are computed."""
    owners: dict[int, list[str]] = {}
    unfit = set()
    for name, module in model.named_modules():
        by_hooks = any(isinstance(vars(module).get(each), Tensor) for each in ("weight", "bias"))
        if by_hooks or torch.nn.utils.parametrize.is_parametrized(module):
            unfit.add(name)
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    return unfit | {n for names in owners.values() if len(names) > 1 for n in names}


def shiftable(model: nn.Module, inputs: Tensor) -> dict[str, Shiftable]:
    """The ReLUs of ``model`` that can be shifted, by name: a BatchNorm or convolution with a bias is all
    that they read, and convolutions whose mean can be put back are all that reads them.
    """
    flow = _Flow(model)
    with Hooks() as hooks, eval_mode(model), torch.no_grad(), flow.operators, flow:
        for name, module in model.named_modules():
            if isinstance(module, _Norm):
                hooks.after(module, lambda m, args, out, name=name: flow.normed(name, args[0], out))
            elif isinstance(module, _READERS):
                hooks.after(module, lambda m, args, out, name=name: flow.conv(name, out))
        with ActivationTap(model, flow.site):
            flow.ended(run_model(model, inputs[:FEW]))
    return flow.found(shared(model))


@dataclass
class _Map:
    """What a ReLU gave, or that padded with zeros or pooled by maxima.

    Attributes:
        ones: what of it is no padding, of one channel.
        readers: convolutions that read it and the share of padding there; "" for anything else.
        pools: how many poolings read it.
    """

    value: Tensor
    ones: Tensor
    readers: list[tuple[str, float]] = field(default_factory=list)
    pools: Counter[str] = field(default_factory=Counter)


class _Operators(TorchDispatchMode):
    """How many operators read a tensor of ``known`` ids, scripted functions' and those of writes too."""

    def __init__(self, known: Callable[[int], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.reads = known, Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = {id(v) for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        self.reads.update(i for i in found if self.known(i))
        return out


class _Flow(TorchFunctionMode):
    """Which layer gives what a ReLU reads, and what reads what the ReLU gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.weights = {id(m.weight): n for n, m in self.modules.items() if isinstance(m, _READERS)}
        self.sources: dict[int, tuple[str, Tensor]] = {}  # what layers gave, by identity
        self.reads = Counter[int]()
        self.given: set[int] = set()  # what the model gives
        self.parameters = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.operators = _Operators(lambda i: i in self.sources or i in self.maps or i in self.parameters)
        self.behind: dict[int, tuple[tuple[str, Tensor], Any]] = {}  # what read a source and nothing else
        self.norms: dict[str, str] = {}
        self.outputs: dict[str, Tensor] = {}
        self.runs: dict[str, int] = {}
        self.maps: dict[int, _Map] = {}
        self.sites: dict[str, tuple[str, Tensor, _Map, float]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outs = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(v, Tensor) for v in outs) or getattr(func, "__name__", "") in _ELSEWHERE:
            self.behind.pop(id(out), None)
            for v in (*args, *kwargs.values()):
                for x in v if isinstance(v, (tuple, list)) else (v,):
                    if isinstance(x, Tensor):
                        self._read(x, func, args, kwargs, out)
        return out

    def _read(self, x: Tensor, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if id(x) in self.sources or id(x) in self.maps:
            self.reads[id(x)] += 1
        if id(x) in self.sources:
            self.behind[id(out)] = self.sources[id(x)], out
        m = self.maps.get(id(x))
        if m is None:
            return
        first = bool(args) and args[0] is x
        name = self.weights.get(id(args[1] if len(args) > 1 else kwargs.get("weight")), "")
        passes = func is F.max_pool2d or (func is F.pad and _zeros(x, args, kwargs))
        if first and passes and isinstance(out, Tensor):  # the shift passes too
            m.pools["max"] += func is F.max_pool2d
            self.maps[id(out)] = _Map(out, func(m.ones, *args[1:], **kwargs), m.readers, m.pools)
        elif first and name and (func in CONVOLUTIONS or func in LINEARS):
            m.readers.append((name, _padding(self.modules[name], m.ones)))
        else:
            m.readers.append(("", 0.0))

    def conv(self, name: str, out: Any) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        if isinstance(out, Tensor) and out.dim() > 1:
            self.outputs[name] = out
            self.sources[id(out)] = name, out

    def normed(self, name: str, x: Any, out: Any) -> None:
        self.runs[name] = self.runs.get(name, 0) + 1
        source = self.sources.get(id(x))
        if source is not None:
            self.norms[source[0]] = name
        if isinstance(out, Tensor):
            self.sources[id(out)] = name, out

    def site(self, site: Site, y: Tensor) -> None:
        """An activation ran."""
        (name, x), out = self.behind.get(id(y), (("", y), None))
        if out is not y or site.kind not in ("relu", "relu6") or y.shape != x.shape or self.reads[id(x)] != 1:
            return
        self.maps[id(y)] = m = _Map(y, torch.ones(1, 1, *y.shape[2:]))
        self.sites[site.name] = name, x, m, math.inf if site.high is None else float(site.high)

    def ended(self, out: Any) -> None:
        """The pass gave ``out``."""
        self.given = {id(t) for t in output_tensors(out)}

    def found(self, unfit: set[str]) -> dict[str, Shiftable]:
        unfit = unfit | {n for n, count in self.runs.items() if count != 1 or not self._once(n)}
        made = {}
        for name, (producer, x, m, high) in self.sites.items():
            beside = x is not m.value and self.reads[id(x)] != 1
            beside |= any(self._beside(v) for v in (x, *self._passed(m)))
            if beside or high <= 0 or not m.readers or not self._shifts(producer, m.value, unfit):
                continue
            if all(self._absorbs(r, m.value, unfit) for r, _ in m.readers):
                norm = isinstance(self.modules[producer], _Norm)
                readers = tuple(r for r, _ in m.readers)
                padding, pooled = max(p for _, p in m.readers), bool(m.pools["max"])
                made[name] = Shiftable(producer, norm, readers, high, padding, pooled)
        return made

    def _passed(self, m: _Map) -> list[Tensor]:
        """A map and what it is behind pads and pools."""
        return [each.value for each in self.maps.values() if each.readers is m.readers]

    def _beside(self, v: Tensor) -> bool:
        """Whether something reads a value that no function of PyTorch's was seen to."""
        return id(v) in self.given or self.operators.reads[id(v)] != self.reads[id(v)]

    def _once(self, name: str) -> bool:
        """Whether a layer's parameters are read by that layer alone."""
        m = self.modules[name]
        tensors = (getattr(m, each, None) for each in ("weight", "bias", "running_mean", "running_var"))
        return all(self.operators.reads[id(t)] == 1 for t in tensors if t is not None)

    def _shifts(self, producer: str, value: Tensor, unfit: set[str]) -> bool:
        m: Any = self.modules[producer]
        if producer in unfit or producer in self.norms or m.weight is None or m.bias is None:
            return False
        if not _batched(m, value):
            return False
        return m.running_mean is not None if isinstance(m, _Norm) else True

    def _absorbs(self, reader: str, value: Tensor, unfit: set[str]) -> bool:
        """Whether the repair puts back the mean of what a reader gives."""
        out = self.outputs.get(reader)
        if out is None or reader in unfit or out.numel() // max(1, int(out.shape[1])) < FEWEST:
            return False
        layer: Any = self.modules[reader]
        if not _batched(layer, value):
            return False
        if reader not in self.norms:
            return layer.bias is not None
        norm: Any = self.modules[self.norms[reader]]
        once = self.reads[id(out)] <= 1 and not self._beside(out)
        return once and self.norms[reader] not in unfit and norm.running_mean is not None


def _batched(layer: Any, value: Tensor) -> bool:
    """Whether channels are the second dimension of what a layer reads or gives."""
    if isinstance(layer, _Norm):
        return True
    return value.dim() == (2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size))


def _zeros(x: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether a pad of ``x`` is of zeros, around pixels."""
    if len(kwargs.get("pad", args[1] if len(args) > 1 else ())) > 2 * (x.dim() - 2):
        return False
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    return mode == "constant" and not kwargs.get("value", args[3] if len(args) > 3 else 0.0)


def _padding(reader: Any, ones: Tensor) -> float:
    """The share of padding in what a layer reads of a map."""
    if isinstance(reader, nn.Linear):
        return 0.0
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(reader.kernel_size)]
    kernel = ones.new_ones(1, 1, *reader.kernel_size)
    padding = reader.padding if reader.padding_mode == "zeros" else 0
    read = run(ones, kernel, None, reader.stride, padding, reader.dilation)
    return 1 - float(read.mean()) / kernel.numel()
