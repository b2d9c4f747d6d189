"""The former place of what :mod:`actzip.runtime.tracing` and :mod:`actzip.runtime.from_torch` hold."""

from __future__ import annotations

from actzip.runtime.from_torch import from_exported
from actzip.runtime.tracing import capture, flat_inputs

__all__ = ["capture", "flat_inputs", "from_exported"]
