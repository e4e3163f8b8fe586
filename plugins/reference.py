"""The whole operator as nested loops in float64: the yardstick of every kernel, plugin and ONNX test."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from plugins.contract import INPUT_NAMES
from plugins.kernels.common import activate_reference


def scores(x: torch.Tensor, router: torch.Tensor, router_bias: torch.Tensor) -> torch.Tensor:
    """[T, K] float64; a token with a score that is not finite has all scores 0."""
    value = x.double() @ router.double().T + router_bias.double()
    return torch.where(torch.isfinite(value).all(1, keepdim=True), value, 0.0)


def routes(x: torch.Tensor, router: torch.Tensor, router_bias: torch.Tensor, top_k: int = 1) -> torch.Tensor:
    """[T, top_k] int64, best expert first; ties go to the lowest id."""
    order = torch.sort(scores(x, router, router_bias), dim=1, descending=True, stable=True)
    return order.indices[:, :top_k]


def moee_ffn(
    inputs: Mapping[str, torch.Tensor], *, activation: int, top_k: int = 1, chosen: torch.Tensor | None = None
) -> torch.Tensor:
    """`inputs` by the names of plugins/contract.py, x [T, D]; result [T, D] float64.

    `activation` is an index into ACTIVATIONS. `chosen` [T, top_k] replaces the routing, so that numerics can be
    compared where a near tie was decided the other way.
    """
    x, router, router_bias, w_up, b_up, w_down, b_out, neurons, offsets = (inputs[name] for name in INPUT_NAMES)
    chosen = routes(x, router, router_bias, top_k) if chosen is None else chosen
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for e in chosen[t].tolist():
            keep = neurons[int(offsets[e]) : int(offsets[e + 1])].long()
            hidden = activate_reference(w_up[keep].double() @ x[t].double() + b_up[keep].double(), activation)
            y[t] += hidden @ w_down[keep].double() + b_out[e].double()
    return y
