"""The tuning cache: which kernel won which trial, on disk, one file per CPU, instruction set and version.

Where: the folder of ``ACTZIP_CACHE``, else ``actzip`` in the platform's cache folder. A file that
cannot be read, is damaged or belongs to something else counts as empty and is written anew; a
folder that cannot be written to costs nothing but the trials. Files are written under another name
and renamed, so readers never see half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

__all__ = ["TuningCache", "cache_dir"]

_FORMAT = 3


def cache_dir() -> Path:
    """``ACTZIP_CACHE``, else the platform's folder for caches; it need not exist."""
    given = os.environ.get("ACTZIP_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "actzip"


class TuningCache:
    """Winners of trials by key, for one ``identity`` (CPU, instruction set, version ...). Safe from
    several threads.

    ``get(key)`` -> a dict as it was put, or None. ``save()`` merges what was put with what is on
    disk by then.
    """

    def __init__(self, identity: dict[str, str], folder: Path | None = None) -> None:
        self.identity = dict(identity)
        text = json.dumps(self.identity, sort_keys=True)
        name = f"tuning-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.path = (cache_dir() if folder is None else folder) / name
        self._lock = threading.Lock()
        self._entries = self._read()
        self._new: dict[str, dict[str, Any]] = {}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if (
            not isinstance(data, dict)
            or data.get("format") != _FORMAT
            or data.get("identity") != self.identity
        ):
            return {}
        entries = data.get("entries")
        if not isinstance(entries, dict):
            return {}
        return {k: v for k, v in entries.items() if isinstance(v, dict)}

    def get(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            found = self._new.get(key) or self._entries.get(key)
        return dict(found) if found else None

    def put(self, key: str, entry: dict[str, Any]) -> None:
        with self._lock:
            self._new[key] = dict(entry)

    def save(self) -> bool:
        """Writes what is new; False where the folder cannot be written to."""
        with self._lock:
            if not self._new:
                return True
            merged = {**self._read(), **self._new}
            data = {"format": _FORMAT, "identity": self.identity, "entries": merged}
            temporary = ""
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name)
                with os.fdopen(handle, "w", encoding="utf-8") as f:
                    json.dump(data, f, indent=1, sort_keys=True)
                Path(temporary).replace(self.path)
            except OSError:
                if temporary:
                    with contextlib.suppress(OSError):
                        Path(temporary).unlink()
                return False
            self._entries, self._new = merged, {}
            return True
