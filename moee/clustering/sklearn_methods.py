"""Clusterings by scikit-learn: DBSCAN, OPTICS and BIRCH, and a random partition to compare with.

They are built for few features: give them principal components.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class DBSCAN:
    """Density clustering at one radius. `eps` None takes the median distance to the `min_samples`-th neighbour."""

    def __init__(self, min_samples: int, eps: float | None = None):
        self.min_samples, self.eps = min_samples, eps

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F], -1 for noise."""
        from sklearn.cluster import DBSCAN as SklearnDBSCAN
        from sklearn.neighbors import NearestNeighbors

        eps, x = self.eps, x.cpu()
        if eps is None:
            neighbours = NearestNeighbors(n_neighbors=min(self.min_samples, len(x))).fit(x.numpy())
            eps = max(float(np.median(neighbours.kneighbors()[0][:, -1])), 1e-12)
        return _labels(SklearnDBSCAN(eps=eps, min_samples=self.min_samples).fit_predict(x.numpy()))


class OPTICS:
    """Density clustering over all radii, clusters cut by steepness (xi)."""

    def __init__(self, min_cluster_size: int, min_samples: int):
        self.min_cluster_size, self.min_samples = min_cluster_size, min_samples

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F], -1 for noise."""
        from sklearn.cluster import OPTICS as SklearnOPTICS

        fitted = SklearnOPTICS(min_samples=self.min_samples, min_cluster_size=self.min_cluster_size)
        return _labels(fitted.fit_predict(x.cpu().numpy()))


class Birch:
    """Clustering-feature tree, then agglomeration to `clusters`. The radius is a tenth of the data's root mean square."""

    def __init__(self, clusters: int):
        self.clusters = clusters

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F]."""
        from sklearn.cluster import Birch as SklearnBirch

        x = x.cpu()
        threshold = 0.1 * float((x - x.mean(0)).square().sum(1).mean().sqrt())
        return _labels(SklearnBirch(n_clusters=self.clusters, threshold=max(threshold, 1e-12)).fit_predict(x.numpy()))


class RandomPartition:
    """Every point in one of `clusters` groups, drawn uniformly with `seed`."""

    def __init__(self, clusters: int, seed: int = 0):
        self.clusters, self.seed = clusters, seed

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F]."""
        return torch.randint(self.clusters, (len(x),), generator=torch.Generator().manual_seed(self.seed))


def _labels(found: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(found, dtype=np.int64))
