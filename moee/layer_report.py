"""What extraction reports about one MLP."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """What extraction did to one MLP. `share` [K] is each expert's share of the calibration tokens."""

    name: str
    status: str  # "routed" or the reason why the layer stayed dense
    hidden: int
    experts: int
    union: int
    widths: list[int]
    share: list[float]
    noise: float

    @property
    def mean_width(self) -> float:
        """Neurons a token uses on average; the dense width where the layer stayed dense."""
        return sum(w * s for w, s in zip(self.widths, self.share, strict=True)) if self.widths else float(self.hidden)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_width": self.mean_width}
