"""What users pass as loaders, and what they do to models with a penalty."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import actzip
from actzip import ActivationPenalty
from actzip.errors import ActzipWarning, InputError
from torches import needs_2_5

X, Y = torch.randn(16, 3, 12, 12), torch.randint(0, 4, (16,))
SHORT = {"epochs": 1, "alpha": 1.0}


def mk():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).train()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": X, "labels": Y},
        {"x": X, "y": Y},
        (X, Y.int()),
        (X, Y.numpy()),
        [X, Y.to(torch.uint8)],
    ],
)
def test_dict_validation(batch):
    steps = []
    actzip.sparsify(mk(), [batch], [batch], SHORT, progress=lambda e: steps.append(e["kind"]))
    assert steps.count("step") == 1


@pytest.mark.filterwarnings("ignore")
def test_iterable_dataset():
    steps = []
    loader = DataLoader(Stream(), batch_size=4)
    actzip.sparsify(mk(), loader, loader, SHORT, progress=lambda e: steps.append(e["kind"]))
    assert steps.count("step") == 4


@pytest.mark.parametrize("what", ["generator", "tensor", "number", "zip"])
def test_what_cannot_be_a_loader_is_refused_before_the_first_step(what):
    pairs = list(zip(X.split(4), Y.split(4)))
    wrong = {"generator": (p for p in pairs), "tensor": X, "number": 3, "zip": zip(X.split(4), Y.split(4))}[
        what
    ]
    with pytest.raises(InputError, match="train"):
        actzip.sparsify(mk(), wrong, None, SHORT)
    with pytest.raises(InputError, match="val"):
        actzip.sparsify(mk(), pairs, wrong, SHORT)


@pytest.mark.filterwarnings("ignore")
@needs_2_5
def test_penalty_compiled():
    model = mk()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(X)
    penalty = ActivationPenalty(model, "l1", alpha=1.0, weighting="elements")
    compiled(X)
    through = float(penalty())
    model(X)
    assert through == float(penalty()) > 0
    penalty.detach()
    assert torch.equal(compiled(X), plain)
    torch._dynamo.reset()


def test_a_penalty_that_sees_nothing_says_so():
    model = mk()
    penalty = ActivationPenalty(model, alpha=1.0)
    copy.deepcopy(model)(X)
    with pytest.warns(ActzipWarning, match="saw no pass"):
        assert float(penalty()) == 0
    model(X)
    assert float(penalty()) > 0


@pytest.mark.filterwarnings("ignore")
def test_penalty_deepcopy():
    model = mk()
    penalty = ActivationPenalty(model, alpha=1.0, example=X[:2])
    model(X)
    twin = copy.deepcopy(model)  # between a pass and the penalty: what EMA does
    buffer = io.BytesIO()
    torch.save(model, buffer)
    penalty().backward()
    for _ in range(3):
        twin(X).sum().backward()
    assert not penalty._terms and float(penalty()) == 0
    assert not any(w.taps for m in twin.modules() if (w := m.__dict__.get("forward")))
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(again.eval()(X), model.eval()(X))


@pytest.mark.filterwarnings("ignore")
def test_penalty_with_activation_checkpointing():
    model, want = mk(), mk()
    penalty, other = ActivationPenalty(model, alpha=1.0), ActivationPenalty(want, alpha=1.0)
    for _ in range(3):
        loss = checkpoint(model, X, use_reentrant=False).sum() + penalty()
        loss.backward()
        (want(X).sum() + other()).backward()
    assert not penalty._terms
    assert np.isclose(penalty.last, other.last)
