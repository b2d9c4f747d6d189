"""Parts of a training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actzip.errors import DataError
from actzip.training.loop import WeightAverage, read_checkpoint, train_mode


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def test_the_average_is_that_of_the_formula_and_the_model_gets_its_weights_back() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    average.start()
    want = {k: v.double().clone() for k, v in model.state_dict().items()}
    for _ in range(5):
        model(torch.randn(2, 3, 6, 6))  # moves the running statistics
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 3, 3, 3))
        average.update()
        for k, v in model.state_dict().items():
            want[k] = 0.9 * want[k] + 0.1 * v.double() if v.is_floating_point() else v.double()
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError), average.applied():
        for k, v in model.state_dict().items():
            assert torch.allclose(v.double(), want[k], rtol=1e-5)
        raise KeyError
    assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
    assert int(average.weights()["1.num_batches_tracked"]) == 5


def test_without_a_decay_there_is_no_average() -> None:
    model = network()
    average = WeightAverage(model, 0.0)
    average.start()
    average.update()
    assert average.values == {}
    weights = average.weights()
    with average.applied(), torch.no_grad():
        model[0].weight.zero_()
    assert torch.count_nonzero(weights["0.weight"]) and not torch.count_nonzero(model[0].weight)


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_norms_keep_their_statistics(freeze: bool) -> None:
    model = network().eval()
    train_mode(model, freeze_norm=freeze)
    model(5 + torch.randn(8, 3, 6, 6))
    assert model.training and model[1].training is not freeze
    assert bool((model[1].running_mean == 0).all()) is freeze


def test_a_checkpoint_that_is_none_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    assert read_checkpoint(None) is None and read_checkpoint(path) is None
    torch.save({"a": 1}, path)
    assert read_checkpoint(path) == {"a": 1}
    for content in (b"", b"no", torch.nn.Linear(1, 1), [1, 2], torch.zeros(3)):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(DataError, match=r"(?s)c\.pt.*delete it"):
            read_checkpoint(path)
