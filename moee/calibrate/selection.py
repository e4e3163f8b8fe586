"""Which hidden neurons an expert keeps: the fewest that hold a share of the activation variance (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.errors import chosen
from moee.models.ffn import FFN
from moee.parallel.devices import CPU


@dataclass(frozen=True)
class Moments:
    """Per expert and neuron: token `count` [K], activation `mean`, `variance` and mean `magnitude` [K, H], float64."""

    count: Tensor
    mean: Tensor
    variance: Tensor
    magnitude: Tensor


class MomentAccumulator:
    """Streams activations on `device` into per-expert means and variances (Chan's pairwise update, float64)."""

    def __init__(self, experts: int, hidden: int, device: torch.device = CPU):
        self.count = torch.zeros(experts, dtype=torch.float64, device=device)
        self.mean, self.absolute, self.squares = (
            torch.zeros(experts, hidden, dtype=torch.float64, device=device) for _ in range(3)
        )

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
            self.absolute[e] += part.abs().sum(0).double()
            self.count[e] = total

    def finish(self) -> Moments:
        count = self.count.clamp(min=1)[:, None]
        moments = (self.count, self.mean, self.squares / count, self.absolute / count)
        return Moments(*(part.cpu() for part in moments))


def output_weight(ffn: FFN) -> Tensor:
    """Squared norm [H] of each neuron's column of fc2, LayerScale included: its variance's factor in the block's output."""
    columns = ffn.w_down if ffn.scale is None else ffn.w_down * ffn.scale[:, None]
    return columns.double().square().sum(0)


def weight_norm(ffn: FFN) -> Tensor:
    """Norm [H] of each neuron's weights in all maps of the MLP: the group magnitude of DepGraph (Fang et al. 2023)."""
    return torch.cat([*ffn.maps_in, ffn.w_down.T], 1).double().norm(dim=1)


def keep_by_share(importance: Tensor, share: float, multiple: int = 1) -> Tensor:
    """Ascending ids of the fewest entries of importance [H] that sum to `share` of its total, at least one, rounded up to a
    multiple of `multiple` or to all.

    Ties go to the lower id.
    """
    order = importance.sort(descending=True, stable=True)
    cumulative = order.values.cumsum(0)
    total = cumulative[-1]
    needed = int((cumulative < share * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 1
    needed = -(-needed // multiple) * multiple
    return order.indices[: min(needed, len(importance))].sort().values


def select_neurons(
    moments: Moments, ffn: FFN, criterion: str, keep: float, *, seed: int = 0, multiple: int = 1
) -> list[Tensor]:
    """Per expert, the ascending neuron ids [H_e] int64 to keep; their number is a multiple of `multiple`, or all.

    `variance` and `output_variance` keep the fewest that hold `keep` of the (weighted) variance. `magnitude` (mean
    absolute activation), `weight` (norm of a neuron's weights) and `random` are there to compare with: they keep as many as
    `variance` would, so that the cost is the same. Raises `UserError` for another criterion.
    """
    generator = torch.Generator().manual_seed(seed)
    scores_of: dict[str, Callable[[], Tensor] | None] = {
        "variance": None, "output_variance": None,
        "magnitude": lambda: moments.magnitude, "weight": lambda: weight_norm(ffn).expand(moments.mean.shape),
        "random": lambda: torch.rand(moments.mean.shape, generator=generator),
    }  # fmt: skip
    scores = chosen(scores_of, criterion, "criterion")
    weight = output_weight(ffn) if criterion == "output_variance" else torch.ones(ffn.hidden, dtype=torch.float64)
    kept = [keep_by_share(row * weight, keep, multiple) for row in moments.variance]
    if scores is None:
        return kept
    ranked = scores().sort(dim=1, descending=True, stable=True).indices
    return [order[: len(k)].sort().values for order, k in zip(ranked, kept, strict=True)]
