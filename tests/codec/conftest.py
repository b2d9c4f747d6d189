"""Fixtures for codec tests: run a test on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actzip import cpu


@pytest.fixture(params=cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once with each instruction set forced."""
    with cpu.forced(request.param):
        yield request.param
