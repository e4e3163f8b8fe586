"""k-means on the device where the points are: Lloyd's algorithm by matrix products.

The start, the draws and the end follow scikit-learn's `KMeans`, so that both give the same clusters up to rounding: points that
lie as near to two centres as float32 can tell may fall to either.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moee.clustering.pairwise import full_precision_products

STEPS = 300
TOLERANCE = 1e-4  # of the mean variance: the square of how far the centres moved, below which they are taken to stand
ROWS = 1 << 15  # of a product's block


def lloyd(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Labels [N] int64 on the CPU for x [N, F] float32 on any device."""
    with torch.inference_mode(), full_precision_products():
        x = x - x.mean(0)
        least = TOLERANCE * float(x.var(0, correction=0).mean())
        centres = x[_start(x, clusters, np.random.RandomState(seed))]
        labels = torch.full((len(x),), -1, device=x.device)
        for _ in range(STEPS):
            before, labels = labels, _nearest(x, centres)
            old, centres = centres, _means(x, labels, centres)
            if torch.equal(labels, before):
                return labels.cpu()
            if float((centres - old).square().sum()) <= least:
                break
        return _nearest(x, centres).cpu()


def _start(x: Tensor, clusters: int, draw: np.random.RandomState) -> Tensor:
    """Rows of the first centres: k-means++ (Arthur, Vassilvitskii 2007), the best of some draws each; int64, on x's device."""
    count, trials = len(x), 2 + int(np.log(clusters))
    norms = torch.cat([part.double().square().sum(1) for part in x.split(ROWS)])
    chosen = [int(draw.choice(count, p=np.full(count, 1 / count)))]
    nearest = _squares(x, norms, torch.tensor(chosen).to(x.device))[0]
    while len(chosen) < clusters:
        far = nearest.cpu().numpy()
        drawn = np.searchsorted(np.cumsum(far), draw.uniform(size=trials) * far.sum()).clip(max=count - 1)
        reached = torch.minimum(_squares(x, norms, torch.from_numpy(drawn).to(x.device)), nearest)
        best = int(reached.sum(1).argmin())
        nearest = reached[best]
        chosen.append(int(drawn[best]))
    return torch.tensor(chosen).to(x.device)


def _squares(x: Tensor, norms: Tensor, rows: Tensor) -> Tensor:
    """Squared distances [n, N] float32 of the points `rows` [n] to all, from products in float64; `norms` [N] float64."""
    centres = x[rows].double()
    parts = [n - 2 * centres @ part.double().T for part, n in zip(x.split(ROWS), norms.split(ROWS), strict=True)]
    return (torch.cat(parts, 1) + norms[rows][:, None]).clamp_min(0).float()


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre [N] int64 of every point; the lowest of equals."""
    norms = centres.square().sum(1)
    return torch.cat([(norms - 2 * part @ centres.T).argmin(1) for part in x.split(ROWS)])


def _means(x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Means [K, F] of the points of each label. A label without points takes the farthest one from its centre."""
    sums, counts = torch.zeros_like(centres), x.new_zeros(len(centres))
    for part, own in zip(x.split(ROWS), labels.split(ROWS), strict=True):
        members = torch.nn.functional.one_hot(own, len(centres)).T.to(x.dtype)
        sums += members @ part  # a product adds up in the same order every time
        counts += members.sum(1)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        away = torch.cat([(p - centres[own]).square().sum(1) for p, own in zip(x.split(ROWS), labels.split(ROWS), strict=True)])
        if float(away.max()) > 0:
            for cluster, point in zip(empty.tolist(), away.topk(len(empty)).indices.tolist(), strict=True):
                owner = int(labels[point])
                sums[owner] -= x[point]
                counts[owner] -= 1
                sums[cluster], counts[cluster] = x[point], 1
    return torch.where((counts > 0)[:, None], sums / counts.clamp_min(1)[:, None], centres)
