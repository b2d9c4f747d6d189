"""MACs and effective MACs, counted one by one."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actzip.activations import (
    ActivationTap,
    ComputeCall,
    count_macs,
)


def _brute_force(call: ComputeCall):
    """Counts by convolving indicator tensors with ones."""
    x = (call.input != 0).double()
    w = torch.ones_like(call.weight, dtype=torch.double)
    dims = w.dim() - 2
    pad = [p for pair in reversed(call.padding) for p in pair]
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    go = lambda t, p: conv(  # noqa: E731
        F.pad(t, p), w, stride=call.stride, dilation=call.dilation, groups=call.groups
    ).sum()
    macs = go(torch.ones_like(F.pad(x, pad)), [0] * (2 * dims))
    inside = go(torch.ones_like(x), pad)
    return int(macs), int(macs - inside), int(go(x, pad))


@pytest.mark.parametrize(
    "kernel,stride,padding,dilation,groups",
    itertools.chain(
        itertools.product([1, 3], [1, 2], [0, 1], [1], [1, 2, 4]),
        [(3, 2, 2, 2, 1), (5, 3, 4, 1, 2), (2, 2, 0, 1, 1), ((1, 7), 1, (0, 3), 1, 1), (3, 1, "same", 1, 1)],
    ),
)
def test_macs_of_convolutions_against_brute_force(kernel, stride, padding, dilation, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 11, 13).relu()
    x[:, :, :, 3] = 0
    calls = []
    with ActivationTap(conv, compute=lambda s, c: calls.append(c)):
        y = conv(x)
    macs, border, effective = count_macs(calls[0])
    assert (macs, border, effective) == _brute_force(calls[0])
    assert macs == y.numel() * conv.weight[0].numel()


@pytest.mark.parametrize("dims", [1, 3])
def test_macs_in_one_and_three_dimensions(dims):
    torch.manual_seed(0)
    cls = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    calls = []
    conv = cls(2, 3, 3, stride=2, padding=1)
    with ActivationTap(conv, compute=lambda s, c: calls.append(c)):
        conv(torch.randn(1, 2, *[7, 6, 5][:dims]).relu())
    assert count_macs(calls[0]) == _brute_force(calls[0])


def test_macs_of_transposed_convolution_and_linear():
    torch.manual_seed(0)
    calls = []
    conv = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False)
    x = torch.randn(1, 4, 5, 6).relu()
    with ActivationTap(conv, compute=lambda s, c: calls.append(c)):
        conv(x)
    ones = copy.deepcopy(conv)
    nn.init.ones_(ones.weight)
    macs, border, effective = count_macs(calls[0])
    assert effective == int(ones((x != 0).float()).sum())
    assert macs - border == int(ones(torch.ones_like(x)).sum())
    linear = nn.Linear(5, 7)
    x = torch.tensor([[0.0, 1, 0, 2, 3], [0, 0, 0, 0, 1]])
    with ActivationTap(linear, compute=lambda s, c: calls.append(c)):
        linear(x)
    assert count_macs(calls[1]) == (70, 0, 28)
