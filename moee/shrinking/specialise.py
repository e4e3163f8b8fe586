"""Experts that a domain's images do not need are dropped, with the neurons that only they hold; the rest stays bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from moee.layers.routed import RoutedFFN
from moee.shrinking.mixture import Mixture, assembled


@torch.no_grad()
def needs(mixture: Mixture, tokens: Tensor) -> Tensor:
    """What each expert contributes to the layer's output on tokens [n, D]: a share [K], float64, that sums to one.

    The expert's part of EASY-EP's output-aware importance (arXiv 2504.06792): the norms of its outputs, summed over the tokens
    that are sent to it. How much a token counts for the model is left out: a layer does not see the stream that it adds to.
    """
    layer, kept = mixture.layer, mixture.experts()
    norms = torch.zeros(layer.num_experts, dtype=torch.float64)
    for part in mixture.chunks(tokens):
        routes = layer.routes(part)
        for e in routes.unique().tolist():
            own = part[(routes == e).any(1)]
            y = layer.activations(own, kept[e]) @ layer.w_down[kept[e]] + layer.b_out[e]
            norms[e] += y.norm(dim=1).sum(dtype=torch.float64)
    return norms / norms.sum().clamp_min(torch.finfo(torch.float64).tiny)


def dropped_experts(need: Tensor, tolerance: float, least: int, protected: list[int]) -> list[int]:
    """The least needed experts, by `need` [K], that together contribute at most `tolerance`; ties to the highest number. At
    least `least` experts and the `protected` ones stay."""
    order = sorted(range(len(need)), key=lambda e: (float(need[e]), -e))
    found, given_up = list[int](), 0.0
    for e in order:
        if len(need) - len(found) == least or given_up + float(need[e]) > tolerance:
            break
        if e not in protected:
            found.append(e)
            given_up += float(need[e])
    return sorted(found)


def without(mixture: Mixture, dropped: list[int], share: Tensor) -> RoutedFFN:
    """The layer without the `dropped` experts. Tokens that they had go to the experts that score next; `share` [K]: of the
    tokens, before."""
    layer = mixture.layer
    stay = [e for e in range(layer.num_experts) if e not in dropped]
    kept = mixture.experts()
    rest = share[stay] / share[stay].sum() if float(share[stay].sum()) > 0 else torch.full((len(stay),), 1 / len(stay))
    router = layer.router.detach()[stay], layer.router_bias[stay]
    return assembled(mixture, router, [kept[e] for e in stay], layer.b_out.detach()[stay], rest)
