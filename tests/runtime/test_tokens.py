"""Tokens that become maps and maps that become tokens, as transformers with convolutions have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import actzip
from actzip.runtime import ops
from actzip.runtime import passes as P
from actzip.runtime.interpret import interpret
from actzip.runtime.tracing import capture


class Mixer(nn.Module):
    """A feed-forward layer of PVT: tokens, a depthwise convolution between two linear layers."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 16), nn.Linear(16, 6), act
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        y = self.a(x)
        y = y.transpose(1, 2).view(len(x), 16, h, w)
        y = self.conv(y).flatten(2).transpose(1, 2)
        return x + self.b(self.act(y))


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.stem, self.mixer = nn.Conv2d(3, 6, 3, 2), Mixer(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        n, c, h, w = y.shape
        return self.mixer(y.flatten(2).transpose(1, 2), h, w).transpose(1, 2).reshape(n, c, h, w)


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(), nn.PReLU(9)])
def test_tokens_lie_as_maps_do(act: nn.Module) -> None:
    torch.manual_seed(0)
    if isinstance(act, nn.PReLU):
        act.weight = nn.Parameter(torch.rand(45))  # one a token: not of the convolution's channels
    net, x = Net(act).eval(), torch.randn(2, 3, 11, 19)
    after = P.optimize(capture(net, x))
    with torch.no_grad():
        want = net(x)
    assert (interpret(after, {after.inputs[0]: x})[0][0] - want).abs().max() <= 1e-5 * want.abs().max()
    torch.testing.assert_close(actzip.compile(net, x, tune=False)(x), want, rtol=1e-5, atol=1e-5)
    assert all(n.perm in ((0, 2, 3, 1), (0, 3, 1, 2)) for n in after.nodes if isinstance(n, ops.Transpose))


def test_tokens_of_other_sizes() -> None:
    torch.manual_seed(0)
    net = Net(nn.GELU()).eval()
    fast = actzip.compile(net, torch.randn(1, 3, 11, 19), tune=False)
    for size in ((9, 9), (24, 11)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
