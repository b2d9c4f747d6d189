"""Shared fixtures. Data and weights are optional: what needs an absent file skips with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
