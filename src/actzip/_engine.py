"""``actzip._engine``, where the native engine was in 0.1 and before: one module with
``actzip._native._engine``."""

import sys

from actzip._native import _engine

sys.modules[__name__] = _engine
