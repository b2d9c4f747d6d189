"""How batches and outputs are read."""

from __future__ import annotations

import types

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from actzip.errors import InputError
from actzip.training.batches import epoch_batches, logits, unpack

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"x": X, "y": Y}, {"pixel_values": X, "labels": Y}])
def test_batches_with_labels(batch: object) -> None:
    x, y = unpack(batch)
    assert x is X and y is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], {"image": X}])
def test_batches_without_labels(batch: object) -> None:
    x, y = unpack(batch)
    assert x is X and y is None


@pytest.mark.parametrize("batch", [None, (X, Y, Y), {"z": X}, (1, 2), "x"])
def test_other_batches_are_refused(batch: object) -> None:
    with pytest.raises(InputError, match=f"not {type(batch).__name__}"):
        unpack(batch)


def test_logits_of_outputs_with_more_than_logits() -> None:
    for out in (X, (X, Y), types.SimpleNamespace(logits=X)):
        assert logits(out) is X
    with pytest.raises(InputError, match="gives a dict"):
        logits({"logits": X})


def test_the_order_of_an_epoch_follows_from_seed_and_epoch() -> None:
    data = DataLoader(TensorDataset(torch.arange(50)), 5, shuffle=True)

    def order(epoch: int, seed: int) -> list[int]:
        torch.randn(3)  # whatever was drawn before
        return torch.cat([b for (b,) in epoch_batches(data, epoch, seed)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0) and order(1, 0) != order(1, 1)
