"""Which neurons the experts of a whole model keep: one price for every neuron's error, under a budget of MACs.

A neuron that expert e of a layer keeps costs 2 D MACs (3 D in a gated MLP) on each of the expert's tokens and removes its own
part of the error there. Errors of different neurons are taken to add up, so the best choice under a budget keeps every (layer,
expert, neuron) whose error a MAC exceeds one threshold: a sort. Where a MAC takes longer in some layers than in others, it is
the error a unit of time; the budget then is one of MACs still, and the choice the best for the time that these take. Where
widths are to be multiples of a number, an expert's neurons are taken by so many at once, the best first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Candidate:
    """A layer to allocate neurons in: error a token `error` [K, H] of dropping each neuron, `share` [K] of the tokens that
    each expert gets, `tokens` an image; MACs a token of one neuron (`neuron_macs`) and of the routing (`routing_macs`);
    `mac_time`: how long a MAC takes, in any unit that all layers share; `multiple`: of which each expert's width is one, or
    all H."""

    error: Tensor
    share: Tensor
    tokens: int
    neuron_macs: int
    routing_macs: int
    mac_time: float = 1.0
    multiple: int = 1


@dataclass(frozen=True)
class Allocation:
    """Ascending neuron ids that each expert of each layer keeps; `error` is the share of the total that is dropped, `macs` an
    image of the routed layers, router included."""

    kept: dict[str, list[Tensor]]
    error: float
    macs: float


def allocate(candidates: Mapping[str, Candidate], macs: float | None = None, keep: float | None = None) -> Allocation:
    """Keep the neurons with the highest error a unit of time until the layers cost `macs` an image, or until they hold the share
    `keep` of the total error. Every expert keeps at least its best neuron, or its best `multiple`. Ties go to the earlier layer,
    expert, neuron.
    """
    ranked = {name: c.error.sort(dim=1, descending=True, stable=True) for name, c in candidates.items()}
    blocks = {name: _blocks(c, ranked[name].values) for name, c in candidates.items()}
    ratios, costs, errors = (torch.cat([block[i].flatten() for block in blocks.values()]) for i in range(3))
    order = ratios.sort(descending=True, stable=True).indices
    error, cost = errors[order].cumsum(0), costs[order].cumsum(0)
    fixed = sum(c.tokens * c.routing_macs for c in candidates.values())
    least = sum(len(c.error) for c in candidates.values())
    if macs is not None:
        count = int((cost + fixed <= macs).sum())
    else:
        assert keep is not None, "allocate needs macs or keep"
        count = int((error < keep * error[-1] * (1 - 1e-12)).sum()) + 1
    count = min(max(count, least), len(order))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count]] = True
    kept, start = {}, 0
    for name, c in candidates.items():
        shape = blocks[name][0].shape
        widths = chosen[start : start + shape.numel()].view(shape).sum(1) * c.multiple
        kept[name] = [ids[: int(w)].sort().values for ids, w in zip(ranked[name].indices, widths, strict=True)]
        start += shape.numel()
    dropped = 1 - float(error[count - 1] / error[-1]) if float(error[-1]) > 0 else 0.0
    return Allocation(kept, max(0.0, dropped), float(cost[count - 1]) + fixed)


def _blocks(c: Candidate, ranked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Error a unit of time, MACs and error an image [K, blocks] of an expert's neurons `ranked` [K, H], by `multiple` at once.
    The first block of an expert stands above all others."""
    missing = -ranked.shape[1] % c.multiple
    error = nn.functional.pad(ranked, (0, missing)).unflatten(1, (-1, c.multiple)).sum(2)
    sizes = torch.full((error.shape[1],), c.multiple, dtype=error.dtype)
    sizes[-1] -= missing
    ratio = error / (sizes * c.neuron_macs * c.mac_time)
    ratio[:, 0] = torch.inf
    tokens = (c.share * c.tokens)[:, None]
    return ratio, tokens * sizes * c.neuron_macs, tokens * error
