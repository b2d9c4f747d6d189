"""The toy network and data of the sparsification tests."""

from __future__ import annotations

import pytest
from toys import Net, loader, net

from actzip.sparsify import sparsify


@pytest.fixture(scope="session")
def trained() -> Net:
    """A trained toy network; tests do not change it."""
    return sparsify(net(), loader(), None, {"epochs": 25, "lr": 0.01, "optimizer": "adam", "alpha": 0})
