"""Products of two maps: every remainder of rows and columns, beside float64, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import actzip
from actzip import cpu


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("depth", [1, 40])
def test_products_of_every_remainder(isa: str, depth: int) -> None:
    torch.manual_seed(0)
    with cpu.forced(isa):
        for rows, columns in itertools.product((1, 4, 6, 11, 49, 100), (1, 7, 16, 33, 70)):
            a, b = torch.randn(2, 3, rows, depth), torch.randn(2, 3, depth, columns)
            fast = actzip.compile(Product(), (a, b), tune=False)
            y = fast(a, b)
            want = a.double() @ b.double()
            assert (y - want).abs().max() <= 1e-6 * depth**0.5 * want.abs().max()
            assert torch.equal(fast(a[1:], b[1:]), y[1:])  # an image is the same in any batch
            short = fast(a[:, :, :1].expand(2, 3, rows, depth).contiguous(), b)
            assert torch.equal(short[:, :, :1].expand_as(short), short)  # a row is the same in any place


@pytest.mark.parametrize("isa", cpu.isas())
def test_columns_beside_infinities_and_nan_stay_their_own(isa: str) -> None:
    a, b = torch.randn(1, 13, 9), torch.randn(1, 9, 35)
    b[0, 3, 5], b[0, 4, 33], a[0, 7, 2] = float("inf"), float("nan"), float("inf")
    with cpu.forced(isa):
        y = actzip.compile(Product(), (a, b), tune=False)(a, b)
    torch.testing.assert_close(y, a @ b, equal_nan=True, rtol=1e-5, atol=1e-5)
