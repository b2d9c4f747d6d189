"""Experiments: a recipe (one YAML file), run stage by stage, resumable, with results as JSON and a
report as HTML.

recipe = load_recipe("recipes/lenet5-mnist/sparsify.yaml")
results = reproduce(recipe, out="out/lenet5")      # goes on where an earlier run was stopped
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actzip._module import lazy
from actzip.experiment.recipe import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from actzip.experiment.run import reproduce

__all__ = ["Recipe", "load_recipe", "parse_recipe", "reproduce"]

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, {"reproduce": "run"})
