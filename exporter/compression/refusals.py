"""What can be said of a job's model, images and budget before its place is touched."""

from __future__ import annotations

from collections.abc import Callable

from exporter.compression.request import ALLOCATION, BASE, Request, possible_heads
from exporter.ship.contents import make_preprocessing
from moee.planning.budget import Budget
from moee.planning.plan import applicable, refuse_incomparable
from moee.planning.search import recipe_of, ways
from moee.stages.session import Session
from moee.stages.space import GRAPHS

Tried = tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]  # methods, shares of the attention's MACs, of merged tokens


def refuse_early(session: Session, request: Request, budget: Budget, say: Callable[[str], None]) -> Tried:
    """What can be tried on the model.

    Raises `UserError` where a bundle's runner cannot prepare images as the model wants them, where the accuracy that the budget
    limits cannot be compared, or where a way of cutting the model does not fit it.
    """
    make_preprocessing(session.transform, session.spec.timm_name)
    if budget.max_drop is not None:
        refuse_incomparable(session.early_comparison(), budget.max_drop)
    heads, why = possible_heads(session, request.heads)
    if why:
        say(f"the attention stays as it is: {why}")
    methods = applicable(session, request.methods)
    session.space.beside = GRAPHS
    for way in ways(methods, ALLOCATION, heads, request.tokens):
        session.prove(recipe_of(way, BASE))
    if budget.max_drop is not None:
        refuse_incomparable(session.comparison(session.probe()), budget.max_drop)
    return methods, heads, request.tokens
