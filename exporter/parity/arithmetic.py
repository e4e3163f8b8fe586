"""What a routed layer computes, in two parts: its experts on given routes, and its scores with what rounding may change in
them."""

from __future__ import annotations

import torch
from torch import Tensor

from exporter.forms.form import half_ulps
from exporter.forms.registry import form_of
from moee.layers.routed import RoutedLayer


def apply_layer(layer: RoutedLayer, tokens: Tensor, chosen: Tensor) -> Tensor:
    """The layer on tokens [T, D] with given experts [T, k], in the type of its weights. Experts out of range add nothing."""
    return form_of(layer).apply(layer, tokens.to(layer.dtype), chosen)


def scores_and_bound(layer: RoutedLayer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, K] float64 of a layer in float64, and by how much float32 may miss each; scores of a token with any that is not
    finite are zero, as routing has it."""
    x = tokens.double()
    if layer.router is None:  # nothing to choose
        return x.new_zeros(len(x), layer.num_experts), x.new_zeros(len(x), layer.num_experts)
    x, error = form_of(layer).scored(layer, x)
    router, bias = layer.router, layer.get_buffer("router_bias")
    scores = x @ router.T + bias
    scores = torch.where(torch.isfinite(scores).all(1, keepdim=True), scores, torch.zeros_like(scores))
    passed_on = error @ router.abs().T
    magnitude = x.abs() @ router.abs().T + passed_on + bias.abs()
    return scores, half_ulps(x.shape[1]) * magnitude + passed_on
