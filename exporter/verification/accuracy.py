"""Accuracy of the MoEE model against the dense one on the same labelled images, with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moee.measure.accuracy import NO_ANSWER, Interval, Proportion, agreement, counted, paired_drop, top1, wilson

BINS = 15  # of the calibration error, as is usual


@dataclass(frozen=True)
class AccuracyResult:
    """Of the `images` that have a label, out of `of_images`.

    `drop_pp`: dense top-1 less MoEE top-1 in percentage points, with its 95 % interval, of paired proportions.
    `kl`: mean KL divergence of the MoEE model's probabilities from the dense one's, in nats. `*_ece`: expected calibration
    error, 15 bins of equal width. `max_drop_pp` is the gate, None if there is none. Top-5 is None below 6 classes.
    `probe`: the classes are those of a probe on the features."""

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
    of_images: int
    probe: bool = False

    @property
    def counted(self) -> str:
        return counted(self.images, self.of_images, self.probe)

    @property
    def passed(self) -> bool:
        # half a millionth of a point: the drop is a quotient of counts, and must not fail at its own printed value
        return self.max_drop_pp is None or self.drop_pp <= self.max_drop_pp + 5e-7

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of logits [N, C]: |accuracy - confidence| a bin of confidence, weighted by the bin's share of
    the images. Of those whose logits are numbers; NaN for none."""
    answered = top1(logits) != NO_ANSWER
    if not answered.any():
        return float("nan")
    confidence, chosen = logits[answered].double().softmax(1).max(1)
    correct = (chosen == labels[answered]).double()
    bins = (confidence * BINS).ceil().clamp(1, BINS).long() - 1
    total = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - correct)
    return float(total.abs().sum() / len(correct))


def kl_divergence(dense: Tensor, moee: Tensor) -> float:
    """Mean KL(dense || moee) of logits [N, C], in nats."""
    p, q = dense.double().log_softmax(1), moee.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def _among_five(logits: Tensor, labels: Tensor) -> Proportion:
    hits = (logits.topk(5, dim=1).indices == labels[:, None]).any(1) & (top1(logits) != NO_ANSWER)
    return wilson(int(hits.sum()), len(labels))


def compare_accuracy(
    dense: Tensor, moee: Tensor, labels: Tensor, max_drop_pp: float | None = None, unlabelled: int = 0,
    *, probe: bool = False,
) -> AccuracyResult:
    """Compare logits [N, C] of both models on images with `labels` [N] int64, beside which there are `unlabelled` images.
    `probe`: the logits are a probe's. Whether that says anything is `moee.measure.accuracy.comparison`'s to decide."""
    count, five = len(labels), dense.shape[1] > 5
    first = [(top1(logits) == labels).numpy() for logits in (dense, moee)]
    fifth = [_among_five(logits, labels) if five else None for logits in (dense, moee)]
    drop, interval = paired_drop(first[0], first[1])
    return AccuracyResult(
        images=count,
        dense_top1=wilson(int(first[0].sum()), count),
        moee_top1=wilson(int(first[1].sum()), count),
        dense_top5=fifth[0],
        moee_top5=fifth[1],
        agreement=wilson(int(agreement(dense, moee).sum()), count),
        kl=kl_divergence(dense, moee),
        dense_ece=calibration_error(dense, labels),
        moee_ece=calibration_error(moee, labels),
        drop_pp=drop,
        drop_interval_pp=interval,
        max_drop_pp=max_drop_pp,
        of_images=count + unlabelled,
        probe=probe,
    )
