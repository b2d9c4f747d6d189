"""Transposed convolutions, windows apart and overlapping: PyTorch's answers, no zeros between pixels."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

import actzip
from actzip.runtime import ops
from actzip.runtime import passes as P
from actzip.runtime.interpret import interpret
from actzip.runtime.tracing import capture


def _check(net: nn.Module, *shape: int, run: bool = True) -> None:
    x = torch.randn(2, *shape)
    with torch.no_grad():
        want = net(x)
    after = P.optimize(capture(net.eval(), x))
    if not any(isinstance(m, nn.ConvTranspose2d) and (m.groups > 1 or m.dilation != (1, 1)) for m in net):  # type: ignore[union-attr]
        assert not any(isinstance(n, ops.ConvTranspose2d) for n in after.nodes)
    answers = [interpret(after, {after.inputs[0]: x})[0][0]]
    if run:
        answers.append(actzip.compile(net, x, tune=False)(x))
    for y in answers:
        assert y.shape == want.shape
        assert (y - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize(("kernel", "stride"), itertools.product((1, 2, 3, 4, 5), (1, 2, 3)))
def test_every_kernel_stride_and_padding(channels: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    for padding, extra in itertools.product((0, 1, 2), (0, 1)):
        if extra < stride and (4 - 1) * stride - 2 * padding + kernel + extra > 0:
            conv = nn.ConvTranspose2d(5, channels, kernel, stride, padding, extra)
            _check(nn.Sequential(conv, nn.ReLU()), 5, 4, 6, run=padding == 1)


@pytest.mark.parametrize("seed", range(16))
def test_random_windows(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)

    def pair(*choices: int) -> tuple[int, int]:
        return r.choice(choices), r.choice(choices)

    stride = pair(1, 2, 4)
    conv = nn.ConvTranspose2d(
        6, r.choice((2, 6, 34)), pair(1, 3, 4, 8), stride, pair(0, 1), tuple(min(s - 1, 1) for s in stride),
        groups=r.choice((1, 1, 2)), dilation=pair(1, 1, 2), bias=r.random() < 0.7,
    )  # fmt: skip
    act = r.choice((nn.Identity(), nn.GELU(), nn.PReLU(conv.out_channels)))
    _check(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), conv, act), 3, 9, 8)


def test_other_sizes_of_a_compiled_model() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 20, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(20, 3, 3, 2)).eval()
    fast = actzip.compile(net, torch.randn(1, 4, 8, 8), tune=False)
    for h, w in ((5, 9), (12, 8), (1, 1)):
        x = torch.randn(2, 4, h, w)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)


def test_signals() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ConvTranspose1d(6, 3, 8, 4, 2), nn.ReLU(), nn.ConvTranspose1d(3, 1, 5, 3, 1)
    ).eval()
    x = torch.randn(2, 6, 17)
    with torch.no_grad():
        torch.testing.assert_close(actzip.compile(net, x, tune=False)(x), net(x), rtol=1e-5, atol=1e-5)
