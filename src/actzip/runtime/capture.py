"""The former name of :mod:`actzip.runtime.from_torch`."""

from __future__ import annotations

from actzip.runtime.from_torch import capture, flat_inputs, from_exported

__all__ = ["capture", "flat_inputs", "from_exported"]
