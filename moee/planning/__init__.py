"""Planning: what wins on a given model, data and device.

Imports layers, store, models, data, calibrate, mlps, places, measure, methods and stages.
"""

from moee.planning.budget import Budget, Point, choose, margins, pareto
from moee.planning.plan import PLAN, check_ways, make_plan, planned_on, read_plan
from moee.planning.search import ALLOCATIONS, TARGETS, Latency, usual, variants

__all__ = [
    "ALLOCATIONS", "PLAN", "TARGETS", "Budget", "Latency", "Point", "check_ways", "choose", "make_plan",
    "margins", "pareto", "planned_on", "read_plan", "usual", "variants",
]  # fmt: skip
