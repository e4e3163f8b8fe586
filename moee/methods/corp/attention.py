"""Which query and key dimensions of a head stay, and what makes up for the others in its logits.

A logit is q_S.k_S + q_P.k_P, with S the dimensions that stay and P those that go. Their part is taken for q_S' M k_S. For q and
k drawn independently the M of the least squared error is (Cq_SS + l I)^-1 Cq_SP Ck_PS (Ck_SS + l I)^-1, with second moments C. So
(I + M)' goes into the query's weights, and nothing else changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moee.methods.heads.fit import Bases, HeadMoments

RIDGE = 1e-3  # l, of the mean diagonal; the moments are of tens of thousands of tokens


def energies(moments: HeadMoments) -> Tensor:
    """E (q_j k_j)^2 [heads, d] of each dimension, for q and k drawn independently."""
    query, key = (each.diagonal(dim1=-2, dim2=-1) / moments.count for each in (moments.query, moments.key))
    return query * key


def compensated(moments: HeadMoments, width: int) -> Bases:
    """Maps [heads, width, d] of query and key to the `width` dimensions of the most energy, those of the query with what makes
    up for the others; the values' is the identity. Ties go to the lower dimension."""
    query, key = moments.query / moments.count, moments.key / moments.count
    heads, dim, _ = query.shape
    order = energies(moments).sort(descending=True, stable=True).indices
    maps = []
    for head in range(heads):
        kept, gone = order[head, :width].sort().values, order[head, width:].sort().values
        stays = torch.eye(dim, dtype=query.dtype, device=query.device)[kept]
        left = torch.linalg.solve(_damped(query[head][kept][:, kept]), query[head][kept][:, gone])
        right = torch.linalg.solve(_damped(key[head][kept][:, kept]), key[head][kept][:, gone])
        mixed = torch.eye(width, dtype=query.dtype, device=query.device) + left @ right.T
        maps.append((mixed.T @ stays, stays))
    whole = torch.eye(dim, dtype=query.dtype, device=query.device).expand(heads, dim, dim)
    return Bases(torch.stack([query for query, _ in maps]), torch.stack([key for _, key in maps]), whole)


def _damped(second: Tensor) -> Tensor:
    level = second.diagonal().mean().clamp(min=1e-30)
    return second + RIDGE * level * torch.eye(len(second), dtype=second.dtype, device=second.device)
