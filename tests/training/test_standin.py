"""Backward passes that compute without the whole of what was saved: as exact as with it, and with less."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from actzip.training import buffers, checkpoint_contexts, packed_activations, standin
from actzip.training.packed import top_hooks
from actzip.training.standin import StandIn

recomputes = pytest.mark.skipif(top_hooks is None, reason="checkpoint_contexts packs from PyTorch 2.5 on")


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(standin, "_SMALL", 0)
    monkeypatch.setattr(buffers, "LARGE", 0)


@pytest.fixture
def calls(monkeypatch):
    """What was asked of oneDNN: which gradients, and of how many samples."""
    found = []
    before = standin._at_once

    def at_once(grad, x, weight, how, wanted):
        found.append((wanted, len(x)))
        return before(grad, x, weight, how, wanted)

    monkeypatch.setattr(standin, "_at_once", at_once)
    return found


CONVOLUTIONS = {  # and whether oneDNN computes them, in two steps
    "3x3": (lambda x, w: F.conv2d(x, w(8, 6, 3, 3), w(8), padding=1), True),
    "no bias": (lambda x, w: F.conv2d(x, w(8, 6, 3, 3)), True),
    "1x1": (lambda x, w: F.conv2d(x, w(8, 6, 1, 1)), None),
    "strided": (lambda x, w: F.conv2d(x, w(8, 6, 3, 3), None, 2), True),
    "dilated": (lambda x, w: F.conv2d(x, w(8, 6, 3, 3), None, 1, 2, 2), True),
    "grouped": (lambda x, w: F.conv2d(x, w(6, 3, 3, 3), groups=2), True),
    "depthwise": (lambda x, w: F.conv2d(x, w(6, 1, 3, 3), groups=6), True),
    "channels last": (lambda x, w: F.conv2d(channels_last(x), w(8, 6, 3, 3)), True),
    "same": (lambda x, w: F.conv2d(x, w(8, 6, 2, 2), padding="same"), None),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w(6, 8, 2, 2), stride=2), None),
    "volume": (lambda x, w: F.conv3d(x[:, None], w(4, 1, 3, 3, 3)), None),
    "line": (lambda x, w: F.conv1d(x.flatten(2), w(8, 6, 3)), None),
}


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_convolutions_in_two_steps_are_exact(kind, dtype, dense, calls):
    convolution, split = CONVOLUTIONS[kind]
    x = random((3, 6, 9, 10), dtype, 1).requires_grad_()

    def gradients(context):
        made = []

        def weight(*shape):
            made.append(random(shape, dtype, len(shape)).requires_grad_())
            return made[-1]

        with context:
            y = convolution(x.sin() if dense else x.relu(), weight)
        return torch.autograd.grad(y, [x, *made], random(y.shape, dtype, 2))

    plain = gradients(nullcontext())
    assert not calls
    packed = gradients(packed_activations(nn.Identity(), min_bytes=0))
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))
    if split and dtype == torch.float32:
        assert [w[:2] for w, _ in calls] == [[False, True], [True, False]]


ACTIVATIONS = {
    "relu": F.relu,
    "in place": lambda x: F.relu(x, True),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "threshold": lambda x: F.threshold(x, 0.25, 7.0),
    "twice": lambda x: F.relu(F.relu(x) - 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradients_by_a_mask_are_exact(kind, dtype, monkeypatch):
    found = []
    select = standin.NATIVE.select

    class Spied(type(standin.NATIVE)):
        def select(self, *arguments):
            found.append(arguments)
            return select(*arguments)

    monkeypatch.setattr(standin, "NATIVE", Spied())
    x = torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.view(-1)[::17] = 0.0
    x.requires_grad_()
    odd = torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    odd.view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("inf"), float("-inf")])
    turned = odd.transpose(2, 3).contiguous().transpose(2, 3)
    for upstream, selects in ((odd, True), (turned, False), (odd[:1].expand_as(odd), False)):
        plain = torch.autograd.grad(ACTIVATIONS[kind](x * 1), x, upstream)[0]
        with packed_activations(nn.Identity(), min_bytes=0):
            y = ACTIVATIONS[kind](x * 1)
        found.clear()
        packed = torch.autograd.grad(y, x, upstream)[0]
        assert torch.equal(plain.nan_to_num(9), packed.nan_to_num(9))
        assert torch.equal(plain.signbit(), packed.signbit())
        assert packed.stride() == plain.stride()
        assert bool(found) == selects or kind == "twice"


def test_the_input_is_gone_while_its_own_gradient_is_computed(monkeypatch):
    inputs = []
    before = standin._at_once

    def at_once(grad, x, weight, how, wanted):
        if wanted[1]:
            inputs.append(StorageWeakRef(x.untyped_storage()))
        else:
            assert inputs[-1].expired()
        return before(grad, x, weight, how, wanted)

    monkeypatch.setattr(standin, "_at_once", at_once)
    model = nn.Sequential(*(m for _ in range(3) for m in (nn.ReLU(), nn.Conv2d(4, 4, 3))))
    x = torch.randn(2, 4, 20, 20, requires_grad=True)
    with packed_activations(model, min_bytes=0):
        y = model(x)
    y.sum().backward()
    assert len(inputs) == 3


@recomputes
@pytest.mark.parametrize("n", [2, 5])
def test_codes_that_are_computed_again_are_read_by_halves(n, calls):
    conv = nn.Conv2d(4, 6, 3)
    x = torch.randn(n, 4, 20, 20, requires_grad=True)

    def gradients(context_fn):
        torch.manual_seed(3)
        with packed_activations(conv, 8, min_bytes=0):
            y = checkpoint(lambda x: conv(x.relu()).relu(), x, use_reentrant=False, context_fn=context_fn)
        return torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])

    halves = gradients(checkpoint_contexts)
    sizes = [size for _, size in calls]
    assert sizes == 2 * [n // 2, n - n // 2]
    again = gradients(checkpoint_contexts)
    assert all(torch.equal(a, b) for a, b in zip(halves, again, strict=True))
    plain = torch.autograd.grad(conv(x.relu()).relu().square().sum(), [x, *conv.parameters()])
    assert torch.equal(plain[0], halves[0]) or torch.allclose(plain[0], halves[0], rtol=1e-4, atol=1e-3)
    assert torch.allclose(plain[2], halves[2], rtol=1e-4)
    assert (plain[1] - halves[1]).norm() < 0.02 * plain[1].norm()


@recomputes
def test_the_last_map_of_a_block_is_not_packed_for_a_moment():
    """It would be in memory twice when backward begins with it."""
    block = nn.Sequential(*(m for _ in range(2) for m in (nn.Conv2d(8, 8, 3), nn.ReLU())))
    x = torch.randn(2, 8, 20, 20).relu().requires_grad_()
    kept = []

    def seen(context_fn):
        with packed_activations(block, min_bytes=0):
            y = checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
        return torch.autograd.grad(y.sum(), [x, *block.parameters()])

    before = standin.handed

    def handed(slot):
        kept.append(type(slot).__name__)
        return before(slot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actzip.training.recompute.handed", handed)
        packed = seen(checkpoint_contexts)
    plain = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))
    assert kept == ["Packed", "Kept", "Packed"]  # the last ReLU, the map before it, the first ReLU


def test_who_reads_what_was_saved_gets_tensors():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            assert type(x) is torch.Tensor and x.numpy().shape == g.shape
            return g * 2

    x = torch.randn(2, 4, 20, 20, requires_grad=True)
    with packed_activations(nn.Identity(), min_bytes=0):
        y = F.relu(x)
        z = Reads.apply(y)
    assert type(y.grad_fn._saved_result) is torch.Tensor
    z.sum().backward()


def test_gradients_of_gradients_never_meet_a_stand_in():
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    w = torch.randn(4, 4, 3, 3, requires_grad=True)

    def twice(context):
        with context:
            y = F.conv2d(F.relu(x), w).square().mean()
        first = torch.autograd.grad(y, [x, w], create_graph=True)
        assert not any(isinstance(g, StandIn) for g in first)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])

    plain = twice(nullcontext())
    packed = twice(packed_activations(nn.Identity(), min_bytes=0))
    assert all(torch.equal(a, b) for a, b in zip(plain, packed, strict=True))
