"""Options that do nothing beside others of the same step: said, since who gives one expects another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moee.errors import OptionError
from moee.methods.recipe import Recipe


def refuse_idle_options(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Raise `OptionError` for the first of the options `given`, by their names, that has another value than it has anyway, and
    that the other options leave without effect in every step of the `recipe` that knows it."""
    for name, value in given.items():
        steps = [step for step in recipe.steps if name in type(step).model_fields]
        reasons = [reason for step in steps if (reason := step.idle().get(name))]
        if value is not None and steps and len(reasons) == len(steps) and value != type(steps[0]).model_fields[name].default:
            raise OptionError(f"--{name.replace('_', '-')} is for {reasons[0]}; leave it out", name)
