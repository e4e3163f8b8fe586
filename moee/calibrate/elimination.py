"""Which neurons an expert keeps, by backward elimination that knows the refit.

A rank by a criterion looks at one neuron at a time. But the refit makes good what the others can: of two neurons that fire alike,
one is enough. Removing neuron j from a least-squares fit on activations with the Gram matrix G, and correcting the rest, adds
|w_j|^2 / [G^-1]_jj to the squared error, w_j being the neuron's corrected output weights: the optimal brain surgeon
(Hassibi and Stork 1993), for whole neurons as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089) and OSSCAR (Meng et al. 2024,
arXiv 2403.12983).
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 96  # in which all neurons would be removed
RIDGE = 0.01  # of the mean diagonal, as the refit takes for layers of this size


def eliminate(
    gram: Tensor, weight: Tensor, count: int, *, block: int | None = None, ridge: float = RIDGE
) -> Tensor:
    """Ascending ids [count] of the neurons that stay.

    `gram` [H, H]: of their centred activations; `weight` [H, D]: what each adds to the output. `block` are removed at once
    (default: a `STEPS`th of them). Ties go to the lower id. Raises `ValueError` for a Gram matrix that is not finite.
    """
    hidden = len(gram)
    level = float(gram.diagonal().double().mean())
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix is not finite")
    alive = torch.ones(hidden, dtype=torch.bool, device=gram.device)
    if count >= hidden or level <= 0:  # nothing to remove, or all activations are constant
        return torch.arange(min(count, hidden), device=gram.device)
    damped = gram + ridge * level * torch.eye(hidden, dtype=gram.dtype, device=gram.device)
    inverse, rest = torch.cholesky_inverse(torch.linalg.cholesky(damped)), weight.to(gram.dtype).clone()
    block = block or max(1, hidden // STEPS)
    for left in range(hidden - count, 0, -block):
        cost = rest.square().sum(1) / inverse.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
        cost[~alive] = torch.inf
        gone = cost.sort(stable=True).indices[: min(block, left)]
        columns = inverse[:, gone]
        solved = torch.linalg.solve(inverse[gone][:, gone], torch.cat([rest[gone], inverse[gone]], 1))
        rest.addmm_(columns, solved[:, : rest.shape[1]], alpha=-1)
        inverse.addmm_(columns, solved[:, rest.shape[1] :], alpha=-1)
        alive[gone] = False
    return alive.nonzero()[:, 0]
