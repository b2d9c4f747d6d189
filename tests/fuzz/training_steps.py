"""Random steps of training with packed activation maps beside the same ones without.

    python tests/fuzz/training_steps.py --cases 2000 --seed 7

Convolutions, normalisations, every activation, pools, views, in-place changes of maps and of their
views, residuals, checkpointed blocks, functions of others, recurrent layers, attention, complex and
sparse tensors, hooks; in three types and both layouts, under autocast, differentiated twice, backward
again, with small maps treated as large ones are. Exactly packed gradients must be equal bit for bit;
where PyTorch refuses a step, so must the packed one. With 8 bits the loss is the same and gradients
exist. The last line says how many ran, and how they ended.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from actzip.training import buffers, checkpoint_contexts, packed_activations, standin


class Square(torch.autograd.Function):
    """Saves its input and its output, outside of every torch function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return 2 * x * g + 0 * y


class Doubled(torch.autograd.Function):
    """Changes its input in place, and saves what it became."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * g + 0.1 * x


@contextmanager
def thresholds(large: bool) -> Iterator[None]:
    """Treats maps of any size as large ones, whose backward passes are cut in steps."""
    before = standin._SMALL, buffers.LARGE
    if large:
        standin._SMALL, buffers.LARGE = 0, 0
    try:
        yield
    finally:
        standin._SMALL, buffers.LARGE = before


@dataclass
class Case:
    """A step: its choices are those of ``rng``, begun again by every run, its weights are made once."""

    seed: int
    weights: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed + 1_000_000)
        self.dtype = rng.choices([torch.float32, torch.bfloat16, torch.float64], [8, 1, 1])[0]
        self.shape = (rng.choice([1, 2, 3]), rng.choice([3, 4, 8]), *rng.choices([5, 8, 12], k=2))
        self.amp = self.dtype == torch.float32 and rng.random() < 0.15
        self.blocks, self.early = rng.random() < 0.35, rng.random() < 0.5
        self.last, self.zeros, self.inputs = rng.random() < 0.3, rng.random() < 0.2, rng.random() < 0.5
        self.again, self.double, self.inside = rng.random() < 0.15, rng.random() < 0.1, rng.random() < 0.2
        self.min_bytes = rng.choice([0, 0, 0, 4096])
        self.large = rng.random() < 0.5

    def begin(self) -> Tensor:
        """The input; weights are handed out from the first one on."""
        self.rng, self.used = random.Random(self.seed), 0
        torch.manual_seed(self.seed)
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        x = torch.zeros_like(x) if self.zeros else x
        x = x.contiguous(memory_format=torch.channels_last) if self.last else x
        return x.requires_grad_(self.inputs)

    def weight(self, *shape: int) -> Tensor:
        if self.used == len(self.weights):
            generator = torch.Generator().manual_seed(self.seed + self.used)
            made = torch.randn(shape, generator=generator).mul(0.5).to(self.dtype)
            self.weights.append(made.requires_grad_())
        self.used += 1
        return self.weights[self.used - 1]


def conv(c: Case, x: Tensor) -> Tensor:
    n, k = x.shape[1], c.rng.choice([1, 3])
    out = c.rng.choice([n, 8, 16])
    stride = c.rng.choice([1, 1, 2]) if min(x.shape[2:]) > 5 else 1
    bias = c.weight(out) if c.rng.random() < 0.5 else None
    return F.conv2d(x, c.weight(out, n, k, k), bias, stride, k // 2)


def other_conv(c: Case, x: Tensor) -> Tensor:
    n = x.shape[1]
    return c.rng.choice(
        [
            lambda: F.conv2d(x, c.weight(n, 1, 3, 3), padding=1, groups=n),
            lambda: F.conv_transpose2d(x[:, :, :12, :12], c.weight(n, 8, 2, 2), stride=2),
            lambda: F.conv1d(x.flatten(2), c.weight(n, n, 3), padding=1).view_as(x),
            lambda: F.conv3d(x.unsqueeze(1), c.weight(1, 1, 3, 1, 1), padding=(1, 0, 0)).squeeze(1),
            lambda: F.linear(x, c.weight(x.shape[-1], x.shape[-1]), c.weight(x.shape[-1])),
        ]
    )()


def norm(c: Case, x: Tensor) -> Tensor:
    n = x.shape[1]
    mean, var = torch.zeros(n, dtype=c.dtype), torch.ones(n, dtype=c.dtype)
    return c.rng.choice(
        [
            lambda: F.batch_norm(x, None, None, c.weight(n), c.weight(n), training=True),
            lambda: F.batch_norm(x, mean, var, c.weight(n), c.weight(n), training=True),
            lambda: F.batch_norm(x, mean, var, c.weight(n), c.weight(n), training=False),
            lambda: F.group_norm(x.contiguous(), 2 - n % 2, c.weight(n), c.weight(n)),
            lambda: F.instance_norm(x) if x.shape[2:].numel() > 1 else x * 2,
            lambda: F.layer_norm(x, x.shape[-1:], c.weight(x.shape[-1])),
            lambda: F.local_response_norm(x, 3),
        ]
    )()


Activation = Callable[[Case, Tensor, bool], Tensor]
EITHER: list[Activation] = [  # in place too
    lambda c, x, i: F.relu(x, i),
    lambda c, x, i: F.relu6(x, i),
    lambda c, x, i: F.leaky_relu(x, c.rng.choice([0.1, 0.0, -0.2, 2.0]), i),
    lambda c, x, i: F.hardtanh(x, *c.rng.choice([(-1.0, 1.0), (0.0, 6.0), (-0.5, 2.0)]), i),
    lambda c, x, i: F.elu(x, 1.0, i),
    lambda c, x, i: F.selu(x, i),
    lambda c, x, i: F.celu(x, 1.3, i),
    lambda c, x, i: F.silu(x, i),
    lambda c, x, i: F.mish(x, i),
    lambda c, x, i: F.hardswish(x, i),
    lambda c, x, i: F.hardsigmoid(x, i),
    lambda c, x, i: F.threshold(x, 0.1, c.rng.choice([0.0, 20.0, -3.0]), i),
    lambda c, x, i: F.rrelu(x, 0.1, 0.3, True, i),
    lambda c, x, i: F.dropout(x, 0.4, True, i),
    lambda c, x, i: F.dropout2d(x, 0.3, True, i),
    lambda c, x, i: F.alpha_dropout(x, 0.2, True, i),
]
METHODS = ["relu", "sigmoid", "tanh", "abs", "neg", "clamp_min", "clamp_max", "clamp", "square"]
APART: list[Activation] = [
    lambda c, x, i: F.gelu(x, approximate=c.rng.choice(["none", "tanh"])),
    lambda c, x, i: F.softplus(x),
    lambda c, x, i: F.prelu(x, c.weight(c.rng.choice([1, x.shape[1]]))),
    lambda c, x, i: F.hardshrink(x, 0.4),
    lambda c, x, i: F.softshrink(x, 0.3),
    lambda c, x, i: F.tanhshrink(x),
    lambda c, x, i: F.logsigmoid(x),
    lambda c, x, i: F.softsign(x),
    lambda c, x, i: torch.clip(x, -0.4, 1.1),
    lambda c, x, i: torch.maximum(x, x.new_zeros(())),
    lambda c, x, i: torch.clamp(x, min=torch.zeros((), dtype=x.dtype)),
    lambda c, x, i: torch.where(x > 0, x, x * 0.1),
    lambda c, x, i: x.masked_fill(x < 0, 0),
    lambda c, x, i: x * (x > 0),
    lambda c, x, i: (x.square() + 0.1).sqrt(),
    lambda c, x, i: Square.apply(x.tanh()),
]


def activation(c: Case, x: Tensor) -> Tensor:
    kind, place = c.rng.randrange(3), c.rng.random() < 0.5 and not x.is_leaf
    if kind == 0:
        return c.rng.choice(EITHER)(c, x, place)
    if kind == 1:
        return c.rng.choice(APART)(c, x, place)
    name = c.rng.choice(METHODS)
    bounds = {"clamp": (-1.0, 0.5), "clamp_min": (0.0,), "clamp_max": (0.3,)}.get(name, ())
    found: Tensor = getattr(x, name + "_" * place)(*bounds)
    return found


def pool(c: Case, x: Tensor) -> Tensor:
    h = min(x.shape[2:])
    if h < 4:
        return x * 1.5
    even = x[..., : h // 2 * 2, : h // 2 * 2]
    return c.rng.choice(
        [
            lambda: F.max_pool2d(x, 2),
            lambda: F.max_pool2d(x, 3, 1, 1),
            lambda: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            lambda: F.max_pool2d(x, 2, 1, dilation=2),
            lambda: F.avg_pool2d(x, 2),
            lambda: F.adaptive_avg_pool2d(x, 3),
            lambda: F.adaptive_max_pool2d(x, 3),
            lambda: F.lp_pool2d(x, 2, 2),
            lambda: F.max_unpool2d(*F.max_pool2d(even, 2, return_indices=True), 2),
        ]
    )()


def view(c: Case, x: Tensor) -> Tensor:
    n, h, w = x.shape[1:]
    mode = c.rng.choice(["constant", "reflect", "replicate"])
    return c.rng.choice(
        [
            lambda: x[:, : max(1, n // 2)],
            lambda: x.transpose(2, 3),
            lambda: x.chunk(2, 1)[-1],
            lambda: x.flip(2),
            lambda: x.contiguous(memory_format=torch.channels_last),
            lambda: x.contiguous(),
            lambda: x.reshape(x.shape),
            lambda: x[:, torch.arange(n).flip(0)],
            lambda: x.mean((2, 3), keepdim=True).expand_as(x),
            lambda: x[:, :1].expand_as(x),
            lambda: x.unbind(0)[0].unsqueeze(0),
            lambda: x[..., 1:, :] if h > 2 else x,
            lambda: x.permute(0, 1, 3, 2).contiguous(),
            lambda: x.as_strided(x.shape, x.stride(), x.storage_offset()),
            lambda: F.pad(x, (1, 0, 0, 1), mode=mode) if 3 < h <= 12 and 3 < w <= 12 else x,
            lambda: F.interpolate(x, size=(5, 6), mode="bilinear"),
        ]
    )()


def mixed(c: Case, x: Tensor) -> Tensor:
    n = x.shape[1]
    return c.rng.choice(
        [
            lambda: x.softmax(1),
            lambda: x.log_softmax(3),
            lambda: x.cumsum(2) * 0.3,
            lambda: x.sort(3)[0],
            lambda: x.topk(max(1, x.shape[3] // 2), 3)[0],
            lambda: x * x.mean((2, 3), keepdim=True).sigmoid(),
            lambda: torch.einsum("nchw,cd->ndhw", x, c.weight(n, n)),
            lambda: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).unsqueeze(1) * 0.01,
            lambda: F.scaled_dot_product_attention(x, x * 0.5, x),
            lambda: x.amax(1, keepdim=True) + x,
            lambda: F.normalize(x, dim=1),
            lambda: x.gather(1, torch.zeros_like(x, dtype=torch.long)),
            lambda: x.var(1, keepdim=True) * x if n > 1 else x,
            lambda: torch.cat([x, x.relu()], 1) if n <= 16 else x,
            lambda: x.roll(1, 2),
        ]
    )()


def odd(c: Case, x: Tensor) -> Tensor:
    """What networks for images have seldom."""
    n, _, w = x.shape[1:]

    def recurrent() -> Tensor:
        gates = c.rng.choice([3, 4])
        weights = [c.weight(gates * 4, w), c.weight(gates * 4, 4), c.weight(gates * 4), c.weight(gates * 4)]
        first = x.new_zeros(1, x.shape[0], 4)
        state = first if gates == 3 else (first, first)
        run = torch.gru if gates == 3 else torch.lstm
        return run(x.mean(1), state, weights, True, 1, 0.0, True, False, True)[0].unsqueeze(1)

    def hooked() -> Tensor:
        y = x * 1.5
        if y.requires_grad:
            y.register_hook(lambda g: g * 0.5)
        return y

    def sparse() -> Tensor:
        matrix = torch.eye(w, dtype=torch.float32).to_sparse_coo()
        return torch.sparse.mm(matrix, x.float().reshape(-1, w).t()).t().reshape(x.shape).to(x.dtype)

    def attention() -> Tensor:
        rows = x.flatten(2).transpose(0, 1).float()
        weights = [c.weight(3 * rows.shape[2], rows.shape[2]).float(), c.weight(rows.shape[2]).float()]
        q, k, v = F.linear(rows, weights[0]).chunk(3, -1)
        return (F.scaled_dot_product_attention(q, k, v) * weights[1]).transpose(0, 1).reshape(x.shape)

    return c.rng.choice(
        [
            recurrent,
            hooked,
            sparse,
            attention,
            lambda: torch.fft.irfft2(torch.fft.rfft2(x.float()) * 1j, s=x.shape[2:]).to(x.dtype),
            lambda: torch.view_as_real(torch.complex(x.float(), x.float().tanh()).square()).mean(-1),
            lambda: F.embedding((x[:, 0] > 0).long(), c.weight(2, n)).permute(0, 3, 1, 2),
            lambda: F.pixel_shuffle(F.pixel_unshuffle(x[..., :4, :4], 2), 2) if min(x.shape[2:]) > 3 else x,
            lambda: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1),
            lambda: F.grid_sample(x, torch.zeros(*x[:, 0].shape, 2, dtype=x.dtype), align_corners=False),
            lambda: torch.cdist(x.flatten(2).float(), x.flatten(2).float()).unsqueeze(1) * 0.1,
            lambda: Doubled.apply(x + 0),
            lambda: F.glu(torch.cat([x, x.relu()], 1), 1),
            lambda: F.rms_norm(x, x.shape[-1:]) if hasattr(F, "rms_norm") else x,
            lambda: x.cumprod(3) * 0.1,
        ]
    )()


def in_place(c: Case, x: Tensor) -> Tensor:
    if x.is_leaf:
        return x * 2
    kind = c.rng.randrange(11)
    if kind == 0:
        x[:, :1].mul_(2)
    elif kind == 1:
        x[:, :1] = 0
    elif kind == 2:
        x[..., 0].relu_()
    elif kind == 3:
        x.split(1, 1)[0].tanh_()
    elif kind == 4:
        with torch.no_grad():
            x.mul_(0.5)
    else:
        changes: list[Callable[[], Tensor]] = [
            lambda: x.mul_(c.weight(1)),
            lambda: x.add_(1),
            lambda: x.div_(2),
            lambda: x.copy_(x.detach() * 2),
            lambda: x.sub_(x.detach()),
            lambda: x.addcmul_(x.detach(), x.detach(), value=0.1),
        ]
        return changes[kind - 5]()
    return x


def joined(c: Case, x: Tensor, maps: list[Tensor]) -> Tensor:
    y = c.rng.choice([y for y in maps if y.shape == x.shape] or [x])
    kind = c.rng.randrange(7)
    if kind < 2 and not x.is_leaf:
        return (x.add_, x.mul_)[kind](y)
    ways: list[Callable[[], Tensor]] = [
        lambda: x + y,
        lambda: x * y,
        lambda: x - y,
        lambda: torch.maximum(x, y),
        lambda: torch.where(y > 0, x, y),
        lambda: torch.cat([x, y], 1) if x.shape[1] <= 16 else x * y,
        lambda: x * y,
    ]
    return ways[kind]()


LAYERS: dict[Callable[[Case, Tensor], Tensor], float] = {
    conv: 5,
    other_conv: 3,
    norm: 5,
    activation: 10,
    pool: 2,
    view: 3,
    mixed: 2.5,
    odd: 1.5,
    in_place: 1.3,
}

Again = Callable[..., Tensor]


def network(c: Case, x: Tensor, again: Again | None) -> list[Tensor]:
    """What goes into the loss."""
    maps, outs = [x], []
    for _ in range(c.rng.randrange(3, 14)):
        count, kind = c.rng.randrange(1, 4), c.rng.random()

        def block(y: Tensor, count: int = count, at: Any = None) -> Tensor:
            if at is not None:  # what is computed again makes the same choices
                c.rng.setstate(at[0])
                c.used = at[1]
            for _ in range(count):
                y = c.rng.choices(list(LAYERS), list(LAYERS.values()))[0](c, y)
            return y

        y = maps[-1] if c.rng.random() < 0.75 else c.rng.choice(maps)
        if kind < 0.15:
            y = joined(c, y, maps)
        elif kind < 0.35 and again is not None:
            y = again(partial(block, at=(c.rng.getstate(), c.used)), y)
        else:
            y = block(y)
        y = y[:2, :16, :12, :12]
        maps.append(y)
        if c.rng.random() < 0.1:
            maps.append(y.detach())
        if c.rng.random() < 0.2:
            outs.append(y)
    return [*outs, maps[-1]]


def step(c: Case, context: AbstractContextManager[Any], again: Again | None) -> list[Tensor | None]:
    """The loss and all gradients; nothing where none is asked for."""
    x = c.begin()

    def gradients(loss: Tensor) -> list[Tensor | None]:
        wanted = [*c.weights, *([x] if c.inputs else [])]
        grad = partial(torch.autograd.grad, inputs=wanted, allow_unused=True)
        found = [loss, *grad(loss, retain_graph=True, create_graph=c.double)]
        if c.again:
            found += grad(loss, retain_graph=True)
        if c.double:
            once = [g.float().square().mean() for g in found[1:] if g is not None and g.requires_grad]
            found += grad(torch.stack(once).sum()) if once else []
        return [None if g is None else g.detach() for g in found]

    with set_checkpoint_early_stop(c.early):
        with context:
            with torch.autocast("cpu", torch.bfloat16) if c.amp else nullcontext():
                outs = network(c, x * 1 if c.inputs else x, again)
            losses = [o.float().tanh().mean() for o in outs if o.requires_grad]
            if not losses:
                return []
            loss = torch.stack(losses).sum()
            if c.inside:
                return gradients(loss)
        return gradients(loss)


def attempt(*arguments: Any) -> list[Tensor | None] | RuntimeError:
    """What a step gives, or what PyTorch says against it."""
    try:
        with thresholds(arguments[0].large):
            return step(*arguments)
    except RuntimeError as error:
        return error


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        x is y or (x is not None and y is not None and torch.equal(x.nan_to_num(9), y.nan_to_num(9)))
        for x, y in zip(a, b, strict=True)
    )


def check(seed: int) -> str:
    """How the case of this seed ended.

    Raises:
        AssertionError: a packed step is not as the plain one is.
    """
    c, nothing = Case(seed), nn.Identity()
    plain = attempt(c, nullcontext(), None)
    again = partial(checkpoint, use_reentrant=False)
    packed_again = partial(again, context_fn=checkpoint_contexts)
    if c.blocks:  # what is computed again is not spoilt by changes outside of its block
        before, plain = plain, attempt(c, nullcontext(), again)
        if isinstance(before, RuntimeError) or isinstance(plain, RuntimeError) or not same(before, plain):
            return "checkpointing alone differs"
    context = packed_activations(nothing, min_bytes=c.min_bytes)
    exact = attempt(c, context, packed_again if c.blocks else None)
    if isinstance(plain, RuntimeError):
        assert isinstance(exact, RuntimeError), f"case {seed}: PyTorch says {plain}; packed, nothing is said"
        return "refused"
    assert not isinstance(exact, RuntimeError), f"case {seed}: packed, {exact}"
    assert same(plain, exact), f"case {seed}: other gradients"
    if plain and not c.double:
        context = packed_activations(
            nothing, 8, min_bytes=c.min_bytes, generator=torch.Generator().manual_seed(seed)
        )
        coded = attempt(c, context, packed_again if c.blocks else None)
        assert not isinstance(coded, RuntimeError), f"case {seed}: with 8 bits, {coded}"
        assert same(plain[:1], coded[:1]), f"case {seed}: another loss with 8 bits"
        assert [g is None for g in plain] == [g is None for g in coded], f"case {seed}: no gradients"
    return "equal"


def run(seed: int, cases: int) -> Counter[str]:
    """``cases`` steps from ``seed`` on; how they ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Counter(check(k) for k in range(seed, seed + cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tally: Counter[str] = Counter()
    first = options.seed * 1_000_000
    for k in range(first, first + options.cases):
        try:
            tally += run(k, 1)
        except Exception as error:
            tally["faults"] += 1
            print(f"{k}: {type(error).__name__}: {error}"[:600], flush=True)
    print(f"{options.cases} steps: {dict(tally)}")
    raise SystemExit(bool(tally["faults"]))


if __name__ == "__main__":
    main()
