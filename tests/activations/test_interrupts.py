"""What watches a model leaves it whole, whatever ends the block."""

import asyncio
import itertools
import sys
from functools import partial

import pytest
import torch
from torch import nn

import actzip
from actzip.activations import (
    ActivationTap,
    find_sites,
    set_thresholds,
)


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
    """Calls ``run`` again and again, each time interrupted at a later line of Python, until it is through.

    PyTorch may put a mode back as late as the frames of the interrupt go. It sees nothing then, and
    goes with the next pass that is watched: there is one before ``end`` looks.
    """
    next_pass = set_thresholds(nn.Sequential(nn.ReLU()), {"0": 0.5})
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
        next_pass(torch.zeros(1))
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


def test_an_interrupt_at_any_line_of_a_profile_leaves_the_model_as_it_was():
    model = _interrupted().train()
    x = torch.randn(2, 3, 8, 8)

    def end():
        assert all(m.training for m in model.modules()) and _function_modes() == 0
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())

    run = partial(actzip.profile, model, [x], engine=False, whatif_images=0, codecs=())
    assert _every_line(run, end, 97) > 1000


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
