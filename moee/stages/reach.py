"""Whether the MLPs hold as many multiply-accumulates as a recipe's budget asks for."""

from __future__ import annotations

from torch import nn

from moee.methods.neurons.choice import ffn_budget
from moee.methods.recipe import Recipe
from moee.methods.registry import method_of
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
        ffn_budget(whole, cut, target, most, floor=floor)
    if asked <= least:  # nothing is left to be cut
        ffn_budget(whole, cut, target, least, floor=floor)
