"""A logistic-regression probe: the accuracy of a backbone that has no classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.data import ImageSet, batches
from moee.progress import Reporter, silent, track


@dataclass(frozen=True)
class Probe:
    """Linear map from features [N, D] to logits [N, classes]: `weight` [classes, D], `bias` [classes], float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}


@torch.inference_mode()
def features(
    model: nn.Module, data: ImageSet, batch_size: int = 32, message: str = "features", report: Reporter = silent
) -> tuple[Tensor, Tensor]:
    """The model's outputs [N, D] (class feature of a backbone, logits of a classifier) and the labels [N]."""
    outputs, labels = [], []
    for batch in track(batches(data, batch_size), message, -(-len(data) // batch_size), report):
        outputs.append(model(batch.images))
        labels.append(batch.labels)
    return torch.cat(outputs), torch.cat(labels)


def fit_probe(x: Tensor, labels: Tensor) -> Probe:
    """Multinomial logistic regression on standardised features [N, D]; the scaling is folded into the weights."""
    from sklearn.linear_model import LogisticRegression

    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(max_iter=2000).fit(((x - mean) / std).double().numpy(), labels.numpy())
    weight = torch.from_numpy(fitted.coef_).float() / std
    return Probe(weight, torch.from_numpy(fitted.intercept_).float() - weight @ mean)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label."""
    return float((logits.argmax(1) == labels).double().mean())
