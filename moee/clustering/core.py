"""Exact core distances: the distance from each point to its `min_samples`-th nearest neighbour, itself not counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moee.clustering.neighbours import SCANNED, Lists, nearest_outside
from moee.clustering.pairwise import Bounds, Points, exact_distances

Tick = Callable[[str, tuple[int, int] | None], None]  # what is done, and how much of how much (0: nobody knows)


@dataclass(frozen=True)
class Known:
    """Distances learnt on the way: `rows` int64 [n], `index` int64 [n, k] (-1: none), `low` <= d <= `high` [n, k]."""

    rows: Tensor
    index: Tensor
    low: Tensor
    high: Tensor


def core_distances(
    points: Points, lists: Lists, ladder: Callable[[int], Bounds], copies: Tensor, min_samples: int, *, block: int,
    tick: Tick,
) -> tuple[Tensor, Tensor, list[Known]]:  # fmt: skip
    """Core distances [M] float64, bounds [M] of every distance that is not known, and the known distances.

    `lists` holds the nearest rows of every row under `ladder(0)`; `copies` int64 [M] counts the input rows that a point
    stands for. A row whose list cannot prove its core distance is scanned again: tighter bounds first, longer lists then.
    """
    count, device = len(copies), copies.device
    core = torch.empty(count, dtype=torch.float64, device=device)
    bound = torch.empty(count, dtype=torch.float64, device=device)
    known = []
    rows, step, length = torch.arange(count, device=device), 0, lists.entry.shape[1]
    while True:
        unproven = []
        for part, found in _lists(rows, lists if step == 0 else None, ladder(step), length, block, step, tick):
            bounds = ladder(step)
            low = bounds.lower(found.entry)
            high = bounds.upper(found.entry, part[:, None], found.index.clamp_min(0))
            value = _settle(points.x, part, found.index, low, high, copies, min_samples)
            reach = bounds.lower(found.limit)
            proven = value <= reach
            core[part], bound[part] = value, reach
            known.append(Known(part[proven], found.index[proven], low[proven], high[proven]))
            unproven.append(part[~proven])
        rows, step = torch.cat(unproven), step + 1
        if len(rows) == 0:
            return core, bound, known
        if step >= 3:  # tighter bounds did not help: there are more near neighbours than the list holds
            length = min(length * 4, count)


def _lists(
    rows: Tensor, lists: Lists | None, bounds: Bounds, length: int, block: int, step: int, tick: Tick
) -> Iterator[tuple[Tensor, Lists]]:
    parts = rows.split(max(1, min(4 * block, SCANNED // length)))
    total = len(parts) * -(-len(bounds.norms) // block)
    counts = iter(range(1, total + 1))

    def product() -> None:
        tick(f"core distances, pass {step}", (next(counts), total))

    for part in parts:
        if lists is not None:
            yield part, lists.part(slice(int(part[0]), int(part[-1]) + 1))
            continue
        nothing = torch.zeros(len(bounds.norms), device=rows.device)
        alone = torch.arange(len(bounds.norms), device=rows.device)
        limit = torch.full((len(part),), torch.inf, device=rows.device)
        yield part, nearest_outside(bounds, part, limit, length, block, tick=product, core=nothing, group=alone)


def _settle(x: Tensor, rows: Tensor, index: Tensor, low: Tensor, high: Tensor, copies: Tensor, min_samples: int) -> Tensor:
    """Core distances [n] over the listed rows. Narrows `low` and `high` in place wherever they were ambiguous."""
    need = min_samples + 1 - copies[rows]
    weight = torch.where(index >= 0, copies[index.clamp_min(0)], 0)
    least, most = _statistic(low, weight, need), _statistic(high, weight, need)
    unclear = (index >= 0) & (high >= least[:, None]) & (low <= most[:, None]) & (need > 0)[:, None]
    where, slot = unclear.nonzero(as_tuple=True)
    distance = exact_distances(x, rows[where], index[where, slot])
    low[where, slot], high[where, slot] = distance, distance
    return _statistic(low, weight, need)


def _statistic(value: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """Smallest value [n] at which the weights of all values up to it reach `need`: 0 if need <= 0, inf if never."""
    ordered, order = value.sort(dim=1)
    enough = weight.gather(1, order).cumsum(1) >= need[:, None]
    first = enough.int().argmax(1, keepdim=True)
    found = ordered.gather(1, first)[:, 0]
    found = torch.where(enough.any(1), found, torch.inf)
    return torch.where(need <= 0, 0.0, found)
