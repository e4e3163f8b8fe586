"""The time that a job may take, and what is left of it for trials, for tuning and for the stages after them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from moee.train.trial import FORWARDS  # of the learning rate

FINISH_S = 60.0  # export, verification, timing, bundle and report of a ViT-S, beside what goes by images
TIMING_S, EXPORTS = 12.0, 8.0  # of these the least that timing takes, and the rest in trial exports of the model
CONFIRM_PASSES = 2.5  # of the dense model on each image that confirms the choice: both models, and reading it
FINISH_IMAGES = 8  # runs of the dense model on each held-out image, that these take beside it
TIMED_IMAGES = 90  # runs of the dense model on a batch, and on an image, while both are timed in turns
TRIALS = 0.7  # of the time before the last stages; tuning gets the rest, where that is worth it
EPOCH_RUNS = 6.0  # of the dense model on an image, that an epoch of tuning takes for it
WORTH_EPOCHS = 2  # of tuning: with fewer the trial of the learning rate takes a good part of the time
SHOWN, FEWEST = 400, 20  # images
SHOWN_PASSES = 3  # of the dense model that showing an image takes: both models, and the pictures
MARGIN = 1.1  # a trial may take longer than the mean of those before


@dataclass
class Clock:
    """`seconds` of a job (None: as long as it takes) since `started`, by the clock `now`. `image_s`: of the dense model on one
    image, once it is known; `held_out` and `training`: numbers of images; `batch`: images that are timed at once;
    `confirming`: images that confirm the choice; `trial_s`: that a trial export took, None where there was none."""

    seconds: float | None
    now: Callable[[], float] = time.monotonic
    image_s: float = 0.0
    held_out: int = 0
    training: int = 0
    batch: int = 0
    confirming: int = 0
    trial_s: float | None = None
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.started

    @property
    def left(self) -> float:
        """Seconds; negative once the time has passed, infinite without a limit."""
        return float("inf") if self.seconds is None else self.seconds - self.spent

    @property
    def finish(self) -> float:
        """Seconds that the stages after tuning will take, as far as that can be told."""
        images = FINISH_IMAGES * min(self.held_out, 1000) + (TIMED_IMAGES * (self.batch + 1) if self.batch else 0)
        fixed = FINISH_S if self.trial_s is None else min(FINISH_S, TIMING_S + EXPORTS * self.trial_s)
        return fixed + self.image_s * (images + CONFIRM_PASSES * self.confirming)

    @property
    def trials_end(self) -> float:
        """Seconds after the start at which the trials must be over. What is too little for a tuning they get too."""
        if self.seconds is None:
            return float("inf")
        whole = self.seconds - self.finish
        return TRIALS * whole if self.tunes and whole - self.spent >= self.least_tuning else whole

    @property
    def tunes(self) -> bool:
        """Whether what trials leave is enough for a tuning; else trials get all of the time."""
        return self.seconds is None or (1 - TRIALS) * (self.seconds - self.finish) >= self.least_tuning

    @property
    def least_tuning(self) -> float:
        """Seconds of the shortest tuning that teaches anything."""
        return WORTH_EPOCHS * self.epoch_s + FORWARDS * self.image_s

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch of tuning."""
        return EPOCH_RUNS * self.image_s * self.training

    @property
    def tuning(self) -> float:
        """Seconds that tuning may take from now on."""
        return self.left - self.finish


    @property
    def overrun(self) -> str:
        """A sentence where the last stages will no longer end in time; empty where they will, or a tenth later at most."""
        whole = self.spent + self.finish
        if self.seconds is None or whole <= MARGIN * self.seconds:
            return ""
        return f"this takes longer than the {duration(self.seconds)} that it was given: about {duration(whole)} in all"


def images_within(clock: Clock) -> int:
    """How many held-out images a report can show from: at most `SHOWN`, and no more than half of the time that is left takes; 0
    where that is too few to say anything."""
    each = SHOWN_PASSES * clock.image_s
    fit = clock.held_out if clock.left == float("inf") or not each else int(max(0.0, clock.left) / 2 / each)
    count = min(SHOWN, clock.held_out, fit)
    return count if count >= min(FEWEST, clock.held_out) else 0


class Trials:
    """Says before each trial whether the time for trials is over: too little is left for one more like those before.

    A trial whose way has to be prepared takes longer than the next ones of that way.
    """

    def __init__(self, clock: Clock, say: Callable[[str], None]):
        self.clock, self.say = clock, say
        self.begun: list[_Begun] = []
        self.told = False

    def __call__(self, fresh: bool) -> bool:
        spent = self.clock.spent
        self.begun.append(_Begun(spent, fresh))
        if len(self.begun) == 1:
            return False
        each, left = self.expected(fresh), self.clock.trials_end - spent
        if not self.told and left != float("inf"):
            self.told = True
            self.say(f"the first trial took {duration(spent - self.begun[0].at)}; {remaining(left)} for others")
        if left >= each * MARGIN:
            return False
        self.begun.pop()  # it is not begun
        return True

    def ready(self) -> None:
        """The first trial is not broken off, however long it takes; what it makes of the time is said as soon as it is known."""
        late = self.clock.overrun
        if late and len(self.begun) == 1 and self.begun[0].ready is None:
            promised = self.clock.trials_end >= 1  # else it was known to be too short from the beginning
            self.say("the first trial is slower than the dense model's speed had promised; " * promised + late)
        self.begun[-1].ready = self.clock.spent

    def expected(self, fresh: bool) -> float:
        """Seconds of a trial: the mean of those of its kind before. Where there was no other: of one that was prepared what came
        after its preparation, and of one that must be prepared as much as of one that need not."""
        taken: dict[bool, list[float]] = {True: [], False: []}
        rest: list[float] = []
        for trial, after in pairwise(self.begun):
            taken[trial.fresh].append(after.at - trial.at)
            rest.append(after.at - (trial.at if trial.ready is None else trial.ready))
        found = taken[fresh] or (taken[False] if fresh else rest)
        return sum(found) / len(found)


@dataclass
class _Begun:
    """A trial that began `at` so many seconds after the start, whether its way had to be prepared, and when that was done."""

    at: float
    fresh: bool
    ready: float | None = None


def duration(seconds: float) -> str:
    """`75` to "75 s", `200` to "3 min 20 s", `7300` to "2 h 2 min"."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def remaining(seconds: float) -> str:
    """`248` to "4 min 8 s are left", `-3` to "no time is left"."""
    return f"{duration(seconds)} are left" if seconds >= 1 else "no time is left"


LEAST_S, MOST_S = 60.0, 7 * 86400.0  # of a job's time
UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """`20m`, `900s`, `900`, `1.5h` to seconds. Raises `ValueError` for anything else."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number):].strip() or "s"
    if unit not in UNITS:
        raise ValueError(text)
    return float(number) * UNITS[unit]
