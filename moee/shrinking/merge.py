"""Experts that answer alike are merged: M-SMoE (arXiv 2310.01334) for experts of one store of neurons.

The published method groups experts by their router's answers and averages their weights, neuron by neuron. Here all experts take
their neurons from one store, so a neuron is the same in each by its number. What a merge costs is known in closed form: if the
experts S answer by the mean of their outputs, weighted by how many tokens each has, tokens that expert a had miss

    sum over x of a of | y_a(x) - sum over g in S of w_g y_g(x) |^2 ,

each output less its mean over those tokens, since the refit sets the bias. The pair that adds least is merged first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.layers.routed import RoutedFFN
from moee.shrinking.mixture import Mixture, assembled


@dataclass(frozen=True)
class Alike:
    """How the experts of a layer answer each other's tokens: products [K, K, K] of outputs g and h (last two) on the tokens of
    expert a (first), each less its mean there; tokens [K] of each. float64."""

    products: Tensor
    tokens: Tensor

    @property
    def power(self) -> float:
        """Squares of the outputs, each about its expert's mean."""
        return float(self.products.diagonal(dim1=1, dim2=2).diagonal().sum())

    def missed(self, group: Sequence[int]) -> float:
        """The sum of squares that the tokens of a merged group would miss before a refit."""
        if len(group) == 1:
            return 0.0
        members = torch.tensor(group)
        within = self.products[members][:, members][:, :, members]
        weights = _weights(self.tokens[members])
        own = torch.arange(len(members))
        lost = within[own, own, own] - 2 * within[own, own] @ weights + (within @ weights) @ weights
        return float(lost.clamp_min(0).sum())


def _weights(tokens: Tensor) -> Tensor:
    """Shares [n] of the tokens; equal ones where there are none."""
    return tokens / tokens.sum() if float(tokens.sum()) else torch.full_like(tokens, 1 / len(tokens))


@torch.no_grad()
def alike(mixture: Mixture, tokens: Tensor) -> Alike:
    """Measured on input tokens [n, D]."""
    experts = mixture.layer.num_experts
    products = torch.zeros(experts, experts, experts, dtype=torch.float64)
    counts = torch.zeros(experts, dtype=torch.float64)
    for a, own in mixture.sent(tokens):
        counts[a] = len(own)
        first = mixture.outputs(own[:1])[0]  # a shift near the mean: nothing is lost to rounding when the mean is taken off
        total = torch.zeros(experts, mixture.dim, dtype=torch.float64)
        for part in mixture.chunks(own):
            y = (mixture.outputs(part) - first).movedim(1, 0)  # [K, n, D]
            products[a] += (y.flatten(1) @ y.flatten(1).T).double()
            total += y.sum(1, dtype=torch.float64)
        products[a] -= total @ total.T / len(own)
    return Alike(products, counts)


@dataclass(frozen=True)
class Merges:
    """Groups of former experts, ascending and by their first; `losses[i]`: what `i` merges make the layer miss before the refit,
    as a share of its outputs' squares about each expert's mean."""

    groups: list[list[int]]
    losses: list[float]


def merged_groups(found: Alike, experts: int, protected: Sequence[int] = ()) -> Merges:
    """Merge until `experts` groups are left, or only `protected` experts and one group. Ties go to the lowest numbers."""
    alone = [[e] for e in protected]
    groups = [[e] for e in range(len(found.tokens)) if e not in protected]
    losses, power = [0.0], found.power
    cost = {tuple(group): 0.0 for group in groups}
    added: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    while len(groups) + len(alone) > experts and len(groups) > 1:
        best: tuple[float, list[int], list[int]] | None = None
        for i, one in enumerate(groups):
            for other in groups[i + 1 :]:
                pair = tuple(one), tuple(other)
                if pair not in added:
                    added[pair] = found.missed(sorted(one + other)) - cost[pair[0]] - cost[pair[1]]
                if best is None or added[pair] < best[0]:
                    best = added[pair], one, other
        assert best is not None, "there are two groups or more"
        union = sorted(best[1] + best[2])
        groups = sorted([g for g in groups if g is not best[1] and g is not best[2]] + [union])
        cost[tuple(union)] = found.missed(union)
        losses.append(sum(cost[tuple(g)] for g in groups) / power if power else 0.0)
    return Merges(sorted(groups + alone), losses)


@torch.no_grad()
def merged_layer(mixture: Mixture, groups: Sequence[Sequence[int]], tokens: Tensor) -> RoutedFFN:
    """The layer of one expert a group, to be refitted. On input tokens [n, D].

    An expert keeps as many neurons as its members did on average over their tokens, so a token costs what it did: those of any
    member with the largest variance times the square of their output row's norm, on the group's tokens. Its router's row is
    the mean of theirs, weighted by their tokens and as long as they were. A single expert stays as it is.
    """
    layer, stored = mixture.layer, mixture.experts()
    group_of = {e: g for g, group in enumerate(groups) for e in group}
    counts = torch.zeros(layer.num_experts, dtype=torch.float64)
    sums = torch.zeros(3, len(groups), layer.union, dtype=torch.float64)  # count, sum, squares
    every = torch.arange(layer.union)
    for e, own in mixture.sent(tokens):
        counts[e] = len(own)
        for part in mixture.chunks(own):
            hidden = layer.activations(part, every).double()
            sums[0, group_of[e]] += len(part)
            sums[1, group_of[e]] += hidden.sum(0)
            sums[2, group_of[e]] += hidden.square().sum(0)
    spread = sums[2] - sums[1].square() / sums[0].clamp_min(1)
    weight = spread.clamp_min(0) * layer.w_down.detach().double().square().sum(1)
    kept, rows, biases, out = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for g, group in enumerate(groups):
        members = torch.tensor(list(group))
        shares = _weights(counts[members])
        rows.append(_merged_row(layer.router.detach()[members], shares))
        biases.append((shares * layer.router_bias[members].double()).sum())
        out.append((shares[:, None] * layer.b_out.detach()[members].double()).sum(0))
        held = torch.cat([stored[e] for e in group]).unique()
        widths = torch.tensor([len(stored[e]) for e in group], dtype=torch.float64)
        width = max(1, min(len(held), round(float(shares @ widths))))
        order = weight[g, held].argsort(descending=True, stable=True)[:width]
        kept.append(held if len(group) == 1 else held[order].sort().values)
    router = torch.stack(rows).float(), _biases(layer, torch.stack(rows), torch.stack(biases)).float()
    share = torch.stack([counts[torch.tensor(list(group))].sum() for group in groups])
    return assembled(mixture, router, kept, torch.stack(out).float(), _weights(share))


def _merged_row(rows: Tensor, shares: Tensor) -> Tensor:
    """The weighted mean [D] of rows [n, D], as long as they are in the mean."""
    exact = rows.double()
    if len(exact) == 1:
        return exact[0]
    mean, length = shares @ exact, float(shares @ exact.norm(dim=1))
    return mean * (length / float(mean.norm().clamp_min(torch.finfo(torch.float64).tiny)))


def _biases(layer: RoutedFFN, rows: Tensor, means: Tensor) -> Tensor:
    """Biases [K] for new rows [K, D]: -|row|^2 / 2 where those of the layer were so (the nearest mean wins), else the `means`."""
    nearest = -layer.router.detach().square().sum(1) / 2
    euclidean = bool(layer.router_bias.any()) and torch.allclose(layer.router_bias, nearest, rtol=1e-4, atol=1e-6)
    return -rows.square().sum(1) / 2 if euclidean else means
