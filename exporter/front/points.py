"""What a `plan.json` says of its candidates, as numbers to draw. Anyone may have written it: what is no number is None."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exporter.markup.values import DASH, dig, fixed, numbers, percent, real, word

DENSE, STATIC, ROUTED = "dense", "static", "routed"  # roles of a candidate: how its mark looks
MOST = 120  # candidates drawn; a plan tries tens
MOST_NAME = 80  # characters
WHOLE = 1.0  # share of the attention's MACs that is all of it
SHARE, MS = (0.0, 100.0), (1e-6, 1e6)  # what figures can be: of dense; of a batch
LIMITS = {
    "max_drop": (0.0, 100.0), "min_cosine": (0.0, 1.0), "target_macs": SHARE, "target_params": SHARE, "target_latency_ms": MS,
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a batch and those of the dense model timed beside it. `how` says how they were come by and where:
    "measured on CPU", "modelled for orin-agx"."""

    how: str
    batch: str
    ms: float
    dense_ms: float

    @property
    def ratio(self) -> float:
        """Share of the dense model's time."""
        return self.ms / self.dense_ms

    @property
    def modelled(self) -> bool:
        return not self.how.startswith("measured")


@dataclass(frozen=True)
class Candidate:
    """One model of a plan. `macs` and `params` are shares of dense, `interval` the 95 % interval of the accuracy."""

    name: str
    method: str
    role: str
    macs: float | None
    params: float | None
    cosine: float | None
    accuracy: float | None
    interval: tuple[float, float] | None
    timing: Timing | None
    chosen: bool = False


@dataclass(frozen=True)
class Front:
    """The candidates of one plan, on one device. `budget` holds the limits that were given, by their names in `plan.json`;
    `not_drawn` counts the candidates above `MOST`."""

    model: str
    data: str
    candidates: tuple[Candidate, ...]
    budget: dict[str, float]
    no_accuracy: str = ""
    not_drawn: int = 0

    @property
    def chosen(self) -> Candidate | None:
        return next((c for c in self.candidates if c.chosen), None)

    @property
    def dense(self) -> Candidate | None:
        return next((c for c in self.candidates if c.role == DENSE), None)

    @property
    def timings(self) -> dict[tuple[str, str], list[Timing]]:
        """The timings by how they were made and the batch: figures of two kinds never share an axis."""
        found: dict[tuple[str, str], list[Timing]] = {}
        for candidate in self.candidates:
            if candidate.timing is not None:
                found.setdefault((candidate.timing.how, candidate.timing.batch), []).append(candidate.timing)
        return found

    def limits(self) -> list[str]:
        """The budget in words."""
        words: dict[str, Callable[[float], str]] = {
            "max_drop": lambda v: f"accuracy at most {v:g} point{'' if v == 1 else 's'} below dense",
            "min_cosine": lambda v: f"cosine at least {v:g}",
            "target_macs": lambda v: f"at most {percent(v, 0)} of the MACs",
            "target_params": lambda v: f"at most {percent(v, 0)} of the parameters",
            "target_latency_ms": lambda v: f"at most {v:g} ms a batch",
        }
        return [words[name](value) for name, value in self.budget.items()]


def read_front(plan: dict[str, Any]) -> Front:
    """The front of the body of a `plan.json`."""
    points = plan.get("points")
    given = [p for p in points if isinstance(p, dict)] if isinstance(points, list) else []
    winner = plan.get("winner")
    chosen = next((place for place, point in enumerate(given) if _same(point, winner)), None)
    drawn = sorted({*range(min(MOST, len(given))), *([] if chosen is None else [chosen])})  # the chosen one is never left out
    candidates = tuple(_candidate(given[place], place == chosen) for place in drawn)
    budget = plan.get("budget")
    limits = {name: v for name, bounds in LIMITS.items() if (v := _within(dig(budget, name), bounds)) is not None}
    reason = dig(plan, "accuracy", "no_accuracy")
    return Front(
        word(dig(plan, "model", "name")), word(plan.get("data")), candidates, limits,
        reason if isinstance(reason, str) else "", len(given) - len(drawn),
    )  # fmt: skip


def _same(point: dict[str, Any], winner: Any) -> bool:
    """Whether a point is the winner: recipes are what tells them apart."""
    return isinstance(winner, dict) and (point.get("method"), point.get("recipe")) == (winner.get("method"), winner.get("recipe"))


def _candidate(point: dict[str, Any], chosen: bool) -> Candidate:
    method = word(point.get("method"))[:MOST_NAME]
    allocation, attention, tokens = point.get("allocation"), real(point.get("attention")), real(point.get("tokens"))
    parts = [method, *([str(allocation)[:MOST_NAME]] if allocation else [])]
    parts += [f"attention {percent(attention, 0)}"] if attention is not None and attention < WHOLE else []
    parts += [f"tokens {percent(tokens, 0)}"] if tokens is not None and tokens < WHOLE else []
    interval = numbers(point.get("accuracy_interval"))
    role = DENSE if method == DENSE else STATIC if method == STATIC else ROUTED
    return Candidate(
        ", ".join(parts), method, role, _within(point.get("macs"), SHARE), _within(point.get("params"), SHARE),
        _within(point.get("cosine"), (-1.001, 1.001)), _within(point.get("accuracy"), (0.0, 1.0)),
        (interval[0], interval[1]) if len(interval) == 2 else None, _timing(point.get("latency")), chosen,
    )  # fmt: skip


def _within(value: Any, bounds: tuple[float, float]) -> float | None:
    """A number within bounds, or None: others are no such figure."""
    number = real(value)
    return number if number is not None and bounds[0] <= number <= bounds[1] else None


def _timing(latency: Any) -> Timing | None:
    ms, dense_ms = (_within(dig(latency, key), MS) for key in ("moee_ms", "dense_ms"))
    if ms is None or dense_ms is None:
        return None
    kind, device = str(dig(latency, "kind") or "of an unknown kind"), str(dig(latency, "device") or "")
    if kind == "modelled":
        kind = f"modelled for {device or 'a device that is not named'}"
    elif device and device.lower() not in kind.lower():
        kind = f"{kind}, {device}"
    batch = real(dig(latency, "batch"))
    return Timing(kind[:MOST_NAME], DASH if batch is None else fixed(batch, 0), ms, dense_ms)


def dense_ms(timings: list[Timing]) -> float:
    """The dense model's median time among timings of one kind."""
    return statistics.median(t.dense_ms for t in timings)
