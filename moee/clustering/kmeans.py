"""k-means with a k-means++ start, by scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.errors import UserError


class KMeans:
    """Lloyd's algorithm; deterministic for one seed and thread count."""

    def __init__(self, clusters: int, seed: int = 0):
        self.clusters, self.seed = clusters, seed

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F]. Raises `UserError` for fewer points than clusters."""
        from sklearn.cluster import KMeans as SklearnKMeans

        if len(x) < self.clusters:
            raise UserError(f"k-means with {self.clusters} clusters needs as many tokens, came {len(x)}; add images")
        fitted = SklearnKMeans(self.clusters, n_init=1, random_state=self.seed).fit(x.cpu().numpy())
        return torch.from_numpy(fitted.labels_.astype("int64"))
