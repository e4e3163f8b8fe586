"""Routers: one row and one bias an expert; a token goes to the highest score, ties to the lowest expert."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def cosine_router(tokens: Tensor, labels: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Unit mean inputs [K, D] of each cluster and a zero bias [K] (paper, routing by cosine similarity).

    tokens [N, D] are the MLP's inputs, labels [N] int64 their clusters (-1 is left out).
    """
    rows = torch.stack([tokens[labels == e].double().mean(0) for e in range(experts)])
    return torch.nn.functional.normalize(rows, dim=1).float(), torch.zeros(experts)


def euclidean_router(tokens: Tensor, labels: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Mean inputs [K, D] and biases -|mu|^2 / 2 [K]: the highest score is the nearest mean."""
    rows = torch.stack([tokens[labels == e].double().mean(0) for e in range(experts)])
    return rows.float(), (-rows.square().sum(1) / 2).float()


def hash_router(tokens: Tensor, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Locality-sensitive hashing by random hyperplanes through the mean of tokens [N, D], written as a linear router: rows [K, D]
    and biases [K].

    With b = ceil(log2 K) planes h_i, expert e answers to the sign pattern c of its binary digits: its row is
    sum_i c_i h_i, so the highest score is the pattern nearest to the token's.
    """
    bits = max(1, math.ceil(math.log2(experts)))
    planes = torch.randn(bits, tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    codes = (torch.arange(experts)[:, None] >> torch.arange(bits)) % 2 * 2.0 - 1.0
    rows = codes @ torch.nn.functional.normalize(planes, dim=1)
    return rows, -rows @ tokens.mean(0)


def random_router(tokens: Tensor, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random unit rows [K, D], and biases [K] that centre them on the mean of tokens [N, D]: experts that have nothing to do with
    the clusters."""
    rows = torch.randn(experts, tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    rows = torch.nn.functional.normalize(rows, dim=1)
    return rows, -rows @ tokens.mean(0)


def make_router(kind: str, tokens: Tensor, labels: Tensor, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [K, D] and biases [K] of a routing by name; tokens [N, D] and labels [N] as in `cosine_router`. Raises `ValueError`
    for an unknown name."""
    if kind == "cosine":
        return cosine_router(tokens, labels, experts)
    if kind == "euclidean":
        return euclidean_router(tokens, labels, experts)
    if kind == "hash":
        return hash_router(tokens, experts, seed)
    if kind == "random":
        return random_router(tokens, experts, seed)
    raise ValueError(f"unknown routing {kind!r}; expected cosine, euclidean, hash or random")


def exact_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, autocast rounds nothing."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def scores(tokens: Tensor, router: Tensor, router_bias: Tensor) -> Tensor:
    """Scores [N, K] float32 (float64 for float64 tokens) of tokens [N, D], under autocast too. A token with any score that is not
    finite scores zero everywhere."""
    exact = torch.promote_types(tokens.dtype, torch.float32)
    with exact_arithmetic(tokens.device):
        raw = tokens.to(exact) @ router.to(exact).T + router_bias.to(exact)
    return torch.where(torch.isfinite(raw).all(-1, keepdim=True), raw, torch.zeros_like(raw))


def route(tokens: Tensor, router: Tensor, router_bias: Tensor, top_k: int = 1) -> Tensor:
    """Experts [N, top_k] int64 of tokens [N, D], best first, ties to the lowest id."""
    values = scores(tokens, router, router_bias)
    if top_k == 1:
        return values.argmax(-1, keepdim=True)
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
