"""Checkpointing (``use_reentrant=False``) whose recomputed maps are packed."""

import gc
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from actzip.errors import TrainingError
from actzip.training import checkpoint_contexts, pack_saved, packed, packed_activations
from actzip.training.standin import StandIn
from ended import Ended, NoMemory
from odd import saved_tensors_hooks

pytestmark = pytest.mark.skipif(packed.top_hooks is None, reason="PyTorch tells of its hooks from 2.5 on")
again = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)


class Square(torch.autograd.Function):
    """Saves outside of every torch function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Block(nn.Module):
    def __init__(self, inside=None):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)
        self.inside = inside

    def forward(self, x, scale=1.0):
        y = F.relu(self.bn(self.conv1(x)), inplace=True)
        y = F.dropout(y, 0.3, self.training)
        y = self.conv2(Square.apply(F.max_pool2d(y, 3, 1, 1)))
        if self.inside is not None:
            y = again(self.inside, y)
        return F.relu(y * scale + x)


class Whole(nn.Module):
    def __init__(self, how, nested=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(
            Block(nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()) if nested else None) for _ in range(3)
        )
        self.fc = nn.Linear(8, 5)
        self.how = how

    def forward(self, x):
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, scale=0.7) if self.how is None else self.how(block, x, scale=0.7)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 20, 20, generator=generator), torch.tensor([0, 1, 2, 3])


def step(model, batch, bits=None, inside=False, packing=True, seed=2):
    torch.manual_seed(seed)
    model.zero_grad()
    if not packing:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
    else:
        with packed_activations(model, bits, min_bytes=0):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_exact_gradients_are_those_without_checkpointing(batch, inside, nested, early, layout):
    with set_checkpoint_early_stop(early):
        plain = step(Whole(None, nested).to(memory_format=layout), batch, packing=False)
        again_model = Whole(again, nested).to(memory_format=layout)
        assert same(step(again_model, batch, inside=inside), plain)
        model = Whole(again, nested).to(memory_format=layout)
        assert same(step(model, batch, packing=False), plain)  # nothing around: plain


def test_what_is_recomputed_is_packed(batch):
    """The originals are gone once they are packed; the block's input is not packed anew, and the last
    map, which backward reads at once, not at all."""
    storages, sizes = [], []
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
    block[1].register_forward_hook(lambda m, a, out: storages.append(StorageWeakRef(out.untyped_storage())))

    class Counted(packed.Session):
        def close(self):
            sizes.append(self.result.packed_bytes)
            super().close()

    before, packed.Session = packed.Session, Counted
    seen = []
    try:
        with packed_activations(block, min_bytes=0):
            out = again(block, conv(torch.randn(4, 3, 32, 32)))
            out.register_hook(lambda g: seen.append([s.expired() for s in storages]))
            loss = out.square().mean()
        torch.autograd.graph.register_multi_grad_hook(
            [block[2].weight], lambda g: seen.append([s.expired() for s in storages])
        )
        loss.backward()
    finally:
        packed.Session = before
    assert seen == [[True], [True, True]]
    n = 4 * 8 * 30 * 30
    # two maps after ReLU: a mask each; the first as it is, for the values of the input are shared
    assert 4 * n < sizes[-1] < 4 * n + 3 * n / 8


@pytest.mark.parametrize("bits", [8, 4])
def test_lossy_is_close_and_repeats_with_the_seed(batch, bits):
    plain = step(Whole(None).eval(), batch, packing=False)
    first, second, other = (step(Whole(again).eval(), batch, bits, seed=s) for s in (2, 2, 3))
    assert same(first, second) and not same(first[1:], other[1:])
    assert torch.equal(first[0], plain[0])
    for a, b in zip(plain[1:], first[1:]):
        assert (a - b).norm() <= {8: 0.03, 4: 0.5}[bits] * a.norm() + 1e-3


def test_twice_through_a_retained_graph_gives_the_same(batch):
    for bits in (None, 8):
        model = Whole(again)
        with packed_activations(model, bits, min_bytes=0):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        first, second = (
            torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2)
        )
        assert same(first, second)


def test_double_backward_is_exact():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.ReLU())
    x = torch.randn(2, 3, 24, 24, requires_grad=True)
    found = []
    for packing in (False, True):
        if packing:
            with packed_activations(block, min_bytes=0):
                y = again(block, x)
        else:
            y = block(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append((g, *torch.autograd.grad(g.square().sum(), [*block.parameters()], allow_unused=True)))
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found))


def test_gradients_inside_a_block(batch):
    """A block that differentiates itself recomputes while it runs."""

    def penalised(x):
        y = (x * 2).tanh()
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.relu() * g

    found = []
    for how in (lambda f, x: f(x), partial(checkpoint, use_reentrant=False), again):
        x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with packed_activations(nn.Identity(), min_bytes=0):
            y = how(penalised, x * 1)
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_autocast_accumulation_and_a_model_packed_once(batch):
    def run(model):
        torch.manual_seed(3)
        for x, y in zip(batch[0].split(2), batch[1].split(2)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    model = Whole(again)
    pack_saved(model, min_bytes=0)
    assert same(run(model), run(Whole(None)))


def test_an_input_changed_in_a_block_raises():
    def block(x):
        y = x.relu()
        x.add_(1)
        return y * 2

    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    with packed_activations(nn.Identity(), min_bytes=0):
        y = again(block, x * 1)
    with pytest.raises(TrainingError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_map_changed_in_a_block_after_it_was_saved_raises():
    """Plain checkpointing takes the changed map; PyTorch without it raises, and so does this."""

    def block(x):
        y = x.exp()
        y.add_(1)
        return y.tanh()

    with packed_activations(nn.Identity(), min_bytes=0):
        y = again(block, torch.randn(4, 8, 16, 16, requires_grad=True))
    with pytest.raises(TrainingError, match="modified by an inplace operation"):
        y.sum().backward()


def test_another_recomputation_is_checkpointings_own_error():
    runs = itertools.count()
    with packed_activations(nn.Identity(), min_bytes=0), set_checkpoint_early_stop(False):
        y = again(
            lambda x: x.relu().tanh() if next(runs) else x.relu(),
            torch.randn(4, 8, 16, 16, requires_grad=True) * 1,
        )
        z = again(lambda x: x[: 3 - next(runs)].tanh(), torch.randn(4, 64, requires_grad=True) * 1)
    for out in (y, z):
        with pytest.raises(CheckpointError):
            out.sum().backward()
    assert not saved_tensors_hooks() and torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_recomputation_that_ends_leaves_nothing_behind(batch, error):
    model = Whole(again)
    wanted = step(model, batch)
    for n in range(1, 4):
        with packed_activations(model, layers={"fc": None}, min_bytes=0):
            torch.manual_seed(2)
            loss = F.cross_entropy(model(batch[0]), batch[1])
        calls = itertools.count()

        def fail(m, a, n=n, calls=calls):
            if next(calls) == n - 1:
                raise error

        handles = [b.conv2.register_forward_pre_hook(fail) for b in model.blocks]
        with pytest.raises(error):
            loss.backward(retain_graph=True)
        for h in handles:
            h.remove()
        assert not saved_tensors_hooks() and torch._C._len_torch_function_stack() == 0
        assert packed.current_scope() is None
        assert not any(m._forward_pre_hooks for m in model.modules())
        assert same([loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])], wanted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("ended", "stride"), [(Ended, 41), (NoMemory, 3)])
def test_a_recomputation_that_ends_anywhere_can_run_again(bits, ended, stride):
    model = Whole(again)
    model.blocks = model.blocks[:1]
    x, y = torch.randn(2, 3, 12, 12), torch.tensor([0, 1])

    def forward():
        torch.manual_seed(1)
        with packed_activations(model, bits, min_bytes=0):
            return F.cross_entropy(model(x), y)

    def gradients(loss):
        return torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)

    wanted = gradients(forward())
    for n in itertools.count(1, stride):
        loss = forward()
        try:
            with ended(n):
                gradients(loss)
            break
        except (KeyboardInterrupt, MemoryError):
            pass
        assert torch._C._len_torch_function_stack() == 0 and torch._C._is_torch_function_enabled()
        assert not saved_tensors_hooks() and packed.current_scope() is None
        assert same(gradients(loss), wanted)
    assert n > 4


def test_no_graph_keeps_itself_alive(batch):
    from actzip.training.saved import Slot

    gc.collect()
    gc.disable()
    try:
        model = Whole(again)
        with packed_activations(model, min_bytes=0):
            loss = F.cross_entropy(model(batch[0]), batch[1])
        torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
        held = [o for o in gc.get_objects() if issubclass(type(o), Slot)]
        assert held
        del loss, held
        assert not [o for o in gc.get_objects() if issubclass(type(o), (Slot, StandIn))]
    finally:
        gc.enable()


def test_a_stand_in_reads_as_its_tensor():
    """Whatever takes one for a tensor computes with what it stands for."""
    model = nn.Identity()
    x = torch.randn(2, 8, 16, 16).relu()
    with packed_activations(model, min_bytes=0):
        y = x * torch.ones((), requires_grad=True)
        scope = packed.current_scope()
        stand_in = StandIn.of(y.shape, y.stride(), y, scope.session.pack(y))
    assert (stand_in.shape, stand_in.dtype, stand_in.stride()) == (y.shape, y.dtype, y.stride())
    assert type(stand_in * 2) is torch.Tensor
    assert torch.equal(stand_in * 2, y.detach() * 2)
    assert torch.equal(F.conv2d(stand_in, torch.ones(1, 8, 1, 1)), F.conv2d(y, torch.ones(1, 8, 1, 1)))
