"""Candidates that are measured elsewhere: what a plan keeps of them, and how it goes on when their times are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from moee.bounds import CANDIDATES
from moee.errors import UserError
from moee.places.output_folder import OutputFolder
from moee.places.resume import alone_on, compare_identity
from moee.planning.budget import Budget, Point, StoredLatency, checked_point
from moee.planning.forms import Latency
from moee.planning.found import Found
from moee.planning.plan import (
    CURE,
    IDENTITY,
    INTERRUPTED,
    STORE_SCHEMA,
    places,
    planner_of,
    refuse_incomparable,
    search,
)
from moee.planning.shortlist import Candidate, Shortlist, Timed
from moee.progress import Reporter, silent
from moee.schema import Body, Text, checked, upgraded
from moee.stages.identity import model_identity
from moee.stages.session import Session
from moee.store.artifact import read_json, write_json
from moee.store.result_kinds import EMITTED

SCHEMA = "moee.emitted/1"
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class Sent(Body):
    """One candidate: its id, and what models of boards said of it, in ms, by the board's name."""

    id: Sha256
    modelled: dict[str, StoredLatency] = {}


class Sending(Body):
    """What a device gets. `emit` is the id of the whole, `dense` that of the dense model."""

    emit: Sha256
    dense: Sha256
    batch: int = Field(ge=1)
    precision: Text
    candidates: list[Sent] = Field(min_length=1, max_length=CANDIDATES.most)

    @model_validator(mode="after")
    def _apart(self) -> Sending:
        if len({sent.id for sent in self.candidates}) < len(self.candidates):
            raise ValueError("expected candidates that differ")
        return self


class Emitted(Sending):
    """What a plan keeps: `chosen` are the places of the candidates among the `points`; `ways`: what was tried, by option."""

    base: dict[str, Any]
    ways: dict[str, list[Any]] = {}
    chosen: list[int]
    points: list[Any]

    @model_validator(mode="after")
    def _placed(self) -> Emitted:
        apart = len(set(self.chosen)) == len(self.candidates) == len(self.chosen)
        if not apart or not all(0 <= place < len(self.points) for place in self.chosen):
            raise ValueError("expected a point for each candidate")
        return self


Writer = Callable[[Sequence[Candidate]], AbstractContextManager[Sending]]


def emit_plan(
    session: Session, budget: Budget, out: Path | str, write: Writer, *, most: int,
    ranking: Latency | None = None, force: bool = False, report: Reporter = silent, **ways: Any,
) -> Sending:  # fmt: skip
    """Make the points of `make_plan`, whose options `ways` are, and give those worth measuring, at most `most`, to `write`, whose
    folder appears after what is known of it was kept in `<out>.resume`. Returns that. `ranking` is a model of the device that
    helps to choose. Raises `UserError` if only dense is left to measure."""
    output, store = places(session, out, force)
    with alone_on(store.place, session.group.leader):
        found = search(session, budget, store, latency=Shortlist(most, None, ranking), report=report, **ways)
        chosen = found.candidates(most)
        if not chosen:
            raise UserError("only dense meets the budget, so there is nothing to measure; loosen the budget")
        with write(chosen) as sending:
            numbers = [next(i for i, p in enumerate(found.points) if p is candidate.point) for candidate in chosen]
            tried = {name: list(value) for name, value in ways.items() if name != "base"}
            kept = {
                "chosen": numbers, "base": found.planner.base, "ways": tried, "points": [asdict(p) for p in found.points],
            }  # fmt: skip
            write_json(store.place / EMITTED, {"schema": SCHEMA, **sending.model_dump(), **kept})
    return sending


def read_emitted(store: OutputFolder) -> tuple[Emitted, list[Point]]:
    """What `emit_plan` kept in `store`, and its points. Raises `UserError` where there is none, or for a damaged one."""
    path = store.place / EMITTED
    if not path.is_file():
        raise UserError(f"{path} not found: no candidates were written for this --out; write them with --emit DIR first")
    kept = checked(Emitted, upgraded(read_json(path), SCHEMA, path), path)
    return kept, [checked_point(body, path) for body in kept.points]


def go_on(
    session: Session, budget: Budget, out: Path | str, timed: Timed, *, base: dict[str, Any] | None = None, force: bool = False,
    report: Reporter = silent,
) -> dict[str, Any]:  # fmt: skip
    """Choose among the candidates of `emit_plan`, now that they are `timed`, and write the plan. `base`: the options that were
    given, which must be those that the points were made with. Raises `UserError` as `make_plan`; the points are kept then."""
    output, store = places(session, out, force)
    with alone_on(store.place, session.group.leader):
        kept, points = read_emitted(store)
        told = {"model": model_identity(session), **({"base": base} if base else {})}
        compare_identity(store.place / IDENTITY, STORE_SCHEMA, told, INTERRUPTED, CURE)
        planner = planner_of(session, budget, kept.base, store, report=report)
        found = Found(planner, points, session.comparison(planner.probe))
        if budget.max_drop is not None:
            refuse_incomparable(found.compared, budget.max_drop)
        chosen = found.taken([points[place] for place in kept.chosen])
        return found.conclude(output, store, chosen=chosen, timed=timed, report=report)
