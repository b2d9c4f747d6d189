"""Stage 1: more zeros in the activation maps of a trained network, at no loss of accuracy.

sparse = actzip.sparsify(model, train, val, {"epochs": 5, "alpha": "auto"})

penalty = ActivationPenalty(model, alpha=0.5, example=x)        # in your own loop
loss = criterion(model(x), y) + penalty()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.sparsify.config import SparsifyConfig
from actzip.sparsify.costs import MapCost, Measurement, map_costs, measure
from actzip.sparsify.learned import LearnedThresholds
from actzip.sparsify.penalties import KINDS, WEIGHTINGS, ActivationPenalty
from actzip.sparsify.thresholds import Calibration, agreement, calibrate_thresholds
from actzip.sparsify.train import EpochResult, SparsifyResult, sparsify, sparsify_result

__all__ = [
    "KINDS",
    "WEIGHTINGS",
    "ActivationPenalty",
    "Calibration",
    "EpochResult",
    "LearnedThresholds",
    "MapCost",
    "Measurement",
    "SparsifyConfig",
    "SparsifyResult",
    "agreement",
    "calibrate_thresholds",
    "map_costs",
    "measure",
    "sparsify",
    "sparsify_result",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "sparsify")
