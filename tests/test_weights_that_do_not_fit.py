"""Weights of another network: one line that names a few keys, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import actzip
from actzip.errors import DataError
from actzip.models import load_weights, save_weights
from actzip.quantize.files import load_quantized, save_quantized


def network(width: int = 8, depth: int = 2) -> nn.Sequential:
    layers = [nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)]
    for layer in layers[1:]:
        layer[0] = nn.Conv2d(width, width, 3)
    return nn.Sequential(*layers)


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (network(width=4), r"of another shape \(0\.0\.weight \(4, 3, 3, 3\) for \(8, 3"),
        (
            network(depth=3),
            r"7 that the model has no place for \(2\.\d\.\w+, 2\.\d\.\w+, 2\.\d\.\w+, \.\.\.\)",
        ),
        (network(depth=1), r"7 missing \(1\.0\.weight, 1\.0\.bias, 1\.1\.weight, \.\.\.\)"),
        (nn.Linear(2, 2), r"14 missing .*; 2 that the model has no place for \(bias, weight\)"),
    ],
)
def test_what_does_not_fit_is_said_in_few_words_and_nothing_is_loaded(
    tmp_path: Path, of: nn.Module, says: str
) -> None:
    save_weights(of, tmp_path / "w.safetensors")
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match=says) as raised:
        load_weights(model, tmp_path / "w.safetensors")
    assert len(str(raised.value).replace(str(tmp_path), "")) < 300
    assert same(model, before)


def test_quantized_weights_that_do_not_fit_are_said_alike(tmp_path: Path) -> None:
    made = actzip.quantize(network(depth=3).eval(), torch.rand(4, 3, 16, 16), bits=8)
    save_quantized(made, tmp_path / "q")
    model = network().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(DataError, match="7 that the model has no place for"):
        load_quantized(model, tmp_path / "q")
    assert same(model, before)


def test_what_fits_in_part_is_loaded_where_asked(tmp_path: Path) -> None:
    save_weights(network(depth=1), tmp_path / "w.safetensors")
    model = network()
    load_weights(model, tmp_path / "w.safetensors", strict=False)
    save_weights(network(width=4), tmp_path / "w.safetensors")
    with pytest.raises(DataError, match="of another shape"):
        load_weights(model, tmp_path / "w.safetensors", strict=False)
