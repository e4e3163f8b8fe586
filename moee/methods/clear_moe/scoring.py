"""Scores of the MLPs: which of them bear a decomposition into experts.

    score = 1/4 sparsity + 1/4 clusterability + 1/2 (1 - sensitivity),   each scaled to 0..1 over the layers

Sparsity and clusterability say how much structure there is; sensitivity measures the damage itself and so weighs as much as
both together. Higher is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.layers.clear import ClearFFN, ClearParts
from moee.layers.clear_routers import linear_parts
from moee.methods.clear_moe.decompose import decompose_down, decompose_up, dense_hidden, up_metric
from moee.mlps.sites import mlp_replaced
from moee.models.ffn import FFN

NEAR_ZERO = 0.01  # of the layer's root mean square activation
SILHOUETTE_TOKENS = 1000
SPARSITY_TOKENS = 4096
SENSITIVITY_TOKENS = 4096
WEIGHTS = (0.25, 0.25, 0.5)


@dataclass(frozen=True)
class LayerScore:
    """Raw figures of one layer and their combination; `rank` is the one that the sensitivity was measured at."""

    sparsity: float
    silhouette: float
    sensitivity: float
    rank: int
    score: float = 0.0


def near_zero_share(hidden: Tensor) -> float:
    """Share of activations [N, H] below 1 % of their root mean square."""
    return float((hidden.abs() < NEAR_ZERO * hidden.square().mean().sqrt()).double().mean())


def silhouette(hidden: Tensor, clusters: int, seed: int) -> float:
    """Mean silhouette of k-means on a subsample of hidden activations [N, H]; -1 to 1, 0 for fewer than two clusters."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    rows = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))[:SILHOUETTE_TOKENS]
    sample = hidden[rows].numpy()
    if not 2 <= clusters < len(sample):
        return 0.0
    labels = KMeans(clusters, n_init=1, random_state=seed).fit_predict(sample)
    return float(silhouette_score(sample, labels)) if len(set(labels.tolist())) > 1 else 0.0


def low_rank_layer(ffn: FFN, tokens: Tensor, rank: int, metric: str) -> ClearFFN:
    """The layer at a rank, without experts, on input tokens [N, D]: what the sensitivity is measured with."""
    routes = torch.zeros(len(tokens), dtype=torch.int64)
    up = decompose_up(ffn, tokens, routes, 1, rank, residual=0, metric=up_metric(ffn, tokens, metric))
    hidden = dense_hidden(ffn, tokens)
    down = decompose_down(ffn, hidden, hidden @ ffn.w_down.T, routes, 1, rank=rank, residual=0, weight=ffn.w_down)
    router = linear_parts(torch.zeros(1, ffn.dim), torch.zeros(1), ffn.dim)
    return ClearFFN(ClearParts(router, up, down, ffn.activation), ffn.channels_first)


@torch.no_grad()
def score_layer(
    model: nn.Module, ffn: FFN, tokens: Tensor, images: Tensor, reference: Tensor, *, rank: int, clusters: int,
    metric: str, seed: int,
) -> LayerScore:  # fmt: skip
    """Figures of one layer from its input tokens [N, D]; sensitivity is the relative change of the model's output
    `reference` on `images` when this layer alone runs at `rank`."""
    hidden = dense_hidden(ffn, tokens[:: max(1, len(tokens) // SPARSITY_TOKENS)])
    layer = low_rank_layer(ffn, tokens[:: max(1, len(tokens) // SENSITIVITY_TOKENS)], rank, metric)
    with mlp_replaced(model, ffn.name, layer.to(images.device), ffn.bypassed):
        changed = model(images)
    sensitivity = float((changed - reference).norm() / reference.norm().clamp(min=1e-12))
    return LayerScore(near_zero_share(hidden), silhouette(hidden, clusters, seed), sensitivity, rank)


def combine(scores: list[LayerScore]) -> list[LayerScore]:
    """The scores with their combination filled in."""

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(v - low) / (high - low) if high > low else 0.5 for v in values]

    columns = (
        scaled([s.sparsity for s in scores]),
        scaled([s.silhouette for s in scores]),
        [1 - v for v in scaled([s.sensitivity for s in scores])],
    )
    totals = [sum(w * v for w, v in zip(WEIGHTS, row, strict=True)) for row in zip(*columns, strict=True)]
    return [LayerScore(s.sparsity, s.silhouette, s.sensitivity, s.rank, t) for s, t in zip(scores, totals, strict=True)]
