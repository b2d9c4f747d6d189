"""Random PyTorch modules with control flow, side effects and odd outputs, compiled and beside eager.

    python tests/fuzz/torch_modules.py --cases 2000 --seed 7

Each goes through ``actzip.compile`` and every fourth through ``torch.compile(backend="actzip")``
too. What comes back must be eager's, on other batches as well; a refusal must be typed; and buffers,
attributes, hooks' counts and random generators must be afterwards what eager leaves (``torch.compile``),
or as before (``actzip.compile``). The last line says how many ran, and how they ended.
"""

from __future__ import annotations

import argparse
import collections
import copy
import logging
import random
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import actzip
from actzip.errors import InputError, UnsupportedError
from actzip.runtime.dynamo import last_report

Pair = collections.namedtuple("Pair", "first second")
CHANNELS = 4


class Step(nn.Module):
    """One random step on a map (N, 4, H, W), which it keeps in that form."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.choice(sorted(STEPS) if rng.random() < 0.25 else PLAIN)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.other = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.register_buffer("state", torch.ones(1))
        self.limit, self.calls, self.log = rng.randrange(1, 5), 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        return STEPS[self.kind](self, x)


def _buffer(s: Any, x: Tensor) -> Tensor:
    s.state += 1
    return x * s.state


def _buffer_slice(s: Any, x: Tensor) -> Tensor:
    s.state[0] = s.state[0] * 0.5 + 1
    return x + s.state


def _replaced(s: Any, x: Tensor) -> Tensor:
    s.state = s.state + 1
    return x * s.state


def _count(s: Any, x: Tensor) -> Tensor:
    s.calls += 1
    return s.conv(x) * s.calls


def _log(s: Any, x: Tensor) -> Tensor:
    s.log.append(1)
    return x + len(s.log)


def _cache(s: Any, x: Tensor) -> Tensor:
    s.calls = x.shape[-1]
    return s.conv(x) / s.calls


def _in_place(s: Any, x: Tensor) -> Tensor:
    return x.add_(1.0)


def _in_place_part(s: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = y[:, 0] * 2
    y[:, 2:].relu_()
    return y


STEPS: dict[str, Any] = {
    "conv": lambda s, x: s.conv(x),
    "conv relu": lambda s, x: F.relu(s.conv(x)),
    "conv relu in place": lambda s, x: F.relu_(s.conv(x)),
    "norm": lambda s, x: s.norm(s.other(x)),
    "residual": lambda s, x: x + F.relu(s.conv(x)),
    "pool": lambda s, x: F.max_pool2d(x, 3, 1, 1),
    "gate": lambda s, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "softmax": lambda s, x: torch.softmax(x, 1),
    "twice": lambda s, x: s.conv(s.conv(x)),
    "batch branch": lambda s, x: s.conv(x) if x.shape[0] >= s.limit else s.other(x),
    "batch one": lambda s, x: s.conv(x) if x.shape[0] == 1 else s.other(x),
    "batch scale": lambda s, x: x / x.shape[0],
    "batch even": lambda s, x: s.conv(x) if x.shape[0] % 2 else s.other(x),
    "batch mean": lambda s, x: x - x.mean(0, keepdim=True),
    "batch flip": lambda s, x: x.flip(0),
    "batch matrix": lambda s, x: torch.softmax(x.flatten(1) @ x.flatten(1).T, 1).sum(1).view(-1, 1, 1, 1) * x,
    "squeeze": lambda s, x: x + x.mean((1, 2, 3)).squeeze().view(-1, 1, 1, 1),
    "data branch": lambda s, x: s.conv(x) if x.sum() > 0 else s.other(x),
    "loop": lambda s, x: sum((s.other(x) * k for k in range(s.limit)), x),
    "sort": lambda s, x: torch.sort(s.conv(x), 1).values,
    "cumsum": lambda s, x: torch.cumsum(x, 1),
    "where": lambda s, x: torch.where(x > 0.1, x, torch.zeros_like(x)),
    "where other": lambda s, x: torch.where(x > 0, x, x * 0.1 + 1),
    "mask": lambda s, x: x * (x > 0),
    "masked fill": lambda s, x: x.masked_fill(x < 0, 0.0),
    "indices": lambda s, x: x + F.max_pool2d(x, 3, 1, 1, return_indices=True)[1].float().tanh(),
    "argmax": lambda s, x: x * x.argmax(1, keepdim=True).float(),
    "double": lambda s, x: (x.double() * 2).float(),
    "half": lambda s, x: s.conv(x.half().float()),
    "round trip": lambda s, x: x.int().float() + x,
    "dropout": lambda s, x: F.dropout(x, 0.5),
    "dropout of eval": lambda s, x: F.dropout(x, 0.5, training=s.training),
    "dropout2d": lambda s, x: F.dropout2d(x, 0.5),
    "rand": lambda s, x: x + torch.rand(CHANNELS, 1, 1),
    "rand like": lambda s, x: x * torch.rand_like(x),
    "bernoulli": lambda s, x: x * torch.bernoulli(torch.full((1, CHANNELS, 1, 1), 0.5)),
    "python random": lambda s, x: x * random.random(),
    "numpy random": lambda s, x: x * float(np.random.rand()),  # noqa: NPY002
    "buffer": _buffer,
    "buffer slice": _buffer_slice,
    "buffer replaced": _replaced,
    "count": _count,
    "log": _log,
    "cache": _cache,
    "in place": _in_place,
    "in place part": _in_place_part,
    "nonzero": lambda s, x: x * float((x > 0).sum() > 3),
    "item": lambda s, x: x * x.max().item(),
}
#: Those that are drawn more often: too many of the others and nothing compiles.
PLAIN = ["conv", "conv relu", "conv relu in place", "norm", "residual", "pool", "gate", "softmax", "twice"]

#: Of the last map, the one before, and the input.
OUTPUTS: dict[str, Any] = {
    "map": lambda y, z, x: y,
    "vector": lambda y, z, x: y.mean((2, 3)),
    "squeezed": lambda y, z, x: y.mean((2, 3)).squeeze(),
    "tuple": lambda y, z, x: (y, z),
    "twice": lambda y, z, x: [y, y],
    "view": lambda y, z, x: (y, y.flatten(1)),
    "input": lambda y, z, x: (y, x),
    "input view": lambda y, z, x: {"y": y, "x": x.flatten(2)},
    "none": lambda y, z, x: {"y": y, "none": None, "number": 3},
    "pair": lambda y, z, x: Pair(y, {"z": [z]}),
    "maximum": lambda y, z, x: y.max(1),
    "top": lambda y, z, x: torch.topk(y + torch.arange(4.0).view(4, 1, 1) / 7, 2, 1),  # no equals
    "ordered": lambda y, z, x: collections.OrderedDict(b=y, a=z),
    "argmax": lambda y, z, x: y.argmax(1),
    "bool": lambda y, z, x: (y, y > 0),
    "int": lambda y, z, x: (y, y.int()),
    "half": lambda y, z, x: y.half(),
    "bfloat16": lambda y, z, x: (y, z.bfloat16()),
    "double": lambda y, z, x: y.double(),
    "shape": lambda y, z, x: (y, y.shape[0]),
    "constant": lambda y, z, x: (y, torch.arange(3), torch.ones(2)),
    "indices": lambda y, z, x: F.max_pool2d(y, 2, return_indices=True),
    "nonzero": lambda y, z, x: y.flatten()[y.flatten() > 0],
}


class Net(nn.Module):
    """A few steps, an output, and sometimes a hook that counts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.steps = nn.ModuleList(Step(rng) for _ in range(rng.randrange(1, 5)))
        self.output = rng.choice(sorted(OUTPUTS))
        self.stem = nn.Conv2d(3, CHANNELS, 3)
        self.straight = rng.random() < 0.8  # else the first step works on the input itself
        self.hooked: list[int] = []
        if rng.random() < 0.3:
            self.stem.register_forward_hook(_Counter(self.hooked))

    def forward(self, x: Tensor) -> Any:
        y = z = self.stem(x) if self.straight else x
        for step in self.steps:
            y, z = step(y), y
        return OUTPUTS[self.output](y, z, x)

    def says(self) -> str:
        return f"{[s.kind for s in self.steps]} -> {self.output}, straight {self.straight}"


class _Counter:
    def __init__(self, calls: list[int]) -> None:
        self.calls = calls

    def __call__(self, *_: Any) -> None:
        self.calls.append(1)


def make(seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net(seed).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
            m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return net


def example(net: Net, batch: int, seed: int) -> Tensor:
    channels = 3 if net.straight else CHANNELS
    return torch.randn(batch, channels, 8, 7, generator=torch.Generator().manual_seed(seed))


def state(net: Net) -> Any:
    """All that a call could change, to be compared."""
    tensors = {k: v.detach().clone() for k, v in (*net.named_parameters(), *net.named_buffers())}
    python = [(s.calls, list(s.log), s.training) for s in net.steps]
    generators = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    return tensors, python, len(net.hooked), generators


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def differ(a: Any, b: Any, path: str = "") -> str:
    """Where ``a`` and ``b`` differ, '' for nowhere. Of tensors: class, type, shape, numbers."""
    if type(a) is not type(b):
        return f"{path}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype}, {tuple(a.shape)} and {b.dtype}, {tuple(b.shape)}"
        if a.dtype.is_floating_point:
            loose = 1e-3 if a.dtype in (torch.float32, torch.float64) else 2e-2
            near = torch.allclose(a.double(), b.double(), rtol=loose, atol=loose, equal_nan=True)
        else:  # of numbers that round to a neighbour some may
            near = (a.dtype == torch.uint8 and torch.equal(a, b)) or bool((a != b).float().mean() <= 0.02)
        return "" if near else f"{path}: numbers"
    if isinstance(a, np.ndarray):
        return "" if np.array_equal(a, b) else f"{path}: numbers"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} and {list(b)}"
        return next((d for k in a if (d := differ(a[k], b[k], f"{path}.{k}"))), "")
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)}"
        return next(
            (d for i, (p, q) in enumerate(zip(a, b, strict=True)) if (d := differ(p, q, f"{path}[{i}]"))), ""
        )
    return "" if a == b else f"{path}: {a!r} and {b!r}"


def eager(net: Net, x: Tensor) -> Any:
    try:
        return net(x)
    except Exception as error:
        return error


def check_compile(seed: int, tally: Counter[str]) -> None:
    net, batch = make(seed), 1 + seed % 3
    reference = copy.deepcopy(net)
    fails = isinstance(eager(copy.deepcopy(net), example(net, batch, seed)), Exception)
    seeded(seed)
    x, before = example(net, batch, seed), state(net)
    given = x.clone()
    try:
        fast = actzip.compile(net, x, tune=False, cache=False, threads=1)
    except UnsupportedError as error:
        fast = None
        if "cannot be taken over" in str(error):
            raise AssertionError(f"seed {seed}: {net.says()}: a fault of a handler: {error}") from error
        tally["refused"] += 1
    except InputError:
        fast = None
        assert fails, f"seed {seed}: {net.says()}: InputError of a model that runs"
        tally["does not run"] += 1
    where = differ(state(net), before)
    assert not where, f"seed {seed}: {net.says()}: compiling changed {where}"
    assert torch.equal(x, given), f"seed {seed}: {net.says()}: compiling changed the example"
    if fast is None:
        return
    for n in (batch, 1, 2, 5, 4):
        x = example(net, n, seed + n)
        wanted = eager(copy.deepcopy(reference), x.clone())
        try:
            got = fast(x)
        except InputError:
            assert n != batch, f"seed {seed}: {net.says()}: the example's batch is refused"
            tally["a batch refused"] += 1
            continue
        where = differ(got, wanted)
        assert not where, f"seed {seed}: {net.says()}: batch {n} of {batch}: {where}"
    assert not differ(state(net), before), f"seed {seed}: {net.says()}: a call changed the model"
    tally["compiled"] += 1


def check_torch_compile(seed: int, tally: Counter[str]) -> None:
    net, batch = make(seed), 1 + seed % 3
    reference = copy.deepcopy(net)
    if isinstance(eager(copy.deepcopy(net), example(net, batch, seed)), Exception):
        return
    torch._dynamo.reset()
    fast = torch.compile(net, backend="actzip", options={"tune": False, "cache": False, "threads": 1})
    for n in (batch, batch, 1 + (batch + seed) % 4):
        x, y = example(net, n, seed + n), example(net, n, seed + n)
        seeded(seed)
        wanted, after = eager(reference, y), state(reference)
        seeded(seed)
        got = eager(fast, x)  # type: ignore[arg-type]
        if isinstance(wanted, Exception):
            assert isinstance(got, Exception), f"seed {seed}: {net.says()}: runs where eager fails"
            break
        for a, b, what in ((got, wanted, "output"), (state(net), after, "state"), (x, y, "input")):
            where = differ(a, b)
            assert not where, (
                f"seed {seed}: {net.says()}: torch.compile, batch {n}: {what} {where} ({got!r:.200})"
            )
        _write_first(got), _write_first(wanted)  # what shares memory, does so as in eager
        where = differ(got, wanted) or differ(x, y)
        assert not where, f"seed {seed}: {net.says()}: torch.compile, batch {n}: memory {where}"
    tally[f"torch.compile {last_report().get('mode', 'no graph')}"] += 1


def _write_first(out: Any) -> None:
    first = next((t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
    if first is not None and first.numel():
        first.zero_()


def run(seed: int, cases: int, every: int = 4) -> Counter[str]:
    """``cases`` modules from ``seed`` on; how they ended.

    Raises:
        AssertionError: one that is not as in eager mode; with its seed.
    """
    tally: Counter[str] = Counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(seed, seed + cases):
            check_compile(k, tally)
            if k % every == 0:
                check_torch_compile(k, tally)
            tally["modules"] += 1
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # torch.compile's own about graph breaks
    tally: Counter[str] = Counter()
    faults = []
    for start in range(options.seed * 1_000_000, options.seed * 1_000_000 + options.cases):
        try:
            tally += run(start, 1)
        except Exception as error:
            faults.append(start)
            print(f"{type(error).__name__}: {error}"[:600], flush=True)
        if (start + 1) % 100 == 0:
            print(dict(tally), len(faults), flush=True)
    print(f"{tally['modules']} modules, {len(faults)} faults: {dict(tally)}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
