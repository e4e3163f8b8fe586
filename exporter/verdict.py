"""Which of two models is faster, or that the noise does not let one say.

The two are timed in pairs, so the ratio of a pair is free of what disturbed both. On a busy machine the second run of a pair may
take several times as long as the first. The first alternates, so two neighbouring pairs are taken together, by the geometric
mean of their ratios: that is free of the order. The interval is that of these ratios' median, by a bootstrap over blocks of
neighbours: disturbances last longer than one run, and ratios resampled as if they were independent would give too narrow a one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99  # a gate in a build must not fire one time in twenty
TAIL = 0.25  # percent of the resamples on each side: twenty ratios gave 98 % with the nominal half a percent
RESAMPLES = 2000
MIN_PAIRS = 10
MIN_EFFECT = 0.02  # a smaller difference is shown with its interval, but nobody is called the winner for it


@dataclass(frozen=True)
class Verdict:
    """`ratio`: median of dense over MoEE, two pairs at a time, above 1 if MoEE is faster; `low` to `high`: its interval.
    `winner`: `moee`, `dense`, or None where the interval holds 1 or the difference is below `MIN_EFFECT`."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def decidable(self) -> bool:
        """Whether the times allow a verdict at all, be it that the noise hides the difference."""
        return self.pairs >= MIN_PAIRS and all(map(math.isfinite, (self.ratio, self.low, self.high)))

    @property
    def span(self) -> dict[str, list[float]]:
        """The interval under the name that a plan's points have it by; nothing where the times allow no verdict."""
        return {"speedup_range": [self.low, self.high]} if self.decidable else {}

    @property
    def winner(self) -> str | None:
        if not self.decidable:
            return None
        if self.low > 1 and self.ratio >= 1 + MIN_EFFECT:
            return "moee"
        if self.high < 1 and self.ratio <= 1 / (1 + MIN_EFFECT):
            return "dense"
        return None

    @property
    def text(self) -> str:
        span = f"{self.ratio:.3f}x ({CONFIDENCE:.0%} interval {self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"
        if self.winner == "moee":
            return f"MoEE is faster: {span}"
        if self.winner == "dense":
            return f"dense is faster: {span}"
        if self.pairs < MIN_PAIRS:
            why = f"fewer than {MIN_PAIRS} pairs"
        elif not self.decidable:
            why = "a run took no time that the clock can tell"
        elif self.low <= 1 <= self.high:
            why = "the noise is as large as the difference"
        else:
            why = f"the difference is below {MIN_EFFECT:.0%}"
        return f"no winner, {why}: {span}"


def judge(dense: np.ndarray, moee: np.ndarray, seed: int = 0) -> Verdict:
    """Times [N] of pairs of runs, in any unit; dense and MoEE begin in turn."""
    pairs = len(dense)
    ratios = np.asarray(dense, np.float64) / np.asarray(moee, np.float64)
    if pairs > 1:  # of an odd number the first pair, which may still warm up, is left out
        ratios = np.sqrt(ratios[pairs % 2 :: 2] * ratios[pairs % 2 + 1 :: 2])
    count = len(ratios)
    block = max(1, round(count ** (1 / 3) / 2))
    random = np.random.default_rng(seed)
    starts = random.integers(0, count, (RESAMPLES, -(-count // block)))
    picks = ((starts[:, :, None] + np.arange(block)) % count).reshape(RESAMPLES, -1)[:, :count]
    medians = np.median(ratios[picks], axis=1)
    low, high = np.percentile(medians, (TAIL, 100 - TAIL))
    return Verdict(float(np.median(ratios)), float(low), float(high), pairs)
