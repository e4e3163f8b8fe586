"""Exact minimum spanning tree of the mutual reachability graph (Campello et al. 2013, definitions 3.1 to 3.3).

The weight of (i, j) is max(core_i, core_j, d_ij). Edges are ordered by (weight, i, j) with i < j, so the tree is unique:
it depends neither on the number of threads nor on the device.

Borůvka with certificates. Every point v knows a set of edges and a bound b_v: every edge of v that leaves its component
and is not in the set weighs at least b_v. If the lightest known edge out of a component weighs less than all b_v of
its points, it is the lightest of all edges out, hence in the tree (cut property). Only components without such a
certificate are scanned again, and only their points whose bound is too low, the smallest components first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from moee.clustering.core import Tick
from moee.clustering.neighbours import SCANNED, Lists, nearest_outside
from moee.clustering.pairwise import Bounds, Points, exact_distances


@dataclass
class Edges:
    """Known edges: `i` < `j` int64 [E]; `low` <= weight <= `high` float64 [E], equal once computed exactly.

    NumPy, on the CPU: this bookkeeping is many small steps, each of which would cost PyTorch a meeting of its threads.
    """

    i: np.ndarray
    j: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def between(cls, rows: Tensor, index: Tensor, low: Tensor, high: Tensor, core: Tensor) -> Edges:
        """Edges of `rows` [n] to `index` [n, k] (-1: none) with distance bounds [n, k]."""
        listed = index >= 0
        source, target = rows[:, None].expand_as(index)[listed], index[listed]
        floor = torch.maximum(core[source], core[target])
        i, j = torch.minimum(source, target), torch.maximum(source, target)
        found = [i, j, torch.maximum(low[listed], floor), torch.maximum(high[listed], floor)]
        return cls(*(each.cpu().numpy() for each in found))

    @classmethod
    def joined(cls, parts: list[Edges]) -> Edges:
        """All edges of some sets, one after another."""
        return cls(*(np.concatenate(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))

    def __getitem__(self, keep: np.ndarray) -> Edges:
        return Edges(self.i[keep], self.j[keep], self.low[keep], self.high[keep])

    def settle(self, which: np.ndarray, x: Tensor, core: np.ndarray) -> None:
        """Compute the weights of the edges `which` (bool [E]) exactly."""
        which = np.flatnonzero(which & (self.low < self.high))
        i, j = self.i[which], self.j[which]
        pairs = (torch.from_numpy(end).to(x.device) for end in (i, j))
        weight = np.maximum(exact_distances(x, *pairs).cpu().numpy(), np.maximum(core[i], core[j]))
        self.low[which], self.high[which] = weight, weight


@dataclass
class Forest:
    """Borůvka's state over M points."""

    points: Points
    core: Tensor  # [M] float64
    edges: Edges
    bound: np.ndarray  # [M] float64: b_v above
    group: np.ndarray = field(init=False)  # [M] int64 component of each point, 0..groups-1
    groups: int = field(init=False)
    tree: list[np.ndarray] = field(init=False, default_factory=list)  # [n, 3] float64 rows (i, j, weight)

    def __post_init__(self) -> None:
        self.groups = len(self.bound)
        self.group = np.arange(self.groups)
        self.heights = self.core.cpu().numpy()

    def lightest(self) -> tuple[np.ndarray, np.ndarray]:
        """Lightest known edge out of each component: its weight [groups] (inf: none) and position in `edges` (-1)."""
        edges = self.edges
        gi, gj = self.group[edges.i], self.group[edges.j]
        least = self._least(gi, gj, edges.high)
        edges.settle((edges.low <= least[gi]) | (edges.low <= least[gj]), self.points.x, self.heights)
        weight = self._least(gi, gj, edges.high)
        at_i, at_j = np.flatnonzero(edges.high == weight[gi]), np.flatnonzero(edges.high == weight[gj])
        owner, place = np.concatenate([gi[at_i], gj[at_j]]), np.concatenate([at_i, at_j])
        for end in (edges.i, edges.j):  # ties: smallest i, then smallest j
            key = end[place]
            first = np.full(self.groups, len(self.bound))
            np.minimum.at(first, owner, key)
            keep = key == first[owner]
            owner, place = owner[keep], place[keep]
        chosen = np.full(self.groups, -1)
        chosen[owner] = place  # an edge may be known twice: either copy will do
        return weight, chosen

    def _least(self, gi: np.ndarray, gj: np.ndarray, value: np.ndarray) -> np.ndarray:
        out = np.full(self.groups, np.inf)
        np.minimum.at(out, gi, value)
        np.minimum.at(out, gj, value)
        return out

    def certificates(self) -> np.ndarray:
        """Smallest bound b_v of each component, [groups]."""
        out = np.full(self.groups, np.inf)
        np.minimum.at(out, self.group, self.bound)
        return out

    def join(self, chosen: np.ndarray) -> None:
        """Add the edges at these positions to the tree and merge the components they connect."""
        edges = self.edges[chosen]
        _, first = np.unique(edges.i * len(self.bound) + edges.j, return_index=True)
        edges = edges[first]
        self.tree.append(np.column_stack([edges.i, edges.j, edges.high]).astype(np.float64))
        ends = self.group[edges.i], self.group[edges.j]
        graph = coo_array((np.ones(len(first), dtype=np.int8), ends), shape=(self.groups, self.groups))
        self.groups, merged = connected_components(graph, directed=False)
        self.group = merged.astype(np.int64)[self.group]
        self.edges = self.edges[self.group[self.edges.i] != self.group[self.edges.j]]

    def learn(self, rows: Tensor, lists: Lists, bounds: Bounds) -> None:
        """Take in the lists of a scan of `rows`."""
        low = bounds.lower(lists.entry)
        high = bounds.upper(lists.entry, rows[:, None], lists.index.clamp_min(0))
        self.edges = Edges.joined([self.edges, Edges.between(rows, lists.index, low, high, self.core)])
        where = rows.cpu().numpy()
        self.bound[where] = np.maximum(self.bound[where], bounds.lower(lists.limit).cpu().numpy())


def spanning_tree(
    forest: Forest, ladder: Callable[[int], Bounds], width: int, block: int, tick: Tick
) -> Tensor:
    """Complete `forest`; returns the tree's edges, float64 [M - 1, 3] rows (i, j, weight), in order (weight, i, j).

    `ladder(step)` gives ever tighter bounds; `width` is the length of a scan's lists.
    """
    while forest.groups > 1:
        weight, chosen = forest.lightest()
        certain = weight < forest.certificates()
        if certain.any():
            forest.join(chosen[certain])
        else:
            _scan(forest, weight, ladder, width, block, tick)
    tree = np.concatenate([*forest.tree, np.empty((0, 3))])
    return torch.from_numpy(tree[np.lexsort((tree[:, 1], tree[:, 0], tree[:, 2]))])


def _scan(
    forest: Forest, weight: np.ndarray, ladder: Callable[[int], Bounds], width: int, block: int, tick: Tick
) -> None:
    """Scan components until the lightest edges out of them, of known `weight` [groups] so far, have certificates."""
    device, wanted = forest.core.device, _cheapest(forest, weight)
    group = torch.from_numpy(forest.group).to(device)
    squared = (forest.core * forest.points.scale).square().float()
    core = torch.nextafter(squared, torch.full_like(squared, -1.0)).clamp_min(0)  # rounded down
    step, count = 0, len(forest.bound)

    def joined() -> None:
        tick(f"joining {count:,} points", (count - forest.groups, 0))

    while True:
        rows = np.flatnonzero((forest.bound <= weight[forest.group]) & wanted[forest.group])
        if len(rows) == 0:
            return
        bounds, length = ladder(step), min(width * 4**step, len(forest.bound))
        for start in range(0, len(rows), size := max(1, min(4 * block, SCANNED // length))):
            part = rows[start : start + size]
            limit = bounds.reach(torch.from_numpy(weight[forest.group[part]]).to(device))
            where = torch.from_numpy(part).to(device)
            found = nearest_outside(bounds, where, limit, length, block, tick=joined, core=core, group=group)
            forest.learn(where, found, bounds)
        weight, _ = forest.lightest()
        step += 1  # what is still open has more near neighbours than its list holds, or bounds too loose to tell


def _cheapest(forest: Forest, weight: np.ndarray) -> np.ndarray:
    """Which components to scan, bool [groups]: by ascending number of rows, up to a sixteenth of all rows.

    Small steps pay: a component that a smaller one joins may never need a scan of its own.
    """
    need = forest.bound <= weight[forest.group]
    rows = np.bincount(forest.group, weights=need, minlength=forest.groups)
    order = np.argsort(rows, kind="stable")
    before = np.cumsum(rows[order]) - rows[order]
    wanted = np.zeros(forest.groups, dtype=bool)
    wanted[order] = before < max(512, len(forest.bound) // 16)
    wanted[order[-1]] = False  # the most expensive one is never needed: the others join it
    return wanted
