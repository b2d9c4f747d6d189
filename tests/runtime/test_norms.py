"""Group norms and softmax at sizes that leave every remainder, beside float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import actzip
from actzip import cpu


def _beside(net: nn.Module, x: Tensor, limit: float) -> Tensor:
    """The compiled network's answer, which is near float64's and the same for any batch and threads."""
    fast = actzip.compile(net, x, tune=False, threads=1)
    y = fast(x)
    want = net.double()(x.double())
    net.float()
    assert (y - want).abs().max() <= limit * want.abs().max()
    assert torch.equal(fast(x[:1]), y[:1])
    assert torch.equal(actzip.compile(net, x, tune=False, threads=2)(x), y)
    return y


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        (1, (5, 3, 3)), (1, (64, 70, 30)), (1, (6, 67, 71)), (3, (6, 9, 5)), (32, (64, 40, 33)),
        (2, (130, 30, 20)), (70, (70, 7, 7)), (257, (257, 3, 4)), (4, (8,)), (5, (10, 333)), (1, (3, 90)),
        (2, (20000, 1, 1)),
    ],
)  # fmt: skip
def test_group_norms_in_bands(isa: str, groups: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, shape[0])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, *shape) + 10
    if x[0].numel() > groups:  # of a group of one number nothing is left but rounding
        with cpu.forced(isa):
            _beside(norm.eval(), x, 3e-6)


class Beside(nn.Module):
    """Norms of parts of a map, written to parts of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 40, 3, padding=1)
        self.one, self.some = nn.GroupNorm(1, 24), nn.GroupNorm(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(self.a(x)), self.some(self.b(x))], 1)


def test_group_norms_write_to_a_concatenation() -> None:
    torch.manual_seed(0)
    _beside(Beside().eval(), torch.randn(2, 3, 37, 50), 3e-6)


@pytest.mark.parametrize("isa", cpu.isas())
def test_softmax_of_every_remainder(isa: str) -> None:
    torch.manual_seed(0)
    with cpu.forced(isa):
        for n in (1, 2, 7, 15, 16, 17, 31, 33, 64, 129, 1000):
            for rows in (2, 40):  # row by row, and side by side
                x = torch.randn(1, rows, n) * 20
                y = actzip.compile(nn.Softmax(-1), x, tune=False)(x)
                want = torch.softmax(x.double(), -1)
                # each number, however small; differences of up to 100 are rounded before
                assert ((y - want).abs() <= 8e-6 * want + 1e-37).all()


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.Tanh(), nn.ELU()])
def test_functions_of_exponents_at_their_limits(isa: str, act: nn.Module) -> None:
    x = torch.cat([torch.linspace(-110, 110, 4001), torch.tensor([1e4, -1e4, 3e38, -3e38, 0.0, -0.0])])[None]
    want = act(x.double())
    with cpu.forced(isa):
        y = actzip.compile(act, x, tune=False)(x)
    assert ((y - want).abs() <= 2e-6 * want.abs() + 1e-6).all()
