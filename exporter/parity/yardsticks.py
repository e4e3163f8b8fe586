"""The torch models that a graph is held against: one exact, one that loses what its type loses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from exporter.parity.outputs import INT8_SAFETY, SAFETY
from exporter.precision import Quantization, RoundedModel, TypedModel, dtype_of, typed
from exporter.quantization import quantized
from moee.layers.routed import RoutedLayer, routed_layers


@dataclass(frozen=True)
class Yardsticks:
    """The torch side: `exact` computes in float64 with the graph's own weights, `own` in the runtime's type. A runtime's output
    may be off by `safety` times what `own`'s is."""

    exact: RoundedModel
    own: nn.Module
    dtype: torch.dtype
    safety: float = SAFETY

    def layers(self) -> tuple[dict[str, RoutedLayer], dict[str, RoutedLayer]]:
        """Routed layers of both by name."""
        return routed_layers(self.exact.model), routed_layers(self.inner)

    @property
    def inner(self) -> nn.Module:
        """`own` as it is beneath what brings images into its type."""
        found = self.own.model if isinstance(self.own, (RoundedModel, TypedModel)) else self.own
        assert isinstance(found, nn.Module), "wrappers hold a model"
        return found


def yardsticks(
    model: nn.Module, precision: str, widened: bool = False, quantization: Quantization | None = None
) -> Yardsticks:
    """Models to compare a graph of `precision` with; `widened`: the runtime computes its bfloat16 weights in float32.

    An int8 graph has `quantization`. Rounding to int8 makes a jump of a difference in the last digit, so `own` takes the closest
    call of every int8 layer and image the other way: that is what another order of summation may do too.
    """
    dtype = dtype_of(precision)
    if quantization is not None:
        exact, own = (quantized(model, quantization.input_scales, dtype, closest_calls=c) for c in (False, True))
        return Yardsticks(RoundedModel(exact, dtype, torch.float64).eval(), typed(own, dtype), dtype, INT8_SAFETY)
    exact = RoundedModel(model, dtype, torch.float64).eval()
    if widened:
        return Yardsticks(exact, RoundedModel(model, dtype, torch.float32).eval(), torch.float32)
    return Yardsticks(exact, typed(model, dtype), dtype)
