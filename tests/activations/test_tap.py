"""Sites: seen, named, chosen and replaced in any module."""

import copy
import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from nets import X
from torch import nn

from actzip.activations import (
    ActivationTap,
    find_sites,
    select_sites,
    set_thresholds,
)
from actzip.errors import InputError, LayerError, UnsupportedError


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
