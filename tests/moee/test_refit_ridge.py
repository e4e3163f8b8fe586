"""Lambda of the refit, chosen on held-out tokens."""

import copy
from dataclasses import replace

import pytest
import torch

from moee.calibrate.calibration import CHUNK
from moee.calibrate.layer_sums import LayerPart, RefitStep, find_shifts, part_sums
from moee.calibrate.refit import refit_layer
from moee.calibrate.ridge import RIDGES, choose_ridge, held_out_runs, solve_ridge
from moee.errors import UserError
from moee.layers.routed import Experts, RoutedFFN
from moee.models.ffn import FFN
from moee.parallel.group import SOLO
from moee.tokens.prefix import holds_prefix, prefix_tokens


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
    assert choose_ridge(a.T @ a, a.T @ r, held_a.T @ held_a, held_a.T @ held_r)[0] == min(errors, key=errors.__getitem__)


def test_every_lambda_of_the_grid_is_best_somewhere():
    """Against solutions by hand."""
    grid, found = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), set()
    for noise in (0.05, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0, 9.0):
        (a, r), (held_a, held_r) = problem(100, noise)
        errors = {}
        for ridge in grid:
            gram = (a.T @ a).double()
            change = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(30), (a.T @ r).double())
            errors[ridge] = float((held_r - held_a @ change.float()).square().sum())
        chosen = choose_ridge(a.T @ a, a.T @ r, held_a.T @ held_a, held_a.T @ held_r)[0]
        assert chosen == min(errors, key=errors.__getitem__)
        found.add(chosen)
    assert found >= {0.03, 0.1, 0.3}


def test_few_noisy_tokens_ask_for_more_than_many_clean_ones():
    chosen = []
    for rows, noise in ((35, 5.0), (2000, 0.1)):
        (a, r), (held_a, held_r) = problem(rows, noise)
        chosen.append(choose_ridge(a.T @ a, a.T @ r, held_a.T @ held_a, held_a.T @ held_r)[0])
    assert chosen[0] > chosen[1]


def test_nothing_held_out_chooses_none():
    (a, r), _ = problem(100, 1.0)
    nothing = torch.zeros(30, 30), torch.zeros(30, 4)
    assert choose_ridge(a.T @ a, a.T @ r, *nothing) == (None, 0.0)


def starved(tokens, hidden=96, dim=24, seed=0):
    """A dense MLP, a static layer that keeps two thirds of its neurons, and a few input tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    ffn = FFN("blocks.7.mlp", "gelu", draw(hidden, dim), draw(hidden), draw(dim, hidden), draw(dim), None, False)
    kept = torch.arange(hidden * 2 // 3)
    experts = Experts(
        router=torch.zeros(1, dim), router_bias=torch.zeros(1), w_up=ffn.w_up[kept], b_up=ffn.b_up[kept],
        w_down=ffn.w_down.T[kept], b_out=ffn.b_down[None], neurons=kept.int(), offsets=torch.tensor([0, len(kept)]).int(),
        activation="gelu",
    )  # fmt: skip
    return RoutedFFN(experts), ffn, draw(tokens, dim)


@pytest.mark.parametrize("tokens", [1, 20, 63])
@pytest.mark.parametrize("ridge", [1e-12, 1e-300])
def test_a_tiny_lambda_with_fewer_tokens_than_neurons_is_raised_and_says_so(tokens, ridge):
    layer, ffn, x = starved(tokens)
    facts = refit_layer(layer, ffn, x, ridge)
    assert all(torch.isfinite(t).all() for t in layer.state_dict().values())
    assert layer.w_down.abs().max() < 100
    if tokens > 1:  # a single token is constant
        assert facts.ridge > ridge and f"lambda {ridge:g} raised to {facts.ridge:g}" in facts.note


def test_a_layer_that_no_lambda_helps_stays_as_it_was():
    layer, ffn, x = starved(4)
    before = copy.deepcopy(layer.state_dict())
    facts = refit_layer(layer, ffn, x)
    assert facts.ridge is None and facts.note.startswith("refit skipped: 4 tokens for 64 neurons")
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


def test_held_out_tokens_decide_where_there_are_fewer_than_five_runs():
    layer, ffn, x = starved(600)
    before = copy.deepcopy(layer)
    facts = refit_layer(layer, ffn, x)
    assert facts.ridge in RIDGES and facts.error_after < facts.error_before
    fresh = starved(600, seed=0)[2].flip(0) + 0.01  # other tokens of the same kind
    dense = torch.nn.functional.gelu(fresh @ ffn.w_up.T + ffn.b_up) @ ffn.w_down.T + ffn.b_down
    assert (layer(fresh) - dense).square().mean() < (before(fresh) - dense).square().mean()


@pytest.mark.parametrize("scaled", [False, True])
def test_the_error_on_held_out_tokens_is_that_of_the_fit_without_them(scaled):
    """Behind the LayerScale, where there is one."""
    layer, ffn, x = starved(1500)
    scale = torch.linspace(0.01, 3.0, 24) if scaled else torch.ones(24)
    ffn = replace(ffn, scale=scale if scaled else None)
    held = held_out_runs(1500)
    other = copy.deepcopy(layer)
    facts = refit_layer(layer, ffn, x)
    hidden = torch.nn.functional.gelu(x @ layer.w_up.T + layer.b_up).detach()
    hidden = (hidden - hidden.mean(0)).double()
    target = torch.nn.functional.gelu(x @ ffn.w_up.T + ffn.b_up) @ ffn.w_down.T
    target = (target - target.mean(0)).double()
    rest = target - hidden @ other.w_down.detach().double()
    a, r = hidden[~held], rest[~held]
    penalty = facts.ridge * (a.T @ a).diagonal().mean() * torch.eye(64)
    fitted = torch.linalg.solve(a.T @ a + penalty, a.T @ r)
    power = (target * scale)[held].square().sum()
    assert facts.error_before == pytest.approx(float((rest * scale)[held].square().sum() / power), rel=1e-3)
    assert facts.error_after == pytest.approx(float(((rest - hidden @ fitted) * scale)[held].square().sum() / power), rel=1e-3)


def test_a_token_that_counts_for_three_is_one_that_stands_there_three_times():
    layer, ffn, x = starved(900)
    other = copy.deepcopy(layer)
    weights = torch.ones(900)
    weights[:200] = 3.0
    refit_layer(layer, ffn, x, 0.01, weights=weights)
    refit_layer(other, ffn, torch.cat([x, x[:200], x[:200]]), 0.01)
    torch.testing.assert_close(layer.w_down, other.w_down, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.b_out, other.b_out, rtol=1e-4, atol=1e-4)
    parts = [LayerPart(x, weights)], [LayerPart(torch.cat([x, x[:200], x[:200]]))]
    shifts, _ = find_shifts(layer, ffn, parts[0], SOLO)
    ours, theirs = (part_sums(layer, ffn, part, None, shifts) for (part,) in parts)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=1e-2) for key in ours)


def test_tokens_of_feature_maps_are_tokens_and_passes_go_on_in_pieces(monkeypatch):
    layer, ffn, x = starved(24)
    plain = LayerPart(x).rows(layer)
    layer.channels_first = True
    mapped = LayerPart(x).rows(layer)
    assert [e for e, *_ in mapped] == [0] and all(torch.equal(a, b) for a, b in zip(mapped[0][1:], plain[0][1:], strict=True))
    layer.channels_first = False
    pieces = []
    layer.register_forward_pre_hook(lambda module, args: pieces.append(args[0].shape))
    monkeypatch.setattr("moee.calibrate.layer_sums.CHUNK", 8)
    images = x.reshape(4, 6, 24)
    whole = RefitStep(layer, ffn, lambda tokens: 0).apply_to(images)
    assert pieces == [(1, 6, 24)] * 4 and torch.allclose(whole, layer(images), atol=1e-4), "no more than eight tokens at once"


def test_activations_far_from_zero_lose_nothing_in_one_pass():
    """Their mean is a hundred times their spread, and that of the first part of the tokens is another one than of all."""
    layer, ffn, x = starved(2 * CHUNK + 100)
    ffn.b_up[:] += 300.0
    layer.b_up.data += 300.0
    x[:CHUNK] += 0.5
    dense, before = copy.deepcopy(ffn), copy.deepcopy(layer)
    refit_layer(layer, ffn, x, 1e-3)
    kept, wide = layer.w_up.detach().double(), x.double()
    hidden = wide @ kept.T + layer.b_up.detach().double()  # GELU is the identity there
    target = (wide @ dense.w_up.double().T + dense.b_up.double()) @ dense.w_down.double().T
    hidden_mean, target_mean = hidden.mean(0), target.mean(0)
    a, r = hidden - hidden_mean, target - target_mean - (hidden - hidden_mean) @ before.w_down.detach().double()
    gram = a.T @ a
    change = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(64), a.T @ r)
    torch.testing.assert_close(layer.w_down.detach().double() - before.w_down.detach().double(), change, rtol=1e-2, atol=1e-3)


def test_held_out_runs_are_as_ever_where_there_are_enough_tokens():
    assert torch.equal(held_out_runs(5000), torch.arange(5000) // 256 % 5 == 4)
    for tokens in (392, 1024, 1025, 1100, 1279, 1280):
        assert 0.15 < held_out_runs(tokens).double().mean() < 0.25, tokens
    assert not held_out_runs(4).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(value):
    layer, ffn, x = starved(300)
    x[7, 3] = value
    for ridge in (None, 0.01):
        with pytest.raises(UserError, match="`blocks.7.mlp` receives NaN or infinite activations"):
            refit_layer(layer, ffn, x, ridge)
    assert torch.isfinite(layer.w_down).all()


@pytest.mark.parametrize("ridge", [None, 0.01, 1e-12])
def test_constant_activations_leave_the_layer_as_it_was(ridge):
    layer, ffn, x = starved(2000)
    before = layer.w_down.detach().clone()
    facts = refit_layer(layer, ffn, x[:1].repeat(2000, 1), ridge)
    assert facts.ridge is None and facts.note == "refit skipped: the activations are constant"
    assert torch.equal(layer.w_down, before)


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_nearly_constant_activations_are_told_by_their_own_size(far):
    """Neurons that never fire, and ones whose spread beside their mean is the rounding of float32."""
    layer, ffn, x = starved(500)
    for weights, bias in ((ffn.w_up, ffn.b_up), (layer.w_up.data, layer.b_up.data)):
        weights.mul_(2.5e-5 if far else 0.0)
        bias.fill_(far)
    before = layer.w_down.detach().clone()
    facts = refit_layer(layer, ffn, x, 0.01)
    assert facts.note == "refit skipped: the activations are constant" and torch.equal(layer.w_down, before)
    if far:  # a spread that is no rounding is not skipped
        layer.w_up.data.mul_(4e4)
        assert refit_layer(layer, ffn, x, 0.01).ridge == 0.01


@pytest.mark.parametrize(("tokens", "note"), [(63, "refitted on 63 tokens for 64 neurons"), (64, "")])
def test_fewer_tokens_than_neurons_are_said(tokens, note):
    layer, ffn, x = starved(tokens)
    facts = refit_layer(layer, ffn, x, 0.1)
    assert (facts.note, facts.ridge, facts.tokens, facts.neurons) == (note, 0.1, tokens, 64)


def test_a_well_posed_fit_keeps_its_bits():
    (a, r), _ = problem(300, 1.0)
    gram, cross = a.T @ a, a.T @ r
    system = gram.double()
    system.diagonal().add_(0.01 * system.diagonal().mean())
    found, used = solve_ridge(gram, cross, 0.01)
    assert used == 0.01 and torch.equal(found, torch.cholesky_solve(cross.double(), torch.linalg.cholesky(system)))


@pytest.mark.parametrize("rows", [torch.zeros(5, 8), torch.ones(5, 8), torch.arange(24.0).view(3, 8) / 7, torch.eye(8)[:2]])
def test_singular_sums_have_a_finite_solution(rows):
    gram = rows.T @ rows
    found, used = solve_ridge(gram, rows.T @ torch.ones(len(rows), 2), 1e-12)
    assert torch.isfinite(found).all() and found.abs().max() < 10 and used < 1e-3
    with pytest.raises(UserError, match="NaN"):
        solve_ridge(gram, torch.full((8, 2), float("nan")), 1e-3)


def test_blocks_that_see_the_patches_alone_have_no_class_token(tiny_model):
    """CaiT's and XCiT's class token joins behind the blocks; a first patch must not count for many."""
    patches = tiny_model.patch_embed.num_patches
    assert prefix_tokens(tiny_model) == tiny_model.num_prefix_tokens > 0
    assert holds_prefix(tiny_model, patches + tiny_model.num_prefix_tokens) and not holds_prefix(tiny_model, patches)
    tiny_model.global_pool = "avg"
    assert prefix_tokens(tiny_model) == 0
