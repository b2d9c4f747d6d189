import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from actzip.errors import ActzipError, InputError, LayerError, TrainingError
from actzip.training import pack_saved, packed, packed_activations
from actzip.training.saved import Slot
from crowd import at_once
from odd import saved_tensors_hooks


class Net(nn.Module):
    """Convolutions, normalisation, in-place and functional activations, pools, views, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.fc = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x) + x)
        x = self.pool(x)
        x = F.relu6(self.depthwise(x), inplace=True)
        x = F.avg_pool2d(F.leaky_relu(x - 0.5, 0.1), 2)
        x = F.dropout(F.adaptive_avg_pool2d(x, 4), 0.3, self.training)
        return self.fc(x.flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def step(model, batch, context=None, seed=2):
    """Loss and gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    x, y = batch
    if context is None:
        loss = F.cross_entropy(model(x), y)
    else:
        with context:
            loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(a, b):
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


# --- exact


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("min_bytes", [0, 1 << 14])
def test_exact_gradients_are_those_without_packing(net, batch, channels_last, min_bytes):
    if channels_last:
        net.to(memory_format=torch.channels_last)
    plain = step(net, batch)
    assert_same(step(net, batch, packed_activations(net, min_bytes=min_bytes)), plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_exact(net, batch, dtype):
    net.to(dtype)
    batch = batch[0].to(dtype), batch[1]
    assert_same(step(net, batch, packed_activations(net, min_bytes=0)), step(net, batch))


def test_a_map_saved_twice_is_packed_once():
    conv = nn.Conv2d(8, 8, 1)
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    with packed_activations(conv) as packed:
        y = F.relu(x * 1)
        conv(y)
        once = packed.packed_bytes
        conv(y), conv(y.view(2, 8, 32, 128))
    assert packed.saved_bytes == y.nbytes
    density = (y != 0).double().mean().item()
    assert once == packed.packed_bytes
    assert once / y.nbytes == pytest.approx(density + 1 / 32, abs=2e-3)


def test_relu_before_a_pool_takes_a_bit_an_element():
    x = torch.randn(2, 8, 64, 64, requires_grad=True)
    with packed_activations(nn.Identity()) as packed:
        y = F.relu(x * 1)
        out, indices = F.max_pool2d(y, 2, return_indices=True)
    # a bit an element, and two bits a place of four
    assert packed.packed_bytes == pytest.approx(y.numel() / 8 + indices.numel() / 4, rel=0.01)
    out.square().sum().backward()
    z = x.detach().requires_grad_()
    F.max_pool2d(F.relu(z * 1), 2).square().sum().backward()
    assert torch.equal(x.grad, z.grad)


def test_the_original_is_freed():
    layer = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    storage = None

    def remember(module, args, out):
        nonlocal storage
        storage = StorageWeakRef(out.untyped_storage())

    layer[1].register_forward_hook(remember)
    with packed_activations(layer):
        out = layer(torch.randn(2, 3, 64, 64))
    assert storage.expired()
    out.sum().backward()


def test_no_graph_keeps_itself_alive(net, batch):
    """A pack hook that gives back the very tensor makes a circle that only the collector frees."""
    gc.collect()
    gc.disable()
    try:
        with packed_activations(net):
            loss = F.cross_entropy(net(batch[0]), batch[1])
        count = sum(1 for o in gc.get_objects() if issubclass(type(o), Slot))
        assert count > 10
        del loss
        assert sum(1 for o in gc.get_objects() if issubclass(type(o), Slot)) == 0
    finally:
        gc.enable()


def test_density_that_gains_nothing_is_kept():
    x = torch.randn(4, 8, 64, 64, requires_grad=True)
    with packed_activations(nn.Identity()) as packed:
        y = (x * 1).exp()
    assert packed.packed_bytes == packed.saved_bytes == y.nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_odd_values_come_back(value, bits):
    x = torch.randn(2, 8, 64, 64)
    x[0, 0, :4] = value
    gradients = []
    for packing in (False, True):
        z, w = x.clone().requires_grad_(), torch.ones(8, 8, 1, 1, requires_grad=True)
        if packing:
            with packed_activations(nn.Identity(), bits):
                y = F.conv2d(F.relu(z * 1), w)
        else:
            y = F.conv2d(F.relu(z * 1), w)
        y.sum().backward()
        gradients.append((z.grad, w.grad))
    (za, wa), (zb, wb) = gradients
    assert torch.equal(za, zb)
    if bits is None:
        assert torch.equal(wa.nan_to_num(7), wb.nan_to_num(7))
    else:
        assert torch.allclose(wa, wb, rtol=0.02, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_activations_answer_odd_values_as_pytorch_does(dtype):
    """Not a number, infinities and the bounds themselves, in PyTorch's vectors and in the rest after them."""
    x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(0)) * 2
    odd = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 6.0, 1.0, -1.0, 0.5, 2.0, 1e-42, -1e-42]
    for i, value in enumerate(odd):
        x.view(-1)[i::97] = value
    g = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    for f in (
        F.relu,
        F.relu6,
        lambda y: F.relu6(y * 1, inplace=True),
        lambda y: F.hardtanh(y, -0.5, 2.0),
        lambda y: F.leaky_relu(y, 0.1),
        lambda y: F.threshold(y, 0.5, -3.0),
        lambda y: y.clamp(-1, 2),
        lambda y: y.clamp(min=0.5),
    ):
        z = x.to(dtype).requires_grad_()
        (plain,) = torch.autograd.grad(f(z * 1), z, g)
        with packed_activations(nn.Identity(), min_bytes=0):
            y = f(z * 1)
        assert torch.equal(torch.autograd.grad(y, z, g)[0], plain)


@pytest.mark.parametrize("inplace", [False, True])
def test_noise_that_is_filled_after_it_was_saved_comes_back(inplace):
    """rrelu's: autograd saves it, and the kernel writes it then."""
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for make in (lambda y: F.rrelu(y, 0.1, 0.3, True, inplace), nn.RReLU(inplace=inplace)):
        found = []
        for context in (contextlib.nullcontext(), packed_activations(nn.Identity(), min_bytes=0)):
            torch.manual_seed(0)
            del [torch.zeros_like(x) for _ in range(8)][:]  # what fresh memory holds
            with context:
                y = make(x * 1)
            found.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert torch.equal(*found)


# --- in place


def test_a_tensor_changed_after_it_was_saved_raises_as_without_packing(net):
    for make in (lambda t: t.relu(), lambda t: t.exp()):
        x = torch.randn(4, 8, 64, 64, requires_grad=True)
        with packed_activations(net):
            y = make(x * 1)
        y.add_(1)
        with pytest.raises(
            TrainingError, match=r"modified by an inplace operation.*version 1; expected version 0"
        ):
            y.sum().backward()


def test_a_change_between_two_savers_is_noticed():
    gradients = []
    for context in (contextlib.nullcontext(), packed_activations(nn.Identity())):
        torch.manual_seed(0)
        w, v = (torch.randn(8, 8, 1, 1, requires_grad=True) for _ in range(2))
        z = torch.randn(2, 8, 64, 64).relu().requires_grad_() * 1
        with context:
            F.conv2d(z, w)
            z.data.mul_(2)  # behind autograd's back
            y = F.conv2d(z, v)
        y.sum().backward()
        gradients.append(v.grad)
    assert torch.equal(*gradients)


class Spoils(torch.autograd.Function):
    """Changes in backward what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        x.mul_(0)
        return g.expand(x.shape)


class Lends(torch.autograd.Function):
    """Gives what it saved as the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum() / 2

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0]


def test_what_one_function_spoils_the_next_one_restores():
    """Two that saved one map share what was restored, unless it was changed meanwhile."""
    torch.manual_seed(0)
    w = torch.randn(8, 8, 1, 1, requires_grad=True)
    z = torch.randn(2, 8, 64, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.conv2d(F.relu(z * 1), w).sum(), w)
    with packed_activations(nn.Identity()):
        y = F.relu(z * 1)
        out = F.conv2d(y, w).sum() + Spoils.apply(y)
    assert torch.equal(torch.autograd.grad(out, w)[0], expected)


@pytest.mark.skipif(packed.top_hooks is None, reason="PyTorch 2.4 takes it for a change of the map")
def test_a_gradient_that_is_a_restored_map_may_be_changed():
    y = torch.randn(2, 8, 64, 64).relu().requires_grad_() * 1
    with packed_activations(nn.Identity()):
        out = Lends.apply(y)
    for _ in range(2):
        (g,) = torch.autograd.grad(out, y, retain_graph=True)
        assert torch.equal(g, y.detach())
        g.zero_()


# --- lossy


@pytest.mark.parametrize("bits", [8, 4])
def test_lossy_is_close_smaller_and_repeats_with_the_seed(net, batch, bits):
    plain = step(net, batch)
    with packed_activations(net) as exact:
        net(batch[0])
    first = step(net, batch, packed_activations(net, bits, generator=torch.Generator().manual_seed(3)))
    again = step(net, batch, packed_activations(net, bits, generator=torch.Generator().manual_seed(3)))
    other = step(net, batch, packed_activations(net, bits, generator=torch.Generator().manual_seed(4)))
    assert_same(first, again)
    assert not all(torch.equal(a, b) for a, b in zip(first[1], other[1]))
    assert torch.equal(first[0], plain[0])
    with packed_activations(net, bits) as packed:
        net(batch[0])
    assert packed.packed_bytes < 0.6 * exact.packed_bytes
    for a, b in zip(plain[1], first[1]):
        assert (a - b).norm() <= {8: 0.03, 4: 0.4}[bits] * a.norm() + 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_unbiased(bits):
    torch.manual_seed(0)
    x, g = torch.randn(2, 8, 32, 32).requires_grad_(), torch.randn(2, 4, 32, 32)
    w = torch.randn(4, 8, 1, 1, requires_grad=True)
    generator = torch.Generator().manual_seed(5)
    (exact,) = torch.autograd.grad(F.conv2d(x * 1, w), w, g)
    trials = []
    for _ in range(200):
        with packed_activations(nn.Identity(), bits, min_bytes=0, generator=generator):
            y = F.conv2d(x * 1, w)
        trials.append(torch.autograd.grad(y, w, g)[0])
    error = torch.stack(trials) - exact
    assert error.std() > 0
    # the mean of 200 is within five standard errors
    assert (error.mean(0).abs() <= 5 * error.std(0) / 200**0.5).all()


def test_zeros_stay_zeros_in_lossy_maps():
    x = torch.randn(2, 8, 64, 64)
    w = torch.randn(4, 8, 1, 1, requires_grad=True)
    with packed_activations(nn.Identity(), 4):
        y = F.conv2d(F.relu(x * torch.ones((), requires_grad=True)), w)
    (saved,) = {id(t): t for t in (y.grad_fn._saved_input,)}.values()
    assert torch.equal(saved == 0, x <= 0)
    assert (saved >= 0).all()


def test_bits_by_name(net, batch):
    with packed_activations(net, layers={"conv2": 4}, by_layer=True) as one:
        net(batch[0])
    with packed_activations(net, by_layer=True) as none:
        net(batch[0])
    assert one.layers["conv2"].packed < none.layers["conv2"].packed
    assert one.layers["bn1"] == none.layers["bn1"]
    with packed_activations(net, 8, layers={"*": None}) as overruled:
        net(batch[0])
    assert overruled.packed_bytes == none.packed_bytes
    with pytest.raises(LayerError, match="conv2"), packed_activations(net, layers={"conv22": 4}):
        pass


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 3},
        {"bits": True},
        {"bits": 8.0},
        {"min_bytes": -1},
        {"layers": {"fc": 2}},
        {"layers": ["fc"]},
    ],
)
def test_wrong_arguments_are_typed_errors(net, arguments):
    with pytest.raises(InputError), packed_activations(net, **arguments):
        pass
    with pytest.raises(InputError), packed_activations("resnet18"):
        pass


# --- what is around


def test_double_backward_is_exact():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.ReLU6()
    )
    x = torch.randn(2, 3, 24, 24, requires_grad=True)
    found = []
    for packing in (False, True):
        if packing:
            with packed_activations(net, min_bytes=0):
                y = net(x)
        else:
            y = net(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append((g, *torch.autograd.grad(g.square().sum(), [*net.parameters()], allow_unused=True)))
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found))


def test_backward_twice_through_a_retained_graph(net, batch):
    with packed_activations(net):
        loss = F.cross_entropy(net(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), once))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside(batch, reentrant):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(True))
    block = nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(True), nn.Conv2d(16, 16, 3), nn.ReLU()
    )
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    class Whole(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.first, self.block, self.last, self.recompute = first, block, last, recompute

        def forward(self, x):
            x = self.first(x)
            x = checkpoint(self.block, x, use_reentrant=reentrant) if self.recompute else self.block(x)
            return self.last(x)

    whole, plain = Whole(True), Whole(False)
    expected = step(plain, batch)
    assert_same(step(whole, batch), expected)
    assert_same(step(whole, batch, packed_activations(whole)), expected)
    with packed_activations(plain) as alone:
        plain(batch[0])
    with packed_activations(whole) as both:
        whole(batch[0])
    assert both.packed_bytes < alone.packed_bytes
    if reentrant:  # with backward inside, what is recomputed is packed too, by the same rules
        for backward in (torch.Tensor.backward, lambda loss: torch.autograd.backward(loss)):
            whole.zero_grad()
            with packed_activations(whole) as exact:
                loss = F.cross_entropy(whole(batch[0]), batch[1])
                backward(loss)
            assert_same((loss.detach(), [p.grad for p in whole.parameters()]), expected)
            with packed_activations(whole, 8) as coded:
                backward(F.cross_entropy(whole(batch[0]), batch[1]))
            assert coded.saved_bytes == exact.saved_bytes > 1.2 * both.saved_bytes
            assert coded.packed_bytes < 0.6 * exact.packed_bytes  # the block's own input is as it was


def test_amp_accumulation_and_gradient_scaling(net, batch):
    def run(packing):
        torch.manual_seed(3)
        net.zero_grad()
        for x, y in zip(batch[0].split(2), batch[1].split(2)):
            if packing:
                with packed_activations(net), torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(net(x), y)
            (loss * 128).backward()
        return loss.detach(), [p.grad.clone() for p in net.parameters()]

    assert_same(run(True), run(False))


def test_contexts_nest_and_the_innermost_decides(net, batch):
    plain = step(net, batch)
    with packed_activations(net, 4) as outer:
        assert_same(step(net, batch, packed_activations(net)), plain)
    assert outer.saved_bytes == 0


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["context", "model"])
def test_exceptions_leave_nothing_behind(net, batch, error, how):
    plain = step(net, batch)
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()}
    raising = net.fc.register_forward_hook(lambda *a: (_ for _ in ()).throw(error()))
    with pytest.raises(error):
        if how == "context":
            with packed_activations(net, layers={"fc": 4}):
                net(batch[0])
        else:
            packed = pack_saved(net, layers={"fc": 4})
            try:
                net(batch[0])
            finally:
                packed.remove()
    raising.remove()
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()}
    assert not saved_tensors_hooks()
    assert torch._C._len_torch_function_stack() == 0
    assert_same(step(net, batch), plain)


def test_users_own_hooks_inside_win(net, batch):
    plain = step(net, batch)
    with packed_activations(net), torch.autograd.graph.save_on_cpu():
        torch.manual_seed(2)
        net.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
    loss.backward()
    assert_same((loss.detach(), [p.grad for p in net.parameters()]), plain)


def test_two_threads_at_once(net, batch):
    plain, found = step(net, batch), {}
    copies = [copy.deepcopy(net).eval() for _ in range(2)]
    expected = [step(c, batch) for c in copies]

    def work(i):
        for _ in range(5):
            found[i] = step(copies[i], batch, packed_activations(copies[i]))

    at_once(work, 2)
    for i in range(2):
        assert_same(found[i], expected[i])
    del plain


def test_every_kind_of_tensor_is_kept_or_packed(net):
    """Layouts, types and subclasses that packing does not know pass through."""

    class Mine(torch.Tensor):
        pass

    w = torch.randn(64, 64, requires_grad=True)
    sparse = torch.eye(64).to_sparse()
    csr = torch.eye(64).to_sparse_csr()
    cases = [
        lambda: torch.sparse.mm(sparse, w).sum(),
        lambda: (csr @ w).sum(),
        lambda: (w.to(torch.complex64) * torch.ones(64, 64, dtype=torch.complex64)).abs().sum(),
        lambda: (w * w.t()).exp().sum(),
        lambda: (w.expand(8, 64, 64) * w[None]).sum(),
        lambda: (torch.randn(64, 128).relu()[:, ::2] * w).sum(),
        lambda: (torch.randn(64, 64).as_subclass(Mine) * w).sum(),
        lambda: torch.where(torch.eye(64, dtype=torch.bool), w, w.exp()).sum(),
        lambda: w.gather(0, torch.arange(64).expand(64, 64)).square().sum(),
        lambda: w.half().relu().square().sum(),
        lambda: (w.double().relu() ** 2).sum(),
        lambda: (
            torch.nested.nested_tensor([w.detach(), w.detach()[:3]], requires_grad=True)
            .to_padded_tensor(0.0)
            .sum()
            + w.sum()
        ),
        lambda: w.exp()[:0].sum() + w.sum(),
        lambda: w.gather(0, torch.arange(0).view(0, 64)).sum() + w.sum(),
        lambda: (torch.nested.as_nested_tensor([w * 1, w[:3] * 1]).relu() * 2).to_padded_tensor(0.0).sum(),
    ]
    for case in cases:
        torch.manual_seed(0)
        (plain,) = torch.autograd.grad(case(), w)
        torch.manual_seed(0)
        with packed_activations(net, min_bytes=0):
            loss = case()
        (packed,) = torch.autograd.grad(loss, w)
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(packed))


# --- once for a model


def test_pack_saved_and_copies(net, batch):
    plain = step(net, batch)
    packed = pack_saved(net)
    assert_same(step(net, batch), plain)
    assert 0 < packed.last.packed_bytes < packed.last.saved_bytes
    twin = copy.deepcopy(net)
    assert twin.forward is not net.forward
    assert twin.forward.model is twin
    assert_same(step(twin, batch), plain)
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    averaged.update_parameters(net)
    assert averaged(batch[0]).shape == (4, 5)
    assert pack_saved(net, 8) is packed
    assert list(net.state_dict()) == list(Net().state_dict())
    packed.remove()
    packed.remove()
    assert "forward" not in net.__dict__
    assert_same(step(net, batch), plain)


def test_pack_saved_models_can_be_pickled(net, batch, tmp_path):
    pack_saved(net, 8)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert loaded.forward.model is loaded
    assert loaded.forward.settings.bits == 8
    loaded(batch[0]).sum().backward()
    assert loaded.forward.last.saved_bytes > 0


def test_evaluation_costs_nothing(net, batch):
    packed = pack_saved(net)
    with torch.no_grad():
        net(batch[0])
    assert packed.last.saved_bytes == 0


def test_activation_penalty(net, batch):
    from actzip.sparsify import ActivationPenalty

    results = []
    for packing in (False, True):
        torch.manual_seed(2)
        net.zero_grad()
        penalty = ActivationPenalty(net, alpha=0.5, example=batch[0])
        try:
            if packing:
                with packed_activations(net):
                    loss = F.cross_entropy(net(batch[0]), batch[1]) + penalty()
            else:
                loss = F.cross_entropy(net(batch[0]), batch[1]) + penalty()
            loss.backward()
        finally:
            penalty.detach()
        results.append((loss.detach(), [p.grad.clone() for p in net.parameters()]))
    assert_same(*results)


def test_errors_are_of_the_hierarchy():
    assert issubclass(TrainingError, ActzipError)
