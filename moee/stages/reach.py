"""Whether the MLPs hold as many multiply-accumulates as a recipe's budget asks for."""

from __future__ import annotations

import math
from contextlib import suppress

from torch import nn

from moee.errors import UserError
from moee.methods.heads.widths import narrowest_and_full
from moee.methods.neurons.choice import ffn_budget
from moee.methods.recipe import Recipe
from moee.methods.registry import method_of
from moee.methods.tokens import TokensOptions, schedule
from moee.models.model import Shape


def refuse_beyond_reach(recipe: Recipe, dense: nn.Module, shape: Shape, whole: int, cut: int) -> None:
    """Raise `OutOfReach` where MLPs of `cut` multiply-accumulates an image cannot meet the budget of the recipe on a `dense`
    model of `whole` ones, on images of `shape`."""
    budget = recipe.method.budget(recipe.cut)
    if budget is None:
        return
    target, floor = budget
    saved = [method_of(step).saves(dense, shape, step) for step in recipe.first]
    least, most = sum(low for low, _ in saved), sum(high for _, high in saved)
    asked = (1 - target) * whole
    if asked - most >= cut or not recipe.first:  # even so the MLPs do not hold enough
        further = _further(recipe, dense, shape) if asked - most >= cut else []
        ffn_budget(whole, cut, target, most, floor=floor, further=further)
    if asked <= least:  # nothing is left to be cut
        ffn_budget(whole, cut, target, least, floor=floor)


def _further(recipe: Recipe, dense: nn.Module, shape: Shape) -> list[str]:
    """The options by which this model saves more than the recipe does: only such as it can take."""
    given = {name: value for step in recipe.first for name, value in step.model_dump().items()}
    further = []
    with suppress(UserError):  # no attention that can be narrowed
        low, full = map(sum, zip(*narrowest_and_full(dense, shape), strict=True))
        least = math.ceil(100 * low / full) / 100
        if least < (given.get("attention_macs") or 1):
            further.append(f"--attention-macs {least:g}")
    if given.get("merge_tokens") is None:
        less = round(0.8 * (given.get("token_macs") or 1), 2)
        with suppress(UserError):  # tokens that cannot be merged, or not so many
            schedule(dense, shape, TokensOptions(token_macs=less))
            further.append(f"--token-macs {less:g}")
    return further
