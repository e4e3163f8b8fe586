"""Errors of a model's output at each batch size, and the tolerance that torch's own error sets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from exporter.parity.stats import error_stats, within

SAFETY = 8.0  # times torch's own largest error: another order of summation, on another processor, may lose more than torch's did
INT8_SAFETY = 3.0  # there the error is the sum of many rounding decisions, which is as large wherever it is computed


@dataclass(frozen=True)
class BatchError:
    """Errors at one batch size against the float64 run of the same weights, and what torch in the graph's type loses there.

    `values` of its outputs are numbers in both; with one that is none, the largest error is infinite.
    `tie_images` of its images hold a near tie between experts and are held against the float64 run with the runtime's routes.
    """

    batch: int
    max_abs_error: float
    mean_abs_error: float
    output_rms: float
    p99_abs_error: float
    max_rel_error: float
    mean_rel_error: float
    p99_rel_error: float
    torch_max_abs_error: float
    tolerance_abs: float
    values: int
    tie_images: int = 0

    @property
    def relative(self) -> float:
        """Largest error over the output's root mean square."""
        return self.max_abs_error / max(self.output_rms, 1e-30)

    @property
    def passed(self) -> bool:
        return self.values > 0 and within(self.max_abs_error, self.tolerance_abs)

    @property
    def message(self) -> str:
        """The largest error and what is allowed, or why nothing could be compared."""
        if self.values == 0:
            return "no output is a number, so nothing was compared"
        if not math.isfinite(self.tolerance_abs):
            return "torch in the graph's type overflows where float64 does not, so that no error could be too large"
        if not math.isfinite(self.max_abs_error):
            return "some outputs are no numbers, in the graph or in the model, and cannot be compared"
        allowed = f"{self.tolerance_abs:.3g} allowed (outputs have rms {self.output_rms:.3g})"
        return f"largest error {self.max_abs_error:.3g} of {allowed}"


def tolerance(
    own_error: float, rms: float, dtype: torch.dtype, rtol: float | None = None, atol: float | None = None,
    *, safety: float = SAFETY,
) -> float:  # fmt: skip
    """Largest absolute error allowed where torch itself, computing in `dtype`, is off by `own_error`; `rms` is the output's.

    `safety` times torch's largest error, and at least `safety` roundings of a value as large as the output's rms. With `rtol`
    or `atol` given, atol + rtol x rms instead.
    """
    if rtol is not None or atol is not None:
        return (atol or 0.0) + (rtol or 0.0) * rms
    return safety * max(own_error, torch.finfo(dtype).eps * rms)


def batch_error(
    batch: int, got: np.ndarray, reference: np.ndarray, torch_error: float, widest: float, *, dtype: torch.dtype,
    rtol: float | None = None, atol: float | None = None, safety: float = SAFETY,
) -> BatchError:  # fmt: skip
    """Compare one batch. `torch_error` is torch's largest error on it, `widest` that over all batches: a batch of one image is
    too small a sample."""
    stats = error_stats(got, reference)
    allowed = tolerance(max(widest, torch_error), stats.rms, dtype, rtol, atol, safety=safety)
    return BatchError(
        batch, stats.max_abs_error, stats.mean_abs_error, stats.rms, stats.p99_abs_error, stats.max_rel_error,
        stats.mean_rel_error, stats.p99_rel_error, torch_error, allowed, stats.count,
    )  # fmt: skip
