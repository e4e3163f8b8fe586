"""What a routed layer of either kind computes, in two parts: its experts on given routes, and its scores with what rounding may
change in them."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.activations import activate
from moee.clear_moe import ClearFFN
from moee.clear_moe.dispatch import Loop, apply_ffn
from moee.layer import NeuronLayer, RoutedLayer


def apply_layer(layer: RoutedLayer, tokens: Tensor, chosen: Tensor) -> Tensor:
    """The layer on tokens [T, D] with given experts [T, k], in the type of its weights. Experts out of range add nothing."""
    tokens = tokens.to(layer.dtype)
    if isinstance(layer, ClearFFN):
        return _clear(layer, tokens, chosen[:, 0])
    assert isinstance(layer, NeuronLayer), f"no arithmetic for {type(layer).__name__}"
    return _routed(layer, tokens, chosen)


def _routed(layer: NeuronLayer, tokens: Tensor, chosen: Tensor) -> Tensor:
    dtype, bounds = tokens.dtype, layer.offsets.tolist()
    y = torch.zeros(tokens.shape, dtype=torch.promote_types(dtype, torch.float32))
    for e in range(layer.num_experts):
        rows = (chosen == e).any(1).nonzero()[:, 0]
        if len(rows):
            kept = layer.neurons[bounds[e] : bounds[e + 1]].long()
            hidden = layer.activations(tokens[rows], kept)
            y[rows] += torch.addmm(layer.b_out[e], hidden, layer.w_down[kept]).to(y.dtype)
    return y.to(dtype)


def _clear(layer: ClearFFN, tokens: Tensor, routes: Tensor) -> Tensor:
    parts, y = layer.parts(), torch.zeros_like(tokens)
    inside = ((routes >= 0) & (routes < layer.num_experts)).nonzero()[:, 0]
    if len(inside):
        y[inside] = apply_ffn(
            tokens[inside], routes[inside], parts.up, parts.down, lambda h: activate(h, layer.activation), Loop()
        )
    return y


def scores_and_bound(layer: RoutedLayer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [T, K] float64 of a layer in float64, and by how much float32 may miss each; scores of a token with any that is not
    finite are zero, as routing has it.

    A sum of n products in any order is off by at most (n + 2) half-ulps of the sum of magnitudes. A router of two layers passes
    the error of its features on: ReLU does not widen it.
    """
    x = tokens.double()
    if layer.router is None:  # nothing to choose
        return x.new_zeros(len(x), layer.num_experts), x.new_zeros(len(x), layer.num_experts)
    error = torch.zeros_like(x)
    if isinstance(layer, ClearFFN) and len(layer.router_hidden):
        rows, bias = layer.router_hidden, layer.router_hidden_bias
        error = _half_ulps(x.shape[1]) * (x.abs() @ rows.abs().T + bias.abs())
        x = torch.relu(x @ rows.T + bias)
    router, bias = layer.router, layer.get_buffer("router_bias")
    scores = x @ router.T + bias
    scores = torch.where(torch.isfinite(scores).all(1, keepdim=True), scores, torch.zeros_like(scores))
    passed_on = error @ router.abs().T
    magnitude = x.abs() @ router.abs().T + passed_on + bias.abs()
    return scores, _half_ulps(x.shape[1]) * magnitude + passed_on


def _half_ulps(products: int) -> float:
    return (products + 2) * torch.finfo(torch.float32).eps / 2
