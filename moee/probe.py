"""A logistic-regression probe: the accuracy of a backbone that has no classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Probe:
    """Linear map from features [N, D] to logits [N, classes]: `weight` [classes, D], `bias` [classes], float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}


def fit_probe(x: Tensor, labels: Tensor) -> Probe:
    """Multinomial logistic regression on features [N, D] as they are, with scikit-learn's default penalty (C = 1)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=2000).fit(x.double().numpy(), labels.numpy())
    return Probe(torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float())
