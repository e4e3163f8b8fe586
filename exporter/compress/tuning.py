"""How long a model is tuned, and whether that was worth it."""

from __future__ import annotations

from typing import Any

from exporter.compress.clock import Clock
from moee.artifacts.model import MoeeModel
from moee.planning.budget import Budget

MOST_EPOCHS = 10
WORTH_EPOCHS = 5  # from which on trials count on what tuning brings back
EPOCH_RUNS = 6.0  # of the dense model on an image, that an epoch takes for it


def epochs_within(clock: Clock, images: int) -> int:
    """Epochs on so many training images that the time allows from now on; none if there is not enough for one."""
    return epochs_in(clock.tuning, clock, images)


def epochs_in(seconds: float, clock: Clock, images: int) -> int:
    """Epochs on so many training images that fit into some seconds, at most `MOST_EPOCHS`."""
    each = EPOCH_RUNS * clock.image_s * images
    if seconds == float("inf") or not each:
        return MOST_EPOCHS
    return max(0, min(MOST_EPOCHS, int(seconds / each)))


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
