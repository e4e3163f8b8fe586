"""Lambda of the refit, chosen on held-out tokens."""

import pytest
import torch

from moee.refit import RIDGES, choose_ridge


def problem(rows, noise, seed=0):
    """Activations [n, U], targets [n, D] of a linear map with noise, for training and held out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(30, 4, generator=generator)

    def part(count):
        a = torch.randn(count, 30, generator=generator)
        return a, a @ weight + noise * torch.randn(count, 4, generator=generator)

    return part(rows), part(2000)


@pytest.mark.parametrize(("rows", "noise"), [(35, 5.0), (60, 2.0), (2000, 0.1)])
def test_the_chosen_lambda_leaves_the_least_held_out_error(rows, noise):
    (a, r), (held_a, held_r) = problem(rows, noise)
    errors = {}
    for ridge in RIDGES:
        gram = (a.T @ a).double()
        gram += ridge * gram.diagonal().mean() * torch.eye(30)
        delta = torch.linalg.solve(gram, (a.T @ r).double())
        errors[ridge] = float((held_r - held_a @ delta.float()).square().sum())
    assert choose_ridge(a.T @ a, a.T @ r, held_a.T @ held_a, held_a.T @ held_r) == min(errors, key=errors.__getitem__)


def test_few_noisy_tokens_ask_for_more_than_many_clean_ones():
    chosen = []
    for rows, noise in ((35, 5.0), (2000, 0.1)):
        (a, r), (held_a, held_r) = problem(rows, noise)
        chosen.append(choose_ridge(a.T @ a, a.T @ r, held_a.T @ held_a, held_a.T @ held_r))
    assert chosen[0] > chosen[1]


def test_nothing_held_out_takes_the_largest():
    (a, r), _ = problem(100, 1.0)
    nothing = torch.zeros(30, 30), torch.zeros(30, 4)
    assert choose_ridge(a.T @ a, a.T @ r, *nothing) == max(RIDGES)
