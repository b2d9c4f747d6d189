"""Where the zeros, the bits and the time are: per-layer statistics of activation maps, and reports of them.

``profile(model, loader)``, or ``profile("resnet18", "photos/")``, runs the model over the inputs
and counts, layer by layer: density and its spread, effective MACs (exactly, borders and strides
included), what each codec makes of each map, and what the engine gains by the clock. See
``docs/profile.md`` for every figure's definition and the JSON's schema.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.profile.collect import Collection, collect, split_inputs
from actzip.profile.report import Comparison, Report, compare, load_report, schema
from actzip.profile.run import profile
from actzip.profile.whatif import what_if

__all__ = [
    "Collection",
    "Comparison",
    "Report",
    "collect",
    "compare",
    "load_report",
    "profile",
    "schema",
    "split_inputs",
    "what_if",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "profile")
