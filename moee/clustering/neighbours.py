"""Nearest-neighbour lists from blocked products: one symmetric pass over all pairs, and passes over chosen rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from threading import Lock

import torch
from torch import Tensor

from moee.clustering.pairwise import Bounds
from moee.clustering.workers import spread

SCANNED = 1 << 22  # entries that the lists of one scan hold, rows x length
GROUP = 256  # offers that a row takes at once; few rows get more


@dataclass
class Lists:
    """The `k` smallest entries of each of n rows. `entry` [n, k] float32 (inf: empty), `index` [n, k] int64 (-1: empty).

    `limit` [n] float32: every pair that its row does not list has an entry of at least this much.
    """

    entry: Tensor
    index: Tensor
    limit: Tensor

    @classmethod
    def empty(cls, limit: Tensor, k: int) -> Lists:
        """Lists that accept entries below `limit` [n] float32."""
        entry = torch.full((len(limit), k), torch.inf, device=limit.device)
        return cls(entry, torch.full((len(limit), k), -1, dtype=torch.int64, device=limit.device), limit.clone())

    def merge(self, row: Tensor, index: Tensor, entry: Tensor) -> None:
        """Offer entries to the lists: `row` int64 [m] ascending, `index` int64 [m], `entry` float32 [m]."""
        if len(row) == 0:
            return
        k = self.entry.shape[1]
        counts = torch.bincount(row, minlength=len(self.limit))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        for start in range(0, int(counts.max()), GROUP):
            part = (place >= start) & (place < start + GROUP)
            rows, where = torch.unique_consecutive(row[part], return_inverse=True)
            most = int(place[part].max()) - start + 1
            offered = torch.full((len(rows), k + most), torch.inf, device=entry.device)
            offered_index = torch.full((len(rows), k + most), -1, dtype=torch.int64, device=entry.device)
            offered[:, :k], offered_index[:, :k] = self.entry[rows], self.index[rows]
            offered[where, k + place[part] - start] = entry[part]
            offered_index[where, k + place[part] - start] = index[part]
            best, slot = offered.topk(k, dim=1, largest=False, sorted=False)
            self.entry[rows], self.index[rows] = best, offered_index.gather(1, slot)
            self.limit[rows] = torch.minimum(self.limit[rows], best.amax(1))

    def part(self, rows: slice) -> Lists:
        """A view of some rows; merging into it changes these lists."""
        return Lists(self.entry[rows], self.index[rows], self.limit[rows])


def positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [m], of the true elements of a contiguous bool matrix, row-major. Reads eight at a time on the
    CPU."""
    if mask.device.type != "cpu" or mask.numel() % 8:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    words = mask.view(-1).view(torch.int64).nonzero()[:, 0]  # nonzero counts and writes: most words are empty
    hit = mask.view(-1, 8)[words].nonzero()
    flat = words[hit[:, 0]] * 8 + hit[:, 1]
    return flat // mask.shape[1], flat % mask.shape[1]


def all_nearest(bounds: Bounds, k: int, block: int, tick: Callable[[], None]) -> Lists:
    """The `k` nearest rows of every row by lower bound, from the upper triangle of the product: half a full pass.

    `tick` is called once a block pair, `block_pairs` times.
    """
    device = bounds.norms.device
    count = len(bounds.norms)
    lists = Lists.empty(torch.full((count,), torch.inf, device=device), k)
    starts = list(range(0, count, block))

    def begin(start: int) -> None:
        rows = slice(start, min(start + block, count))
        entries = torch.mm(bounds.left(rows), bounds.right(rows).T)
        entries.fill_diagonal_(torch.inf)
        take = min(k, len(entries) - 1)
        if take > 0:
            best, slot = entries.topk(take, dim=1, largest=False, sorted=False)
            lists.entry[rows, :take], lists.index[rows, :take] = best.float(), slot + start
            if take == k:
                lists.limit[rows] = best.float().amax(1)

    for _ in spread(begin, starts, device):  # the diagonal first: it gives every row a limit
        tick()
    merging = Lock()

    def offer(pair: tuple[int, int]) -> None:
        rows, columns = (slice(start, min(start + block, count)) for start in pair)
        entries = torch.mm(bounds.left(rows), bounds.right(columns).T)
        row_limit, column_limit = lists.limit[rows].clone(), lists.limit[columns].clone()
        mask = entries < row_limit.to(entries.dtype)[:, None]
        mask |= entries < column_limit.to(entries.dtype)
        row, column = positions(mask)
        entry = entries[row, column].float()
        order = column.argsort(stable=True)
        order = order[entry[order] < column_limit[column[order]]]
        for_row = entry < row_limit[row]
        with merging:
            lists.part(rows).merge(row[for_row], column[for_row] + pair[1], entry[for_row])
            lists.part(columns).merge(column[order], row[order] + pair[0], entry[order])

    for _ in spread(offer, combinations(starts, 2), device):
        tick()
    return lists


def block_pairs(count: int, block: int) -> int:
    """Number of block pairs that `all_nearest` multiplies."""
    blocks = -(-count // block)
    return blocks * (blocks + 1) // 2


def nearest_outside(
    bounds: Bounds, rows: Tensor, limit: Tensor, k: int, block: int, *, tick: Callable[[], None], core: Tensor, group: Tensor
) -> Lists:
    """The `k` entries of smallest mutual reachability of `rows` int64 [n] among the points of other groups.

    `core` [M] float32: core distances as entries, rounded down. `group` [M] int64. `limit` [n] float32: only entries
    below it are wanted. `tick` is called once a column block.
    """
    lists = Lists.empty(limit.to(bounds.dtype).float(), k)  # representable, so that comparing keeps the promise
    starts = range(0, len(core), block)
    share = -(-len(rows) // torch.get_num_threads()) if rows.device.type == "cpu" else len(rows)
    parts = [slice(start, start + share) for start in range(0, len(rows), share)]
    operands = [bounds.left(rows[part]) for part in parts]

    def offer(task: tuple[int, int]) -> None:
        number, start = task
        columns, part = slice(start, min(start + block, len(core))), parts[number]
        entries = torch.mm(operands[number], bounds.right(columns).T)
        torch.maximum(entries, core[columns].to(entries.dtype), out=entries)
        torch.maximum(entries, core[rows[part]].to(entries.dtype)[:, None], out=entries)
        mine = lists.part(part)
        mask = entries < mine.limit.to(entries.dtype)[:, None]
        mask &= group[rows[part]][:, None] != group[columns]
        row, column = positions(mask)
        with merging[number]:
            mine.merge(row, column + start, entries[row, column].float())

    merging = [Lock() for _ in parts]
    tasks = [(number, start) for start in starts for number in range(len(parts))]
    for done, _ in enumerate(spread(offer, tasks, rows.device), start=1):
        if done % len(parts) == 0:
            tick()
    return lists
