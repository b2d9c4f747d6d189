"""The report as one self-contained HTML page: no request leaves it, light and dark, usable by keyboard."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from actzip.profile.verdict import verdict_of
from actzip.text import visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actzip.profile.collect import Sample

__all__ = ["render"]


def render(data: dict[str, Any], samples: Mapping[str, Sample]) -> str:
    """The HTML page of a report's plain data and its sample maps, as text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files("actzip.profile").joinpath("report.html.j2").read_text(encoding="utf-8")
    payload = {**data, "samples": _pictures(samples), "verdict": verdict_of(data)}
    # "</script>" inside a string would end the script element
    text = json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c")
    return environment.from_string(source).render(
        title=f"actzip profile: {visible(payload['model']['name'])}", data=text
    )


def _pictures(samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Real activation maps as 8-bit grey levels (0 is an exact zero; magnitudes on a square-root scale)."""
    import base64

    out = {}
    for name, sample in samples.items():
        values = np.abs(sample.values.astype(np.float32))
        values = np.where(np.isfinite(values), values, 0)
        step = max(1, -(-max(values.shape[1:]) // 64))
        values = values[:, ::step, ::step]
        peak = float(values.max()) or 1.0
        grey = np.where(values == 0, 0, 1 + np.floor(254 * np.sqrt(values / peak))).astype(np.uint8)
        out[name] = {
            "channels": sample.channels,
            "height": int(grey.shape[1]),
            "width": int(grey.shape[2]),
            "pixels": base64.b64encode(grey.tobytes()).decode(),
        }
    return out
