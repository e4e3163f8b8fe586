"""CORP: which neurons and dimensions go, and that what makes up for them is the least-squares solution."""

import copy

import pytest
import torch
from timm.layers import Attention

from moee.errors import OutOfReach, UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import model_cost
from moee.methods.corp.attention import compensated, energies
from moee.methods.corp.budget import Costs
from moee.methods.heads.fit import HeadMoments, dense_parts, narrowed
from moee.methods.recipe import make_recipe, method_options
from moee.mlps.attention import Widths, narrow_attentions
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images

SHAPE = (3, 32, 32)


@pytest.fixture
def seen():
    """An attention and the moments of its correlated tokens [40, 11, 24]."""
    torch.manual_seed(0)
    attention = Attention(24, num_heads=2, qkv_bias=True).eval()
    x = torch.randn(40, 11, 24) @ (torch.randn(24, 24) * torch.logspace(0, -1.5, 24))
    moments = HeadMoments(attention)
    moments.add(x)
    return attention, x, moments


@torch.no_grad()
def test_dimensions_of_the_most_energy_stay_with_the_least_squares_logits(seen):
    attention, x, moments = seen
    q, k, _ = dense_parts(attention, x)
    k = (k - k.mean(2, keepdim=True)).double()
    q, width = q.double(), 7
    for head in range(2):
        energy = torch.stack([q[:, head, :, j].square().mean() * k[:, head, :, j].square().mean() for j in range(12)])
        torch.testing.assert_close(energies(moments)[head], energy, rtol=1e-4, atol=1e-8)
        kept = energy.topk(width).indices.sort().values
        bases = compensated(moments, width)
        torch.testing.assert_close(bases.key[head], torch.eye(12, dtype=torch.float64)[kept])
        qs, ks = q[:, head].flatten(0, 1), k[:, head].flatten(0, 1)
        wanted = qs @ ks.T  # of every query with every key, as if drawn independently

        def missed(query_map, wanted=wanted, qs=qs, ks=ks, kept=kept):
            return float((wanted - (qs @ query_map.T) @ ks[:, kept].T).square().sum())

        found, plain = missed(bases.query[head]), missed(torch.eye(12, dtype=torch.float64)[kept])
        assert found < 0.999 * plain
        mixed = torch.linalg.lstsq(qs[:, kept], wanted @ torch.linalg.pinv(ks[:, kept]).T).solution.T
        best = missed(mixed @ torch.eye(12, dtype=torch.float64)[kept])
        assert found < best + 0.02 * (plain - best), "the ridge alone keeps it from the best"


@torch.no_grad()
def test_every_dimension_gives_the_dense_attention(seen):
    attention, x, moments = seen
    made = narrowed(attention, compensated(moments, 12), Widths(12, 12), moments)
    torch.testing.assert_close(made(x), attention(x), rtol=1e-3, atol=1e-4)


def test_neurons_of_the_most_energy_stay_and_the_cost_is_what_was_asked(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images(64)
    options = method_options("corp", target_macs=0.7)
    reports = extract(tiny_model, data, options)
    layers = routed_layers(tiny_model)
    cost = model_cost(dense, tiny_model, dict.fromkeys(layers, [1.0]), SHAPE)
    assert 0.68 < cost["moee"]["macs"] / cost["dense"]["macs"] <= 0.7
    assert len({layer.union for layer in layers.values()}) == 1 and len(narrow_attentions(tiny_model)) == 3
    assert [report.union for report in reports] == [layer.union for layer in layers.values()]
    ffn, tokens = find_ffns(dense).ffns[0], []
    dense.blocks[0].mlp.register_forward_pre_hook(lambda m, a: tokens.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        dense(data.images)
    energy = ffn.activations(tokens[0]).square().mean(0)
    kept = energy.topk(layers[ffn.name].union).indices.sort().values
    overlap = (layers[ffn.name].w_up[:, None] == ffn.w_up[kept][None]).all(-1).any(1).float().mean()
    assert overlap > 0.97, "but for rounding of the calibration tokens"


def test_whole_heads_and_what_cannot_be_met_are_said(tiny_model):
    extract(tiny := copy.deepcopy(tiny_model), tiny_images(16), method_options("corp", keep=0.5, corp_attention="whole"))
    assert not narrow_attentions(tiny) and set(layer.union for layer in routed_layers(tiny).values()) == {64}
    costs = Costs.of(tiny_model, method_options("corp"), SHAPE)
    with pytest.raises(OutOfReach, match="--target-macs 0.01: with one neuron an MLP and half of the heads'"):
        costs.keep_for(0.01)
    assert costs.macs(1.0) == costs.whole
    with pytest.raises(UserError, match="corp cuts the heads itself; leave --attention-macs and --token-macs out, or give"):
        make_recipe("corp", values={"attention_macs": 0.8, "keep": 0.5})
    assert len(make_recipe("corp", values={"attention_macs": 0.8, "keep": 0.5, "corp_attention": "whole"}).steps) == 2
