"""Which hidden neurons an expert keeps: the fewest that hold a share of the activation variance (paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moee.models import FFN


@dataclass(frozen=True)
class Moments:
    """Per expert and neuron: token `count` [K], activation `mean` and `variance` [K, H], float64."""

    count: Tensor
    mean: Tensor
    variance: Tensor


class MomentAccumulator:
    """Streams activations into per-expert means and variances (Chan's pairwise update, float64)."""

    def __init__(self, experts: int, hidden: int):
        self.count = torch.zeros(experts, dtype=torch.float64)
        self.mean = torch.zeros(experts, hidden, dtype=torch.float64)
        self.squares = torch.zeros(experts, hidden, dtype=torch.float64)

    def add(self, activations: Tensor, experts: Tensor) -> None:
        """activations [n, H]; experts [n] int64, negative ones are left out."""
        for e in experts.unique().tolist():
            if e < 0:
                continue
            part = activations[experts == e]
            variance, mean = torch.var_mean(part, 0, correction=0)
            n, total = len(part), self.count[e] + len(part)
            delta = mean.double() - self.mean[e]
            self.squares[e] += variance.double() * n + delta**2 * (self.count[e] * n / total)
            self.mean[e] += delta * (n / total)
            self.count[e] = total

    def finish(self) -> Moments:
        return Moments(self.count, self.mean, self.squares / self.count.clamp(min=1)[:, None])


def output_weight(ffn: FFN) -> Tensor:
    """Squared norm [H] of each neuron's column of fc2, LayerScale included: its variance's factor in the block's output."""
    columns = ffn.w_down if ffn.scale is None else ffn.w_down * ffn.scale[:, None]
    return columns.double().square().sum(0)


def keep_by_share(importance: Tensor, share: float) -> Tensor:
    """Ascending ids of the fewest entries of importance [H] that sum to `share` of its total; at least one.

    Ties go to the lower id.
    """
    order = importance.sort(descending=True, stable=True)
    cumulative = order.values.cumsum(0)
    total = cumulative[-1]
    if total <= 0:
        return torch.zeros(1, dtype=torch.int64)
    needed = int((cumulative < share * total * (1 - 1e-12)).sum()) + 1
    return order.indices[: min(needed, len(importance))].sort().values


def select_neurons(moments: Moments, ffn: FFN, criterion: str, keep: float) -> list[Tensor]:
    """Per expert, the ascending neuron ids [H_e] int64 that hold `keep` of its variance."""
    weight = output_weight(ffn) if criterion == "output_variance" else torch.ones(ffn.hidden, dtype=torch.float64)
    return [keep_by_share(row * weight, keep) for row in moments.variance]
