"""A faster network from a model and a few unlabelled inputs, without training, with the proof of
what it keeps.

fast = actzip.accelerate(model, inputs, keep=0.99) print(fast)                       # what was
gained, what is kept, on inputs held out y = fast(x); fast.save("fast.actzip");
fast.export("fast.onnx"); fast.to_html("report.html")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy, make_callable
from actzip.accelerate.api import accelerate
from actzip.accelerate.promise import Metric, Promise
from actzip.accelerate.result import Acceleration, Attempt
from actzip.profile.work import LayerWork, Work, measure_work, worth_of_zeros

__all__ = [
    "Acceleration",
    "Attempt",
    "LayerWork",
    "Metric",
    "Promise",
    "Work",
    "accelerate",
    "measure_work",
    "worth_of_zeros",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__)

make_callable(__name__, "accelerate")
