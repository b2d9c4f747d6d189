"""Three-dimensional convolutions and pools: they are made of two-dimensional ones, against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import actzip
from actzip.runtime import ops
from actzip.runtime.passes import optimize
from actzip.runtime.tracing import capture
from torches import needs_2_6

pytestmark = needs_2_6


@torch.no_grad()
def agrees(model: nn.Module, *shape: int) -> actzip.runtime.CompiledModel:
    """Compiled at batch 1, run at 1 and 3 and at another size."""
    torch.manual_seed(0)
    x = torch.randn(1, *shape)
    fast = actzip.compile(model.eval(), x, tune=False, cache=False, parts=False, threads=1)
    larger = (shape[0], shape[1] + 2, *shape[2:])
    for given in (x, torch.randn(3, *shape), torch.randn(1, *larger)):
        want = model(given)
        torch.testing.assert_close(fast(given), want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)
    return fast


KERNELS = [  # kernel, stride, padding, dilation
    (3, 1, 1, 1), ((1, 3, 3), 1, (0, 1, 1), 1), ((3, 1, 1), 1, (1, 0, 0), 1), (3, 2, 1, 1),
    ((3, 1, 1), (2, 1, 1), 0, 1), ((3, 1, 1), 1, (2, 0, 0), (2, 1, 1)), (1, 1, 0, 1), (1, 2, 0, 1),
    ((3, 5, 7), (1, 2, 2), (1, 2, 3), 1), (2, 2, 0, 1), (3, 1, 2, 2), ((2, 3, 1), (1, 2, 1), (1, 0, 2), 1),
]  # fmt: skip


@pytest.mark.parametrize("channels", [(3, 8, 1), (24, 24, 24)])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), KERNELS)
def test_convolutions(channels, kernel, stride, padding, dilation):
    i, o, groups = channels
    agrees(nn.Conv3d(i, o, kernel, stride, padding, dilation, groups), i, 6, 9, 11)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d(2), nn.MaxPool3d((1, 2, 2)), nn.MaxPool3d((2, 1, 1), (2, 1, 1)), nn.MaxPool3d(3, 2, 1),
        nn.MaxPool3d(3, 2, 1, ceil_mode=True), nn.MaxPool3d(2, 1, dilation=2), nn.AvgPool3d(2),
        nn.AvgPool3d(3, 2, 1), nn.AvgPool3d(3, 2, 1, count_include_pad=False),
        nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool3d(2, divisor_override=3), nn.AvgPool3d((2, 1, 1), divisor_override=3),
        nn.AdaptiveAvgPool3d(1), nn.AdaptiveAvgPool3d((2, 3, 4)), nn.AdaptiveMaxPool3d((2, None, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_pools(pool):
    agrees(nn.Sequential(nn.Conv3d(3, 8, 1), pool), 3, 6, 9, 11)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra"),
    [(2, 2, 0, 0), ((1, 4, 4), (1, 2, 2), (0, 1, 1), 0), ((2, 3, 3), 2, (0, 1, 1), (0, 1, 1))],
)
def test_transposed_convolutions_whose_windows_do_not_overlap_along_the_depth(kernel, stride, padding, extra):
    agrees(nn.ConvTranspose3d(16, 8, kernel, stride, padding, extra, groups=2), 16, 4, 7, 6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "dilation"),
    [
        (3, 2, 1, 1, 1),  # a U-Net's
        (3, 1, 1, 0, 1),
        (4, 2, 1, 0, 1),
        (2, 2, 1, 0, 1),
        ((5, 1, 1), (2, 1, 1), (3, 0, 0), (1, 0, 0), 1),
        ((3, 2, 2), (3, 2, 2), 0, (2, 1, 1), 1),
        ((3, 2, 2), 1, 0, 0, (2, 1, 1)),
        ((2, 3, 3), 2, 0, 0, (3, 1, 1)),
    ],
)
def test_transposed_convolutions_whose_windows_overlap_along_the_depth(
    kernel, stride, padding, extra, dilation
):
    agrees(nn.ConvTranspose3d(16, 8, kernel, stride, padding, extra, 2, dilation=dilation), 16, 4, 7, 6)
    agrees(nn.ConvTranspose3d(3, 8, kernel, stride, padding, extra, 1, False, dilation), 3, 5, 4, 6)


class Block(nn.Module):
    """A residual block of (2+1)-dimensional convolutions, a whole one, a concatenation, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.na = nn.Conv3d(3, 24, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(24)
        self.b, self.nb = nn.Conv3d(24, 24, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(24)
        self.c, self.nc = nn.Conv3d(48, 24, 3, padding=1, bias=False), nn.BatchNorm3d(24)
        self.head = nn.Linear(24, 5)
        for norm in (self.na, self.nb, self.nc):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.na(self.a(x)))
        y = F.relu(self.nb(self.b(x)) + x)
        y = F.relu(self.nc(self.c(torch.cat([x, y], 1))))
        return self.head(F.adaptive_avg_pool3d(y, 1).flatten(1))


def test_between_layers_nothing_leaves_the_maps_and_norms_are_folded_into_sums():
    fast = agrees(Block(), 3, 6, 9, 11)
    kinds = [type(n).__name__ for n in fast.graph.nodes]
    assert kinds.count("Transpose") == 1, kinds  # of the input
    assert not {"BatchNorm", "Activation", "Binary"} & set(kinds), kinds
    macs = sum(fast.graph.macs().values())
    pixels = 6 * 9 * 11
    assert macs == pixels * (27 * 24 + 72 * 24 + 27 * 48 * 24) + 24 * 5


def test_a_file_of_a_volume_network_takes_other_batches(tmp_path):
    model, x = Block().eval(), torch.randn(2, 3, 6, 9, 11)
    fast = actzip.compile(model, x, tune=False, cache=False, threads=1)
    fast.save(tmp_path / "m.actzip")
    loaded = actzip.runtime.load(tmp_path / "m.actzip")
    np.testing.assert_array_equal(loaded(x.numpy()), fast(x.numpy()))
    np.testing.assert_array_equal(loaded(x.numpy()[:1]), fast(x.numpy()[:1]))


def test_onnx_files_of_volume_networks(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(8, 16, 2, 2), nn.ReLU(),
        nn.AvgPool3d(3, 2, 1), nn.Conv3d(16, 4, (3, 1, 1)),
    )  # fmt: skip
    x, path = torch.randn(1, 3, 6, 10, 8), tmp_path / "m.onnx"
    torch.onnx.export(model.eval(), (x,), str(path), opset_version=17, dynamo=False)
    fast = actzip.compile(path, x.numpy(), tune=False, cache=False, parts=False, threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    want = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(fast(x.numpy()), want, atol=1e-5, rtol=1e-5)
    net = actzip.load(path)
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), want, atol=1e-5, rtol=1e-5)


def test_norms_of_sums_that_something_else_reads_stay():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x) + self.b(x)
            return self.n(y), y

    model, x = Read().eval(), torch.randn(2, 3, 6, 7)
    graph = optimize(capture(model, x))
    assert any(isinstance(n, ops.BatchNorm) for n in graph.nodes)
    fast = actzip.compile(model, x, tune=False, cache=False)
    with torch.no_grad():
        for got, want in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
