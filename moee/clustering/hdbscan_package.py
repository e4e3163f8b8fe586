"""HDBSCAN by the `hdbscan` package (Campello et al. 2013; McInnes et al. 2017)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moee.errors import UserError


class PackageHDBSCAN:
    """Density clustering. `min_samples` None means the package's default, `min_cluster_size`."""

    def __init__(self, min_cluster_size: int, min_samples: int | None = None):
        self.min_cluster_size, self.min_samples = min_cluster_size, min_samples

    def fit_predict(self, x: Tensor) -> Tensor:
        """Labels [N] int64 for x [N, F], -1 for noise. Raises `UserError` for fewer points than a cluster."""
        import hdbscan

        if len(x) < self.min_cluster_size:
            raise UserError(
                f"calibration gave {len(x)} tokens a layer, fewer than the minimum cluster size {self.min_cluster_size}; "
                "add images or lower --min-cluster-size"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator = hdbscan.HDBSCAN(self.min_cluster_size, min_samples=self.min_samples, core_dist_n_jobs=1)
            labels = estimator.fit_predict(x.double().numpy())
        return torch.from_numpy(labels.astype("int64"))
