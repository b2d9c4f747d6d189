"""Experiments: a recipe (one YAML file), run stage by stage, resumable, with results as JSON and a report as HTML.

recipe = load_recipe("recipes/lenet5-mnist/sparsify.yaml")
results = reproduce(recipe, out="out/lenet5")      # goes on where an earlier run was stopped
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actzip.experiment.recipe import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from actzip.experiment.run import reproduce

__all__ = ["Recipe", "load_recipe", "parse_recipe", "reproduce"]


def __getattr__(name: str) -> Any:
    if name == "reproduce":
        from actzip.experiment.run import reproduce

        return reproduce
    raise AttributeError(f"module 'actzip.experiment' has no attribute {name!r}")
