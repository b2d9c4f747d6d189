"""A short round of random ONNX graphs; `make fuzz-interop N=...` runs thousands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent))
import onnx_graphs


@pytest.mark.parametrize("seed", range(3))
def test_random_graphs_give_what_onnx_runtime_and_the_reference_give(seed: int) -> None:
    tally, wrong = onnx_graphs.run(seed, 200, seconds=25)
    assert not wrong
    assert tally["whole"] > 0.8 * tally["graphs"]  # the engine itself is what is tested
