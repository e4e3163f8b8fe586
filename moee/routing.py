"""Routers: one row and one bias an expert; a token goes to the highest score, ties to the lowest expert."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine_router(tokens: Tensor, labels: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Unit mean inputs [K, D] of each cluster and a zero bias [K] (paper, routing by cosine similarity).

    tokens [N, D] are the MLP's inputs, labels [N] int64 their clusters (-1 is left out).
    """
    rows = torch.stack([tokens[labels == e].double().mean(0) for e in range(experts)])
    return torch.nn.functional.normalize(rows, dim=1).float(), torch.zeros(experts)


def scores(tokens: Tensor, router: Tensor, router_bias: Tensor) -> Tensor:
    """Scores [N, K] float32 of tokens [N, D]. A token with any score that is not finite scores zero everywhere."""
    raw = tokens.float() @ router.float().T + router_bias.float()
    return torch.where(torch.isfinite(raw).all(-1, keepdim=True), raw, torch.zeros_like(raw))


def route(tokens: Tensor, router: Tensor, router_bias: Tensor, top_k: int = 1) -> Tensor:
    """Experts [N, top_k] int64 of tokens [N, D], best first, ties to the lowest id."""
    values = scores(tokens, router, router_bias)
    if top_k == 1:
        return values.argmax(-1, keepdim=True)
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
