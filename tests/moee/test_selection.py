"""Neuron selection and streamed moments."""

import copy

import pytest
import torch

from moee.calibrate.selection import MomentAccumulator, Moments, keep_by_share, output_weight, select_neurons, weight_norm
from moee.layers.routed import routed_layers
from moee.methods.recipe import method_options
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images


def test_keeps_the_fewest_neurons_that_hold_the_share():
    importance = torch.tensor([5.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    assert keep_by_share(importance, 0.5).tolist() == [0]
    assert keep_by_share(importance, 0.51).tolist() == [0, 2]
    assert keep_by_share(importance, 0.9).tolist() == [0, 1, 2]  # tie of 1 and 3 goes to the lower id
    assert keep_by_share(importance, 1.0).tolist() == [0, 1, 2, 3]


def test_constant_activations_still_keep_one_neuron():
    assert keep_by_share(torch.zeros(4, dtype=torch.float64), 0.95).tolist() == [0]


@pytest.mark.parametrize("chunks", [1, 3, 17])
def test_moments_do_not_depend_on_the_chunks(chunks):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(200, 6, generator=g) * 3 + 100  # a large mean would ruin a naive sum of squares
    experts = torch.randint(-1, 3, (200,), generator=g)
    accumulator = MomentAccumulator(3, 6)
    for part in torch.arange(200).chunk(chunks):
        accumulator.add(values[part], experts[part])
    moments = accumulator.finish()
    for e in range(3):
        member = values[experts == e].double()
        assert int(moments.count[e]) == len(member)
        torch.testing.assert_close(moments.mean[e], member.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moments.variance[e], member.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_an_expert_without_tokens_has_no_moments_and_no_nan():
    accumulator = MomentAccumulator(2, 3)
    accumulator.add(torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]]), torch.zeros(2, dtype=torch.int64))
    moments = accumulator.finish()
    assert moments.count.tolist() == [2, 0]
    assert moments.mean.tolist() == [[2, 0, 0], [0, 0, 0]] and moments.variance.tolist() == [[1, 4, 0], [0, 0, 0]]
    assert moments.magnitude.tolist() == [[2, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("share", "multiple", "kept"), [(0.5, 1, 2), (0.5, 3, 3), (0.75, 2, 4), (1.0, 3, 4), (1e-9, 4, 4), (0.3, 1, 2)]
)
def test_a_share_that_is_met_exactly_needs_no_more(share, multiple, kept):
    assert len(keep_by_share(torch.full((4,), 0.1, dtype=torch.float64), share, multiple)) == kept


def test_output_variance_weighs_by_the_down_projection(tiny_model):
    ffn = find_ffns(tiny_model).ffns[0]
    ffn.w_down[:, 0] = 0  # a neuron that cannot be seen in the output is never worth keeping
    accumulator = MomentAccumulator(1, ffn.hidden)
    accumulator.add(torch.randn(100, ffn.hidden), torch.zeros(100, dtype=torch.int64))
    moments = accumulator.finish()
    assert output_weight(ffn)[0] == 0
    assert 0 not in select_neurons(moments, ffn, "output_variance", 0.99)[0].tolist()
    assert 0 in select_neurons(moments, ffn, "variance", 1.0)[0].tolist()


def test_weight_ranks_by_the_norm_of_all_that_a_neuron_has(tiny_model):
    ffn = find_ffns(tiny_model).ffns[0]
    norms = torch.stack([torch.cat([ffn.w_up[j], ffn.w_down[:, j]]).norm() for j in range(ffn.hidden)])
    torch.testing.assert_close(weight_norm(ffn).float(), norms)
    moments = Moments(torch.ones(1), torch.zeros(1, 128), torch.ones(1, 128).double(), torch.zeros(1, 128))
    kept = select_neurons(moments, ffn, "weight", 0.25)[0]
    assert kept.tolist() == norms.topk(32).indices.sort().values.tolist()


def test_taylor_is_the_sensitivity_of_neurons_that_nothing_replaces(tiny_model):
    """Around zero and not around the mean: a neuron that hardly varies matters by what it always gives."""
    with torch.no_grad():
        mlp = tiny_model.blocks[1].mlp
        mlp.fc1.weight[5] = 0
        mlp.fc1.bias[5], mlp.fc1.bias[6:9] = 3.0, -9.0
    kept = {}
    for criterion in ("taylor", "sensitivity"):
        model = copy.deepcopy(tiny_model)
        options = method_options("static", criterion=criterion, allocation="model", target_macs=0.6, compensation="mean")
        extract(model, tiny_images(), options)
        rows = routed_layers(model)["blocks.1.mlp"].w_up
        kept[criterion] = bool((rows == 0).all(1).any())
    assert kept == {"taylor": True, "sensitivity": False}
