"""Verdicts on published orderings: who retains more at equal MACs, and by more than the seeds differ.

Rows of a table cost different amounts at the same kept share, so they are compared along their curves: for each seed the better
row's metric minus the worse row's, both interpolated linearly at the MACs of the reference row's cells that lie within both
curves, and averaged over those costs. An ordering is

    reproduced   the mean difference over the seeds is positive and larger than its standard deviation
    reversed     it is negative and larger than its standard deviation
    undecided    anything between, and whatever one seed alone gives: it has no standard deviation
    not compared the curves share no cost, or a row's layers all stayed dense
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from moee.ablation.grid import TABLES, Cell, Table

Result = tuple[Cell, dict[str, Any]]
Curve = list[tuple[float, float]]  # (MACs relative to dense minus 1, metric), by rising MACs
METRICS = ("accuracy", "class_cosine")
ROUNDING = 1e-6  # a difference of metrics in 0..1 below this is that of sums in another order
TOLERANCE = 1e-3  # of the dense MACs: rows made to cost the same differ by their routing's shares


@dataclass(frozen=True)
class PairVerdict:
    """One pair of rows: `differences` holds one mean difference a seed."""

    better: str
    worse: str
    differences: list[float]
    verdict: str

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.differences) if self.differences else None


@dataclass(frozen=True)
class Verdict:
    """One published ordering under one compensation, by one metric."""

    table: str
    claim: str
    compensation: str
    metric: str
    verdict: str
    pairs: list[PairVerdict] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "pairs": [{**asdict(p), "mean": p.mean} for p in self.pairs]}


def interpolate(curve: Curve, at: float) -> float | None:
    """The metric of a curve at a cost; None outside its range."""
    if not curve or not curve[0][0] - TOLERANCE <= at <= curve[-1][0] + TOLERANCE:
        return None
    at = min(max(at, curve[0][0]), curve[-1][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 <= at <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return curve[0][1]


def curve_of(results: Iterable[Result], row: str, compensation: str, seed: int, metric: str) -> Curve:
    """The curve of one row, compensation and seed; cells without the metric are left out."""
    points = [
        (result["macs_change"], result[metric])
        for cell, result in results
        if (cell.row, cell.compensation, cell.seed) == (row, compensation, seed) and result.get(metric) is not None
    ]
    return sorted(points)


def _pair(results: list[Result], table: Table, better: str, worse: str, compensation: str, metric: str) -> PairVerdict:
    differences = []
    for seed in sorted({cell.seed for cell, _ in results}):
        costs = [x for x, _ in curve_of(results, table.reference, compensation, seed, metric)]
        ours, theirs = (curve_of(results, row, compensation, seed, metric) for row in (better, worse))
        values = [(interpolate(ours, x), interpolate(theirs, x)) for x in costs]
        shared = [a - b for a, b in values if a is not None and b is not None]
        if shared:
            differences.append(statistics.fmean(shared))
    return PairVerdict(better, worse, differences, _decide(differences))


def _decide(differences: list[float]) -> str:
    if not differences:
        return "not compared"
    mean = statistics.fmean(differences)
    if len(differences) == 1 or abs(mean) <= max(statistics.stdev(differences), ROUNDING):
        return "undecided"
    return "reproduced" if mean > 0 else "reversed"


def judge(results: list[Result], metric: str) -> list[Verdict]:
    """A verdict on each published ordering of the tables that were run, under each compensation.

    An ordering over several pairs is reproduced or reversed when all its compared pairs are, and mixed otherwise.
    """
    verdicts = []
    for key in dict.fromkeys(cell.table for cell, _ in results):
        table = TABLES[key]
        mine = [(cell, result) for cell, result in results if cell.table == key]
        for compensation in dict.fromkeys(cell.compensation for cell, _ in mine):
            for ordering in table.orderings:
                pairs = [
                    _pair(mine, table, better, worse, compensation, metric)
                    for better in ordering.better
                    for worse in ordering.worse
                ]
                kinds = {pair.verdict for pair in pairs} - {"not compared"}
                overall = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "not compared"
                verdicts.append(Verdict(key, ordering.claim, compensation, metric, overall, pairs))
    return verdicts
