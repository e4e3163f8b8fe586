"""Ranks from a kept share of variance or from a MAC budget, and the division of a rank between basis and experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moee.errors import OutOfReach
from moee.methods.clear_moe.decompose import Moments, leading

GRID = 24  # shared ranks tried up to full rank
RESIDUALS = (0, 4, 8, 16, 32)  # residual ranks tried when the choice is free
STEPS = 40  # of the bisection to a budget


@dataclass(frozen=True)
class LossTable:
    """Share of a map's output variance that is lost: `loss` [ranks, residuals] for shared ranks `ranks`, residuals `residuals`.
    Between-expert variance, which the biases keep, is not lost. `total` is the variance itself."""

    ranks: tuple[int, ...]
    residuals: tuple[int, ...]
    loss: Tensor
    total: float

    def at_price(self, gain: float, price: float, fixed: int | None = None) -> tuple[int, int, float]:
        """(rank, residual, absolute loss) of least gain x loss + price x (rank + residual)."""
        found = []
        for i, r in enumerate(self.ranks):
            for j, q in enumerate(self.residuals):
                if (fixed is None or q == fixed) and r + q <= self.ranks[-1]:
                    loss = self.total * float(self.loss[i, j])
                    found.append((gain * loss + price * (r + q), r, q, loss))
        _, r, q, loss = min(found)
        return r, q, loss

    def for_energy(self, energy: float, fixed: int | None = None) -> tuple[int, int]:
        """Cheapest (rank, residual) that keeps this share of the variance; full rank if none does."""
        choices = []
        for i, r in enumerate(self.ranks):
            for j, q in enumerate(self.residuals):
                if (fixed is None or q == fixed) and r + q <= self.ranks[-1] and float(self.loss[i, j]) <= 1 - energy:
                    choices.append((r + q, float(self.loss[i, j]), r, q))
        if not choices:
            return self.ranks[-1], 0
        _, _, r, q = min(choices)
        return r, q


def loss_table(m: Moments, full: int, residual: int | None = None) -> LossTable:
    """Losses of all (rank, residual) pairs of a grid, from the moments of the map's coordinates.

    In the pooled eigenbasis the part outside a rank-r basis is the trailing block of each covariance, so one small eigenvalue
    problem a rank and expert gives all residual ranks at once.
    """
    pooled = m.pooled
    basis = leading(pooled, len(pooled))
    share = m.count / m.count.sum()
    rotated = basis.T @ m.cov @ basis
    # total variance, experts' means included: what a single constant output would lose
    centre = (share[:, None] * m.mean).sum(0)
    total = float(torch.trace(pooled)) + float((share[:, None] * (m.mean - centre).square()).sum())
    step = max(1, full // GRID)
    ranks = tuple(sorted({*range(step, full, step), full}))
    residuals = (residual,) if residual is not None else tuple(q for q in RESIDUALS if q < full)
    loss = torch.zeros(len(ranks), len(residuals), dtype=torch.float64)
    for i, r in enumerate(ranks):
        for e in range(len(share)):
            block = rotated[e, r:, r:]
            values = torch.linalg.eigvalsh(block).flip(0) if r < len(pooled) else torch.zeros(0, dtype=torch.float64)
            for j, q in enumerate(residuals):
                loss[i, j] += share[e] * values[q:].clamp(min=0).sum()
    return LossTable(ranks, residuals, loss / max(total, 1e-30), total)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs an image: dense MACs, the MACs of one rank-one term in one map, and those of the router. `gain` turns
    the block-output error of the loss tables into that of the model's output, squared."""

    dense: float
    unit: float
    router: float
    gain: float = 1.0

    def of(self, units: int) -> float:
        return self.unit * units + self.router


def ranks_for_budget(
    tables: list[tuple[LossTable, LossTable]], costs: list[LayerCost], other: float, budget: float, fixed: int | None
) -> list[tuple[int, int, int, int] | None]:
    """(r1, q1, r2, q2) of every layer so that the sum of all layers' errors is least and the model costs at most `budget` MACs an
    image; `other` are the MACs outside these layers. None: the layer stays dense.

    A price a MAC makes the layers independent: each takes the ranks of least error + price x cost, dense included, and the price
    is bisected until the budget is met. Raises `OutOfReach` if even the smallest ranks exceed it.
    """

    def at(price: float) -> tuple[list[tuple[int, int, int, int] | None], float]:
        chosen: list[tuple[int, int, int, int] | None] = []
        total = other
        for pair, cost in zip(tables, costs, strict=True):
            (r1, q1, up), (r2, q2, down) = (t.at_price(cost.gain, price * cost.unit, fixed) for t in pair)
            spent = cost.of(r1 + q1 + r2 + q2)
            pays = spent < cost.dense and cost.gain * (up + down) + price * spent < price * cost.dense
            chosen.append((r1, q1, r2, q2) if pays else None)
            total += spent if pays else cost.dense
        return chosen, total

    error = max(c.gain * t.total for pair, c in zip(tables, costs, strict=True) for t in pair)
    scale = max(error, 1e-30) / min(c.unit for c in costs)  # at this price no rank pays for itself
    low, high = -18.0, 2.0  # exponents of ten
    chosen, least = at(scale * 10**high)
    if least > budget:
        raise OutOfReach(
            f"--target-macs asks for {budget / 1e6:.1f} M multiply-accumulates an image, the smallest ranks need "
            f"{least / 1e6:.1f} M; raise the target or convert more layers"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        candidate, cost = at(scale * 10**middle)
        if cost <= budget:
            high, chosen = middle, candidate
        else:
            low = middle
    return chosen
