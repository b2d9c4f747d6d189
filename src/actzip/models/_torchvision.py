"""Import torchvision (and timm, which imports it) where its binary part does not match the installed torch.

A torchvision wheel built for CUDA beside a CPU-only torch cannot load its C++ operators; its models do not
need them, yet the import itself fails because two operators that it describes are missing. Declaring those
two makes the import work; calling them still fails, with torch's own message.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from actzip.errors import DataError

__all__ = ["import_timm", "import_torchvision"]

_DECLARED: list[Any] = []  # the Library must stay alive, or its operators vanish


def import_torchvision() -> ModuleType:
    """The torchvision module.

    Raises:
        DataError: torchvision is not installed, or cannot be imported with this torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise DataError("torchvision is not installed; `pip install actzip[data]` brings it") from error
    except (RuntimeError, ImportError) as error:
        if "torchvision::" not in str(error):
            raise DataError(f"torchvision cannot be imported with this torch: {error}") from error
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    try:
        return importlib.import_module("torchvision")
    except Exception as error:
        raise DataError(f"torchvision cannot be imported with this torch: {error}") from error


def import_timm() -> ModuleType:
    """The timm module, with :func:`import_torchvision` done first.

    Raises:
        DataError: timm is not installed.
    """
    import_torchvision()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise DataError("timm is not installed; `pip install timm` brings it") from error
