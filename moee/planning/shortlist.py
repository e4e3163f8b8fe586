"""Candidates that are timed on the device itself: which points are worth it, and what the device says of them.

A device that has to build an engine for every model times a few candidates after all points were made, in turns with the dense
model. The choice is then made among these and dense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

from torch import nn

from moee.planning.budget import Budget, Point, pareto
from moee.planning.forms import Latency


@dataclass(frozen=True)
class Candidate:
    """A point that is to be timed, and the call that makes its model again."""

    point: Point
    make: Callable[[], nn.Module]


@dataclass(frozen=True)
class Scale:
    """By how much a model of a device is off, as measured milliseconds over modelled ones: of the dense model, and the median of
    the candidates. `device` is the name that its figures carry."""

    device: str
    dense: float
    moee: float

    def of(self, latency: dict[str, Any] | None) -> dict[str, Any] | None:
        """A figure of this model brought to what was measured; others as they are. It still only ranks."""
        if latency is None or latency.get("device") != self.device:
            return latency
        dense_ms, moee_ms = latency["dense_ms"] * self.dense, latency["moee_ms"] * self.moee
        figures = {"dense_ms": dense_ms, "moee_ms": moee_ms, "speedup": dense_ms / moee_ms}
        return {**latency, "kind": "modelled, scaled to what was measured", **figures}


@dataclass(frozen=True)
class Timed:
    """What a device says. `latencies` has one entry a candidate, in their order: what `Latency.of` gives, or the reason why there
    is none. `dense` is the dense model's latency in the same form, with itself as the candidate. `facts` go into plan.json: the
    `name` of the device, `candidates` in their order. `scale` is known where there is a model of the device."""

    dense: dict[str, Any]
    latencies: list[dict[str, Any] | str]
    facts: dict[str, Any]
    scale: Scale | None = None


@dataclass(frozen=True)
class Shortlist:
    """How a device times candidates together, in milliseconds a batch: at most `most` of them. `ranking` is a model of the device
    that helps to choose them, if there is one. `time` is None where that happens elsewhere (`moee.planning.emitted`)."""

    most: int
    time: Callable[[Sequence[Candidate]], Timed] | None
    ranking: Latency | None = None


def worth_measuring(points: Sequence[Point], budget: Budget, most: int) -> list[Point]:
    """The points that may win once they are timed, at most `most`: the front of MACs and cosine of every method under the
    budget, whose limit of latency nobody can check yet. Methods take turns: fewer MACs of one may be slower than more of another.
    """
    limits = budget.model_copy(update={"target_latency_ms": None})
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.recipe is not None and not point.shortfalls(limits):
            groups.setdefault(point.method, []).append(point)
    fronts = [front for group in groups.values() if (front := _ranked(pareto(group), budget, most))]
    fronts.sort(key=lambda front: _merit(front[0], budget))
    return list(islice((p for turn in zip_longest(*fronts) for p in turn if p is not None), most))


def _ranked(front: list[Point], budget: Budget, most: int) -> list[Point]:
    """A front, the most promising first. A limit of latency alone says nothing of MACs: then points from all over it."""
    ranked = sorted(front, key=lambda p: _merit(p, budget))
    if budget.limits_quality or budget.target_macs is not None or budget.target_params is not None or len(ranked) <= most:
        return ranked
    steps = [round(i * (len(ranked) - 1) / max(1, most - 1)) for i in range(most)]
    return [ranked[i] for i in dict.fromkeys(steps)]


def _merit(point: Point, budget: Budget) -> tuple[float, float]:
    """A sort key, the best first: the cheapest under a limit of quality, else the most faithful."""
    return (point.cost(), -point.cosine) if budget.limits_quality else (-point.cosine, point.cost())


def with_times(points: Sequence[Point], chosen: Sequence[Point], timed: Timed) -> tuple[list[Point], list[Point]]:
    """All points with what the device said of the `chosen` ones, and those of them that it timed. The others keep a modelled
    figure, if they have one, scaled to what was measured: they are not to be chosen from."""
    said = {_key(point): latency for point, latency in zip(chosen, timed.latencies, strict=True)}
    scaled = timed.scale.of if timed.scale is not None else lambda latency: latency
    everything = [replace(p, latency=_latency(said[_key(p)]) if _key(p) in said else scaled(p.latency)) for p in points]
    return everything, [p for p in everything if _key(p) in said and p.latency is not None]


def _key(point: Point) -> str:
    return json.dumps(point.recipe, sort_keys=True)


def _latency(said: dict[str, Any] | str) -> dict[str, Any] | None:
    return said if isinstance(said, dict) else None
