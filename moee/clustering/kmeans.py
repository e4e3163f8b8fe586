"""k-means with a k-means++ start: scikit-learn's on the CPU, ours on another device."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.clustering.lloyd import lloyd
from moee.errors import UserError


class KMeans:
    """Lloyd's algorithm; deterministic for one seed and thread count."""

    def __init__(self, clusters: int, seed: int = 0):
        self.clusters, self.seed = clusters, seed

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 on the CPU for x [N, F]. Raises `UserError` for fewer points than clusters."""
        if len(x) < self.clusters:
            raise UserError(f"k-means with {self.clusters} clusters needs as many tokens, came {len(x)}; add images")
        if x.device.type != "cpu":
            return lloyd(x, self.clusters, self.seed)
        from sklearn.cluster import KMeans as SklearnKMeans

        fitted = SklearnKMeans(self.clusters, n_init=1, random_state=self.seed).fit(x.numpy())
        return torch.from_numpy(fitted.labels_.astype("int64"))
