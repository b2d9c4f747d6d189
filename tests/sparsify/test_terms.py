"""The kinds of penalty, each against its formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from toys import net

from actzip.errors import InputError
from actzip.sparsify import KINDS, ActivationPenalty
from actzip.sparsify.terms import TERMS, get

FORMULAS = {
    "l1": lambda x, s, b: (x / s).abs().mean(),
    "tl1": lambda x, s, b: ((1 + b) * (x / s).abs() / (b + (x / s).abs())).mean(),
    "log": lambda x, s, b: (torch.log1p((x / s).abs() / b) / math.log1p(1 / b)).mean(),
    "hoyer": lambda x, s, b: (
        (x.flatten(1).sum(1).square() / x.flatten(1).square().sum(1)).mean() / x[0].numel()
    ),
}


def test_every_kind_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(TERMS) == set(KINDS)


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_value_and_gradient_are_those_of_the_formula(kind: str, normalised: bool, beta: float) -> None:
    torch.manual_seed(0)
    y = torch.relu(torch.randn(3, 4, 5, 6))
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0]).reshape(1, 4, 1, 1) if normalised else None
    mine, exact = y.clone().requires_grad_(), y.double().requires_grad_()
    value = TERMS[kind].mean(mine, scale, beta)
    want = FORMULAS[kind](exact, scale.double() if scale is not None else 1.0, beta)
    value.backward()
    want.backward()
    assert value.dtype == torch.float32 and value.dim() == 0
    assert float(value.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    on = y > 0  # at 0 a norm has many gradients
    assert torch.allclose(mine.grad[on].double(), exact.grad[on], rtol=1e-4, atol=1e-9)


def test_an_unknown_kind_is_refused_and_never_taken_for_another() -> None:
    model = net().train()
    with pytest.raises(InputError, match=r"l1, tl1, log, hoyer.*not 'hoyre'; did you mean 'hoyer'"):
        ActivationPenalty(model, "hoyre")
    with pytest.raises(InputError, match="not 'lg'"):
        get("lg")
    penalty = ActivationPenalty(model)
    penalty.kind = "exp"
    with penalty, pytest.raises(InputError, match="not 'exp'"):
        model(torch.randn(4, 3, 8, 8))


def test_the_command_line_names_every_kind() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "actzip.cli", "sparsify", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    assert all(kind in out for kind in KINDS)
