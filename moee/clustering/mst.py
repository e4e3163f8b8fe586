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

from moee.clustering.neighbours import Lists, nearest_outside
from moee.clustering.pairwise import Bounds, Points, exact_distances

Tick = Callable[[str], None]


@dataclass
class Edges:
    """Known edges: `i` < `j` int64 [E]; `low` <= weight <= `high` float64 [E], equal once computed exactly."""

    i: Tensor
    j: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def between(cls, rows: Tensor, index: Tensor, low: Tensor, high: Tensor, core: Tensor) -> Edges:
        """Edges of `rows` [n] to `index` [n, k] (-1: none) with distance bounds [n, k]."""
        listed = index >= 0
        source, target = rows[:, None].expand_as(index)[listed], index[listed]
        floor = torch.maximum(core[source], core[target])
        i, j = torch.minimum(source, target), torch.maximum(source, target)
        return cls(i, j, torch.maximum(low[listed], floor), torch.maximum(high[listed], floor))

    def __getitem__(self, keep: Tensor) -> Edges:
        return Edges(self.i[keep], self.j[keep], self.low[keep], self.high[keep])

    def __add__(self, other: Edges) -> Edges:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Edges(*(torch.cat(pair) for pair in pairs))

    def settle(self, which: Tensor, x: Tensor, core: Tensor) -> None:
        """Compute the weights of the edges `which` (bool [E]) exactly."""
        which = (which & (self.low < self.high)).nonzero()[:, 0]
        i, j = self.i[which], self.j[which]
        weight = torch.maximum(exact_distances(x, i, j), torch.maximum(core[i], core[j]))
        self.low[which], self.high[which] = weight, weight


@dataclass
class Forest:
    """Borůvka's state over M points."""

    points: Points
    core: Tensor  # [M] float64
    bound: Tensor  # [M] float64: b_v above
    edges: Edges
    group: Tensor = field(init=False)  # [M] int64 component of each point, 0..groups-1
    groups: int = field(init=False)
    tree: list[Tensor] = field(init=False, default_factory=list)  # [n, 3] float64 rows (i, j, weight)

    def __post_init__(self) -> None:
        self.groups = len(self.core)
        self.group = torch.arange(self.groups, device=self.core.device)

    def lightest(self) -> tuple[Tensor, Tensor]:
        """Lightest known edge out of each component: its weight [groups] (inf: none) and position in `edges` (-1)."""
        edges = self.edges
        gi, gj = self.group[edges.i], self.group[edges.j]
        least = self._least(gi, gj, edges.high)
        edges.settle((edges.low <= least[gi]) | (edges.low <= least[gj]), self.points.x, self.core)
        weight = self._least(gi, gj, edges.high)
        at_i, at_j = edges.high == weight[gi], edges.high == weight[gj]
        owner = torch.cat([gi[at_i], gj[at_j]])
        place = torch.cat([at_i.nonzero()[:, 0], at_j.nonzero()[:, 0]])
        for end in (edges.i, edges.j):  # ties: smallest i, then smallest j
            key = end[place]
            first = torch.full((self.groups,), len(self.core), device=key.device).scatter_reduce(0, owner, key, "amin")
            keep = key == first[owner]
            owner, place = owner[keep], place[keep]
        chosen = torch.full((self.groups,), -1, dtype=torch.int64, device=weight.device)
        chosen[owner] = place  # an edge may be known twice: either copy will do
        return weight, chosen

    def _least(self, gi: Tensor, gj: Tensor, value: Tensor) -> Tensor:
        out = torch.full((self.groups,), torch.inf, dtype=torch.float64, device=value.device)
        return out.scatter_reduce(0, gi, value, "amin").scatter_reduce(0, gj, value, "amin")

    def certificates(self) -> Tensor:
        """Smallest bound b_v of each component, [groups]."""
        out = torch.full((self.groups,), torch.inf, dtype=torch.float64, device=self.bound.device)
        return out.scatter_reduce(0, self.group, self.bound, "amin")

    def join(self, chosen: Tensor) -> None:
        """Add the edges at these positions to the tree and merge the components they connect."""
        edges = self.edges[chosen]
        pairs, first = np.unique((edges.i * len(self.core) + edges.j).cpu().numpy(), return_index=True)
        edges = edges[torch.from_numpy(first).to(chosen.device)]
        self.tree.append(torch.stack([edges.i.double(), edges.j.double(), edges.high], dim=1))
        ends = self.group[edges.i].cpu().numpy(), self.group[edges.j].cpu().numpy()
        graph = coo_array((np.ones(len(pairs), dtype=np.int8), ends), shape=(self.groups, self.groups))
        self.groups, merged = connected_components(graph, directed=False)
        self.group = torch.from_numpy(merged.astype(np.int64)).to(self.group.device)[self.group]
        self.edges = self.edges[self.group[self.edges.i] != self.group[self.edges.j]]

    def learn(self, rows: Tensor, lists: Lists, bounds: Bounds) -> None:
        """Take in the lists of a scan of `rows`."""
        low = bounds.lower(lists.entry)
        high = bounds.upper(lists.entry, rows[:, None], lists.index.clamp_min(0))
        self.edges = self.edges + Edges.between(rows, lists.index, low, high, self.core)
        self.bound[rows] = torch.maximum(self.bound[rows], bounds.lower(lists.limit))


def spanning_tree(
    forest: Forest, ladder: Callable[[int], Bounds], width: int, block: int, tick: Tick, budget: int = 1 << 22
) -> Tensor:
    """Complete `forest`; returns the tree's edges, float64 [M - 1, 3] rows (i, j, weight), in order (weight, i, j).

    `ladder(step)` gives ever tighter bounds; `width` is the length of a scan's lists; `budget` limits rows x width.
    """
    while forest.groups > 1:
        weight, chosen = forest.lightest()
        certain = weight < forest.certificates()
        if bool(certain.any()):
            forest.join(chosen[certain])
            continue
        wanted = _cheapest(forest, weight)
        step, length = 0, width
        while True:
            weight, _ = forest.lightest()
            need = forest.bound <= weight[forest.group]
            rows = (need & wanted[forest.group]).nonzero()[:, 0]
            if len(rows) == 0:
                break
            bounds, length = ladder(step), min(length, len(forest.core))
            core = torch.nextafter((forest.core * forest.points.scale).square().float(), torch.tensor(-1.0)).clamp_min(0)
            for part in rows.split(max(1, min(4 * block, budget // length))):
                limit = bounds.reach(weight[forest.group[part]])
                found = nearest_outside(
                    bounds, part, limit, length, block, lambda: tick("joining components"), core, forest.group
                )
                forest.learn(part, found, bounds)
            step, length = step + 1, length * 4
    if not forest.tree:
        return forest.core.new_zeros((0, 3))
    tree = torch.cat(forest.tree).cpu().numpy()
    return torch.from_numpy(tree[np.lexsort((tree[:, 1], tree[:, 0], tree[:, 2]))])


def _cheapest(forest: Forest, weight: Tensor) -> Tensor:
    """Which components to scan, bool [groups]: by ascending number of rows, up to a sixteenth of all rows.

    Small steps pay: a component that a smaller one joins may never need a scan of its own.
    """
    need = (forest.bound <= weight[forest.group]).long()
    rows = torch.zeros(forest.groups, dtype=torch.int64, device=need.device).index_add_(0, forest.group, need)
    order = rows.argsort(stable=True)
    before = rows[order].cumsum(0) - rows[order]
    wanted = torch.zeros(forest.groups, dtype=torch.bool, device=need.device)
    wanted[order] = before < max(512, len(forest.core) // 16)
    wanted[order[-1]] = False  # the most expensive one is never needed: the others join it
    return wanted
