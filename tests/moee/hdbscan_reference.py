"""Slow, obvious counterparts of the fast clustering: dense distances, Kruskal, and a comparison of hierarchies."""

from __future__ import annotations

import numpy as np
import torch
from hdbscan._hdbscan_linkage import label
from scipy.cluster.hierarchy import cophenet
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from moee.clustering.pairwise import exact_distances


def dense_reachability(x: Tensor, min_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Core distances [N] and mutual reachability [N, N] in float64."""
    count = len(x)
    i, j = torch.triu_indices(count, count, 1)
    distance = torch.zeros(count, count, dtype=torch.float64)
    distance[i, j] = exact_distances(x, i, j)
    distance = distance + distance.T
    core = distance.sort(dim=1).values[:, min(min_samples, count - 1)]
    return core.numpy(), torch.maximum(distance, torch.maximum(core[:, None], core)).numpy()


def kruskal(x: Tensor, min_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The unique tree in the order (weight, copies of a row first, i, j): edges [N - 1, 2] and weights, sorted."""
    _, weights = dense_reachability(x, min_samples)
    i, j = np.triu_indices(len(x), 1)
    weight = weights[i, j]
    distinct = (x[i] != x[j]).any(1).numpy()
    parent = list(range(len(x)))

    def root(v: int) -> int:
        while parent[v] != v:
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    chosen = []
    for e in np.lexsort((j, i, distinct, weight)):
        a, b = root(i[e]), root(j[e])
        if a != b:
            parent[a] = b
            chosen.append(e)
    chosen = np.array(chosen, dtype=int)
    chosen = chosen[np.lexsort((j[chosen], i[chosen], weight[chosen]))]
    return np.stack([i[chosen], j[chosen]], axis=1), weight[chosen]


def merge_heights(edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Height at which each pair of rows first shares a component, condensed [N (N - 1) / 2].

    Two spanning trees describe the same hierarchy exactly when these agree, whatever their order of ties.
    """
    order = np.argsort(weights, kind="stable")
    rows = np.column_stack([edges[order], weights[order]]).astype(np.float64)
    return cophenet(label(np.ascontiguousarray(rows)))


def is_tree(edges: np.ndarray, count: int) -> bool:
    graph = np.zeros((count, count), dtype=np.int8)
    graph[edges[:, 0], edges[:, 1]] = 1
    return len(edges) == count - 1 and connected_components(graph, directed=False)[0] == 1
