"""Clusterings of hidden activations behind one interface, chosen by the configuration."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.clustering.base import NOISE, Clusterer, principal_components, relabel
from moee.clustering.hdbscan import HDBSCAN
from moee.clustering.kmeans import KMeans
from moee.config import ExtractConfig
from moee.errors import UserError
from moee.progress import Reporter, silent

__all__ = ["HDBSCAN", "NOISE", "Clusterer", "KMeans", "cluster_tokens", "make_clusterer", "principal_components"]

MIN_CLUSTER_POINTS = 5


def make_clusterer(config: ExtractConfig, points: int, report: Reporter = silent, name: str = "cluster") -> Clusterer:
    """The clusterer of a configuration for `points` rows; `name` heads its progress."""
    if config.clustering == "kmeans":
        assert config.clusters is not None, "ExtractConfig validates that k-means has a cluster count"
        return KMeans(config.clusters, config.seed)
    return HDBSCAN(
        max(MIN_CLUSTER_POINTS, round(config.min_cluster_size * points)),
        config.min_samples,
        # further passes make the total grow, so the end is not reached before fit_predict returns
        progress=lambda done, total, message: report(name, min(done, total - 1), total),
    )


def cluster_tokens(
    activations: Tensor, config: ExtractConfig, report: Reporter = silent, name: str = "cluster"
) -> Tensor:
    """Labels [N] int64 of hidden activations [N, H], noise -1, renumbered by first appearance.

    Raises `UserError` for too few points or values that are not finite.
    """
    bad = int((~torch.isfinite(activations).all(1)).sum())
    if bad:
        raise UserError(f"{bad} of {len(activations)} tokens have NaN or infinite activations; check the model's weights")
    if config.clustering == "none":
        return torch.zeros(len(activations), dtype=torch.int64)
    smallest = config.clusters if config.clustering == "kmeans" else MIN_CLUSTER_POINTS
    if smallest is not None and len(activations) < smallest:
        raise UserError(
            f"calibration gave {len(activations)} tokens a layer, fewer than the minimum cluster size {smallest}; add images"
        )
    if config.components is not None and config.components < activations.shape[1]:
        activations = principal_components(activations, config.components)
    labels = relabel(make_clusterer(config, len(activations), report, name).fit_predict(activations))
    report(name, 1, 1)
    return labels
