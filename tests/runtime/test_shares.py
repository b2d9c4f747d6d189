"""Images of a batch go through a plan in shares, where none meets another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip
from actzip.errors import UnsupportedError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5),
    ).eval()  # fmt: skip


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_batch_gives_what_its_images_give_alone(threads):
    fast = actzip.compile(network(), images(2), threads=threads, tune=False, cache=False)
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 13, 33):
        x = images(n)
        want = torch.cat([fast(x[i : i + 1]) for i in range(n)])
        assert torch.equal(fast(x), want), n


class First(nn.Module):
    """Images that meet: each is compared with the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x - x[:1])


class Pairs(nn.Module):
    """Images that meet: turned ones behind all others, then two by two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([x, x.flip(3)])
        return torch.relu(both.reshape(x.shape[0], 2, *x.shape[1:])).sum(1)


class Gram(nn.Module):
    """Images that meet: every one with every other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return flat @ flat.t()


@pytest.mark.parametrize("meeting", [First, Pairs, Gram])
def test_images_that_meet_stay_together(meeting):
    try:
        fast = actzip.compile(meeting(), images(4), threads=2, tune=False, cache=False, parts=False)
    except UnsupportedError:
        return  # refused is right as well
    for n in (1, 2, 4, 8, 9):
        x = images(n)
        torch.testing.assert_close(fast(x), meeting()(x))


def test_activations_take_the_memory_of_shares():
    fast = actzip.compile(network(), images(2), threads=2, tune=False, cache=False)
    assert fast.arena_bytes(32) == fast.arena_bytes(8)  # two threads, four images each
    assert fast.arena_bytes(8) <= 2.1 * fast.arena_bytes(4)


def test_explain_counts_all_images():
    fast = actzip.compile(network(), images(2), threads=2, tune=False, cache=False)
    few, many = (fast.explain(np.asarray(images(n))).to_dict() for n in (2, 16))
    assert many["batch"] == 16 and many["macs"] == 8 * few["macs"]
