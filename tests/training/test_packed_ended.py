"""Steps that end in the middle: by an interrupt at any line, or for want of memory at any allocation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from actzip.training import packed_activations
from ended import Ended, NoMemory
from odd import saved_tensors_hooks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8 * 9, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)), inplace=True)
        x = F.relu6(self.conv2(F.max_pool2d(x, 2)))
        return self.fc(F.dropout(F.adaptive_avg_pool2d(x, 3), 0.3).flatten(1))


class Step:
    """Forward under packing and backward, as two calls, and what they give when nothing ends them."""

    def __init__(self, bits):
        torch.manual_seed(0)
        self.net, self.bits = Net().train(), bits
        self.x, self.y = torch.randn(4, 3, 24, 24), torch.tensor([0, 1, 2, 3])
        self.wanted = self.gradients(self.forward())

    def forward(self):
        torch.manual_seed(1)
        with packed_activations(self.net, self.bits, min_bytes=0):
            return F.cross_entropy(self.net(self.x), self.y)

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.net.parameters()), retain_graph=True)

    def check(self, found):
        assert all(torch.equal(a, b) for a, b in zip(found, self.wanted, strict=True))
        assert torch._C._len_torch_function_stack() == 0 and torch._C._is_torch_function_enabled()
        assert torch.is_grad_enabled()
        assert not saved_tensors_hooks()


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("ended", "stride"), [(Ended, 31), (NoMemory, 1)])
def test_a_forward_pass_that_ends_leaves_nothing_behind(bits, ended, stride):
    step = Step(bits)
    for n in itertools.count(1, stride):
        try:
            with ended(n):
                step.forward()
            break
        except (KeyboardInterrupt, MemoryError):
            pass
        step.check(step.gradients(step.forward()))
    assert n > 4


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(("ended", "stride"), [(Ended, 31), (NoMemory, 1)])
def test_a_backward_pass_that_ended_can_run_again(bits, ended, stride):
    step = Step(bits)
    for n in itertools.count(1, stride):
        loss = step.forward()
        try:
            with ended(n):
                step.gradients(loss)
            break
        except (KeyboardInterrupt, MemoryError):
            pass
        step.check(step.gradients(loss))
    assert n > 4
