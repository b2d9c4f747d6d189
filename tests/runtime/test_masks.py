"""Comparisons, logic, choices and constants of the size are the engine's own."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip import cpu
from actzip.errors import ActzipWarning
from actzip.runtime import CompiledModel, load

T = torch.Tensor


class Block(nn.Module):
    """A convolution, and what ``f(x, y)`` makes of the input and its map."""

    def __init__(self, f: Callable[[T, T], Any]) -> None:
        super().__init__()
        self.f, self.conv = f, nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: T) -> Any:
        return self.f(x, self.conv(x))


def pos_embed(x: T, y: T) -> T:
    """EdgeNeXt's Fourier features of places: a mask of the batch's size, summed up."""
    free = ~torch.zeros((x.shape[0], *x.shape[2:])).bool()
    rows, cols = (free.cumsum(d, dtype=torch.float32) for d in (1, 2))
    return y + (rows / (rows[:, -1:, :] + 1e-6) + cols.sin()).unsqueeze(1)


def window_mask(x: T, y: T) -> T:
    """Swin's shifted windows: rolled, cut in two by two, parts of other images masked."""
    b, c, h, w = y.shape
    image = torch.zeros(1, 1, h, w)
    image[:, :, : h // 2] = 1
    image[:, :, :, : w // 2] += 2

    def windows(t: T) -> T:
        t = t.reshape(-1, t.shape[1], h // 2, 2, w // 2, 2)
        return t.permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, t.shape[1])

    flat = windows(image).squeeze(2)
    mask = flat.unsqueeze(1) != flat.unsqueeze(2)
    tokens = windows(torch.roll(y, (-1, -1), (2, 3))).reshape(b, -1, 4, c)
    scores = tokens @ tokens.transpose(-2, -1)
    out = scores.masked_fill(mask, float("-inf")).softmax(-1) @ tokens
    return out.reshape(b, -1, c)


def peaks(x: T, y: T) -> T:
    """CenterNet's points: what is the greatest of its neighbours."""
    heat = y.sigmoid()
    return heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()


CASES: dict[str, Callable[[T, T], Any]] = {
    "pos_embed": pos_embed,
    "window_mask": window_mask,
    "peaks": peaks,
    "choice": lambda x, y: torch.where(x > y, x, y * 2),
    "choice of a number": lambda x, y: torch.where(x > 0.1, y, x.new_tensor(3.0)),
    "choice by a constant": lambda x, y: torch.where(torch.arange(x.shape[3]) % 2 == 0, x, y),
    "masked": lambda x, y: y.masked_fill(x <= 0, -7.5),
    "lower triangle": lambda x, y: y.tril(),
    "upper triangle": lambda x, y: y.masked_fill(torch.ones(x.shape[2:]).triu(1).bool(), -1.0),
    "infinities": lambda x, y: torch.where(x > 0, y, float("-inf")).softmax(1).nan_to_num(0.0),
    "arithmetic": lambda x, y: (x > 0).float() * y + (x < y).float() - (y >= 0.2).to(torch.float32),
    "logic": lambda x, y: ((x > 0) & (y > 0) | ~(x < y) ^ (x != 0)).float(),
    "a mask": lambda x, y: (x >= y, x == 0, (y > 0.5).logical_not()),
    "counts": lambda x, y: (y > 0).sum(1) / 4,
    "any and all": lambda x, y: (y > 0).any(1).float() + (x < 0.5).all(2).float().mean(1, keepdim=True),
    "integers": lambda x, y: ((y > 0).int(), (x < 0).long()),
    "not a number": lambda x, y: torch.where((y.log()).isnan(), 0.0, y.log()),
    "by channel": lambda x, y: torch.where(x > torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1), x, y),
    "ones of the batch": lambda x, y: torch.cat([y, torch.ones(x.shape[0], 1, *x.shape[2:])], 1),
    "places": lambda x, y: y + torch.arange(x.shape[2]).view(-1, 1) * torch.linspace(-1, 1, x.shape[3]),
    "a mask of channels": lambda x, y: y * (y.mean((2, 3), keepdim=True) > 0),
    "clamps": lambda x, y: y.clamp(x.mean(1, keepdim=True), torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)),
    "flips": lambda x, y: y.flip(3) + x.flip((1, 2)) * y.flip(2),
    "roll": lambda x, y: torch.roll(y, (1, -2), (2, 3)) + y.roll(3, 1),
    "circular": lambda x, y: F.pad(y, (5, 3, 2, 1), mode="circular"),
    "taken": lambda x, y: (
        y[:, [3, 1, 1, 0]]
        + y[:, :, [5, 2, 7, 0, 5, 4, 4, 1]].index_select(3, torch.arange(x.shape[3]) * 5 % x.shape[3])[
            :, :, :1
        ]
    ),
    "pairs": lambda x, y: y[:, :, torch.arange(4)[:, None], torch.tensor([[5, 0, 2]])],
    "pixels": lambda x, y: y[:, :, torch.tensor([0, 3, 1]), torch.tensor([5, 0, 2])],
    "unfold": lambda x, y: F.unfold(y, 3, padding=1, stride=2),
    "windows": lambda x, y: y.unfold(2, 4, 2).unfold(3, 3, 1),
    "from the end": lambda x, y: y[:, :, 1:-1, 2:] - x[:, :, 2:, :-2],
    "broadcast": lambda x, y: torch.where(x.mean(1, keepdim=True) > 0, y.mean((2, 3), keepdim=True), x),
}


#: Those that are made of constants of the size, which no rule says to a file.
FIXED = {"pos_embed", "window_mask", "choice by a constant", "lower triangle", "upper triangle", "places"}
FIXED |= {"circular", "pairs", "pixels", "taken", "unfold", "windows", "ones of the batch"}


def alike(got: Any, want: Any) -> None:
    if isinstance(want, tuple):
        for g, w in zip(got, want, strict=True):
            alike(g, w)
    else:
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_masks_run_on_the_engine_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Block(CASES[name]).eval()
    x = torch.randn(1, 4, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActzipWarning)  # of parts
        fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    assert isinstance(fast, CompiledModel)
    fast.save(tmp_path / "m.actzip")
    twins = [fast, load(tmp_path / "m.actzip"), pickle.loads(pickle.dumps(fast))]
    for n in (1, 3):
        x = torch.randn(n, 4, 8, 12)
        for twin in twins:
            alike(twin(x), model(x))
    other = torch.randn(2, 4, 12, 6)
    for twin in twins[: 1 if name in FIXED else 3]:
        alike(twin(other), model(other))


def heads(t: T, n: int) -> T:
    return t.flatten(2).transpose(1, 2).unflatten(2, (n, -1)).transpose(1, 2)


ATTENTION: dict[str, Callable[[T, T], T]] = {
    "causal": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 2), heads(y, 2), heads(x, 2), is_causal=True
    ),
    "grouped": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 4), heads(y[:, :2], 2), heads(x[:, 2:], 2), enable_gqa=True
    ),
    "bool mask": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 2), heads(y, 2), heads(x, 2), attn_mask=(torch.arange(96) % 3 > 0).expand(96, 96)
    ),
    "rows that see nothing": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 2), heads(y, 2), heads(x, 2), attn_mask=(torch.arange(96)[:, None] > torch.arange(96) + 3)
    ),
    "mask of the input": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 2), heads(y, 2), heads(x, 2), attn_mask=(x.flatten(1)[:, None, None, :96] > 0.2)
    ),
    "nothing of an image": lambda x, y: F.scaled_dot_product_attention(
        heads(x, 2), heads(y, 2), heads(x, 2), attn_mask=(x.flatten(1)[:, None, None, :96] > 9)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_takes_masks(name: str) -> None:
    torch.manual_seed(1)
    model = Block(ATTENTION[name]).eval()
    x = torch.randn(2, 4, 8, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ActzipWarning)
        fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    for n in (2, 1, 3):
        x = torch.randn(n, 4, 8, 12)
        alike(fast(x), model(x))


@pytest.mark.parametrize("kind", ["gt", "ge", "lt", "le", "eq", "ne", "keep", "drop"])
@pytest.mark.parametrize("isa", cpu.isas())
def test_comparisons_on_every_instruction_set(kind: str, isa: str) -> None:
    from actzip.runtime import graph as g
    from actzip.runtime import ops
    from actzip.runtime.compiled import compile_graph
    from actzip.runtime.interpret import interpret

    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(5, 3, 7), (1, 3, 1), (5, 1, 7)]
    for other in shapes:
        graph = g.Graph("compare")
        x = graph.add_input("x", (g.Sym(), 5, 3, 7))
        z = graph.add_input("z", (g.Sym(), *other))
        graph.outputs = [graph.add(ops.Binary("b", (x, z), "y", kind=kind))]
        a = rng.integers(-1, 2, (2, 5, 3, 7)).astype(np.float32)
        b = rng.integers(-1, 2, (2, *other)).astype(np.float32)
        a[0, 0, 0, :3], b[0, 0, 0, :1] = (np.nan, np.inf, -np.inf), np.inf
        with cpu.forced(isa):
            got = compile_graph(graph)((a, b))
        want = interpret(graph, {"x": torch.from_numpy(a), "z": torch.from_numpy(b)})[0][0]
        np.testing.assert_array_equal(got, want.numpy())
