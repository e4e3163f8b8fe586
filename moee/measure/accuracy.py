"""Accuracy with its interval, and the one answer to the question whether two models' accuracies can be compared at all.

An accuracy says something of a model only if the dense model beats a guess with it: labels that have nothing to do with the head
give two low figures whose difference is nothing. So the dense model's hits are held against the best constant answer by an exact
binomial test. That answer's rate is the share of the most frequent class among the labels, which is never below one over the
number of classes; skewed labels, where a constant is right most of the time, are thereby held to more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moee.schema import shown

if TYPE_CHECKING:  # a report and `--help` read this file, and importing torch takes seconds, NumPy a quarter of `--help`
    import numpy as np
    from torch import Tensor

Z = 1.959963984540054  # 95 %, two-sided
CHANCE_P = 0.01  # of as many hits or more by the best constant answer: below it the dense model is better than that
LIMIT_ROUNDING = 1e-6  # percentage points: accuracies are quotients of counts
MAX_NAME = 200  # characters of a data set's name in a reason
FEATURES = "extract with --num-classes 0, and features are compared, and a probe on them"
OTHER_CLASSES = f"{FEATURES}, or give images of the model's classes"
NO_ANSWER = -2  # the class of an output that is not a number; -1 is the label of an image without one
Interval = tuple[float, float]


@dataclass(frozen=True)
class Proportion:
    """A share of the images with its 95 % interval by Wilson's score."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        return self.low, self.high


def wilson(successes: float, count: int) -> Proportion:
    """Share of `successes` in `count` (at least 1) with Wilson's 95 % interval, which holds near 0 and 1 too. Raises
    `ValueError` for more successes than images, or none."""
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"a share needs some images and not more hits than images; came {successes} of {count}")
    share = successes / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Proportion(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def paired_drop(dense_correct: np.ndarray, moee_correct: np.ndarray) -> tuple[float, Interval]:
    """Drop in percentage points and its 95 % interval, of answers [N] that are right or not, N at least 1.

    The images are the same, so shared difficulty cancels: Newcombe's score interval for paired proportions (Statistics in
    Medicine 17, 1998, method 10). Unlike a bootstrap's it has a width where the models agree on every one of a few images.
    """
    dense, moee = dense_correct.astype(bool), moee_correct.astype(bool)
    count, pairs = len(dense), zip((True, True, False, False), (True, False, True, False), strict=True)
    both, lost, won, none = (int(((dense == a) & (moee == b)).sum()) for a, b in pairs)
    before, after = wilson(both + lost, count), wilson(both + won, count)
    shared = float(both * none - lost * won)
    shared = max(shared - count / 2, 0.0) if shared > 0 else shared
    margins = math.sqrt((both + lost) * (won + none) * (both + won) * (lost + none))
    correlation = shared / margins if margins else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    drop = (lost - won) / count
    low = drop - reach(before.value - before.low, after.high - after.value)
    high = drop + reach(before.high - before.value, after.value - after.low)
    return 100 * drop, (100 * max(-1.0, low), 100 * min(1.0, high))


def top1(logits: Tensor) -> Tensor:
    """Most likely class [N] of logits [N, C]; `NO_ANSWER` where one of them is NaN or +inf, which argmax takes for a winner."""
    broken = (logits.isnan() | (logits == float("inf"))).any(1)
    return logits.argmax(1).masked_fill(broken, NO_ANSWER)


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Which images [N] get the same class from both logits [N, C]; none where a model gives no number."""
    ours, theirs = top1(a), top1(b)
    return (ours == theirs) & (ours != NO_ANSWER)


def shared_answers(dense: Tensor, moee: Tensor) -> float | None:
    """Share of the images that get the same class from both logits [N, C]. None if the dense ones name one class for all of
    several images and the others too: any two constants agree as well, so that shows nothing."""
    share = float(agreement(dense, moee).double().mean())
    return None if share == 1 and len(dense) > 1 and len(top1(dense).unique()) == 1 else share


def drop_in_words(drop_pp: float, interval: Sequence[float]) -> tuple[str, str]:
    """`("drop 2.50 points", "0.25 to 4.75")` of a drop in percentage points and its interval; of a negative one a gain, with that
    of the gain."""
    low, high = interval
    word, sign = ("gain", -1.0) if round(drop_pp, 2) < 0 else ("drop", 1.0)
    if sign < 0:
        low, high = -high, -low
    points, low, high = (round(value, 2) + 0.0 for value in (sign * drop_pp, low, high))  # no "-0.00"
    return f"{word} {points:.2f} points", f"{low:.2f} to {high:.2f}"


def class_count(labels: Sequence[int] | Tensor | np.ndarray, classes: int) -> int:
    """How many classes labels [N] number from 0: `classes`, or more if a label lies above it; 0 for data without labels."""
    import numpy as np

    known = np.asarray(labels, np.int64)
    return max(classes, int(known.max()) + 1) if classes > 1 and len(known) else classes


@dataclass(frozen=True)
class Comparison:
    """Whether accuracy on some images can be compared with the dense model's; `reason` says why not, and is empty if it can;
    `cure` what to do, where something can be done.

    `labelled` of the `images` have a label, and only they count. `dense`: its accuracy on them, None before it has run. `guess`:
    that of the best constant answer.
    """

    images: int
    labelled: int
    reason: str
    dense: Proportion | None = None
    cure: str = ""
    guess: float = 0.0

    def __bool__(self) -> bool:
        return not self.reason

    @property
    def advised(self) -> str:
        """The reason, and what to do."""
        return f"{self.reason}; {self.cure}" if self.cure else self.reason

    @property
    def counted(self) -> str:
        return counted(self.labelled, self.images)

    def idle(self, max_drop_pp: float) -> str:
        """Why a limit of `max_drop_pp` percentage points would fail no model, not even one that knows nothing; empty if it could,
        or before the dense model has run."""
        if self.dense is None or max_drop_pp < 100 * (self.dense.value - self.guess) - LIMIT_ROUNDING:
            return ""
        return (
            f"the dense model is right on {self.dense.value:.2%} of {self.counted}, and one class for all is right on "
            f"{self.guess:.2%}, so that a model which knows nothing would pass; give less than "
            f"{100 * (self.dense.value - self.guess):.4g}"
        )


def counted(labelled: int, images: int, probe: bool = False) -> str:
    """What an accuracy is of, in words. `probe`: it is a probe's, and not of the model's own head."""
    found = f"{images} images" if labelled == images else f"{labelled} of {images} images that have a label"
    return found + (", by a linear probe on the features" if probe else "")


def comparison(
    labels: Sequence[int] | Tensor, classes: int, told: int, name: str, *, logits: Tensor | None = None, drawn: bool = False,
    probe: bool = False, unknown: Collection[str] = (),
) -> Comparison:  # fmt: skip
    """Whether accuracy can be compared on images with `labels` [N] (-1: none) of `classes` classes.

    `told`: how many classes the model's head or probe tells apart (0: it has neither). `name`: the data's, for the reason.
    `logits` [N, told] are the dense model's; without them the answer is what is known before anything has run, and a comparison
    that is not refused yet may still be. `drawn`: the head's weights are random ones, whose accuracy may beat a guess by chance.
    `probe`: the logits are those of a probe on the dense features. `unknown`: names of the data's classes that the model has not.
    """
    import numpy as np

    given, name = np.asarray(labels, np.int64), shown(name, quoted=False, limit=MAX_NAME)
    known = given[given >= 0]
    classes = class_count(given, classes)
    shares = np.bincount(known) / max(len(known), 1)
    guess = float(shares.max()) if len(known) else 1.0
    reason, cure = "", ""
    if classes < 2 or not len(known):
        reason = f"{name} has no labels of two classes or more"
        if unknown and told:
            some = ", ".join(shown(each) for each in list(unknown)[:2]) + (" and others" if len(unknown) > 2 else "")
            reason += f" that the model has: its {some} {'are' if len(unknown) > 1 else 'is'} none of the model's classes"
    elif told == 0:
        reason = "the model has neither a classifier nor a probe"
    elif told == 1:
        reason = "the model's head gives one number an image, which names no class"
        cure = OTHER_CLASSES
    elif told != classes:
        reason = f"the model tells {told} classes apart, {name} has {classes}"
        cure = OTHER_CLASSES
    elif drawn:
        reason = "the model's head has the weights that --random-weights drew, so that its accuracy means nothing"
        cure = f"give --checkpoint or --pretrained, or {FEATURES}"
    elif guess == 1.0:
        reason = f"the {len(known)} labelled images from {name} are all of one class, so that a constant answer is always right"
    elif guess ** len(known) >= CHANCE_P:
        reason = f"{name} has {len(known)} labelled images, too few to tell any model from a guess"
    if reason or logits is None:
        return Comparison(len(given), len(known), reason, cure=cure)
    answers = top1(logits).numpy()[given >= 0]
    hits, silent = int((answers == known).sum()), int((answers == NO_ANSWER).sum())
    chance = _chance(hits, len(known), guess)
    if silent:
        reason = f"the dense model's outputs are NaN or infinite on {silent} of {counted(len(known), len(given))} in {name}"
    elif not chance < CHANCE_P:
        who, hint = "the dense model", "the labels may be of other classes than the model's"
        if probe:
            who, hint = "a linear probe on the dense model's features", "more labelled images a class would help it"
        reason = (
            f"{who} is right on {hits} of {counted(len(known), len(given))} in {name}, no better than a guess: the most frequent "
            f"class alone is right on {guess:.1%} (p {chance:.2g}, below {CHANCE_P} expected); {hint}"
        )
    return Comparison(len(given), len(known), reason, wilson(hits, len(known)), guess=guess)


def _chance(hits: int, count: int, rate: float) -> float:
    """Probability of `hits` or more in `count` images by an answer that is right at `rate`: one-sided exact binomial test."""
    from scipy.stats import binomtest

    return float(binomtest(hits, count, rate, alternative="greater").pvalue)


def recorded_interval(figures: Any, key: str) -> Interval | None:
    """The interval of the accuracy `key` in a recorded retention; worked out from its number of images in records of before
    intervals were kept. None without an accuracy."""
    value, images = figures.get(key), figures.get("images")
    found = figures.get(f"{key}_interval")
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in found):
        return float(found[0]), float(found[1])
    if not isinstance(value, (int, float)) or not isinstance(images, int) or images < 1 or not 0 <= value <= 1:
        return None
    return wilson(value * images, images).interval


def seeds_interval(results: Sequence[dict[str, Any]], name: str) -> Interval | None:
    """95 % interval of an accuracy's mean over seeds, by the images alone: the seeds share them, so they make it no narrower.
    None for results of before the number of `labelled` images was kept."""
    known = [(r[name], r["labelled"]) for r in results if r.get(name) is not None and r.get("labelled")]
    if not known:
        return None
    count = known[0][1]
    return wilson(min(sum(value for value, _ in known) / len(known), 1.0) * count, count).interval
