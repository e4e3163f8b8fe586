"""Backward elimination against one that fits anew for every neuron that might go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moee.calibrate.elimination import RIDGE, eliminate


def fitted(gram, weight, kept, ridge):
    """What is missed by the best weights of the kept neurons, ridge included: the cost that elimination minimises."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight)
    rest = weight.clone()
    rest[kept] -= solved
    return float((rest * (damped @ rest)).sum())


def by_trials(gram, weight, count, ridge):
    kept = list(range(len(gram)))
    while len(kept) > count:
        trials = [fitted(gram, weight, [k for k in kept if k != j], ridge) for j in kept]
        del kept[trials.index(min(trials))]
    return kept


def drawn(seed, hidden=9, dim=4, tokens=60):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    a = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64) @ mixed
    a -= a.mean(0)
    return a.T @ a / tokens, torch.randn(hidden, dim, generator=generator, dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 9))
def test_one_at_a_time_removes_what_trials_remove(seed, count):
    gram, weight = drawn(seed)
    assert eliminate(gram, weight, count, block=1).tolist() == by_trials(gram, weight, count, RIDGE)


def test_of_two_neurons_that_fire_alike_one_goes_although_both_are_strong():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 6, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    a[:, 1] = a[:, 0] + 0.01 * torch.randn(200, generator=generator, dtype=torch.float64)
    kept = eliminate(a.T @ a / 200, torch.eye(6, dtype=torch.float64), 5, ridge=1e-6).tolist()
    assert len({0, 1} & set(kept)) == 1 and {2, 3, 4, 5} <= set(kept)


def test_blocks_in_single_precision_miss_hardly_more():
    gram, weight = drawn(3, hidden=288, dim=24, tokens=4000)
    exact = fitted(gram, weight, eliminate(gram, weight, 144, block=1), RIDGE)
    found = eliminate(gram.float(), weight.float(), 144)
    ranked = (gram.diagonal() * weight.square().sum(1)).sort(descending=True).indices[:144].sort().values
    assert len(found) == 144 and fitted(gram, weight, found, RIDGE) < 1.1 * exact < fitted(gram, weight, ranked, RIDGE)


def test_nothing_to_remove_constant_activations_and_broken_ones():
    gram, weight = drawn(1)
    assert eliminate(gram, weight, 9).tolist() == list(range(9))
    assert eliminate(torch.zeros(4, 4), torch.ones(4, 2), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="not finite"):
        eliminate(gram * torch.nan, weight, 3)
