"""Backward elimination against one that fits anew for every neuron that might go."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moee.calibrate.calibration import hidden_activations
from moee.calibrate.elimination import RIDGE, eliminate, eliminated, root_of
from moee.calibrate.layer_sums import LayerPart
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import mean_cosine
from moee.methods.neurons.assembly import chosen_anew
from moee.methods.recipe import method_options
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images


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


def test_errors_that_the_output_does_not_mind_cost_nothing():
    gram, weight = drawn(5, hidden=12, dim=4)
    weight[:6, :2] = 0  # these write where the metric is small
    weight[6:, 2:] = 0
    metric = torch.diag(torch.tensor([1.0, 1.0, 1e-9, 1e-9]))
    assert set(eliminate(gram, weight @ root_of(metric), 6).tolist()) == set(range(6, 12))
    torch.testing.assert_close(root_of(metric) @ root_of(metric).T * 0.5, metric.double(), atol=1e-8, rtol=1e-6)


def test_nothing_to_remove_constant_activations_and_broken_ones():
    gram, weight = drawn(1)
    assert eliminate(gram, weight, 9).tolist() == list(range(9))
    assert eliminate(torch.zeros(4, 4), torch.ones(4, 2), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="not finite"):
        eliminate(gram * torch.nan, weight, 3)


VALUES = dict(clustering="kmeans", clusters=4, cluster_tokens=500, target_macs=0.7)


def test_each_expert_keeps_what_its_own_tokens_leave_and_misses_less(tiny_model):
    """Same widths, other neurons, and outputs nearer to the dense ones on images that neither has seen."""
    made, seen = {}, tiny_images(160).images[96:]
    dense = tiny_model(seen).detach()
    for neurons in ("ranked", "eliminated"):
        model = copy.deepcopy(tiny_model)
        reports = extract(model, tiny_images(96), method_options(neurons=neurons, **VALUES))
        made[neurons] = model, reports
    for ranked, chosen in zip(made["ranked"][1], made["eliminated"][1], strict=True):
        assert ranked.widths == chosen.widths and chosen.refit.neurons == chosen.union
    with torch.no_grad():
        near = {name: mean_cosine(model(seen), dense) for name, (model, _) in made.items()}
    assert near["ranked"] < near["eliminated"] < 1
    layers = routed_layers(made["eliminated"][0])
    assert all(p.requires_grad for layer in layers.values() for p in (layer.w_up, layer.w_down, layer.b_out))
    assert not any(p.is_inference() for p in made["eliminated"][0].parameters()), "it can be trained"
    assert [layer.union for layer in layers.values()] == [report.union for report in made["eliminated"][1]]


def test_the_gram_matrix_is_centred_although_few_tokens_tell_the_first_mean(tiny_moee):
    """Every sixteenth token, by which the first mean goes, is far from the others."""
    _, dense, *_ = tiny_moee
    ffn = find_ffns(dense).ffns[0]
    layer = routed_layers(extracted_static(dense))["blocks.0.mlp"]
    tokens = torch.randn(480, ffn.dim, generator=torch.Generator().manual_seed(0))
    tokens[::16] += 3.0
    with torch.no_grad():
        (kept,), means = eliminated(layer, ffn, [LayerPart(tokens)])
        hidden = hidden_activations(ffn, tokens).double()
    off = hidden - hidden.mean(0)
    assert kept.tolist() == eliminate((off.T @ off / 480).float(), ffn.w_down.T, layer.widths[0]).tolist()
    torch.testing.assert_close(means[0].double(), hidden.mean(0), atol=1e-5, rtol=1e-5)


def extracted_static(dense):
    model = copy.deepcopy(dense)
    extract(model, tiny_images(), method_options("static", keep=0.6, compensation="none"))
    return model


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_a_metric_counts_by_its_shape_and_not_by_its_size(factor):
    metric = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    root = root_of(metric * factor)
    whole = (root @ root.T).float()
    torch.testing.assert_close(whole, metric * (whole[0, 0] / 4))
    assert float(root.norm()) == pytest.approx(2**0.5, rel=1e-6)


def test_parts_give_what_the_whole_gives_and_an_expert_without_tokens_goes_by_all(tiny_moee):
    model, dense, data, *_ = tiny_moee
    layer, ffn = next(iter(routed_layers(model).values())), find_ffns(dense).ffns[0]
    tokens = torch.randn(600, ffn.dim, generator=torch.Generator().manual_seed(2))
    lonely = tokens[layer.routes(tokens)[:, 0] != 2]
    weights = torch.rand(len(lonely), generator=torch.Generator().manual_seed(3)) + 0.5
    whole = eliminated(layer, ffn, [LayerPart(lonely, weights)])
    parts = eliminated(layer, ffn, [LayerPart(lonely[:200], weights[:200]), LayerPart(lonely[200:], weights[200:])])
    assert whole is not None and parts is not None
    assert [len(kept) for kept in whole[0]] == layer.widths
    overlap = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(whole[0], parts[0], strict=True)]
    assert min(overlap) > 0.97, "rounding alone"
    hidden, routes = hidden_activations(ffn, lonely), layer.routes(lonely)[:, 0]
    for e in (0, 1, 3):
        mine = routes == e
        mean = (hidden[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
        torch.testing.assert_close(whole[1][e].float(), mean, rtol=1e-4, atol=1e-5)
    other = chosen_anew(layer, ffn, *whole)
    one = lonely[routes == 0]
    kept = torch.zeros(ffn.hidden, dtype=torch.bool)
    kept[whole[0][0]] = True
    filled = torch.where(kept, hidden_activations(ffn, one), whole[1][0].float())
    with torch.no_grad():
        torch.testing.assert_close(other(one), filled @ ffn.w_down.T + ffn.b_down, rtol=1e-3, atol=1e-4)


def test_activations_that_are_not_finite_are_left_to_the_refit_to_name(tiny_moee):
    model, dense, *_ = tiny_moee
    layer, ffn = next(iter(routed_layers(model).values())), find_ffns(dense).ffns[0]
    assert eliminated(layer, ffn, [LayerPart(torch.full((40, ffn.dim), torch.nan))]) is None


def test_without_a_refit_there_is_nothing_to_count_on():
    with pytest.raises(UserError, match="--neurons eliminated counts on the refit; compensation mean has none"):
        method_options(neurons="eliminated", compensation="mean")
