"""What a parity check found, with its verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from exporter.forms.form import WeightProblem
from exporter.parity.layers import Deviation, LayerParity, first_deviation
from exporter.parity.merges.judge import MergeParity
from exporter.parity.operator import OperatorParity
from exporter.parity.outputs import BatchError
from moee.schema import json_safe


@dataclass(frozen=True)
class ParityResult:
    """Errors by batch size and by layer, share of equal routes by layer, share of equal top-1 classes (None without a head, and
    where the model names one class alone). `rule` says in words what the outputs' tolerance is. `notes`: what was compared and
    shows little. `belongs_to`: the export (`exporter.belonging`).
    `dense`: the export is of the dense model itself, which has no routed layers to compare. `merges`: of blocks that merge
    tokens.
    `only_ties`: routes that differ from the float64 run's are near ties. `operator`: of `runtime.onnx`, None where the export has
    none."""

    runtime: str
    batches: list[BatchError]
    route_agreement: dict[str, float]
    top1_agreement: float | None
    images: int
    precision: str = "fp32"
    arithmetic: str = "float32"
    layers: list[LayerParity] = field(default_factory=list)
    weight_problems: list[WeightProblem] = field(default_factory=list)
    min_route_agreement: float = 0.0
    rule: str = ""
    only_ties: bool = False
    notes: list[str] = field(default_factory=list)
    belongs_to: dict[str, str] = field(default_factory=dict)
    dense: bool = False
    operator: OperatorParity | None = None
    merges: list[MergeParity] = field(default_factory=list)

    @property
    def max_abs_error(self) -> float:
        return max((b.max_abs_error for b in self.batches), default=math.inf)

    @property
    def mean_route_agreement(self) -> float | None:
        """None where no layer chooses between experts."""
        return sum(self.route_agreement.values()) / len(self.route_agreement) if self.route_agreement else None

    @property
    def routes_passed(self) -> bool:
        return self.only_ties or all(v >= self.min_route_agreement for v in self.route_agreement.values())

    @property
    def passed(self) -> bool:
        parts = [part.passed for some in (self.batches, self.layers, self.merges) for part in some]  # type: ignore[attr-defined]
        by_operator = self.operator is None or self.operator.passed
        return not self.unchecked and all(parts) and self.routes_passed and not self.weight_problems and by_operator

    @property
    def unchecked(self) -> list[str]:
        """What nothing was compared of: with nothing to check a gate has not passed."""
        parts = {"batches": self.batches, **({} if self.dense else {"layers": [*self.layers, *self.merges]})}
        return [name for name, found in parts.items() if not found]

    def __bool__(self) -> bool:
        return self.passed

    @property
    def first_deviation(self) -> Deviation | None:
        """The first layer that leaves the model, and how; None if none does."""
        damaged = {p.layer: p.message for p in reversed(self.weight_problems)}
        wrong = next((merge for merge in self.merges if not merge.passed), None)
        if wrong is not None:
            return Deviation(wrong.name, "merges", wrong.message)
        return first_deviation(self.layers, all(b.passed for b in self.batches), damaged)

    def to_json(self) -> dict[str, Any]:
        deviation = self.first_deviation
        largest = max((b.tolerance_abs / max(b.output_rms, 1e-30) for b in self.batches), default=math.nan)
        body = {
            "schema": "moee.parity/1",
            **{k: v for k, v in asdict(self).items() if k not in ("layers", "batches", "min_route_agreement", "rule")},
            "batches": [{**asdict(b), "passed": b.passed} for b in self.batches],
            "layers": [layer.to_json() for layer in self.layers],
            "max_abs_error": self.max_abs_error,
            "tolerance": {
                "max_relative_error": largest,
                "min_route_agreement": self.min_route_agreement,
                "rule": self.rule,
            },
            "first_deviation": asdict(deviation) if deviation else None,
            "passed": self.passed,
        }
        return json_safe(body)
