"""Statistics of an error: absolute and relative, maximum, mean and 99th percentile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RELATIVE_FLOOR = 1e-3  # of the reference's rms: below it a relative error says nothing


@dataclass(frozen=True)
class ErrorStats:
    """Elementwise errors; `count` of the values are numbers in both arrays.

    Relative ones divide by |reference|, at least `RELATIVE_FLOOR` of its rms."""

    count: int
    max_abs_error: float
    mean_abs_error: float
    p99_abs_error: float
    max_rel_error: float
    mean_rel_error: float
    p99_rel_error: float
    rms: float


def error_stats(got: np.ndarray, reference: np.ndarray) -> ErrorStats:
    """`got` and `reference` of equal shape, compared in float64. A value that is not finite, in one or in both, is an
    infinite error: it cannot be compared."""
    got, reference = np.asarray(got, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    if got.size == 0:
        return ErrorStats(0, *([0.0] * 7))
    with np.errstate(invalid="ignore"):
        error = np.abs(got - reference)
        error[~np.isfinite(error)] = np.inf
        rms = float(np.sqrt(np.mean(np.square(reference[np.isfinite(reference)])))) if np.isfinite(reference).any() else 0.0
        relative = error / np.maximum(np.abs(reference), max(RELATIVE_FLOOR * rms, np.finfo(np.float64).tiny))
    relative[np.isnan(relative)] = np.inf
    return ErrorStats(int((np.isfinite(got) & np.isfinite(reference)).sum()), *_three(error), *_three(relative), rms)


def within(error: float, allowed: float) -> bool:
    """Whether an error is inside its tolerance. An infinite tolerance is one of a type that overflows, and allows nothing."""
    return math.isfinite(allowed) and error <= allowed


def _three(error: np.ndarray) -> tuple[float, float, float]:
    p99 = float(np.percentile(error, 99, method="higher"))
    return float(error.max()), float(error.mean()), p99
