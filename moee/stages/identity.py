"""Which model a run works on, for a run that goes on from another."""

from __future__ import annotations

from typing import Any

from moee.artifacts.answers import CODED, answers_of
from moee.places.resume import ANSWERS
from moee.stages.session import Session


def model_identity(session: Session) -> dict[str, Any]:
    """Name and arguments of the dense model and the hash of its weights, not where they lie; of a model of someone's own code
    what it answers too, since that code may change between two runs."""
    spec = session.spec
    told = {"name": spec.name, **spec.identity()}
    return {**told, ANSWERS: answers_of(session.dense)} if spec.library in CODED else told


def named_identity(session: Session) -> dict[str, Any]:
    """The same among other facts of a run: the model's name is under `model`."""
    identity = model_identity(session)
    return {"model": identity.pop("name"), **identity}
