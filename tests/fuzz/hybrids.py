"""Random small networks of convolutions, attention, masks, windows and norms, beside float64.

    python tests/fuzz/hybrids.py --cases 300 --seed 7

Each is compiled, called at three batches, saved and loaded, pickled, and called at a second size,
where the module itself takes that. What comes back must be the module's in float64 within rounding;
an error must be typed. The last line says how many ran, and how they ended: ``whole`` on the
engine, in ``parts``, or refused; how many files took the second size.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import actzip
from actzip.errors import ActzipError, ActzipWarning, UnsupportedError
from actzip.runtime import load

C = 8  # channels between the steps
Step = Callable[[Any, Tensor], Tensor]


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _map(t: Tensor, like: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(like.shape)


def _heads(s: Any, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = s.qkv(t).reshape(*t.shape[:-1], 3, 2, C // 2).permute(2, 0, 3, 1, 4)
    return q, k, v


def _attention(s: Any, x: Tensor) -> Tensor:
    t = s.layer(_tokens(x))
    q, k, v = _heads(s, t)
    a = (q @ k.transpose(-2, -1)) * (C // 2) ** -0.5
    return x + _map((a.softmax(-1) @ v).transpose(1, 2).reshape(t.shape), x)


def _fused(s: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(s, _tokens(x))
    return x + _map(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), x)


def _causal(s: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(s, _tokens(x))
    return x + _map(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2), x)


def _bool_mask(s: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(s, _tokens(x))
    n = q.shape[2]
    near = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs() < 5
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
    return x + _map(y.transpose(1, 2).flatten(2), x)


def _filled(s: Any, x: Tensor) -> Tensor:
    t = _tokens(x)
    a = t @ t.transpose(-2, -1)
    a = a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return x + _map(a.softmax(-1) @ t, x)


def _padding_mask(s: Any, x: Tensor) -> Tensor:
    """What is masked depends on the input."""
    t = _tokens(x)
    off = t.mean(-1) < -0.5
    a = (t @ t.transpose(-2, -1)).masked_fill(off[:, None], -1e4)
    return x + _map(a.softmax(-1) @ t, x)


def _windows(s: Any, x: Tensor, shift: int = 0) -> Tensor:
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % 4, 0, -h % 4))
    hp, wp = x.shape[2:]
    y = torch.roll(x, (-shift, -shift), (2, 3)) if shift else x
    y = y.view(b, c, hp // 4, 4, wp // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    q, k, v = _heads(s, y)
    a = (q @ k.transpose(-2, -1)) * 0.5
    table = s.table[s.places.flatten()].view(16, 16, 2).permute(2, 0, 1)
    a = a + table.unsqueeze(0)
    if shift:
        image = torch.zeros(1, hp, wp, 1)
        for i, rows in enumerate((slice(0, -4), slice(-4, -shift), slice(-shift, None))):
            for j, cols in enumerate((slice(0, -4), slice(-4, -shift), slice(-shift, None))):
                image[:, rows, cols] = 3 * i + j
        parts = image.view(1, hp // 4, 4, wp // 4, 4).permute(0, 1, 3, 2, 4).reshape(-1, 16)
        mask = (parts[:, None] - parts[:, :, None]).masked_fill_(
            parts[:, None] != parts[:, :, None], float(-100)
        )
        a = a.view(b, -1, 2, 16, 16) + mask[None, :, None]
        a = a.view(-1, 2, 16, 16)
    y = (a.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, c)
    y = y.view(b, hp // 4, wp // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, hp, wp)
    y = torch.roll(y, (shift, shift), (2, 3)) if shift else y
    return (x + y)[:, :, :h, :w]


def _grid(s: Any, x: Tensor) -> Tensor:
    """MaxViT's attention over a grid of pixels that are apart."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        return s.conv(x)
    y = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 3, 5, 2, 4, 1).reshape(-1, 4, c)
    y = s.mha(y, y, y, need_weights=False)[0]
    return x + y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 3, 1, 4, 2).reshape(x.shape)


def _unfolded(s: Any, x: Tensor) -> Tensor:
    """MobileViT's patches."""
    b, c, h, w = x.shape
    nh, nw = -(-h // 2), -(-w // 2)
    y = F.interpolate(x, (2 * nh, 2 * nw), mode="bilinear", align_corners=False)
    y = y.reshape(b * c * nh, 2, nw, 2).transpose(1, 2).reshape(b, c, nh * nw, 4)
    y = s.encoder(y.transpose(1, 3).reshape(b * 4, nh * nw, c))
    y = y.reshape(b, 4, nh * nw, c).transpose(1, 3).reshape(b * c * nh, nw, 2, 2).transpose(1, 2)
    return x + F.interpolate(y.reshape(b, c, 2 * nh, 2 * nw), (h, w), mode="bilinear", align_corners=False)


def _cross_covariance(s: Any, x: Tensor) -> Tensor:
    """XCiT's and EdgeNeXt's attention over channels."""
    q, k, v = _heads(s, _tokens(x))
    q, k = (F.normalize(t.transpose(-2, -1), dim=-1) for t in (q, k))
    a = (q @ k.transpose(-2, -1) * s.scale).softmax(-1)
    return x + _map((a @ v.transpose(-2, -1)).permute(0, 3, 1, 2).flatten(2), x)


def _linear_attention(s: Any, x: Tensor) -> Tensor:
    q, k, v = _heads(s, _tokens(x))
    q, k = q.relu(), k.relu()
    y = (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1) + 1e-3)
    return x + _map(y.transpose(1, 2).flatten(2), x)


def _places(s: Any, x: Tensor) -> Tensor:
    """Places as Fourier features, of the size and the batch."""
    free = ~torch.zeros((x.shape[0], *x.shape[2:])).bool()
    rows, cols = (free.cumsum(d, dtype=torch.float32) for d in (1, 2))
    rows = rows / (rows[:, -1:, :] + 1e-6)
    return x + torch.stack((rows.sin(), cols.cos()), 1).repeat(1, C // 2, 1, 1)


def _coordinates(s: Any, x: Tensor) -> Tensor:
    """CoordConv."""
    h, w = x.shape[2:]
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"))
    return s.nine(torch.cat([x, grid.expand(x.shape[0], -1, -1, -1)], 1))


def _table(s: Any, x: Tensor) -> Tensor:
    """A table of places, resized."""
    return x + F.interpolate(s.grid, x.shape[2:], mode="bicubic", align_corners=False)


def _class_token(s: Any, x: Tensor) -> Tensor:
    t = torch.cat([s.token.expand(x.shape[0], -1, -1), _tokens(x)], 1)
    t = s.encoder(t)
    return _map(t[:, 1:], x) * t[:, 0].sigmoid()[:, :, None, None]


def _gathered(s: Any, x: Tensor) -> Tensor:
    """The strongest channels of each image."""
    best = x.mean((2, 3)).topk(4, 1).indices
    picked = torch.gather(x, 1, best[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    return torch.cat([picked, x[:, :4]], 1)


def _recurrent(s: Any, x: Tensor) -> Tensor:
    t, _ = s.rnn(x.mean(2).transpose(1, 2))
    return x + t.transpose(1, 2).unsqueeze(2)


def _even(x: Tensor) -> Tensor:
    return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))


STEPS: dict[str, Step] = {
    "conv": lambda s, x: s.norm(s.conv(x)).relu(),
    "depthwise": lambda s, x: x + s.point(F.gelu(s.deep(x))),
    "convnext": lambda s, x: x + s.layer(s.deep(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * s.scale,
    "attention": _attention,
    "fused": _fused,
    "causal": _causal,
    "bool mask": _bool_mask,
    "filled": _filled,
    "padding mask": _padding_mask,
    "windows": _windows,
    "shifted": lambda s, x: _windows(s, x, 2),
    "grid": _grid,
    "unfolded": _unfolded,
    "cross covariance": _cross_covariance,
    "linear attention": _linear_attention,
    "places": _places,
    "coordinates": _coordinates,
    "table": _table,
    "class token": _class_token,
    "gathered": _gathered,
    "recurrent": _recurrent,
    "multihead": lambda s, x: x + _map(s.mha(_tokens(x), _tokens(x), _tokens(x))[0], x),
    "group norm": lambda s, x: F.silu(s.group(s.conv(x))),
    "instance norm": lambda s, x: F.instance_norm(x).relu(),
    "layer norm 2d": lambda s, x: s.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(),
    "whole norm": lambda s, x: F.layer_norm(x, x.shape[1:]),
    "roll": lambda s, x: torch.roll(x, (1, -2), (2, 3)) + x.roll(3, 1),
    "flip": lambda s, x: x.flip(3) - x.flip((1, 2)),
    "reflect": lambda s, x: s.valid(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "circular": lambda s, x: s.valid(F.pad(x, (1, 1, 1, 1), mode="circular")),
    "pad": lambda s, x: s.valid(F.pad(x, (0, 2, 2, 0), value=0.5)),
    "up": lambda s, x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "down": lambda s, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True),
    "pool": lambda s, x: F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 4 else x,
    "unet": lambda s, x: x + F.interpolate(s.conv(F.max_pool2d(x, 2)), size=x.shape[2:], mode="bilinear"),
    "squeeze": lambda s, x: x * F.hardsigmoid(s.point(x.mean((2, 3), keepdim=True))),
    "shuffle": lambda s, x: x.view(x.shape[0], 2, C // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "halves": lambda s, x: torch.cat([a * b for a, b in [x.chunk(2, 1)]] * 2, 1),
    "choice": lambda s, x: torch.where(x > 0.3, s.point(x), -x),
    "peaks": lambda s, x: x * (F.max_pool2d(x, 3, 1, 1) == x).float(),
    "clip": lambda s, x: x.clamp(x.mean((2, 3), keepdim=True), None) + x.clamp(min=-0.5),
    "variance": lambda s, x: (x - x.mean(1, True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-3).sqrt(),
    "response norm": lambda s, x: x * (x.norm(p=2, dim=(2, 3), keepdim=True) + 1e-6).reciprocal(),
    "einsum": lambda s, x: torch.einsum("bchw,dc->bdhw", x, s.mix),
    "product": lambda s, x: (torch.einsum("bchw,bdhw->bcd", x, x).softmax(-1) @ x.flatten(2)).view(x.shape),
    "pixels": lambda s, x: F.pixel_shuffle(s.wide(x), 2),
    "space to depth": lambda s, x: s.narrow(F.pixel_unshuffle(_even(x), 2)),
    "neighbours": lambda s, x: F.unfold(x, 3, padding=1).view(x.shape[0], C, 9, *x.shape[2:]).mean(2),
    "adaptive": lambda s, x: x + F.interpolate(F.adaptive_avg_pool2d(x, 3), x.shape[2:], mode="bilinear"),
    "rows": lambda s, x: x + s.layer(x.mean(3).transpose(1, 2)).transpose(1, 2).unsqueeze(3),
    "steps": lambda s, x: x[:, :, ::2, 1:] if min(x.shape[2:]) > 5 else x,
    "diagonal": lambda s, x: x.tril() + x.triu(2),
    "logic": lambda s, x: x * ((x > 0) & (x < 1) | (x < -1)).float(),
    "signs": lambda s, x: x.sign() * x.abs().sqrt() + (x.floor() % 2),
    "remainder": lambda s, x: x - x.round() + x.fmod(0.7),
    "masked mean": lambda s, x: x - (x * (x > 0)).sum((2, 3), True) / ((x > 0).sum((2, 3), True) + 1),
    "sorted": lambda s, x: x.sort(1).values,
    "cumulated": lambda s, x: x.cumsum(3) / 8,
}  # fmt: skip


class Net(nn.Module):
    """Some steps, then a head."""

    def __init__(self, rng: random.Random, kinds: list[str]) -> None:
        super().__init__()
        self.kinds, self.head = kinds, rng.choice(["map", "mean", "tokens", "both"])
        self.stem = nn.Conv2d(3, C, 3, rng.choice([1, 2]), 1)
        self.steps = nn.ModuleList(nn.Module() for _ in kinds)
        for s in self.steps:
            s.conv, s.norm = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
            nn.init.uniform_(s.norm.running_mean, -0.3, 0.3)
            s.deep, s.point = nn.Conv2d(C, C, 5, padding=2, groups=C), nn.Conv2d(C, C, 1)
            s.valid, s.nine = nn.Conv2d(C, C, 3), nn.Conv2d(C + 2, C, 1)
            s.wide, s.narrow = nn.Conv2d(C, 4 * C, 1), nn.Conv2d(4 * C, C, 1)
            s.qkv, s.layer, s.group = nn.Linear(C, 3 * C), nn.LayerNorm(C), nn.GroupNorm(4, C)
            s.mha = nn.MultiheadAttention(C, 2, batch_first=True)
            s.encoder = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True, norm_first=True)
            s.rnn = nn.GRU(C, C // 2, batch_first=True, bidirectional=True)
            s.scale, s.mix = nn.Parameter(torch.rand(1)), nn.Parameter(torch.randn(C, C) / 3)
            s.token, s.grid = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, C, 5, 5))
            s.table = nn.Parameter(torch.randn(49, 2))
            at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
            apart = at[:, :, None] - at[:, None] + 3
            s.register_buffer("places", apart[0] * 7 + apart[1])
        self.last = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for kind, s in zip(self.kinds, self.steps, strict=True):
            x = STEPS[kind](s, x)
        if self.head == "map":
            return x
        logits = self.last(x.mean((2, 3)) if self.head != "tokens" else _tokens(x))
        return (x, logits) if self.head == "both" else logits


def make(seed: int) -> Net:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    return Net(rng, rng.choices(sorted(STEPS), k=rng.randrange(1, 5))).eval()


def differ(got: Any, want: Any) -> str:
    """What is wrong, '' for nothing."""
    if isinstance(want, tuple):
        return next((d for g, w in zip(got, want, strict=True) if (d := differ(g, w))), "")
    if got.shape != want.shape or got.dtype != torch.float32:
        return f"shape {tuple(got.shape)} for {tuple(want.shape)}, {got.dtype}"
    most = float(want.abs().max()) + 1e-3
    error = float((got.double() - want).abs().max()) / most
    return "" if error < 1e-4 else f"error {error:.1e}"


def check(seed: int, tally: Counter[str]) -> None:
    """
    Raises:
        AssertionError: an output is wrong. Errors that are not typed go through.
    """
    net = make(seed)
    rng = random.Random(seed)
    size, second = ([rng.randrange(9, 21) for _ in range(2)] for _ in range(2))
    exact = copy.deepcopy(net).double()
    x = torch.randn(rng.choice([1, 2]), 3, *size)
    say = f"seed {seed}: {net.kinds} {net.head} at {tuple(x.shape)}"

    def wanted(t: Tensor) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            want = exact(t.double())
        finally:
            torch.set_default_dtype(torch.float32)
        single = differ(net(t), want)  # a step that jumps: rounding decides
        return None if single else want

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ActzipWarning)
        try:
            fast = actzip.compile(net, x, tune=False, cache=False, threads=1)
        except ActzipError as error:
            tally["refused"] += 1
            tally[f"refused: {str(error)[:150]}"] += 1
            return
        whole = type(fast).__name__ == "CompiledModel"
        tally["whole" if whole else "parts"] += 1
        if not whole:
            tally[f"parts: {fast._refused!s:.150}"] += 1
        for n in (x.shape[0], 3, 1):
            t = torch.randn(n, 3, *size)
            if (want := wanted(t)) is not None:
                wrong = differ(fast(t), want)
                assert not wrong, f"{say}: batch {n}: {wrong}"
        twins = [("fresh", fast)]
        if whole:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "m.actzip"
                fast.save(path)
                twins += [("file", load(path)), ("pickle", pickle.loads(pickle.dumps(fast)))]
            t = torch.randn(2, 3, *size)
            if (want := wanted(t)) is not None:
                for name, twin in twins[1:]:
                    wrong = differ(twin(t), want)
                    assert not wrong, f"{say}: {name}: {wrong}"
        t = torch.randn(2, 3, *second)
        try:
            want = wanted(t)
        except Exception:
            return  # the network does not take it
        if want is None:
            return
        for name, twin in twins:
            try:
                got = twin(t)
            except (ActzipError, UnsupportedError) as error:
                tally[f"{name}: second size refused"] += 1
                if name == "fresh":
                    tally[f"size: {str(error)[-120:]}"] += 1
                continue
            tally[f"{name}: second size"] += 1
            wrong = differ(got, want)
            assert not wrong, f"{say}: {name} at {second}: {wrong}"


def run(seed: int, cases: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    for k in range(seed, seed + cases):
        if k % 20 == 0:
            print(k, dict(tally), flush=True)
        try:
            check(k, tally)
        except Exception as error:
            net = make(k)
            tally["faults"] += 1
            print(f"FAULT seed {k} {net.kinds} {net.head}: {type(error).__name__}: {error}", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tally = run(args.seed, args.cases)
    for name, count in tally.most_common():
        print(f"{count:5} {name}")


if __name__ == "__main__":
    main()
