"""Which way wins within a given time: ways of making a model are bisected side by side, and the worse are left behind.

A grid of targets, as `moee.planning.search` tries them, costs the same for every way. Here each way begins in the middle, or at
the cost of the best model so far where that is less. What it gives there says whether it may save more or must save less. After
every round fewer ways go on. Ways that learn nothing from images take little time: each has all of its trials in the first round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moee.planning.budget import COST_TOLERANCE, Budget, Point, choose, standing
from moee.planning.search import ALONE, Planner, Way, variants

FIRST = 0.72  # of the dense MACs, where the first way begins: most budgets are met there, and it is worth deploying
CHEAPEST, DEAREST = 0.3, 1.0  # between which targets are looked for
GOING_ON = (6, 3, 2, 2)  # ways that are tried in each round
REPEATS = 3  # of more: how often the others are tried at the cost of what would be chosen, which they may change
FEW = 6  # ways up to which that is so; of more, all are tried first, and half as many in each round until they are few


def rounds_of(ways: int) -> tuple[int, ...]:
    """How many ways are tried in each round: successive halving down to `GOING_ON`."""
    halved = []
    while ways > FEW:
        halved.append(ways)
        ways = -(-ways // 2)
    return (*halved, *GOING_ON)


class Over(Protocol):
    """Says when the time for trials is over."""

    def __call__(self, fresh: bool) -> bool:
        """Asked before every trial, the first too. `fresh`: its way has to be prepared first."""
        ...

    def ready(self) -> None:
        """Told in a trial when its way is prepared."""
        ...


@dataclass
class Racer:
    """A way with the targets that it was seen to meet the budget at, and to miss it at."""

    way: Way
    cheaper: float = CHEAPEST
    dearer: float = DEAREST
    points: list[Point] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Whether it waits for training images: to calibrate the method, or narrower heads before it."""
        return variants()[self.way.method][0].calibrated or self.way.first != ALONE

    def target(self, best: Point | None = None) -> float:
        """The share of the dense MACs of the next trial; `best`: the point that would be chosen until now."""
        if (self.cheaper, self.dearer) != (CHEAPEST, DEAREST):
            return round((self.cheaper + self.dearer) / 2, 3)
        return FIRST if best is None else min(FIRST, round(best.macs, 3))

    def learn(self, target: float, point: Point | None, budget: Budget) -> None:
        """Take the result at `target`, None where no model can be made for it, which is so for everything cheaper."""
        if point is not None:
            self.points.append(point)
        if point is None or may_cost_more(point, budget):
            self.cheaper = target
        else:
            self.dearer = target


def may_cost_more(point: Point, budget: Budget) -> bool:
    """Whether the next model of this way should cost more: where quality is limited, because it is missed; else because there is
    room below the limit of the cost."""
    return point.lacks_quality(budget) if budget.limits_quality else not point.shortfalls(budget)


def race(planner: Planner, ways: Sequence[Way], over: Over) -> tuple[list[Point], int, list[Way]]:
    """Points of `ways`, how many more there would have been, had `over` not said that the time is, and the ways that were never
    tried because of that. `rounds_of` says how many ways that wait for images each round tries; of more than `FEW`, the
    others are tried at the cost of what would be chosen, too.

    The first point is made in any case. Where the time no longer serves for a way that has to be prepared, trials of the others
    go on. Ways after the same first steps are tried one after another, since what is calibrated for one serves the next. What an
    interrupted run stored costs no time, so the same call comes to the same points.
    """
    planner.ready = over.ready
    racers = [Racer(way) for way in ways]
    points: list[Point] = []
    waiting = sum(racer.waits for racer in racers)
    left = len(GOING_ON) * (len(ways) - waiting) + sum(min(count, waiting) for count in rounds_of(waiting))
    left += (len(ways) > FEW) * (len(ways) - 1)
    first, prepared, started, untried = ALONE, set[str](), {ALONE}, list(ways)
    skipped = False
    for racer, target in _trials(racers, planner.budget):
        way = racer.way
        known = prepared if way.first == first else set[str]()  # what was prepared is of no use to another share
        method, _ = variants()[way.method]
        prepares = method.shares != "nothing"
        calibrates = method.calibrated and not (prepares and way.method in known)
        fresh = calibrates or way.first not in started  # first steps are calibrated too
        if over(fresh) and points:  # asked before the first too, by whose time the second is judged
            if fresh:  # a trial that needs no preparation may still fit
                skipped = True
                continue
            return points, max(0, left), untried
        untried = [other for other in untried if other != way]
        started.add(way.first)
        if prepares:
            first, prepared = way.first, {*known, way.method}
        point = planner.point(way, target)
        racer.learn(target, point, planner.budget)
        if point is not None:
            points.append(point)
        left -= 1
    return points, max(0, left) if skipped else 0, untried if skipped else []


def _trials(racers: list[Racer], budget: Budget) -> Iterator[tuple[Racer, float]]:
    """Who is tried next, and at which target; what came of a trial is known before the next one is asked for."""
    waiting, forwards = [racer for racer in racers if racer.waits], True
    for number, count in enumerate(rounds_of(len(waiting))):
        ranked = sorted((r for r in waiting if r.points), key=lambda r: standing(r.points, budget))
        chosen = ranked[:count] if ranked else waiting[:count]
        ordered = [racer for racer in racers if racer in chosen or number == 0 and not racer.waits]
        for racer in ordered if forwards else reversed(ordered):
            for _ in range(1 if racer.waits else len(GOING_ON)):
                yield racer, racer.target(_best(racers, budget))
        forwards = not forwards
    last = None
    for _ in range(REPEATS if len(racers) > FEW else 0):  # a trial may cost less than what would be chosen until then
        best = _best(racers, budget)
        if best is None or best is last:
            return
        last, target = best, round(best.macs, 3)
        others = [r for r in racers if r.points and all(abs(point.macs - best.macs) > COST_TOLERANCE for point in r.points)]
        for racer in sorted(others, key=lambda r: standing(r.points, budget)):
            yield racer, target


def _best(racers: Sequence[Racer], budget: Budget) -> Point | None:
    """The point that would be chosen of those that there are."""
    return choose([point for racer in racers for point in racer.points], budget)
