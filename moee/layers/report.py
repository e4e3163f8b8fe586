"""What extraction reports about one MLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moee.cures import cures

FROM_THE_START = "dense: "


@dataclass(frozen=True)
class RefitReport:
    """What the refit did to one layer: its tokens, its `neurons` (the unknowns), `ridge` (lambda; None: the layer is as before).

    The errors are squares of what the layer misses of its target on held-out tokens, behind its LayerScale, over those of the
    target about its mean; None where they were not measured. The target is the dense MLP's output, or what brings the residual
    stream to the dense model's. `note` says what is out of the ordinary."""

    tokens: int
    neurons: int
    ridge: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    note: str = ""


@dataclass(frozen=True)
class LayerReport:
    """What extraction did to one MLP. `share` [K] is each expert's share of the calibration tokens, of which there were `tokens`
    (None: not recorded, or the method looks at none)."""

    name: str
    status: str  # "routed" or the reason why the layer stayed dense
    hidden: int
    experts: int
    union: int
    widths: list[int]
    share: list[float]
    noise: float
    tokens: int | None = None
    refit: RefitReport | None = None

    @property
    def candidate(self) -> bool:
        """Whether experts were looked for: what is no MLP, or was excluded, stays dense from the start."""
        return not self.status.startswith(FROM_THE_START)

    @property
    def notes(self) -> list[str]:
        """What makes the layer's figures doubtful, one sentence each."""
        found = []
        if self.tokens is not None and self.tokens < self.hidden and self.status == "routed":
            more = cures("give more images", "more --tokens")
            found.append(f"experts from {self.tokens} calibration tokens for {self.hidden} neurons: {more}")
        if self.refit is not None and self.refit.note:
            found.append(self.refit.note)
        return found

    @property
    def mean_width(self) -> float:
        """Neurons a token uses on average; the dense width where the layer stayed dense."""
        return sum(w * s for w, s in zip(self.widths, self.share, strict=True)) if self.widths else float(self.hidden)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_width": self.mean_width, "notes": self.notes}


def routing_entropy(share: Sequence[float]) -> float:
    """Entropy of the experts' shares [K] of a layer's tokens, over its maximum log K; 1 for one expert."""
    if len(share) < 2:
        return 1.0
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))


def left_dense(name: str, reason: str, hidden: int, noise: float = 0.0) -> LayerReport:
    """The report of an MLP of `hidden` neurons that stays as it is."""
    return LayerReport(name, reason, hidden, 0, hidden, [], [], noise)
