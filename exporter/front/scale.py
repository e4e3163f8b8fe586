"""Scales of an axis: which range it shows, and where its ticks stand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1, 2, 2.5, 5, 10)
MOST_TICKS = 5
MARGIN = 0.06  # of the range, on both sides
FAR = 2.5  # times the range that matters: what lies further below its top is drawn at the edge


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixels of a value; one outside the range is at its edge."""
        inside = min(max(value, self.low), self.high)
        return self.start + (inside - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most `MOST_TICKS` round values within the range."""
        raw = (self.high - self.low) / MOST_TICKS
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in STEPS if s * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def span(values: Sequence[float], least: float) -> tuple[float, float]:
    """The range of all values with a margin, at least `least` wide."""
    low, high = min(values), max(values)
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    return low - MARGIN * (high - low), high + MARGIN * (high - low)


def useful_span(values: Sequence[float], keys: Sequence[float], least: float) -> tuple[float, float]:
    """The range that holds the `keys`, three quarters of the values, and what lies near below them.

    A model that lost everything would else press those that matter into one line.
    """
    low, top = min([sorted(values)[len(values) // 4], *keys]), max([*values, *keys])
    reach = FAR * max(top - low, least)
    return span([min(low, *(v for v in values if top - v <= reach)), top], least)
