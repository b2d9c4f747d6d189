"""The one-page report of an acceleration: self-contained HTML."""

from __future__ import annotations

from importlib import resources
from typing import Any

__all__ = ["render"]


def render(found: dict[str, Any]) -> str:
    """The page, of what ``Acceleration.to_dict()`` gives."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda v: f"{100 * v:.1f} %"
    environment.filters["n"] = lambda v, digits=2: "" if v is None else f"{v:.{digits}f}"
    source = resources.files("actzip.accelerate").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        r=found, b=found["before"], a=found["after"], clock=found["clock"]
    )
