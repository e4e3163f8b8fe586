"""Ridge regression from sums that may be singular: fewer rows than unknowns, constant or dependent columns, tiny penalties. Gram
matrices are summed by their upper part, since the lower one is the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moee.errors import UserError

# Of a diagonal entry: when a pivot is smaller, nothing but the rounding of float32 sums is left of that column
PIVOT = 2.0**-23
STEP = 10.0
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
LEAST = 1e-12  # mean diagonal of a Gram matrix that is more than rounding
BLOCKS = 4  # of a Gram matrix's columns: ten of their sixteen products are made
FOLDS, RUN = 5, 256  # every fifth run of 256 tokens is held out; runs are shorter where there are few tokens


def add_upper(gram: Tensor, rows: Tensor, weighed: Tensor) -> None:
    """Add `weighed` [n, H]' @ `rows` [n, H] to `gram` [H, H], which is symmetric, on its diagonal and above. Below stands what
    `mirrored` replaces."""
    width = max(1, -(-len(gram) // BLOCKS))
    for start in range(0, len(gram), width):
        gram[start : start + width, start:].addmm_(weighed[:, start : start + width].T, rows[:, start:])


def mirrored(gram: Tensor) -> Tensor:
    """The whole symmetric matrix [U, U] of sums by `add_upper`, which fill its upper triangle."""
    return gram.triu() + gram.triu(1).mT


def solve_ridge(gram: Tensor, cross: Tensor, ridge: float, least: float = 1e-30) -> tuple[Tensor, float]:
    """X [U, C] of (G + lambda mean(diag G) I) X = C in float64, and the lambda that was used.

    gram: G [U, U], symmetric; cross: C [U, C]; `least` is the smallest mean diagonal that is believed. Lambda is `ridge`, or,
    where the sums do not determine X at that penalty, the first of 10, 100, ... times it at which they do. Raises `UserError` for
    sums that are not finite.
    """
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise UserError("a least-squares fit met NaN or infinite activations; check the weights and the input normalisation")
    mean = gram.diagonal().double().mean().clamp(min=least)
    while True:
        system = gram.to(torch.float64, copy=True)
        system.diagonal().add_(ridge * mean)
        least_pivots = PIVOT * system.diagonal()
        factor, failed = torch.linalg.cholesky_ex(system)
        del system  # as large as the factor, and the solution needs copies of its own
        # a symmetric system with a penalty above its trace is positive definite whatever its rounding, so this ends
        if not failed and bool((factor.diagonal().square() >= least_pivots).all()):
            return torch.cholesky_solve(cross.double(), factor), ridge
        ridge *= STEP


def held_out_runs(tokens: int) -> Tensor:
    """Which of `tokens` tokens in reading order [N] are held out to judge a fit: runs, so that an image's tokens mostly stay
    together."""
    run = RUN if tokens >= RUN * FOLDS else max(1, tokens // FOLDS)
    return torch.arange(tokens) // run % FOLDS == FOLDS - 1


def error_change(change: Tensor, gram: Tensor, cross: Tensor) -> float:
    """|R - A X|^2 - |R|^2 = tr(X' G X) - 2 tr(X' C) for a solution X [U, C] float64 on the tokens of `gram` and `cross`."""
    return float((change * (gram.double() @ change - 2 * cross.double())).sum())


def choose_ridge(
    gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor, ridges: Sequence[float] = RIDGES
) -> tuple[float | None, float]:
    """The lambda of `ridges`, ascending, whose solution dW on (gram [U, U], cross [U, C]) leaves the least squared error on
    held-out tokens, whose sums are of the same shapes, and the change of that error. None and 0 where no lambda lowers it, or
    nothing is held out."""
    best: tuple[float | None, float] = None, 0.0
    for ridge in reversed(ridges):
        delta, used = solve_ridge(gram, cross, ridge, LEAST)
        error = error_change(delta, held_gram, held_cross)
        if error < best[1]:
            best = used, error
    return best
