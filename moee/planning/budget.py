"""What a plan must meet, the points it chooses from, and the choice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from moee.config import Options
from moee.schema import Body, checked

COST_TOLERANCE = 0.005  # of the dense MACs, or of its time: routing on held-out images differs a little from calibration

MOST_MS = 1e6  # of a batch: a quarter of an hour
ALIKE = 0.05  # of dense, half the distance between the usual targets


class Budget(Options):
    """What a plan must meet. Shares are of the dense model; `max_drop` is in percentage points of accuracy."""

    max_drop: float | None = Field(None, ge=0, lt=100, description="percentage points of accuracy it may lose; needs labels")
    min_cosine: float | None = Field(None, gt=0, le=1, description="least mean cosine of the outputs to the dense model's")
    target_macs: float | None = Field(None, gt=0, lt=1, description="most MACs, as a share of the dense model's")
    target_params: float | None = Field(None, gt=0, lt=1, description="most parameters, as a share of the dense model's")
    target_latency_ms: float | None = Field(None, gt=0, le=MOST_MS, description="longest p50 of a batch on --device, in ms")

    @model_validator(mode="after")
    def _something(self) -> Budget:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError(
                "a plan needs a budget: --max-drop, --min-cosine, --target-macs, --target-params or --target-latency-ms"
            )
        return self

    @property
    def limits_quality(self) -> bool:
        return self.max_drop is not None or self.min_cosine is not None


@dataclass(frozen=True)
class Point:
    """One model that was made and measured: `macs` and `params` as shares of dense, `drop` the share of accuracy lost, latency in
    ms. None is what was not measured: it meets no limit. `recipe` makes it again, and is None for dense; `attention` is the share
    of the attention's MACs that it keeps, `tokens` that of all MACs which merging tokens leaves first."""

    method: str
    allocation: str
    macs: float
    params: float
    cosine: float
    token_cosine: float | None
    accuracy: float | None
    drop: float | None
    latency: dict[str, Any] | None
    recipe: dict[str, Any] | None
    accuracy_interval: list[float] | None = None
    attention: float = 1.0
    tokens: float = 1.0

    def shortfalls(self, budget: Budget) -> dict[str, float]:
        """By how much each figure misses the budget, relative to the limit; infinite for one that was not measured. Empty if the
        point meets the budget. A cosine that is no number is that of a broken model, which meets none."""
        timed, limit = self.latency["moee_ms"] if self.latency else None, budget.target_latency_ms
        over = {
            "accuracy": _excess(self.drop, None if budget.max_drop is None else budget.max_drop / 100, 1e-9),
            "cosine": _excess(-self.cosine, math.inf if budget.min_cosine is None else -budget.min_cosine),
            "MACs": _excess(self.macs, budget.target_macs, COST_TOLERANCE),
            "parameters": _excess(self.params, budget.target_params),
            "latency": 0.0 if limit is None else _excess(None if timed is None else timed / limit, 1.0),
        }
        return {name: excess for name, excess in over.items() if excess > 0}

    def lacks_quality(self, budget: Budget) -> bool:
        """Whether the budget limits what the point loses, and it loses more."""
        return bool({"accuracy", "cosine"} & self.shortfalls(budget).keys())

    def cost(self) -> float:
        """What a quality budget minimises, as a share of dense: the latency where it is known, MACs otherwise. Latency is held
        against the dense one timed in turns with it, since points are minutes apart and a machine's speed changes."""
        return self.latency["moee_ms"] / self.latency["dense_ms"] if self.latency else self.macs

    def noise(self) -> float:
        """By how much the timing leaves the cost open, either way, as a share of it; 0 where nothing was measured in turns."""
        low, high = (self.latency or {}).get("speedup_range", (1.0, 1.0))
        return math.log(high / low) / 2

    def outdone_by(self, other: Point) -> bool:
        """Whether `other`, which is faster than dense, is more faithful with no more MACs, and the timings do not show that it is
        slower than this one."""
        if other.cosine <= self.cosine or other.macs > self.macs + COST_TOLERANCE or other.cost() > 1 - COST_TOLERANCE:
            return False
        noise = math.hypot(self.noise(), other.noise())
        return noise > 0 and math.log(other.cost() / self.cost()) <= noise


def _excess(value: float | None, limit: float | None, tolerance: float = 0.0) -> float:
    """By how much a figure exceeds its limit: 0 if it does not or has none, infinite if the figure is unknown."""
    if limit is None:
        return 0.0
    if value is None or not math.isfinite(value):
        return math.inf
    return value - limit if value > limit + tolerance else 0.0


class StoredLatency(Body):
    """What an interrupted run stored of a point's latency, in ms."""

    moee_ms: float = Field(gt=0)
    dense_ms: float = Field(gt=0)
    speedup_range: list[Annotated[float, Field(gt=0)]] | None = Field(None, min_length=2, max_length=2)


class StoredPoint(Body):
    """A `Point` in a file. A broken model's cosine is null, or NaN in files of earlier versions."""

    model_config = ConfigDict(allow_inf_nan=True)

    method: str
    allocation: str
    macs: float
    params: float
    cosine: float | None
    token_cosine: float | None
    accuracy: float | None
    drop: float | None
    latency: StoredLatency | None
    recipe: dict[str, Any] | None
    accuracy_interval: list[float] | None = None
    attention: float = 1.0
    tokens: float = 1.0


def checked_point(body: Any, path: Path) -> Point:
    """A point from a file. Raises `UserError` for one that lacks a figure or holds another thing in its place."""
    checked(StoredPoint, body, path)
    figures = {field.name: body[field.name] for field in fields(Point) if field.name in body}
    return Point(**{**figures, "cosine": math.nan if body["cosine"] is None else body["cosine"]})


def pareto(points: list[Point]) -> list[Point]:
    """Points that no other beats in both MACs and cosine, by rising MACs."""
    front: list[Point] = []
    for point in sorted((p for p in points if math.isfinite(p.cosine)), key=lambda p: (p.macs, -p.cosine)):
        if not front or point.cosine > front[-1].cosine:
            front.append(point)
    return front


def choose(points: list[Point], budget: Budget) -> Point | None:
    """The best point that meets the budget: the cheapest under a quality limit that no other outdoes (`Point.outdone_by`), of
    those that cost the same but for `COST_TOLERANCE` the most faithful; else the most faithful. None if none does."""
    meeting = [p for p in points if not p.shortfalls(budget) and math.isfinite(p.cost())]
    if not meeting:
        return None
    if budget.limits_quality:
        best = [p for p in meeting if not any(p.outdone_by(other) for other in meeting)]
        least = min(p.cost() for p in best)
        return max((p for p in best if p.cost() <= least + COST_TOLERANCE), key=lambda p: (p.cosine, -p.cost()))
    return max(meeting, key=lambda p: (p.cosine, -p.cost()))


def passed_over(winner: Point, points: Sequence[Point], budget: Budget) -> list[Point]:
    """Points within a budget of the quality that were measured faster than its winner: others outdo them (`Point.outdone_by`)."""
    if not budget.limits_quality or winner.latency is None:
        return []
    timed = [p for p in points if p.latency and not p.shortfalls(budget)]
    return [p for p in timed if p.cost() < winner.cost() - COST_TOLERANCE]


def standing(points: list[Point], budget: Budget) -> tuple[bool, float, float]:
    """A sort key of a way of making points: the lower, the better its best point serves the budget. Under a quality budget costs
    are compared in steps of `ALIKE`, then by the mean cosine: experts and ranks are whole numbers, so some ways cost less than
    they were allowed without being the better for it."""
    best = choose(points, budget)
    faithful = -statistics.fmean(p.cosine if math.isfinite(p.cosine) else -1.0 for p in points)
    if best is None:
        return True, min(sum(p.shortfalls(budget).values()) for p in points), faithful
    return False, round(best.cost() / ALIKE) if budget.limits_quality else -best.cosine, faithful


def nearest(points: list[Point], budget: Budget) -> str:
    """A sentence about the point that misses the budget least, and by how much."""
    best = min(points, key=lambda p: sum(p.shortfalls(budget).values()))
    said = {
        "accuracy": lambda by: f"{100 * by:.3g} points", "latency": lambda by: f"{by * (budget.target_latency_ms or 0):.3g} ms",
    }  # fmt: skip
    missing = ", ".join(
        f"{name} by {said.get(name, '{:.3g}'.format)(value)}" if math.isfinite(value) else f"{name}, which could not be measured"
        for name, value in best.shortfalls(budget).items()
    )
    heads = f" and {best.attention:.0%} of the attention" if best.attention < 1 else ""
    heads += f" and tokens merged to {best.tokens:.0%} of the MACs" if best.tokens < 1 else ""
    return (
        f"nothing meets the budget; nearest is {best.method} {best.allocation}{heads} with {best.macs:.0%} of the MACs, "
        f"{best.params:.0%} of the parameters and cosine {best.cosine:.4f}: it misses {missing}"
    )


def margins(winner: Point, points: list[Point], dense: Point, budget: Budget) -> dict[str, Any]:
    """How far the winner is ahead of the best static model that meets the budget too, and of dense: differences of the MACs
    share, the cosine and the latency (of the dense model's median, by each one's share of it; None where one lacks it)."""
    static = choose([p for p in points if p.method == "static"], budget)

    def against(other: Point | None) -> dict[str, Any] | None:
        if other is None:
            return None
        known = winner.latency and other.latency and dense.latency
        return {
            "macs": other.macs - winner.macs,
            "params": other.params - winner.params,
            "cosine": winner.cosine - other.cosine,
            "latency_ms": (other.cost() - winner.cost()) * dense.latency["dense_ms"] if known else None,  # type: ignore[index]
        }

    return {"static": against(static), "dense": against(dense)}
