"""The clustering that the options ask for, and the labels that it gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moee.clustering.base import Clusterer, principal_components, relabel
from moee.clustering.hdbscan import FIRST_PASS, HDBSCAN
from moee.clustering.kmeans import KMeans
from moee.clustering.options import PARTITIONS, ClusteringOptions
from moee.clustering.sklearn_methods import DBSCAN, OPTICS, Birch, RandomPartition
from moee.errors import UserError, chosen
from moee.progress import Reporter, silent

MIN_CLUSTER_POINTS = 5
DBSCAN_SAMPLES = 10


def make_clusterer(
    config: ClusteringOptions, points: int, clusters: int | None = None, report: Reporter = silent, name: str = "cluster"
) -> Clusterer:
    """The clusterer of a configuration for `points` rows; partition methods make `clusters`, `name` heads the progress."""
    size = max(MIN_CLUSTER_POINTS, round(config.min_cluster_size * points))
    count = clusters or 0
    assert count or config.clustering not in PARTITIONS, "cluster_tokens asks HDBSCAN where the configuration has no number"

    def progress(done: int, total: int, message: str) -> None:
        if message == FIRST_PASS:
            report(name, min(done, total - 1), total)  # the end is reported when fit_predict returns
        else:
            report(f"{name}, {message}", min(done, total - 1) if total else done, total)

    makers: dict[str, Callable[[], Clusterer]] = {
        "hdbscan": lambda: HDBSCAN(size, config.min_samples, progress=progress),
        "dbscan": lambda: DBSCAN(config.min_samples or DBSCAN_SAMPLES, config.eps),
        "optics": lambda: OPTICS(size, config.min_samples or DBSCAN_SAMPLES),
        "kmeans": lambda: KMeans(count, config.seed),
        "birch": lambda: Birch(count),
        "random": lambda: RandomPartition(count, config.seed),
    }
    return chosen(makers, config.clustering, "clustering")()


def cluster_tokens(
    activations: Tensor, config: ClusteringOptions, report: Reporter = silent, name: str = "cluster"
) -> Tensor:
    """Labels [N] int64 on the CPU of hidden activations [N, H], noise -1, renumbered by first appearance.

    A partition method without a number of clusters takes HDBSCAN's. Raises `UserError` for too few points or values
    that are not finite.
    """
    bad = int((~torch.isfinite(activations).all(1)).sum())
    if bad:
        raise UserError(f"{bad} of {len(activations)} tokens have NaN or infinite activations; check the model's weights")
    smallest = config.clusters or MIN_CLUSTER_POINTS
    if len(activations) < smallest:
        raise UserError(
            f"calibration gave {len(activations)} tokens a layer, fewer than the minimum cluster size {smallest}; add images"
        )
    if config.components is not None and config.components < activations.shape[1]:
        activations = principal_components(activations, config.components)
    clusters = config.clusters
    if config.clustering in PARTITIONS and clusters is None:
        density = config.model_copy(update={"clustering": "hdbscan", "clusters": None})
        found = make_clusterer(density, len(activations), report=report, name=name).fit_predict(activations)
        clusters = max(2, int(found.max()) + 1)
    labels = relabel(make_clusterer(config, len(activations), clusters, report, name).fit_predict(activations))
    if config.clustering == "hdbscan" or config.clusters is None:  # the others report nothing on the way, so no end either
        report(name, 1, 1)
    return labels
