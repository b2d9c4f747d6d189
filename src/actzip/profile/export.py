"""A report for simulators of accelerators: a new folder, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actzip._version import __version__
from actzip.checks import one_of
from actzip.errors import DataError, InputError
from actzip.profile.workloads import LeftOut, workloads
from actzip.text import visible

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KINDS", "Exported", "check_folder", "check_kind", "export"]

#: What can be written, and for what.
KINDS = {
    "timeloop": "Timeloop and Sparseloop problems, version 0.4: one YAML file a layer.",
    "scalesim": "SCALE-Sim topology.csv (v2 and v3). SCALE-Sim models no density of activations.",
    "stonne": "STONNE: tensors of the first image, layers.csv, and commands.sh for its own program.",
}


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, how many layers, and those left out with the reason."""

    folder: Path
    layers: int
    left_out: list[LeftOut]

    def __str__(self) -> str:
        left = "; ".join(f"{x.name}: {x.why}" for x in self.left_out)
        return f"{self.folder}: {self.layers} layers" + (f"; left out: {left}" if left else "")


def check_kind(kind: str) -> str:
    """``kind``, one of :data:`KINDS`.

    Raises:
        InputError: it is another.
    """
    return one_of(kind, "the simulator", KINDS)


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """``folder``, which is not there yet, in a folder that is.

    Raises:
        InputError: it is there. DataError: the folder around it is not.
    """
    path = Path(folder)
    if os.path.lexists(path):
        raise InputError(f"{path} exists; name a folder that does not")
    if not path.absolute().parent.is_dir():
        raise DataError(f"cannot make {path}: there is no folder {path.absolute().parent}")
    return path


def export(
    data: Mapping[str, Any],
    kind: str,
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    batch: Any = None,
) -> Exported:
    """Writes the layers of a report's ``data`` for a simulator; see :meth:`Report.export`."""
    check_kind(kind)
    path = check_folder(folder)
    layers, left = workloads(data)
    if not layers:
        raise InputError("the report has no convolution or linear layer that a simulator knows")
    if kind == "stonne" and (model is None or batch is None):
        raise InputError("stonne takes tensors: give model and batch, the inputs to run it on")
    temporary = path.absolute().parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir()
        if kind == "stonne":
            from actzip.profile import stonne

            left = left + stonne.export(layers, data, temporary, model, batch)  # type: ignore[arg-type]
        elif kind == "scalesim":
            from actzip.profile import scalesim

            left = left + scalesim.export(layers, data, temporary)
        else:
            from actzip.profile import timeloop

            left = left + timeloop.export(layers, data, temporary)
        written = len(data["layers"]) - len(left)
        (temporary / "README.txt").write_text(_readme(kind, data, written, left), encoding="utf-8")
        check_folder(path)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(path, written, left)


def _readme(kind: str, data: Mapping[str, Any], written: int, left: list[LeftOut]) -> str:
    lines = [
        KINDS[kind],
        f"{written} layers of {data['model']['name']}, {data['data']['images']} images from "
        f"{data['data']['source']}; actzip {__version__}.",
        *(f"warning: {w}" for w in data["warnings"]),
    ]
    if left:
        lines += ["Left out:", *(f"  {x.name}: {x.why}" for x in left)]
    return "".join(f"{visible(line)}\n" for line in lines)
