"""Parity of each routed layer: its result and its routes on the inputs that it got, and how far those inputs had drifted.

Three comparisons, because they answer different questions:
- *local*: the layer in float64 on the tokens that the runtime itself fed it, with the runtime's routes. A layer that fails here
  is wrong, whatever came before it. Its routes are held against float64 scores of those tokens: another expert than the best
  is a near tie if the scores differ by less than float32 sums can be off, and an error otherwise.
- *probe*: the same with routes that are dictated, so that each expert works, also those that no image's token reaches.
- *cumulative*: the same layer in a float64 run of the whole model. It shows how errors add up, and which tokens took another
  expert because of them (flips).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.forms.registry import form_of
from exporter.parity.arithmetic import apply_layer, scores_and_bound
from exporter.parity.outputs import SAFETY, tolerance
from exporter.parity.stats import ErrorStats, error_stats, within
from exporter.parity.taps import Tap
from moee.layers.routed import RoutedLayer


@dataclass(frozen=True)
class LayerParity:
    """One routed layer on `tokens` tokens.

    `agreement`: share of tokens with the routes of the float64 run, `flips` the others. `flip_margin_*`: how much better the
    float64 run's expert scored than the one taken, over the median gap between the best two experts. `wrong_routes`: tokens
    whose expert is not the best of their own scores by more than rounding explains. `local`: errors of the layer alone, allowed
    up to `local_tolerance`; `probe`: the same where every expert gets tokens, up to `probe_tolerance`. `equal`, `flipped`:
    cumulative errors of tokens with equal and with other routes. `input_drift`: mean error of the layer's input, allowed up to
    `input_tolerance`. `kind`: moee (a plugin node in `tensorrt.onnx`), plain (a plain MLP there, of one expert), clear-moe
    or lowrank (standard operators there too). `experts`: how many it has.
    """

    name: str
    tokens: int
    agreement: float
    flips: int
    flip_margin_median: float | None
    flip_margin_max: float | None
    wrong_routes: int
    wrong_route_margin: float
    local: ErrorStats
    local_tolerance: float
    probe: ErrorStats
    probe_tolerance: float
    equal: ErrorStats
    flipped: ErrorStats | None
    input_drift: float
    input_tolerance: float
    kind: str = "moee"
    experts: int = 0

    @property
    def routes(self) -> bool:
        """Whether there is a choice between experts."""
        return self.experts > 1

    @property
    def output_passed(self) -> bool:
        checked = self.tokens > 0 and self.local.count > 0 and self.probe.count > 0
        return checked and all(within(error, allowed) for error, allowed in self._pairs)

    @property
    def _pairs(self) -> tuple[tuple[float, float], ...]:
        return (self.local.max_abs_error, self.local_tolerance), (self.probe.max_abs_error, self.probe_tolerance)

    @property
    def output_message(self) -> str:
        """The worse of the two errors of the layer alone, and what is allowed."""
        if not (self.tokens and self.local.count and self.probe.count):
            return "something unknown: none of its values is a number"
        if not all(math.isfinite(error) for error, _ in self._pairs):
            return "something unknown: some of its values are no numbers"
        error, allowed = max(self._pairs, key=lambda pair: pair[0] / max(pair[1], 1e-300) if math.isfinite(pair[1]) else math.inf)
        return f"{error:.2e} of {allowed:.2e} allowed"

    @property
    def passed(self) -> bool:
        return self.output_passed and self.wrong_routes == 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Deviation:
    """The first place where a run leaves the model: `where` is input, routes or output of `layer`, or head."""

    layer: str
    where: str
    message: str


def wrong_routes(layer: RoutedLayer, tokens: Tensor, chosen: Tensor) -> Tensor:
    """By how much [T] each token's choice is worse than its best experts, less what float32 sums may be off; 0 where right.

    `layer` is in float64.
    """
    scores, bound = scores_and_bound(layer, tokens)
    inside = ((chosen >= 0) & (chosen < layer.num_experts)).all(1)
    safe = chosen.clamp(0, layer.num_experts - 1)
    best = scores.topk(layer.top_k, dim=1)
    deficit = best.values[:, -1] - scores.gather(1, safe).min(1).values
    slack = bound.gather(1, safe).max(1).values + bound.gather(1, best.indices).max(1).values
    over = torch.where(torch.isfinite(slack), (deficit - slack).clamp(min=0), torch.zeros_like(deficit))
    repeated = (safe.sort(1).values.diff(dim=1) == 0).any(1)
    return torch.where(inside & ~repeated, over, torch.full_like(over, float("inf")))


def layer_parity(
    name: str, exact: RoutedLayer, own: RoutedLayer, got: Tap, probe: Tap, *, reference: Tap, by_torch: Tap, plain: bool = False
) -> LayerParity:
    """Judge one layer. `exact` is the layer in float64, `own` in the type that the runtime computes in; `got` and `probe` come
    from the runtime, `reference` from the float64 run of the model, `by_torch` from torch in the runtime's type. `plain`: the
    layer is a plain MLP in `tensorrt.onnx`."""
    dtype = own.dtype
    local, local_tolerance = alone(exact, own, got)
    probed, probe_tolerance = alone(exact, own, probe)
    over = wrong_routes(exact, got.tokens, got.route)
    flipped = (got.route.sort(1).values != reference.route.sort(1).values).any(1)
    margins = _margins(exact, reference, got.route)[flipped]
    split = [error_stats(got.result[m].float().numpy(), reference.result[m].numpy()) for m in (~flipped, flipped)]
    drift = error_stats(got.tokens.float().numpy(), reference.tokens.numpy())
    usual = error_stats(by_torch.tokens.float().numpy(), reference.tokens.numpy())
    return LayerParity(
        name=name,
        tokens=len(flipped),
        agreement=float((~flipped).double().mean()),
        flips=int(flipped.sum()),
        flip_margin_median=float(margins.median()) if len(margins) else None,
        flip_margin_max=float(margins.max()) if len(margins) else None,
        wrong_routes=int((over > 0).sum()),
        wrong_route_margin=float(over.max()) if len(over) else 0.0,
        local=local,
        local_tolerance=local_tolerance,
        probe=probed,
        probe_tolerance=probe_tolerance,
        equal=split[0],
        flipped=split[1] if len(margins) else None,
        input_drift=drift.mean_abs_error,
        input_tolerance=SAFETY * max(usual.mean_abs_error, torch.finfo(dtype).eps * usual.rms),
        kind=form_of(exact).title(plain),
        experts=exact.num_experts,
    )


def alone(exact: RoutedLayer, own: RoutedLayer, got: Tap) -> tuple[ErrorStats, float]:
    """Error of the layer on the tokens and routes that it got, and how much torch's own type excuses."""
    expected = apply_layer(exact, got.tokens, got.route).numpy()
    by_own = error_stats(apply_layer(own, got.tokens, got.route).float().numpy(), expected)
    return error_stats(got.result.float().numpy(), expected), tolerance(by_own.max_abs_error, by_own.rms, own.dtype)


def _margins(layer: RoutedLayer, reference: Tap, chosen: Tensor) -> Tensor:
    """Score of the reference's weakest expert less that of the weakest one taken [T], over the median gap of the best two."""
    scores, _ = scores_and_bound(layer, reference.tokens)
    lost = scores.gather(1, reference.route).min(1).values - scores.gather(1, chosen.clamp(0, scores.shape[1] - 1)).min(1).values
    if scores.shape[1] < 2:
        return lost
    top = scores.topk(2, dim=1).values
    return lost / float(np.maximum((top[:, 0] - top[:, 1]).median(), 1e-30))


def first_deviation(layers: list[LayerParity], outputs_passed: bool, damaged: dict[str, str]) -> Deviation | None:
    """Walk the layers in order and name the first that leaves the model; `damaged` maps layers to what their weights lack."""
    before = "the input"
    for layer in layers:
        if layer.name in damaged:
            return Deviation(layer.name, "weights", damaged[layer.name])
        if not within(layer.input_drift, layer.input_tolerance):
            message = f"the input is off by {layer.input_drift:.2e} on average ({layer.input_tolerance:.2e} allowed): "
            return Deviation(layer.name, "input", f"{message}something between {before} and {layer.name} differs")
        if layer.wrong_routes:
            message = f"{layer.wrong_routes} of {layer.tokens} tokens take an expert that is not their best, by up to "
            return Deviation(layer.name, "routes", f"{message}{layer.wrong_route_margin:.2e} beyond rounding")
        if not layer.output_passed:
            return Deviation(layer.name, "output", f"the layer alone is off by {layer.output_message}")
        before = layer.name
    if not outputs_passed:
        agreed = f"every routed layer agrees; something after {before} differs" if layers else "the output differs"
        return Deviation(before, "head", agreed)
    return None
