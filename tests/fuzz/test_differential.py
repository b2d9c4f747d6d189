"""A short round of the differential fuzzer; `python tests/fuzz/differential.py` runs as many as are
asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import differential

pytest.importorskip("torch", reason="the cases have bfloat16")


@pytest.mark.parametrize("seed", range(4))
def test_native_and_reference_decoder_agree(seed: int) -> None:
    tally = differential.run(seed, 0, 250)
    assert sum(n for name, n in tally.items() if name.endswith("good")) > 150
    assert sum(n for name, n in tally.items() if name.endswith("refused")) > 300
