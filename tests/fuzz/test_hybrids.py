"""A short round of random hybrid networks; `make fuzz-interop N=...` runs hundreds."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import hybrids


def test_hybrids_are_as_in_float64() -> None:
    tally = hybrids.run(1000, 2)
    assert not tally["faults"] and tally["whole"] >= 1
