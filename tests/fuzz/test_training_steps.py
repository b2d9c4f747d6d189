"""A short round of random steps of training; `make fuzz-interop N=...` runs thousands."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import training_steps


def test_packed_steps_are_as_plain_ones() -> None:
    tally = training_steps.run(0, 200)
    assert tally["equal"] >= 80 and tally["refused"] >= 10
