"""One threshold over all layers and experts, and the sensitivity that it is set on."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moee.calibrate.calibration import hidden_activations
from moee.calibrate.sensitivity import RoutedStats, measure_sensitivity, output_projection
from moee.data.image_set import TensorSet, image_shape
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.measure.metrics import mean_cosine, model_cost
from moee.methods.neurons.allocation import Candidate, allocate
from moee.methods.neurons.choice import ffn_budget
from moee.methods.recipe import method_options
from moee.methods.registry import METHODS
from moee.mlps.find import find_ffns
from moee.models.model import load_model
from moee.planning.search import Way, recipe_of
from tests.conftest import extract, tiny_images, tiny_spec

KMEANS = dict(clustering="kmeans", clusters=4, cluster_tokens=500)
MODEL = dict(criterion="sensitivity", allocation="model", **KMEANS)


def candidates(seed, layers=3):
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for i in range(layers):
        experts, hidden = 1 + i, 12 + i
        share = torch.rand(experts, generator=generator, dtype=torch.float64) + 0.1
        error = torch.rand(experts, hidden, generator=generator, dtype=torch.float64)
        dim, gated = 8 * (1 + i % 2), i == 0  # the first layer has one expert
        macs = (3 * dim, 0) if gated else (2 * dim, dim * experts)
        result[str(i)] = Candidate(error, share / share.sum(), 10 + i, *macs)
    return result


def macs_of(layers, kept):
    return sum(
        c.tokens * (c.routing_macs + sum(c.neuron_macs * float(s) * len(k) for s, k in zip(c.share, kept[n], strict=True)))
        for n, c in layers.items()
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.floats(0.3, 1.0))
def test_budget_is_met_and_no_dropped_neuron_is_worth_more_than_a_kept_one(seed, part):
    layers = candidates(seed)
    budget = part * sum(c.tokens * (c.neuron_macs * c.error.shape[1] + c.routing_macs) for c in layers.values())
    result = allocate(layers, macs=budget)
    assert macs_of(layers, result.kept) == pytest.approx(result.macs)
    assert result.macs <= budget
    kept, dropped = [], []
    for name, c in layers.items():
        for row, neurons in zip(c.error / c.neuron_macs, result.kept[name], strict=True):
            mask = torch.zeros(len(row), dtype=torch.bool)
            mask[neurons] = True
            kept += row[mask & (row < row.max())].tolist()
            dropped += row[~mask].tolist()
    assert not kept or not dropped or min(kept) >= max(dropped)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), part=st.floats(0.6, 1.0), multiple=st.integers(2, 7))
def test_widths_are_multiples_and_no_dropped_block_is_worth_more_than_a_kept_one(seed, part, multiple):
    layers = {name: replace(c, multiple=multiple) for name, c in candidates(seed).items()}
    budget = part * sum(c.tokens * (c.neuron_macs * c.error.shape[1] + c.routing_macs) for c in layers.values())
    result = allocate(layers, macs=budget)
    assert macs_of(layers, result.kept) == pytest.approx(result.macs) and result.macs <= budget
    kept, dropped = [], []
    for name, c in layers.items():
        for row, neurons in zip(c.error / c.neuron_macs, result.kept[name], strict=True):
            width = len(neurons)
            assert width == c.error.shape[1] or width and width % multiple == 0
            ranked = row.sort(descending=True).values
            assert sorted(row[neurons].tolist(), reverse=True) == ranked[:width].tolist(), "the best of the expert"
            means = [float(block.mean()) for block in ranked.split(multiple)]
            kept += means[1 : -(-width // multiple)]
            dropped += means[-(-width // multiple) :]
    assert not kept or not dropped or min(kept) >= max(dropped) - 1e-12


def test_a_multiple_leaves_a_small_layer_eight_widths():
    options = method_options(width_multiple=64)
    assert [options.multiple_of(hidden) for hidden in (1536, 512, 511, 64, 8, 4)] == [64, 64, 32, 8, 1, 1]
    assert method_options(width_multiple=12).multiple_of(50) == 6


@pytest.mark.parametrize(
    "options",
    [
        dict(method="static", target_macs=0.8),
        dict(method="static", keep=0.9),
        dict(target_macs=0.8, **MODEL),
        dict(target_macs=0.8, neurons="eliminated", **MODEL),
    ],
)
def test_every_expert_keeps_a_multiple(tiny_model, options):
    dense, data = copy.deepcopy(tiny_model), tiny_images(32)
    extract(tiny_model, data, method_options(width_multiple=16, **options))
    layers = routed_layers(tiny_model)
    hidden = {ffn.name: ffn.hidden for ffn in find_ffns(dense).ffns}
    widths = [(width, hidden[name]) for name, layer in layers.items() for width in layer.widths]
    assert widths and all(width == full or width % 16 == 0 for width, full in widths)
    assert any(width < full for width, full in widths)


def test_what_is_made_for_a_device_has_widths_for_it():
    """Presets for use and a plan's points; the paper's recipe is as published."""
    for method, preset, multiple in (("experts", "deploy", 16), ("static", "static", 16), ("experts", "paper", 1)):
        values = next(m for m in METHODS if m.name == method).presets[preset]
        assert values.get("width_multiple", 1) == multiple
    way = Way("kmeans-4", "sensitivity")
    assert recipe_of(way, {}).cut.width_multiple == 16 and recipe_of(way, {"width_multiple": 64}).cut.width_multiple == 64


def test_a_layer_whose_macs_take_longer_keeps_fewer():
    one = Candidate(torch.rand(1, 40, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 10, 16, 0)
    dear = replace(one, mac_time=3.0)
    assert len(allocate({"a": one, "b": one}, macs=40 * 160.0).kept["b"][0]) == 20
    kept = allocate({"a": one, "b": dear}, macs=40 * 160.0).kept
    assert len(kept["a"][0]) + len(kept["b"][0]) == 40 and len(kept["b"][0]) < 15
    least = one.error[0][kept["b"][0]].min()
    assert least / 3 >= one.error[0].sort(descending=True).values[len(kept["a"][0])], "a unit of time costs as much in both"


def test_times_of_macs_are_names_with_factors_and_hold_layers_against_each_other():
    options = method_options(**MODEL, mac_time=("blocks.0.mlp=2", "a=b=0.5"))
    assert options.mac_times() == {"blocks.0.mlp": 2.0, "a=b": 0.5}
    for wrong in ("blocks.0.mlp", "=2", "a=0", "a=-1", "a=nan", "a=x"):
        with pytest.raises(UserError, match="--mac-time is an MLP and a positive factor"):
            method_options(**MODEL, mac_time=(wrong,))
    with pytest.raises(UserError, match="use it with --allocation model"):
        method_options(mac_time=("a=2",))


def test_keep_is_the_share_of_the_error_of_all_layers_together():
    layers = candidates(1)
    result = allocate(layers, keep=0.9)
    total = sum(float((c.error * c.share[:, None]).sum()) * c.tokens for c in layers.values())
    held = sum(
        float(c.share[e] * c.tokens * c.error[e, k].sum()) for n, c in layers.items() for e, k in enumerate(result.kept[n])
    )
    assert 0.9 <= held / total < 0.93
    assert result.error == pytest.approx(1 - held / total)
    assert allocate(layers, keep=1.0).error == pytest.approx(0)


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 4), (0.51, 5), (0.25, 2), (1.0, 8)])
def test_a_share_of_the_error_that_is_met_exactly_needs_no_more(keep, kept):
    candidate = Candidate(torch.full((2, 4), 0.1, dtype=torch.float64), torch.tensor([0.5, 0.5]), 10, 8, 0)
    found = allocate({"mlp": candidate}, keep=keep)
    assert sum(map(len, found.kept["mlp"])) == kept and found.error == pytest.approx(1 - kept / 8)
    assert found.macs == kept * 10 * 0.5 * 8


def test_every_expert_keeps_a_neuron_even_with_no_budget():
    layers = candidates(2)
    result = allocate(layers, macs=0.0)
    assert all(len(k) == 1 for kept in result.kept.values() for k in kept)


def test_sensitivity_equals_the_exact_jacobian():
    """Sum over tokens of (a - m)^2 |P J w2|^2 / |f|^2 with the Jacobian J of the features, against the sampled estimate."""
    torch.manual_seed(0)
    model = load_model(tiny_spec(num_classes=0))
    data, ffn = tiny_images(6), find_ffns(model).ffns[1]
    mean = torch.full((1, ffn.hidden), 0.1, dtype=torch.float64)
    kept = {}
    handle = model.get_submodule(ffn.name).register_forward_hook(lambda m, a, y: kept.update(x=a[0], y=y) or y)
    exact = torch.zeros(ffn.hidden, dtype=torch.float64)
    tokens = 0
    for image in data.images:
        output = model(image[None])
        unit = torch.nn.functional.normalize(output[0], dim=0).detach()
        project = (torch.eye(len(unit)) - unit[:, None] * unit) / output.norm().detach()
        rows = [torch.autograd.grad(v @ output[0], kept["y"], retain_graph=True)[0][0] for v in project]
        jacobian = torch.stack(rows)  # [C, N, D]
        effect = (jacobian @ ffn.w_down).square().sum(0)
        deviation = (hidden_activations(ffn, kept["x"][0].detach()) - 0.1).square()
        exact += (effect * deviation).sum(0).detach().double()
        tokens += len(deviation)
    handle.remove()
    stats = {ffn.name: RoutedStats(torch.ones(1, ffn.dim), torch.zeros(1), mean)}
    estimates = [
        measure_sensitivity(model, {ffn.name: ffn}, stats, data, 10**6, objective="output", seed=seed)[ffn.name].error[0]
        for seed in range(60)
    ]
    torch.testing.assert_close(
        torch.stack(estimates).mean(0), exact / exact.sum() / tokens, rtol=0.3, atol=0.02 / tokens / ffn.hidden
    )


def test_logit_projection_has_the_metric_of_the_kl_divergence():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).expand(200_000, 5)
    v = output_projection(logits, True, torch.Generator().manual_seed(1))
    p = logits[0].softmax(0)
    torch.testing.assert_close(v.T @ v / len(v), torch.diag(p) - p[:, None] * p, rtol=0.05, atol=0.002)


def test_a_single_logit_has_the_metric_of_its_two_classes():
    """The softmax of one logit is 1, and its metric 0: every neuron would have been worth nothing."""
    logit = torch.full((200_000, 1), 1.5)
    v = output_projection(logit, True, torch.Generator().manual_seed(1))
    yes = logit[0].sigmoid()
    torch.testing.assert_close((v.T @ v / len(v))[0], yes * (1 - yes), rtol=0.05, atol=0.002)


def test_target_macs_is_met_and_weights_are_untouched(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images(48)
    extract(tiny_model, data, method_options(target_macs=0.8, **MODEL))
    layers = routed_layers(tiny_model)
    shares = {}
    for name, layer in layers.items():
        handle = layer.register_forward_pre_hook(
            lambda m, a, name=name, layer=layer: shares.__setitem__(
                name, torch.bincount(layer.routes(a[0]).flatten(), minlength=layer.num_experts)
            )
        )
        with torch.no_grad():
            tiny_model(data.images)
        handle.remove()
    parts = {name: (c.double() / c.sum()).tolist() for name, c in shares.items()}
    cost = model_cost(dense, tiny_model, parts, image_shape(data.images))
    assert cost["moee"]["macs"] / cost["dense"]["macs"] == pytest.approx(0.8, abs=0.02)
    assert all(p.requires_grad for p in tiny_model.patch_embed.parameters())


def test_allocation_over_the_model_beats_equal_shares_where_layers_differ(tiny_model):
    """A layer whose output hardly matters should give its neurons to the others."""
    with torch.no_grad():
        tiny_model.blocks[0].mlp.fc2.weight.mul_(0.01)
    dense, data = copy.deepcopy(tiny_model), tiny_images(64)
    cosines = {}
    for name, config in {
        "model": method_options(target_macs=0.75, compensation="mean", **MODEL),
        "expert": method_options(keep=0.72, compensation="mean", criterion="variance", **KMEANS),
    }.items():
        model = copy.deepcopy(dense)
        extract(model, data, config)
        widths = {n: sum(layer.widths) / len(layer.widths) for n, layer in routed_layers(model).items()}
        with torch.no_grad():
            cosines[name] = (mean_cosine(model(data.images), dense(data.images)), sum(widths.values()))
    assert cosines["model"][1] <= cosines["expert"][1], "the comparison should not favour the allocation"
    assert cosines["model"][0] > cosines["expert"][0]


def test_a_floor_that_misses_the_target_is_said(tiny_model, caplog):
    data, floor = tiny_images(16), dict(method="static", target_macs=0.6, mlp_floor=0.9)
    with caplog.at_level("INFO", logger="moee"):
        extract(copy.deepcopy(tiny_model), data, method_options(**floor))
        assert "--target-macs 0.6 is not reached: --mlp-floor 0.9 leaves 9" in caplog.text
        caplog.clear()
        extract(tiny_model, data, method_options(**{**floor, "mlp_floor": 0.1}))
    assert "not reached" not in caplog.text


def test_a_target_below_the_rest_of_the_model_is_refused():
    with pytest.raises(UserError, match="hold 50% of the MACs.*give a larger share$"):
        ffn_budget(100, 50, 0.5)
    assert ffn_budget(100, 50, 0.5, saved=10) == 10
    assert ffn_budget(100, 50, 0.5, floor=0.4) == 20 and ffn_budget(100, 50, 0.9, floor=0.4) == 40
    with pytest.raises(UserError, match="stays above 0.40"):
        ffn_budget(100, 50, 0.4, saved=10)
    with pytest.raises(UserError, match="narrower attention or merged tokens alone leave 0.70"):
        ffn_budget(100, 50, 0.75, saved=30)


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(target_macs=0.5, method="moefication", experts=4, top_k=2), "--target-macs is for method experts, static"),
        (dict(allocation="model"), "needs --criterion sensitivity"),
        (dict(criterion="sensitivity", statistics="cluster"), "routed"),
    ],
)
def test_contradictory_options_are_refused(bad, match):
    with pytest.raises(UserError, match=match):
        method_options(**bad)


def test_token_objective_needs_only_a_feature_map(tiny_model):
    data, ffns = tiny_images(4), {f.name: f for f in find_ffns(tiny_model).ffns}
    stats = {n: RoutedStats(torch.ones(1, f.dim), torch.zeros(1), torch.zeros(1, f.hidden).double()) for n, f in ffns.items()}
    found = measure_sensitivity(tiny_model, ffns, stats, TensorSet("t", data.images, [-1] * 4, 0), 10**6, objective="tokens")
    assert all(bool((s.error > 0).any()) for s in found.values())


def test_the_metric_says_how_much_the_output_minds_an_error_in_a_direction(tiny_model):
    """Second moments of gradients: an error along the strongest direction changes the output more than one along the weakest."""
    data, ffn = tiny_images(6), find_ffns(tiny_model).ffns[1]
    stats = {ffn.name: RoutedStats(torch.zeros(1, ffn.dim), torch.zeros(1), torch.zeros(1, ffn.hidden).double())}
    metric = measure_sensitivity(tiny_model, {ffn.name: ffn}, stats, data, 10**6, objective="output")[ffn.name].metric
    values, vectors = torch.linalg.eigh(metric)
    assert torch.allclose(metric, metric.T) and float(values[0]) > -1e-5 * float(values[-1])
    last = tiny_model.blocks[1].mlp.fc2
    before, bias, moved = tiny_model(data.images).detach(), last.bias.detach().clone(), {}
    for at in (0, -1):
        with torch.no_grad():
            last.bias.copy_(bias + 0.05 * vectors[:, at].float())
            moved[at] = 1 - mean_cosine(tiny_model(data.images), before)
            last.bias.copy_(bias)
    assert moved[-1] > 3 * moved[0]
