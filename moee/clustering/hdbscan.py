"""HDBSCAN (Campello, Moulavi, Sander 2013) for many features: exact, from blocked matrix products, on CPU or CUDA.

Core distances and the spanning tree are ours; the condensed tree and the choice of clusters are the `hdbscan`
package's own functions, so labels mean what its users expect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hdbscan._hdbscan_linkage import label
from hdbscan.hdbscan_ import _tree_to_labels
from hdbscan.plots import CondensedTree
from torch import Tensor

from moee.clustering.core import core_distances
from moee.clustering.mst import Edges, Forest, spanning_tree
from moee.clustering.neighbours import all_nearest, block_pairs
from moee.clustering.pairwise import Bounds, Points, fast_dtype, full_precision_products, row_chunks
from moee.errors import UserError

Progress = Callable[[int, int, str], None]
MIN_SAMPLES = 5
FIRST_PASS = "nearest neighbours"  # message of the pass that every clustering has


class ClusteringStopped(RuntimeError):
    """Raised by `HDBSCAN.fit` when `should_stop` returned true."""


@dataclass(frozen=True)
class SpanningTree:
    """`edges` int64 [N - 1, 2] rows (i, j), i < j; `weights` float64 [N - 1] ascending: mutual reachability."""

    edges: Tensor
    weights: Tensor


class HDBSCAN:
    """Exact HDBSCAN in the Euclidean metric.

    min_cluster_size: smallest group that counts as a cluster, at least 2.
    min_samples: the core distance is that to the `min_samples`-th neighbour, the point itself not counted (as the
        `hdbscan` package counts). None takes the smaller of min_cluster_size and 5; docs/clustering.md says why.
    cluster_selection_method: "eom" (excess of mass) or "leaf".
    allow_single_cluster: let the whole data be one cluster.
    block: rows of a product's block; memory beyond the data is about N x neighbours x 30 bytes plus block^2 x 8.
    neighbours: length of the first pass's lists; None takes `min_samples` plus a margin. Changes time, not results.
    precision: dtype of the first pass's products; None picks the fastest. Changes time, not results.
    progress: called as progress(done, total, message): block products of the pass that `message` names, or, with total 0, how
        many points are joined.
    should_stop: polled at every block; when it returns true, `fit` raises ClusteringStopped.

    Fitted: `labels_` int64 [N] (-1 noise), `probabilities_` float64 [N], `condensed_tree_` (hdbscan's),
    `minimum_spanning_tree_` (SpanningTree).
    """

    labels_: Tensor
    probabilities_: Tensor
    condensed_tree_: CondensedTree
    minimum_spanning_tree_: SpanningTree

    def __init__(
        self,
        min_cluster_size: int = 5,
        min_samples: int | None = None,
        cluster_selection_method: str = "eom",
        allow_single_cluster: bool = False,
        block: int = 4096,
        *, neighbours: int | None = None,
        precision: torch.dtype | None = None,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        if min_cluster_size < 2:
            raise UserError(f"min_cluster_size must be at least 2, got {min_cluster_size}.")
        if min_samples is not None and min_samples < 1:
            raise UserError(f"min_samples must be at least 1, got {min_samples}.")
        if cluster_selection_method not in ("eom", "leaf"):
            raise UserError(f"cluster_selection_method must be 'eom' or 'leaf', got {cluster_selection_method!r}.")
        if block < 1:
            raise UserError(f"block must be at least 1, got {block}.")
        if neighbours is not None and neighbours < 1:
            raise UserError(f"neighbours must be at least 1, got {neighbours}.")
        self.min_cluster_size, self.min_samples = min_cluster_size, min_samples
        self.cluster_selection_method, self.allow_single_cluster = cluster_selection_method, allow_single_cluster
        self.block, self.neighbours, self.precision = block, neighbours, precision
        self.progress, self.should_stop = progress, should_stop

    def fit_predict(self, x: Tensor | np.ndarray) -> Tensor:
        """Labels of the rows of x, int64 [N] on the CPU; see `fit`."""
        return self.fit(x).labels_

    def fit(self, x: Tensor | np.ndarray) -> HDBSCAN:
        """Cluster the rows of x [N, F], any float type (computed as float32), contiguous or not, CPU or CUDA.

        Raises UserError (a ValueError) for a shape other than [N, F], fewer rows than min_cluster_size, or rows that are
        not finite.
        """
        data = _checked(x, self.min_cluster_size)
        samples = min(self.min_samples or min(MIN_SAMPLES, self.min_cluster_size), len(data) - 1)
        with torch.inference_mode(), full_precision_products():
            self.minimum_spanning_tree_ = self._tree(data, samples)
        tree, weights = self.minimum_spanning_tree_.edges.double(), self.minimum_spanning_tree_.weights
        linkage = label(np.ascontiguousarray(torch.cat([tree, weights[:, None]], dim=1).numpy()))
        labels, probabilities, _, condensed, _ = _tree_to_labels(
            None, linkage, self.min_cluster_size, self.cluster_selection_method, self.allow_single_cluster
        )
        self.labels_ = torch.from_numpy(labels.astype(np.int64))
        self.probabilities_ = torch.from_numpy(np.asarray(probabilities, dtype=np.float64))
        self.condensed_tree_ = CondensedTree(condensed, labels)
        return self

    def _tree(self, data: Tensor, samples: int) -> SpanningTree:
        first, which = unique_rows(data)
        copies = torch.bincount(which, minlength=len(first))
        points = Points.of(data if len(first) == len(data) else data[first])
        count = len(first)
        fast = self.precision or fast_dtype(data.device, data.shape[1])
        dtypes = list(dict.fromkeys((fast, torch.float32, torch.float64)))
        made: dict[torch.dtype, Bounds] = {}

        def ladder(step: int) -> Bounds:
            dtype = dtypes[min(step, len(dtypes) - 1)]
            if dtype not in made:
                made[dtype] = Bounds(points, dtype, keep=dtype == fast)
            return made[dtype]

        tick = _Ticker(self.progress, self.should_stop, block_pairs(count, self.block))
        length = min(self.neighbours or samples + max(16, samples // 4), count)
        lists = all_nearest(ladder(0), length, self.block, lambda: tick(FIRST_PASS, None))
        core, bound, known = core_distances(points, lists, ladder, copies, samples, block=self.block, tick=tick)
        edges = Edges.joined([Edges.between(each.rows, each.index, each.low, each.high, core) for each in known])
        del lists, known
        forest = Forest(points, core, edges, bound.cpu().numpy())
        tree = spanning_tree(forest, ladder, samples + 16, self.block, tick)
        return _expanded(tree, core.cpu(), first.cpu(), which.cpu())


def _checked(x: Any, least: int) -> Tensor:
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        x = x.astype(np.float32)  # a copy: PyTorch warns about tensors over memory that it may not write
    data = torch.as_tensor(x)
    if data.ndim != 2 or data.shape[1] == 0 or not data.is_floating_point():
        raise UserError(f"Expected floating-point rows of shape [N, F], F >= 1, got {data.dtype} {list(data.shape)}.")
    if len(data) < least:
        raise UserError(f"Clustering needs at least min_cluster_size = {least} rows, got {len(data)}: give more rows.")
    data = data.detach().float().contiguous()
    bad = len(data) - sum(int(data[part].isfinite().all(1).sum()) for part in row_chunks(data))
    if bad:
        raise UserError(f"{bad} of {len(data)} rows hold NaN or infinite values (as float32): remove them first.")
    return data


def unique_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first copy of each distinct row [M], ascending, and the distinct row of every row [N], int64.

    Rows are compared through a 64-bit sum and then in full; rows that merely share the sum stay distinct.
    """
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(-(2**62), 2**62, (x.shape[1],), generator=generator).to(x.device) * 2 + 1
    parts = [((x[part] + 0.0).view(torch.int32).long() * factor).sum(1) for part in row_chunks(x)]  # -0.0 equals 0.0
    _, first, which = np.unique(torch.cat(parts).cpu().numpy(), return_index=True, return_inverse=True)
    owner = torch.from_numpy(first[which]).to(x.device)
    copy = (owner != torch.arange(len(x), device=x.device)).nonzero()[:, 0]
    for part in copy.split(1024):
        differs = part[(x[part] != x[owner[part]]).any(1)]
        owner[differs] = differs
    distinct, position = torch.unique(owner, return_inverse=True)
    return distinct, position


def _expanded(tree: Tensor, core: Tensor, first: Tensor, which: Tensor) -> SpanningTree:
    """The tree over all rows: copies of a point hang on its first row, at the core distance that they share."""
    copy = (first[which] != torch.arange(len(which))).nonzero()[:, 0]
    i = torch.cat([first[which[copy]], first[tree[:, 0].long()]])
    j = torch.cat([copy, first[tree[:, 1].long()]])
    weight = torch.cat([core[which[copy]], tree[:, 2]])
    order = torch.from_numpy(np.lexsort((j.numpy(), i.numpy(), weight.numpy())))
    return SpanningTree(torch.stack([i, j], dim=1)[order], weight[order])


class _Ticker:
    def __init__(self, progress: Progress | None, should_stop: Callable[[], bool] | None, total: int) -> None:
        self.progress, self.should_stop, self.done, self.total = progress, should_stop, 0, total

    def __call__(self, message: str, own: tuple[int, int] | None) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        if self.progress is not None:
            self.progress(*(own or (self.done, self.total)), message)
        if self.should_stop is not None and self.should_stop():
            raise ClusteringStopped(f"Stopped while computing {message}, after {self.done} of {self.total} blocks.")
