"""The points of a plan before one is chosen, and the choice."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from moee.errors import BudgetUnmet
from moee.measure.accuracy import Comparison
from moee.methods.recipe import read_recipe_json
from moee.places.output_folder import OutputFolder
from moee.places.resume import ANSWERS
from moee.planning.budget import Budget, Point, choose, margins, nearest, pareto, passed_over
from moee.planning.layers import layer_table
from moee.planning.search import Planner, Way
from moee.planning.shortlist import Candidate, Timed, with_times, worth_measuring
from moee.progress import Reporter
from moee.stages.identity import model_identity
from moee.store.artifact import write_manifest

SCHEMA, PLAN, RECIPE = "moee.plan/2", "plan.json", "recipe.toml"


@dataclass(frozen=True)
class Found:
    """The points that were made and measured, by the planner that can make their models again. `left_out`: trials that there was
    no time for, `untried` the ways that had none. `wanted`: the budget, where points were looked for under a wider one."""

    planner: Planner
    points: list[Point]
    compared: Comparison
    left_out: int = 0
    wanted: Budget | None = None
    untried: Sequence[Way] = ()

    @property
    def budget(self) -> Budget:
        return self.wanted or self.planner.budget

    @property
    def obstacle(self) -> str:
        """Why nothing could be made; empty if something was."""
        return self.planner.failed[-1][2] if self.planner.failed and not self.points else ""

    def candidates(self, most: int) -> list[Candidate]:
        """Those that are worth timing on the device, at most `most`."""
        return self.taken(worth_measuring(self.points, self.budget, most))

    def taken(self, points: Sequence[Point]) -> list[Candidate]:
        """Points as candidates."""
        return [Candidate(point, partial(self._model, point)) for point in points]

    def _model(self, point: Point) -> Any:
        return self.planner.made(point)[0]

    def conclude(
        self, output: OutputFolder, store: OutputFolder, *, chosen: Sequence[Candidate] = (), timed: Timed | None = None,
        report: Reporter,
    ) -> dict[str, Any]:  # fmt: skip
        """Choose, write the plan, and remove the points that were kept for it. With `timed` the choice is made among the `chosen`
        candidates that the device timed, and dense. Raises `BudgetUnmet` that names the nearest point if nothing meets the
        budget; the points are kept then."""
        points, eligible, facts = self.points, self.points, {}
        dense = self.planner.dense(points, self.compared)
        if timed is not None:
            points, eligible = with_times(points, [candidate.point for candidate in chosen], timed)
            dense = replace(dense, latency=timed.dense)
            entries = [
                {"method": c.point.method, "allocation": c.point.allocation, "macs": c.point.macs, **entry}
                for c, entry in zip(chosen, timed.facts["candidates"], strict=True)
            ]
            facts = {"measurement": {**timed.facts, "candidates": entries}}
        winner = choose([*eligible, dense], self.budget)
        if winner is None:
            obstacle = f"; {self.obstacle}" if self.obstacle else ""
            raise BudgetUnmet(nearest([*eligible, dense], self.budget) + obstacle)
        everything = [*points, dense]
        session = self.planner.session
        ambitious = choose([*eligible, dense], self.planner.budget) or winner
        if self.planner.frugal and ambitious.recipe is not None:
            session.made = (ambitious.recipe, *self.planner.made(ambitious))
        result = {
            "model": session.spec.model_dump(mode="json"), "data": session.source, "images": self.planner.images,
            "base": self.planner.base, **{key: value for key, value in model_identity(session).items() if key == ANSWERS},
            "budget": self.budget.model_dump(),
            "winner": asdict(winner), "ambitious": asdict(ambitious), "margins": margins(winner, eligible, dense, self.budget),
            "passed_over": [asdict(p) for p in passed_over(winner, eligible, self.budget)],
            "points": [asdict(p) for p in everything], "front": [asdict(p) for p in pareto(everything)],
            "layers": layer_table(session, self.planner, winner, report), "data_read": session.data_facts(),
            "accuracy": {"images": self.compared.images, "labelled": self.compared.labelled,
                         "no_accuracy": self.compared.reason, "probe": self.planner.probe is not None},
            "left_out": self.left_out, "untried": [way._asdict() for way in self.untried],
            "not_made": [{**w._asdict(), "target": target, "why": why} for w, target, why in dict.fromkeys(self.planner.failed)],
            "obstacle": self.obstacle,
            "prediction": prediction_error(self.points), **facts,
        }  # fmt: skip
        with output.write() as folder:
            if winner.recipe is not None:
                recipe = read_recipe_json(winner.recipe, PLAN)
                (folder / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
            write_manifest(folder, PLAN, SCHEMA, result)
        store.remove()
        return result


def prediction_error(points: Sequence[Point]) -> dict[str, Any] | None:
    """By how much the layers' own times missed the measured ones, as shares of these: median and largest. None where nothing
    was predicted."""
    known = [p.latency for p in points if p.latency and "predicted_ms" in p.latency]
    errors = [abs(latency["predicted_ms"] / latency["moee_ms"] - 1) for latency in known]
    return {"points": len(errors), "median": statistics.median(errors), "largest": max(errors)} if errors else None
