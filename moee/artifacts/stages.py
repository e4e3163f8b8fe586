"""The stages of an artifact, in the order in which they were done."""

from __future__ import annotations

from typing import Any


def latest(info: dict[str, Any]) -> dict[str, Any]:
    """The record of the command that changed the weights last; empty where none is recorded."""
    found: dict[str, Any] = next(reversed(info.get("stages", {}).values()), {})
    return found
