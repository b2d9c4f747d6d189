"""Subnormal numbers count as zero inside a run, on every thread, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import actzip

TINY = 1e-40  # subnormal in float32, whose least normal number is 1.2e-38


@pytest.mark.parametrize("threads", [1, 2])
def test_subnormal_operands_are_flushed_on_every_thread(threads: int) -> None:
    conv = nn.Conv2d(8, 64, 1, bias=False).eval()
    nn.init.constant_(conv.weight, 2.0)
    fast = actzip.compile(conv, torch.rand(4, 8, 16, 16), threads=threads, tune=False)
    out = np.asarray(fast(torch.full((4, 8, 16, 16), TINY)))
    assert not out.any()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_callers_mode_is_restored(threads: int) -> None:
    conv = nn.Conv2d(8, 64, 1).eval()
    x = torch.rand(2, 8, 16, 16)
    fast = actzip.compile(conv, x, threads=threads, tune=False)
    fast(x)
    tiny = np.full(1000, TINY, np.float32)
    assert (tiny + tiny > tiny).all()
    with pytest.raises(actzip.ActzipError):
        fast(torch.rand(2, 7, 16, 16))
    assert (tiny + tiny > tiny).all()


def test_a_subnormal_comes_out_as_zero_or_itself() -> None:
    x = torch.tensor([TINY, -TINY, 1.0, -1.0]).reshape(1, 4, 1, 1)
    out = np.asarray(actzip.compile(nn.ReLU().eval(), x, tune=False)(x)).ravel()
    assert np.abs(out[:2]).max() <= np.float32(TINY) and list(out[2:]) == [1.0, 0.0]
