"""Figures of models as every table shows them: MACs in a unit that fits, and what was done to a layer."""

from __future__ import annotations

from typing import Any

SMALL = 1e8  # multiply-accumulates below which millions are shown


def macs_unit(macs: float) -> tuple[float, str]:
    """By what the MACs of a table are divided, and what that is called: billions, `G`, or millions for a small model."""
    return (1e6, "M") if macs < SMALL else (1e9, "G")


def status_of(layer: dict[str, Any]) -> str:
    """A layer's recorded status in words; one expert takes every token, so such a layer is pruned, and nothing is routed."""
    status = str(layer.get("status", ""))
    return "pruned" if status == "routed" and layer.get("experts") == 1 else status
