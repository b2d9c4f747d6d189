"""A short round of damaged ONNX models; `make fuzz-onnx N=...` runs thousands under sanitizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
sys.path.insert(0, str(Path(__file__).parent))
import onnx_models


@pytest.mark.parametrize("seed", range(3))
def test_damaged_models_end_in_a_typed_error_or_run(seed: int) -> None:
    tally = onnx_models.run(seed, 100)
    assert tally["ran"] + tally["built"] >= 10  # what is damaged slightly still gets to the engine
    assert tally["DataError"] >= 10 and tally["InputError"] >= 10


def test_the_models_that_are_damaged_are_whole() -> None:
    from actzip.runtime.from_onnx import from_onnx

    for model in onnx_models.seeds():
        assert len(from_onnx(model).nodes) >= 10
