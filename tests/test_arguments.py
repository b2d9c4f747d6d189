"""What the public functions are given by mistake ends in an error that actzip raises on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import actzip
import odd
from actzip.activations import load_thresholds, set_thresholds
from actzip.quantize.train import finetune
from actzip.sparsify import ActivationPenalty, SparsifyConfig, calibrate_thresholds
from actzip.training import packed_activations

X = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)).eval()


def packed(**kwargs: Any) -> None:
    with packed_activations(**kwargs):
        pass


def configured(**kwargs: Any) -> Any:
    return SparsifyConfig(**kwargs)


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "profile": (
        actzip.profile.profile,
        actzip.profile.profile,
        lambda: {"model": net(), "loader": [X], "engine": False, "whatif_images": 0, "codecs": ()},
    ),
    "quantize": (
        actzip.quantize.quantize,
        actzip.quantize.quantize,
        lambda: {"model": net(), "calibration": [X], "observer": "minmax"},
    ),
    "finetune": (
        finetune,
        finetune,
        lambda: {"model": actzip.quantize(net(), [X], observer="minmax"), "train": [(X, Y)], "epochs": 1},
    ),
    "calibrate_thresholds": (
        calibrate_thresholds,
        calibrate_thresholds,
        lambda: {"model": net(), "data": [X], "density": 0.3, "samples": 2, "steps": 1, "projections": 1},
    ),
    "ActivationPenalty": (
        ActivationPenalty,
        ActivationPenalty,
        lambda: {"model": net(), "example": X[:1]},
    ),
    "set_thresholds": (set_thresholds, set_thresholds, lambda: {"model": net(), "thresholds": {"1": 0.1}}),
    "load_thresholds": (load_thresholds, load_thresholds, lambda: {"path": "nowhere.json"}),
    "SparsifyConfig": (configured, SparsifyConfig, dict),
    "sparsify": (
        actzip.sparsify.sparsify,
        actzip.sparsify.sparsify,
        lambda: {"model": net(), "train": [(X, Y)], "recipe": {"epochs": 1}},
    ),
    "accelerate": (
        actzip.accelerate.accelerate,
        actzip.accelerate.accelerate,
        lambda: {
            "model": net(),
            "data": [X],
            "by": "macs",
            "compile": False,
            "attempts": 1,
            "distil_steps": 0,
        },
    ),
    "compile": (
        actzip.compile,
        actzip.compile,
        lambda: {"model": net(), "example": X[:1], "tune": False},
    ),
    "load": (actzip.load, actzip.load, lambda: {"model": "nowhere.onnx"}),
    "packed_activations": (packed, packed_activations, lambda: {"model": net()}),
}

#: Values that mean a large amount of work are no mistake.
WORK = ("huge", "large", "inf")
COSTLY = {
    "epochs", "steps", "samples", "projections", "attempts", "distil_steps", "images", "max_images",
    "accumulate", "checks",
}  # fmt: skip
#: Functions and modules of the caller may raise what they like.
THEIRS = {"forward", "evaluate", "metric", "on_batch", "on_epoch", "on_step", "penalty", "progress"}
#: Functions that take longer: of each parameter some of the objects, in turn.
TURNS = {"load": 3, "packed_activations": 3, "ActivationPenalty": 6, "quantize": 6}


def applies(parameter: str, kind: str) -> bool:
    """Whether this is a mistake, and a quick one."""
    if parameter in THEIRS and kind in ("type", "module", "function"):
        return False
    if kind == "True" and parameter in ("tune", "engine", "by", "compile"):
        return False  # the machine would be measured
    if parameter == "model" and kind == "text":
        return False  # near names are looked for among all models
    return not (kind in WORK and parameter in COSTLY)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_odd_arguments(name: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    call, signature, make = FUNCTIONS[name]
    given = inspect.signature(signature).parameters.values()
    turns = TURNS.get(name, 1 if name in ("SparsifyConfig", "set_thresholds", "load_thresholds") else 12)
    calls = []
    for i, parameter in enumerate(p.name for p in given if p.kind is not p.VAR_KEYWORD):
        kinds = {**odd.plain(), **odd.tensors()}
        for kind in list(kinds)[i % turns :: turns]:
            if applies(parameter, kind):
                make_one = lambda p=parameter, v=kinds[kind]: call(**{**make(), p: v})  # noqa: E731
                calls.append((f"{parameter}={kind}", make_one))
    assert list(odd.untyped(calls)) == []
