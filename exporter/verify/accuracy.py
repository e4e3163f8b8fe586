"""Accuracy of the MoEE model against the dense one on the same labelled images, with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Z = 1.959963984540054  # 95 %, two-sided
BINS = 15  # of the calibration error, as is usual
RESAMPLES = 2000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Proportion:
    """A share of the images with its 95 % interval by Wilson's score."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AccuracyResult:
    """`drop_pp`: dense top-1 less MoEE top-1 in percentage points, with the 95 % interval of a paired bootstrap over images.
    `kl`: mean KL divergence of the MoEE model's probabilities from the dense one's, in nats. `*_ece`: expected calibration
    error, 15 bins of equal width. `max_drop_pp` is the gate, None if there is none. Top-5 is None below 6 classes."""

    images: int
    dense_top1: Proportion
    moee_top1: Proportion
    dense_top5: Proportion | None
    moee_top5: Proportion | None
    agreement: Proportion
    kl: float
    dense_ece: float
    moee_ece: float
    drop_pp: float
    drop_interval_pp: Interval
    max_drop_pp: float | None

    @property
    def passed(self) -> bool:
        # half a millionth of a point: the drop is a quotient of counts, and must not fail at its own printed value
        return self.max_drop_pp is None or self.drop_pp <= self.max_drop_pp + 5e-7

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def wilson(successes: int, count: int) -> Proportion:
    """Share of `successes` in `count` with Wilson's 95 % interval, which holds near 0 and 1 too."""
    share = successes / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * float(np.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)))
    return Proportion(share, max(0.0, centre - half), min(1.0, centre + half))


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: |accuracy - confidence| a bin of confidence, weighted by the bin's share of the images."""
    confidence, chosen = logits.double().softmax(1).max(1)
    correct = (chosen == labels).double()
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    total = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - correct)
    return float(total.abs().sum() / len(labels))


def kl_divergence(dense: Tensor, moee: Tensor) -> float:
    """Mean KL(dense || moee) of logits [N, C], in nats."""
    p, q = dense.double().log_softmax(1), moee.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def paired_drop(dense_correct: np.ndarray, moee_correct: np.ndarray, seed: int = 0) -> tuple[float, Interval]:
    """Drop in percentage points and its 95 % interval; images are resampled in pairs, so that shared difficulty cancels."""
    difference = dense_correct.astype(np.float64) - moee_correct.astype(np.float64)
    counts = np.array([(difference == v).sum() for v in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), RESAMPLES)
    drops = (draws[:, 2] - draws[:, 0]) / len(difference) * 100
    low, high = np.percentile(drops, (2.5, 97.5))
    return float(difference.mean() * 100), (float(low), float(high))


def compare_accuracy(dense: Tensor, moee: Tensor, labels: Tensor, max_drop_pp: float | None = None) -> AccuracyResult:
    """Compare logits [N, C] of both models on images with `labels` [N] int64."""
    hits = {}
    for name, logits in (("dense", dense), ("moee", moee)):
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits[name] = (ranked[:, 0].numpy(), ranked.any(1).numpy())
    count, five = len(labels), dense.shape[1] > 5
    drop, interval = paired_drop(hits["dense"][0], hits["moee"][0])
    return AccuracyResult(
        images=count,
        dense_top1=wilson(int(hits["dense"][0].sum()), count),
        moee_top1=wilson(int(hits["moee"][0].sum()), count),
        dense_top5=wilson(int(hits["dense"][1].sum()), count) if five else None,
        moee_top5=wilson(int(hits["moee"][1].sum()), count) if five else None,
        agreement=wilson(int((dense.argmax(1) == moee.argmax(1)).sum()), count),
        kl=kl_divergence(dense, moee),
        dense_ece=calibration_error(dense, labels),
        moee_ece=calibration_error(moee, labels),
        drop_pp=drop,
        drop_interval_pp=interval,
        max_drop_pp=max_drop_pp,
    )
