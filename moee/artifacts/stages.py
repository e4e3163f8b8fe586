"""The stages of an artifact, in the order in which they were done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CHANGED = "the held-out images changed between these stages, so that their figures are of different images"


def latest(info: dict[str, Any]) -> dict[str, Any]:
    """The record of the command that changed the weights last; empty where none is recorded."""
    found: dict[str, Any] = next(reversed(info.get("stages", {}).values()), {})
    return found


def images_changed(stages: Iterable[Any]) -> bool:
    """Whether stages on data of one name were measured on different held-out images: what they were is in `held_out`, a hash of
    their content, and older records have their number alone."""
    found = [stage for stage in stages if isinstance(stage, dict) and isinstance(stage.get("retention"), dict)]
    known = [{stage[key] for stage in found if isinstance(stage.get(key), str) and stage[key]} for key in ("data", "held_out")]
    return len(known[0]) < 2 and (len(known[1]) > 1 or _differ(found, "images") or _differ(found, "labelled"))


def dense_differs(stages: Iterable[Any]) -> bool:
    """Whether the dense model had several accuracies at the stages, so that none is the one of all."""
    found = [stage for stage in stages if isinstance(stage, dict) and isinstance(stage.get("retention"), dict)]
    return _differ(found, "dense_accuracy")


def _differ(stages: list[dict[str, Any]], key: str) -> bool:
    return len({str(stage["retention"][key]) for stage in stages if stage["retention"].get(key) is not None}) > 1
