"""Multiplications of convolutions and linear layers, those with a zero operand counted exactly."""

from __future__ import annotations

import torch

from actzip.activations.sites import ComputeCall

__all__ = ["count_macs", "output_size", "reads", "reads_transposed"]


def reads(size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int) -> list[int]:
    """For each input index along one axis, how many (output position, tap) pairs read it."""
    out = (size + pad[0] + pad[1] - dilation * (kernel - 1) - 1) // stride + 1
    uses = [0] * size
    for tap in range(kernel):
        offset = tap * dilation - pad[0]
        for o in range(out):
            i = o * stride + offset
            if 0 <= i < size:
                uses[i] += 1
    return uses


def reads_transposed(
    size: int, kernel: int, stride: int, pad: tuple[int, int], dilation: int, extra: int
) -> tuple[list[int], int]:
    out = (size - 1) * stride - pad[0] - pad[1] + dilation * (kernel - 1) + extra + 1
    return [
        sum(0 <= i * stride - pad[0] + tap * dilation < out for tap in range(kernel)) for i in range(size)
    ], out


def output_size(call: ComputeCall) -> tuple[int, ...]:
    """Height, width ... of a convolution's output; empty for a linear call."""
    out = []
    for axis, size in enumerate(call.input.shape[2:] if call.stride else ()):
        s, (before, after), d = call.stride[axis], call.padding[axis], call.dilation[axis]
        reach = d * (int(call.weight.shape[2 + axis]) - 1)
        if call.transposed:
            out.append((int(size) - 1) * s - before - after + reach + call.output_padding[axis] + 1)
        else:
            out.append((int(size) + before + after - reach - 1) // s + 1)
    return tuple(out)


def count_macs(call: ComputeCall) -> tuple[int, int, int]:
    """(MACs, border MACs, effective MACs) of one convolution or linear call, counted exactly.

    MACs is the usual count: output elements times the inputs of each, padding included. Border MACs
    are those of them whose activation operand is padding. Effective MACs are those whose activation
    operand is an element of the input and not zero (NaN counts as non-zero); stride, dilation,
    groups and borders are counted position by position. So effective MACs <= MACs - border MACs,
    with equality at density 1. The theoretical speed-up is MACs / effective MACs. For transposed
    convolutions, MACs is input elements times taps times output channels a group, and border MACs
    are those that fall outside the output.
    """
    x, weight = call.input, call.weight
    if weight.dim() == 2 and not call.stride:
        out_features, features = int(weight.shape[0]), int(weight.shape[1])
        rows = x.numel() // features if features else 0
        return rows * features * out_features, 0, int(torch.count_nonzero(x)) * out_features
    spatial = [int(s) for s in x.shape[2:]]
    kernel = [int(k) for k in weight.shape[2:]]
    n, channels = int(x.shape[0]), int(x.shape[1])
    axes: list[list[int]] = []
    positions = 1
    for axis, size in enumerate(spatial):
        s, p, d, k = call.stride[axis], call.padding[axis], call.dilation[axis], kernel[axis]
        if call.transposed:
            uses, _ = reads_transposed(size, k, s, p, d, call.output_padding[axis])
            positions *= size * k
        else:
            uses = reads(size, k, s, p, d)
            positions *= ((size + p[0] + p[1] - d * (k - 1) - 1) // s + 1) * k
        axes.append(uses)
    out_per_group = int(weight.shape[1]) if call.transposed else int(weight.shape[0]) // call.groups
    macs = n * channels * positions * out_per_group
    inside = n * channels * out_per_group
    for uses in axes:
        inside *= sum(uses)
    counts = (x.detach() != 0).sum(dim=(0, 1), dtype=torch.int64)
    for uses in reversed(axes):
        counts = (counts * torch.tensor(uses, dtype=torch.int64, device=counts.device)).sum(-1)
    return macs, macs - inside, int(counts) * out_per_group
