"""Closed-form decomposition of an MLP's two linear maps into a shared basis and residual experts.

Both maps are brought to coordinates v [m] in which squared error is what counts, so that one algorithm serves both:

1. Shared basis U [m, r]: the r leading eigenvectors of the pooled within-expert covariance of v. That is the truncated SVD of
   the map whitened by the tokens' second moment; means are centred out, since each expert has a bias of its own.
2. Residual expert U_c [m, q]: the leading eigenvectors of expert c's covariance outside the span of U, shrunk towards the pooled
   one where the expert saw few tokens.
3. bias_c takes up the mean of what is left out, so an expert is unbiased on its own tokens.

Up map: v = Q^1/2 x with Q = W1' G W1, G = (W2' L W2) * E[s s'], s the activation's slopes: the error that a change of the hidden
layer causes behind the second map to first order (`metric="output"`), or G = 1 (`plain`: error of the hidden layer before its
activation).
Down map: v = L^1/2 y, y the layer's output, L the squared LayerScale; W2 is first refitted by ridge regression to the hidden
activations that the decomposed up map really produces (reduced-rank regression).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moee.calibrate.calibration import CHUNK, hidden_activations
from moee.calibrate.ridge import LEAST, error_change, held_out_runs, solve_ridge
from moee.cures import cures, without
from moee.errors import UserError, chosen
from moee.layers.activations import activate
from moee.layers.clear_dispatch import Factors
from moee.layers.report import RefitReport
from moee.models.ffn import FFN

METRIC_TOKENS = 4096  # that the up map's metric is averaged over
FLOOR = 1e-9  # of the largest eigenvalue: below, a direction of the metric counts as that large, so that it can be inverted
NORMALISED = 1  # direction that LayerNorm takes from every token it puts out
SINGULAR = 1e-12  # of the largest eigenvalue: below, a direction carries nothing but the rounding of float32


@dataclass(frozen=True)
class Moments:
    """Tokens [K], means [K, m] and covariances [K, m, m] of each expert, float64."""

    count: Tensor
    mean: Tensor
    cov: Tensor

    @property
    def pooled(self) -> Tensor:
        """Within-expert covariance [m, m] over all tokens."""
        return torch.einsum("k,kij->ij", self.count / self.count.sum(), self.cov)

    def through(self, matrix: Tensor) -> Moments:
        """Moments of matrix @ x for matrix [n, m]."""
        matrix = matrix.double()
        return Moments(self.count, self.mean @ matrix.T, matrix @ self.cov @ matrix.T)


def moments(rows: Tensor, experts: Tensor, count: int) -> Moments:
    """Moments of rows [N, m] by expert [N]. An expert without tokens takes those of all tokens, with count 0."""
    counts, means, covs = [], [], []
    for e in range(count):
        mine = rows[experts == e]
        use = mine if len(mine) else rows
        mean = use.double().mean(0)
        centred = use.double() - mean
        counts.append(len(mine))
        means.append(mean)
        covs.append(centred.T @ centred / len(use))
    return Moments(torch.tensor(counts).double(), torch.stack(means), torch.stack(covs))


def leading(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors [m, rank] of a symmetric matrix [m, m]."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :rank]


def directions(covariance: Tensor) -> int:
    """How many independent directions a covariance [m, m] has."""
    values = torch.linalg.eigvalsh(covariance)
    return int((values > SINGULAR * values[-1].clamp(min=torch.finfo(values.dtype).tiny)).sum())


def require_directions(covariance: Tensor, rank: int, name: str) -> None:
    """Raises `UserError` if a map's outputs, of this covariance [D, D], have fewer than `rank` directions: the layer is singular
    for this rank."""
    found = directions(covariance)
    if found + NORMALISED < rank:
        raise UserError(
            f"`{name}` is singular: its map has {found} independent directions on the calibration tokens, and rank {rank} "
            "needs as many; " + cures("lower --rank", "give more --calibration-images", without(name))
        )


def subspaces(m: Moments, rank: int, residual: int) -> tuple[Tensor, Tensor]:
    """Shared basis [m, rank] and the experts' bases [K, m, residual], each orthogonal to the shared one."""
    pooled = m.pooled
    basis = leading(pooled, rank)
    size = len(pooled)
    left = torch.eye(size, dtype=basis.dtype) - basis @ basis.T
    experts = torch.zeros(len(m.count), size, residual, dtype=basis.dtype)
    for e in range(len(m.count)) if residual else ():
        weight = m.count[e] / (m.count[e] + size)
        cov = weight * m.cov[e] + (1 - weight) * pooled
        experts[e] = left @ leading(left @ cov @ left, residual)
    return basis, experts


def sqrt_and_inverse(metric: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a metric [m, m] and its inverse; directions without weight count as `floor`."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=float(values[-1]) * floor).clamp(min=1e-30).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def up_metric(ffn: FFN, tokens: Tensor, kind: str) -> Tensor:
    """Q [D, D] float64 of the up map for input tokens [N, D]; kind: output or plain."""
    return chosen({"output": _output_metric, "plain": _plain_metric}, kind, "metric")(ffn, tokens)


def _plain_metric(ffn: FFN, tokens: Tensor) -> Tensor:
    w_up = ffn.w_up.double()
    return w_up.T @ w_up


def _output_metric(ffn: FFN, tokens: Tensor) -> Tensor:
    w_up = ffn.w_up.double()
    scale = ffn.scale.double() if ffn.scale is not None else torch.ones(ffn.dim, dtype=torch.float64)
    step = max(1, len(tokens) // METRIC_TOKENS)
    with torch.enable_grad():
        before = torch.addmm(ffn.b_up, tokens[::step], ffn.w_up.T).requires_grad_()
        (slope,) = torch.autograd.grad(activate(before, ffn.activation).sum(), before)
    weighted = (ffn.w_down.double() * scale[:, None]).float()
    metric = (weighted.T @ weighted) * (slope.T @ slope / len(slope))
    return w_up.T @ (metric @ ffn.w_up).double()


def output_scale(ffn: FFN) -> Tensor:
    """L^1/2 [D] float64: what the block multiplies the output by; never zero, so that it can be divided out."""
    if ffn.scale is None:
        return torch.ones(ffn.dim, dtype=torch.float64)
    scale = ffn.scale.double().abs()
    return scale.clamp(min=max(float(scale.max()) * 1e-6, 1e-30))


def full_rank(ffn: FFN) -> int:
    """The largest rank that either map can have."""
    return min(ffn.dim, ffn.hidden)


def check_rank(ffn: FFN, rank: int, residual: int) -> None:
    """Raises `UserError` for ranks beyond the maps'."""
    if rank + residual > full_rank(ffn):
        raise UserError(
            f"`{ffn.name}` has full rank {full_rank(ffn)}; shared rank {rank} plus residual rank {residual} is above it, "
            "lower --rank or --residual-rank"
        )


def _stack(shared: Tensor, experts: Tensor) -> Tensor:
    """[r, n] and [K, q, n] to [r + K q, n] float32."""
    return torch.cat([shared, experts.flatten(0, 1)]).float().contiguous()


def decompose_up(ffn: FFN, tokens: Tensor, routes: Tensor, experts: int, rank: int, *, residual: int, metric: Tensor) -> Factors:
    """The up map on input tokens [N, D] with experts [N]; `metric` as from `up_metric`."""
    check_rank(ffn, rank, residual)
    root, inverse = sqrt_and_inverse(metric)
    m = moments(tokens, routes, experts)
    plain, _ = sqrt_and_inverse(ffn.w_up.double().T @ ffn.w_up.double(), 0.0)
    require_directions(m.through(plain).pooled, rank, ffn.name)
    basis, own = subspaces(m.through(root), rank, residual)
    weight = ffn.w_up.double() @ inverse  # [H, D] from the coordinates to the hidden layer
    inward = _stack(basis.T @ root, own.transpose(1, 2) @ root)
    outward = _stack((weight @ basis).T, (weight @ own).transpose(1, 2))
    kept = basis @ basis.T + own @ own.transpose(1, 2)  # [K, D, D]
    centre = m.mean @ root
    dropped = centre - torch.einsum("kij,kj->ki", kept, centre)
    return Factors(inward, outward, (ffn.b_up.double() + dropped @ weight.T).float(), rank, residual)


def refit_down(
    ffn: FFN, hidden: Tensor, target: Tensor, routes: Tensor, experts: int, *, ridge: float
) -> tuple[Tensor, RefitReport]:
    """W2 [D, H] corrected by ridge regression of target [N, D] (without bias) on hidden [N, H], both centred per expert.

    With fewer tokens than neurons a fifth of them is held out first; W2 stays as it is unless the correction helps there."""
    few = len(hidden) < ffn.hidden
    held_out = held_out_runs(len(hidden)) if few else torch.zeros(len(hidden), dtype=torch.bool)
    grams = [torch.zeros(ffn.hidden, ffn.hidden) for _ in range(1 + few)]
    crosses = [torch.zeros(ffn.hidden, ffn.dim) for _ in range(1 + few)]
    for e in range(experts):
        mine = routes == e
        if not mine.any():
            continue
        inputs, outputs = hidden[mine], target[mine]
        inputs = inputs - inputs.mean(0)
        outputs = outputs - outputs.mean(0)
        for which, (gram, cross) in enumerate(zip(grams, crosses, strict=True)):
            chosen = inputs if not few else inputs[held_out[mine] == bool(which)]
            wanted = outputs if not few else outputs[held_out[mine] == bool(which)]
            gram += chosen.T @ chosen
            cross += chosen.T @ (wanted - chosen @ ffn.w_down.T)
    facts = {"tokens": len(hidden), "neurons": ffn.hidden}
    what = f"{len(hidden)} tokens for {ffn.hidden} neurons"
    if few and error_change(solve_ridge(grams[0], crosses[0], ridge, LEAST)[0], grams[1], crosses[1]) >= 0:
        return ffn.w_down, RefitReport(**facts, note=f"refit skipped: {what}, it does not help on held-out tokens")
    change, used = solve_ridge(torch.stack(grams).sum(0), torch.stack(crosses).sum(0), ridge, LEAST)
    note = f"refitted on {what}" if few else ""
    if used != ridge:
        note = f"lambda {ridge:g} raised to {used:g}: {what} do not determine the fit below that"
    return ffn.w_down + change.float().T, RefitReport(**facts, ridge=used, note=note)


def decompose_down(
    ffn: FFN, hidden: Tensor, target: Tensor, routes: Tensor, experts: int, *, rank: int, residual: int, weight: Tensor
) -> Factors:
    """The down map `weight` [D, H] on hidden activations [N, H]; biases make each expert's mean output that of the dense
    layer, `target` [N, D] (its bias left out)."""
    check_rank(ffn, rank, residual)
    scale = output_scale(ffn)
    fitted = moments(hidden @ weight.T * scale.float(), routes, experts)
    require_directions(fitted.pooled, rank, ffn.name)
    basis, own = subspaces(fitted, rank, residual)
    inner = scale[:, None] * weight.double()  # [D, H] from the hidden layer to the coordinates
    inward = _stack(basis.T @ inner, own.transpose(1, 2) @ inner)
    outward = _stack((basis / scale[:, None]).T, (own / scale[:, None]).transpose(1, 2))
    kept = basis @ basis.T + own @ own.transpose(1, 2)
    produced = torch.einsum("kij,kj->ki", kept, fitted.mean) / scale
    wanted = torch.stack([
        (target[routes == e] if (routes == e).any() else target).double().mean(0) for e in range(experts)
    ])  # fmt: skip
    return Factors(inward, outward, (ffn.b_down.double() + wanted - produced).float(), rank, residual)


def dense_hidden(ffn: FFN, tokens: Tensor) -> Tensor:
    """Hidden activations [N, H] of the dense layer, in chunks."""
    return torch.cat([hidden_activations(ffn, part) for part in tokens.split(CHUNK)])
