"""How long a model is tuned, and whether that was worth it."""

from __future__ import annotations

from typing import Any

from exporter.compression.clock import WORTH_EPOCHS, Clock, duration
from moee.artifacts.model import MoeeModel
from moee.planning.budget import Budget
from moee.train.trial import FORWARDS  # of the learning rate

MOST_EPOCHS = 10


def epochs_within(clock: Clock) -> int:
    """Epochs that the time allows from now on, at most `MOST_EPOCHS`; none if fewer fit than teach anything."""
    if clock.tuning == float("inf") or not clock.epoch_s:
        return MOST_EPOCHS
    fit = min(MOST_EPOCHS, int((clock.tuning - FORWARDS * clock.image_s) / clock.epoch_s))
    return fit if fit >= WORTH_EPOCHS else 0


def too_short(clock: Clock) -> str:
    """Why there is no tuning within the time."""
    least = f"{WORTH_EPOCHS} epochs take about {duration(clock.least_tuning)}"
    return f"{duration(clock.tuning)} were left, and {least}" if clock.tuning >= 1 else f"no time was left, and {least}"


def within(budget: Budget, kept: dict[str, Any]) -> bool:
    """Whether a retention keeps to the limits of the quality; what was not measured keeps to none."""
    accurate = budget.max_drop is None
    if budget.max_drop is not None and kept["accuracy"] is not None:
        accurate = 100 * (kept["dense_accuracy"] - kept["accuracy"]) <= budget.max_drop + 1e-7
    return accurate and (budget.min_cosine is None or kept["class_cosine"] >= budget.min_cosine)


def worth(tuned: MoeeModel, epochs: int, budget: Budget) -> dict[str, Any]:
    """Whether the tuned model is to be shipped: it learned something, and holds no less on the held-out images, nor less than the
    budget asks for."""
    stages = tuned.info["stages"]
    before, after = (stages[name]["retention"] for name in ("extracted", "tuned"))
    if stages["tuned"]["best_epoch"] == 0:
        return {"epochs": epochs, "kept": False, "why": f"{epochs} epochs taught it nothing"}
    worse = after["class_cosine"] < before["class_cosine"]
    if before["accuracy"] is not None:
        worse = (after["accuracy"], after["class_cosine"]) < (before["accuracy"], before["class_cosine"])
    if budget.min_cosine is not None and after["class_cosine"] < budget.min_cosine:
        return {"epochs": epochs, "kept": False, "why": f"the tuned model's cosine is {after['class_cosine']:.4f}"}
    return {"epochs": epochs, "kept": not worse, "why": "the tuned model holds less on the held-out images" if worse else ""}
