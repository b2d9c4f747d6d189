"""A few of the random hybrid networks; ``make fuzz-interop`` runs many."""

from __future__ import annotations

import hybrids
import pytest


@pytest.mark.parametrize("seed", range(6))
def test_random_hybrids_are_float64s(seed: int) -> None:
    tally = hybrids.run(1000 + seed, 1)
    assert not tally["faults"] and tally["whole"] + tally["parts"] + tally["refused"] == 1
