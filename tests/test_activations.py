import asyncio
import copy
import inspect
import io
import itertools
import math
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actzip.activations import (
    ActivationTap,
    ComputeCall,
    clear_thresholds,
    count_macs,
    find_sites,
    get_thresholds,
    select_sites,
    set_thresholds,
    threshold_activation,
    without_thresholds,
)
from actzip.errors import InputError, LayerError, UnsupportedError


class Mixed(nn.Module):
    """Every way of writing a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU6())
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.relu(self.conv(x[:, :3]))
        x = self.block(x)
        x = F.relu(x - 0.1)
        x = (x - 0.05).clamp(min=0)
        y = x - 0.01
        y.relu_()
        x = torch.clamp(y, 0, 6)
        x = F.silu(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def test_every_kind_of_relu_is_seen_and_named(model):
    activations, computations = find_sites(model, X)
    assert [(s.name, s.kind) for s in activations] == [
        ("relu", "relu"),
        ("relu:1", "relu"),
        ("block.1", "relu"),
        ("block.3", "relu6"),
        ("(model)", "relu"),
        ("(model):1", "relu"),
        ("(model):2", "relu"),
        ("(model):3", "relu6"),
        ("(model):4", "silu"),
    ]
    assert [s.name for s in computations] == ["conv", "conv:1", "block.0", "block.2", "fc"]
    assert not activations[-1].sparse and activations[0].sparse


def test_watching_changes_nothing_and_leaves_nothing(model):
    want = model(X)
    keys = list(model.state_dict())
    with ActivationTap(model, lambda s, y: None, lambda s, c: None):
        assert torch.equal(model(X), want)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["relu", "relu:1", "block.1", "block.3", "(model)", "(model):2"])
def test_a_map_can_be_replaced_in_place_or_not(model, name):
    seen = []

    def zero(site, y):
        return torch.zeros_like(y)

    def watch(site, y):
        seen.append((site.name, y.detach().clone()))

    with ActivationTap(model, zero, layers=[name]), ActivationTap(model, watch):
        model(X)
    # the second tap sees what the first has put in
    assert (dict(seen)[name] == 0).all()
    assert any((y != 0).any() for n, y in seen if n != name)


def test_gradients_flow_through_a_penalty_on_in_place_maps(model):
    total = []
    with ActivationTap(model, lambda s, y: total.append(y.abs().sum())):
        model(X)
        sum(total).backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "fc" not in n
    )


def test_selection_by_name_glob_regex_type_and_ignore(model):
    sites, _ = find_sites(model, X)
    names = lambda **kw: [s.name for s in select_sites(sites, model, **kw)]  # noqa: E731
    assert names(layers="relu") == ["relu"]
    assert names(layers="block.*") == ["block.1", "block.3"]
    assert names(layers=r"re:\(model\).*", ignore="(model):4") == [
        "(model)",
        "(model):1",
        "(model):2",
        "(model):3",
    ]
    assert names(layers=nn.ReLU6) == ["block.3"] == names(layers="type:ReLU6")
    with pytest.raises(LayerError, match="relu"):
        names(layers="rellu")
    with pytest.raises(InputError, match="regular expression"):
        names(layers="re:(")
    with pytest.raises(InputError, match="module type"):
        names(layers=[3])


def test_a_tap_with_an_unknown_name_says_so_after_the_pass(model):
    with (
        ActivationTap(model, lambda s, y: None, layers=["block.9"]),
        pytest.raises(LayerError, match=r"block\.1"),
    ):
        model(X)
    model(X)


def test_an_exception_in_the_model_leaves_no_mode_behind(model):
    with ActivationTap(model, lambda s, y: torch.zeros_like(y)) as tap:
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 5, 9, 9))
        assert not torch.overrides._get_current_function_mode_stack() and not tap._depth()
        assert (torch.relu(torch.ones(3)) == 1).all()
        model(X)


def test_submodules_called_on_their_own_are_seen(model):
    names = []
    with ActivationTap(model, lambda s, y: names.append(s.name)):
        model.block(torch.randn(1, 8, 5, 5))
    assert names == ["block.1", "block.3"]


def test_threads_do_not_mix(model):
    results = [[] for _ in range(4)]
    local = threading.local()
    with ActivationTap(model, lambda s, y: local.names.append(s.name)):

        def run(i):
            local.names = results[i]
            for _ in range(3):
                model(X)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    want = [s.name for s in find_sites(model, X)[0]] * 3
    assert all(r == want for r in results)


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


def test_thresholds_are_applied_kept_beside_the_model_and_removed(model):
    keys = list(model.state_dict())
    plain = model(X)
    set_thresholds(model, {"relu": 0.2, "block.1": torch.full((8,), 0.1)}, X)
    assert list(model.state_dict()) == keys
    maps = {}
    with ActivationTap(model, lambda s, y: maps.__setitem__(s.name, y.clone())):
        cut = model(X)
    assert ((maps["relu"] == 0) | (maps["relu"] > 0.2)).all()
    assert ((maps["block.1"] == 0) | (maps["block.1"] > 0.1)).all()
    assert not torch.equal(cut, plain)
    with without_thresholds(model) as values:
        assert set(values) == {"relu", "block.1"} and torch.equal(model(X), plain)
    assert torch.equal(model(X), cut)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), cut)
    set_thresholds(twin, {"relu": 9.0})
    assert torch.equal(model(X), cut) and not torch.equal(twin(X), cut)
    clear_thresholds(model)
    assert torch.equal(model(X), plain) and get_thresholds(model) == {}


@pytest.mark.parametrize("t", [0.5, torch.tensor([0.5, 0.25])])
def test_thresholds_keep_nan_and_infinity_as_torch_does(t):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5, 0.75, 0.0]).reshape(1, 1, 6).repeat(1, 2, 1)
    y = threshold_activation(torch.relu(x), t)
    want = nn.Threshold(0.5, 0.0)(x)
    assert torch.equal(y[:, 0].isnan(), want[:, 0].isnan()) and y[0, 0, 0].isnan()
    assert y[0, 0, 1:].tolist() == want[0, 0, 1:].tolist() == [math.inf, 0, 0, 0.75, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_thresholds_by_channel_are_the_same_with_a_gradient(dtype, form):
    torch.manual_seed(0)
    t = torch.tensor([0.0, 0.3, 1.0, 0.7])
    plain = torch.relu(torch.randn(3, 4, 5, 6)).to(dtype).contiguous(memory_format=form)
    plain[0, :, 0, 0] = t.to(dtype)  # on the threshold: dropped
    plain[0, :, 0, 1] = torch.nextafter(t.to(dtype), torch.tensor(9.0, dtype=dtype))  # the next number: kept
    plain[0, :, 0, 2] = torch.nan
    plain[0, :, 0, 3] = torch.inf
    y = plain.clone().requires_grad_()
    kept = threshold_activation(y, t)
    want = threshold_activation(plain, t)
    assert kept.dtype == dtype and kept.is_contiguous(memory_format=form)
    torch.testing.assert_close(kept.detach(), want, rtol=0, atol=0, equal_nan=True)
    g = torch.randn_like(want)
    kept.backward(g)
    assert torch.equal(y.grad, torch.where(plain <= t.to(dtype).reshape(1, -1, 1, 1), torch.zeros_like(g), g))
    assert threshold_activation(y.double(), t).dtype == torch.float64


def test_a_thresholded_model_pickles():
    model = set_thresholds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), {"1": 0.3})
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -1.0])])
def test_bad_thresholds_are_refused(model, bad):
    with pytest.raises(InputError, match="relu"):
        set_thresholds(model, {"relu": bad})
    with pytest.raises(LayerError, match="silu"):
        set_thresholds(model, {"(model):4": 0.1}, X)
    with pytest.raises(LayerError):
        set_thresholds(model, {"nope": 0.1}, X)


def test_thresholded_models_pickled_by_version_0_1_load():
    import pickle

    x = torch.randn(2, 3, 8, 8)
    model = set_thresholds(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), {"1": 0.25})
    now = pickle.dumps(model, protocol=2)  # which names classes in lines of text
    then = now
    for module in ("sites", "tap", "thresholds"):
        then = then.replace(f"cactzip.activations.{module}\n".encode(), b"cactzip.activations\n")
    assert then != now and b"cactzip.activations\n" in then
    for data in (now, then):
        back = pickle.loads(data)
        assert torch.equal(back(x), model(x)) and get_thresholds(back) == {"1": 0.25}


class Interrupted(nn.Module):
    """Raises what it is told to in the middle of a pass."""

    error: BaseException | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


def _interrupted():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(Interrupted(), nn.Conv2d(8, 8, 3)), nn.ReLU(inplace=True)
    ).eval()


def _function_modes():
    return len(torch.overrides._get_current_function_mode_stack())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, MemoryError, ValueError]
)
def test_interrupt_leaks_mode(error):
    model = set_thresholds(_interrupted(), {"1": 0.5, "3": 0.05})
    x = torch.randn(2, 3, 12, 12)
    want = model(x)
    for call in (model, lambda x: model[2](model[:2](x))):
        model[2][0].error = error()
        with pytest.raises(error):
            call(x)
        assert _function_modes() == 0  # while the traceback still holds the frames
        model[2][0].error = None
        assert torch.equal(model(x), want)


def _every_line(run, end, step=7):
    """Calls ``run`` again and again, each time interrupted at a later line of Python, until it is through."""
    for n in itertools.count(1, step):
        left = n

        def trace(frame, event, arg):
            nonlocal left
            left -= event in ("line", "call")
            if not left:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            run()
            through = True
        except KeyboardInterrupt:
            through = False
        finally:
            sys.settrace(before)
        end()
        if through:
            return n
    return 0


def test_an_interrupt_at_any_line_of_a_pass():
    model = set_thresholds(_interrupted(), {"1": 0.5, "3": 0.05})
    x = torch.randn(2, 3, 8, 8)
    want, seen = model(x), []
    tap = ActivationTap(model, lambda s, y: seen.append(s.name)).attach()

    def end():
        seen.clear()
        assert torch.equal(model(x), want) and seen == ["1", "3"] and _function_modes() == 0

    assert _every_line(lambda: model(x), end) > 200
    tap.detach()
    assert torch.equal(model(x), want)


def test_an_interrupt_at_any_line_of_watching_leaves_the_model_as_it_was():
    model = _interrupted().train()
    x = torch.randn(2, 3, 8, 8)

    def end():
        assert model.training and _function_modes() == 0 and torch.is_grad_enabled()
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    assert _every_line(lambda: find_sites(model, x), end, 41) > 1000


def test_a_cancelled_task_in_a_pass():
    model = set_thresholds(_interrupted(), {"1": 0.5})
    x = torch.randn(2, 3, 8, 8)
    want = model(x)

    async def cancelled():
        model[2][0].error = asyncio.CancelledError()
        return model(x)

    async def both():
        task = asyncio.ensure_future(cancelled())
        await asyncio.wait([task])
        model[2][0].error = None
        return task.cancelled(), model(x)

    done, got = asyncio.run(both())
    assert done and torch.equal(got, want) and _function_modes() == 0


def test_replicas_as_of_data_parallel_run_their_own_weights(model):
    set_thresholds(model, {"relu": 0.2})
    conv = model.conv._replicate_for_data_parallel()
    conv.weight, conv.bias = torch.zeros_like(model.conv.weight), model.conv.bias.detach()
    assert torch.equal(conv(X), F.conv2d(X, conv.weight, conv.bias, padding=1))
    shallow = copy.copy(model)
    assert torch.equal(shallow(X), model(X))


def test_forward_called_by_itself_is_the_model_without_taps(model):
    plain = model(X)
    set_thresholds(model, {"relu": 0.2})
    assert not torch.equal(model(X), plain)
    assert torch.equal(model.relu.forward(X), X.relu())
    assert list(inspect.signature(model.forward).parameters) == ["x"]


def test_scripted_modules_are_refused_and_nothing_stays(model):
    scripted = nn.Sequential(nn.Conv2d(3, 3, 1), torch.jit.script(nn.ReLU()))
    with pytest.raises(UnsupportedError, match="ScriptModule"):
        ActivationTap(scripted, lambda s, y: None).attach()
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in [scripted, scripted[0]])
