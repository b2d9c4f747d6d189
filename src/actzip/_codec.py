"""``actzip._codec``, where the native codec was in 0.1 and before: one module with
``actzip._native._codec``."""

import sys

from actzip._native import _codec

sys.modules[__name__] = _codec
