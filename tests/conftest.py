"""Shared fixtures. Data and weights are optional: what needs an absent file skips with the reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

from actzip.errors import UnsupportedError

SHARED = Path(os.environ.get("ACTZIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/` and `weights/`; skips where there is none."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no shared data at {SHARED} (set ACTZIP_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def shared_file(shared: Path):
    """shared_file("weights/x.safetensors") -> Path; skips, naming the file, where it is absent."""

    def get(name: str) -> Path:
        path = shared / name
        if not path.exists():
            pytest.skip(f"no {name} under {shared}")
        return path

    return get


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """What only an older PyTorch keeps from the engine skips with that reason."""
    try:
        return (yield)
    except UnsupportedError as error:
        if "PyTorch before 2.6" in str(error):
            pytest.skip("torch.export before PyTorch 2.6 takes operators apart")
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, by reason: only missing data and hardware should be among them."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.write_sep("-", f"{sum(reasons.values())} skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5}  {reason}")
