"""A logistic-regression probe: the accuracy of a backbone that has no classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moee.errors import UserError
from moee.interface.spec import ModelSpec
from moee.measure.accuracy import class_count

NEVER = 50.0  # nats by which another class always beats one that the probe has not seen


@dataclass(frozen=True)
class Probe:
    """Linear map from features [N, D] to logits [N, classes]: `weight` [classes, D], `bias` [classes], float32."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias

    def state(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}


def fit_probe(x: Tensor, labels: Tensor, classes: int = 2) -> Probe:
    """Multinomial logistic regression on features [N, D] as they are, with scikit-learn's default penalty (C = 1).

    `labels` [N] are numbers of `classes` classes, -1 for none: those images are left out. Row i of the probe is class i. A class
    without an image has a row that lies `NEVER` below another one for every input, so that it never wins. Raises `UserError` for
    fewer than two classes with images, or features that are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    known = labels >= 0
    if not x[known].isfinite().all():
        bad = int((~x[known].isfinite().all(1)).sum())
        raise UserError(f"the model's features are not finite on {bad} of {int(known.sum())} training images; check its weights")
    if len(labels[known].unique()) < 2:
        raise UserError("a probe needs labelled training images of two classes or more")
    fitted = LogisticRegression(max_iter=2000).fit(x[known].double().numpy(), labels[known].numpy())
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if len(weight) == 1:  # of two classes scikit-learn keeps the difference alone; softmax of its halves is the same model
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    rows = class_count(labels, classes)
    filled = Probe(weight[:1].repeat(rows, 1), bias[:1].repeat(rows) - NEVER)
    places = torch.from_numpy(fitted.classes_)
    filled.weight[places], filled.bias[places] = weight, bias
    return Probe(filled.weight.float(), filled.bias.float())


def head_drawn(spec: ModelSpec, probe: Probe | None) -> bool:
    """Whether classes would be told apart by a head with random weights."""
    return probe is None and spec.random_seed is not None


def classes_told(model: nn.Module, probe: Probe | None) -> int:
    """How many classes the probe, or else the model's own head, tells apart; 0 if it has neither."""
    return len(probe.bias) if probe is not None else int(getattr(model, "num_classes", 0) or 0)
