"""The CPU as actzip sees it: which instruction set its native code uses, and how to force another.

``ACTZIP_ISA=avx2`` in the environment forces one at start; :func:`force` does so from then on. Results do not
depend on it: codecs give the same bytes on every one, kernels the same numbers within float rounding.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actzip._native import _codec, _engine
from actzip.errors import InputError

__all__ = ["force", "forced", "info", "isa", "isas"]


def isa() -> str:
    """The instruction set in use: ``baseline``, ``avx2``, ``avx512``, ``avx512_icl`` or ``neon``."""
    return str(_codec.isa())


def isas() -> list[str]:
    """The instruction sets that this CPU can run, ``baseline`` first and the best last."""
    return list(_codec.isas())


def force(name: str = "") -> None:
    """Use instruction set ``name`` from now on in this process (``""``: the best one).

    Raises:
        InputError: ``name`` is unknown or this CPU cannot run it.
    """
    if not _codec.force_isa(name) or not _engine.force_isa(name):
        raise InputError(f"instruction set {name!r} cannot run on this CPU; these can: {', '.join(isas())}")


@contextmanager
def forced(name: str) -> Iterator[None]:
    """:func:`force` for the length of a ``with`` block."""
    before = isa()
    force(name)
    try:
        yield
    finally:
        force(before)


def info() -> dict[str, Any]:
    """CPU, instruction sets, threads and versions, as they are printed with every measurement."""
    import importlib.metadata

    from actzip._version import __version__

    versions = {"actzip": __version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "torchvision", "onnx", "onnxruntime", "openvino"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": str(_codec.cpu_model()) or platform.processor() or platform.machine(),
        "isa": isa(),
        "isas": isas(),
        "extras": list(_codec.cpu_extras()),
        "isa_warning": str(_codec.isa_warning()),
        "threads": int(_codec.default_threads()),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
    }
