"""Which folders are searched for data."""

from __future__ import annotations

import os
from pathlib import Path

from actzip.errors import DataError

__all__ = ["data_roots"]


def data_roots(folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """Folders that are searched for data, in order: ``folder``, ``$ACTZIP_DATA``,
    ``$ACTZIP_SHARED/data``, ``../shared/data``.

    Raises:
        DataError: ``folder`` or ``$ACTZIP_DATA`` is given and is no folder.
    """
    roots: list[Path] = []
    for given, where in ((folder, "the data folder"), (os.environ.get("ACTZIP_DATA"), "ACTZIP_DATA")):
        if given:
            path = Path(given).expanduser()
            if not path.is_dir():
                raise DataError(f"{where} {path} does not exist or is no folder")
            roots += [path, path / "data"]
    shared = os.environ.get("ACTZIP_SHARED")
    roots += [Path(shared) / "data"] if shared else []
    roots.append(Path("../shared/data"))
    return [r for r in dict.fromkeys(roots) if r.is_dir()]
