"""What every training shares: precision, mixup and how batches are read."""

from __future__ import annotations

from actzip._module import lazy

#: Public names and the modules that define them, imported on first use.
_HOMES: dict[str, str] = {
    "autocast": "precision",
    "mixed": "mixup",
}

__all__ = ["autocast", "mixed"]

__getattr__ = lazy(__name__, _HOMES)
