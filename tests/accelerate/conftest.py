"""A cost model of a machine on which time is work, so that no test waits for a calibration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sparsify"))

from actzip.profile import cost
from actzip.sparsify import sparsify


@pytest.fixture(scope="module", autouse=True)
def machine():
    """16 GMAC/s dense or packed, whatever the shape; of a module, so that its fixtures get it too."""
    samples = []
    for storage in ("dense", "packed"):
        for small in (True, False):
            for channels in (16, 64, 256):
                for density in (1.0, 0.5, 0.1) if storage == "packed" else (1.0,):
                    conv = cost.Conv(channels, channels, 14, 14, (3, 3))
                    samples.append(
                        cost.Sample(conv, storage, small, density, cost._work(conv, storage, density) / 16e6)
                    )
    model = cost.CostModel(samples, {"": 1e-7})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.CostModel, "of_this_machine", classmethod(lambda cls, *a, **k: model))
        yield model


@pytest.fixture(scope="session")
def trained():
    """A trained toy network; tests do not change it."""
    from toys import loader, net

    return sparsify(net(), loader(), None, {"epochs": 25, "lr": 0.01, "optimizer": "adam", "alpha": 0})
