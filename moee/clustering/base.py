"""The interface of a clustering, and principal components before it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

NOISE = -1


class Clusterer(Protocol):
    """Groups rows of x [N, F] float32; returns labels [N] int64, `NOISE` for points in no cluster."""

    def fit_predict(self, x: Tensor) -> Tensor: ...


def principal_components(x: Tensor, components: int) -> Tensor:
    """x [N, F] projected onto its first principal components [N, min(components, F)], float32.

    The F x F covariance is decomposed in float64, so the result does not depend on N's size or a random start; each
    component's sign makes its largest entry positive.
    """
    centred = x - x.mean(0)
    covariance = (centred.T @ centred).double()
    _, vectors = torch.linalg.eigh(covariance)
    vectors = vectors[:, -components:].flip(1)
    signs = torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
    return centred @ (vectors * signs).float()


def relabel(labels: Tensor) -> Tensor:
    """Labels int64 [N] renumbered 0.. in order of first appearance; noise stays."""
    result = torch.full_like(labels, NOISE)
    seen: dict[int, int] = {}
    for value in labels.tolist():
        if value != NOISE and value not in seen:
            seen[value] = len(seen)
    for value, new in seen.items():
        result[labels == value] = new
    return result
