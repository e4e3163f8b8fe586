"""The parts of CLEAR-MoE: linear algebra, rank choice, routers, dispatch backends, the layer under autograd."""

import pytest
import torch

from moee.errors import UserError
from moee.layers.activations import activate
from moee.layers.clear_dispatch import BACKENDS, apply_ffn, backend
from moee.layers.clear_routers import fit_router
from moee.methods.clear_moe.decompose import (
    Moments,
    decompose_up,
    directions,
    moments,
    refit_down,
    require_directions,
    subspaces,
    up_metric,
)
from moee.methods.clear_moe.ranks import LayerCost, loss_table, ranks_for_budget
from moee.methods.clear_moe.scoring import WEIGHTS, LayerScore, combine, near_zero_share
from moee.models.ffn import FFN
from tests.exporter.test_clear_export import random_layer


def clustered(count=600, dim=12, experts=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % experts
    centres = torch.randn(experts, dim, generator=g) * 3
    mix = torch.randn(experts, dim, dim, generator=g) / dim**0.5
    noise = torch.einsum("nij,nj->ni", mix[labels], torch.randn(count, dim, generator=g))
    return centres[labels] + noise, labels


def tiny_ffn(dim=12, hidden=20, seed=1) -> FFN:
    g = torch.Generator().manual_seed(seed)
    return FFN(
        "layer", "gelu", torch.randn(hidden, dim, generator=g), torch.randn(hidden, generator=g),
        torch.randn(dim, hidden, generator=g), torch.randn(dim, generator=g), torch.rand(dim, generator=g), False,
    )  # fmt: skip


def apply(factors, x, routes):
    e = factors
    own = torch.stack([(v @ e.expert_in[c].T) @ e.expert_out[c] + e.bias[c] for v, c in zip(x, routes.tolist(), strict=True)])
    return e.shared(x) + own


def test_moments_of_each_expert():
    x, labels = clustered()
    m = moments(x, labels, 4)
    torch.testing.assert_close(m.cov[1], torch.cov(x[labels == 1].double().T, correction=0))
    torch.testing.assert_close(m.mean[2], x[labels == 2].double().mean(0))
    assert m.count.tolist() == [200, 200, 200, 0]
    torch.testing.assert_close(m.mean[3], x.double().mean(0))  # no tokens: those of all
    torch.testing.assert_close(m.through(torch.eye(12) * 2).cov, m.cov * 4)


def test_bases_are_orthogonal_and_optimal():
    x, labels = clustered()
    m = moments(x, labels, 3)
    basis, own = subspaces(m, 4, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    for e in range(3):
        torch.testing.assert_close(own[e].T @ own[e], torch.eye(2, dtype=torch.float64))
        assert (basis.T @ own[e]).abs().max() < 1e-10
    lost = torch.trace(m.pooled) - torch.trace(basis.T @ m.pooled @ basis)
    torch.testing.assert_close(lost, torch.linalg.eigvalsh(m.pooled)[:-4].sum())  # Eckart-Young


def test_few_tokens_lean_on_the_pooled_covariance():
    base = torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    odd = torch.diag(torch.tensor([0.0, 0.0, 0.0, 50.0], dtype=torch.float64))
    zero = torch.zeros(2, 4, dtype=torch.float64)
    few = Moments(torch.tensor([10_000.0, 0.01]).double(), zero, torch.stack([base, odd]))
    many = Moments(torch.tensor([10_000.0, 400.0]).double(), zero, torch.stack([base, odd]))
    assert subspaces(few, 1, 1)[1][1, :, 0].abs().argmax() == 1  # what all tokens would take next
    assert subspaces(many, 1, 1)[1][1, :, 0].abs().argmax() == 3  # its own direction


def test_up_map_error_is_the_loss_table_entry():
    x, labels = clustered()
    ffn = tiny_ffn()
    plain = up_metric(ffn, x, "plain")
    factors = decompose_up(ffn, x, labels, 3, 5, residual=0, metric=plain)
    error = apply(factors, x, labels) - (x @ ffn.w_up.T + ffn.b_up)
    for e in range(3):
        assert error[labels == e].mean(0).abs().max() < 1e-4, "an expert is unbiased on its own tokens"
    root = torch.linalg.cholesky(plain).T
    m = moments(x, labels, 3).through(root)
    table = loss_table(m, 12, 0)
    total = (x @ ffn.w_up.T).double()
    variance = float((total - total.mean(0)).square().sum(1).mean())
    assert float(table.loss[table.ranks.index(5), 0]) * variance == pytest.approx(float(error.square().sum(1).mean()), rel=1e-3)


def test_output_metric_beats_plain_behind_the_second_map():
    x, labels = clustered(2000)
    ffn = tiny_ffn()
    ffn.w_up[:6] *= 4  # loud rows that the second map hardly reads
    ffn.w_down[:, :6] *= 0.02

    def damage(kind):
        factors = decompose_up(ffn, x, labels, 3, 5, residual=0, metric=up_metric(ffn, x, kind))
        hidden = activate(apply(factors, x, labels), "gelu")
        wanted = activate(x @ ffn.w_up.T + ffn.b_up, "gelu")
        return float((((hidden - wanted) @ ffn.w_down.T) * ffn.scale).square().mean())

    assert damage("output") < 0.7 * damage("plain")


def test_directions_counts_what_the_tokens_span():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() @ torch.randn(3, 8).double()
    assert directions(torch.cov(x.T)) == 3
    with pytest.raises(UserError, match="singular: its map has 3 independent directions"):
        require_directions(moments(x.float(), torch.zeros(200, dtype=torch.int64), 1).pooled, 6, "layer")


def test_loss_falls_with_rank_and_residual():
    x, labels = clustered()
    table = loss_table(moments(x, labels, 3), 12)
    assert (table.loss.diff(dim=0) <= 1e-9).all() and (table.loss.diff(dim=1) <= 1e-9).all()
    r, q = table.for_energy(0.9)
    i, j = table.ranks.index(r), table.residuals.index(q)
    assert table.loss[i, j] <= 0.1
    cheaper = [table.loss[a, b] for a, ra in enumerate(table.ranks) for b, qb in enumerate(table.residuals) if ra + qb < r + q]
    assert all(v > 0.1 for v in cheaper)
    free, dear = table.at_price(1.0, 0.0), table.at_price(1.0, 1e9)
    assert free[2] == pytest.approx(0, abs=1e-9) and dear[0] + dear[1] == min(table.ranks)


def test_budget_is_spent_but_not_exceeded():
    x, labels = clustered()
    table = loss_table(moments(x, labels, 3), 12)
    cost = LayerCost(dense=2 * 12 * 20.0, unit=32.0, router=36.0)
    (ranks,) = ranks_for_budget([(table, table)], [cost], 100.0, 100.0 + 400.0, None)
    assert ranks is not None and 100 + cost.of(sum(ranks)) <= 500 < 100 + cost.of(sum(ranks) + 3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "centroid"])
def test_trained_routers_find_the_clusters(kind):
    x, labels = clustered(1200)
    router, accuracy = fit_router(kind, x, labels, 3)
    assert accuracy > 0.95
    assert float((router.route(x) == labels).double().mean()) > 0.95
    assert router.macs == (32 * 12 + 3 * 32 if kind == "mlp" else 36)
    bad = torch.full((2, 12), float("nan"))
    assert router.route(bad).tolist() == [0, 0]


def test_random_router_ignores_the_labels():
    x, labels = clustered(1200)
    router, accuracy = fit_router("random", x, labels, 3, seed=1)
    other, _ = fit_router("random", x, labels.flip(0), 3, seed=1)
    assert torch.equal(router.rows, other.rows) and accuracy < 0.9


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"triton"}))
def test_backends_agree(name, tokens):
    layer = random_layer(experts=5, ranks=(6, 4, 5, 4))
    parts = layer.parts()
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0))
    routes = parts.router.route(x)

    def gelu(h):
        return activate(h, "gelu")

    with torch.no_grad():
        hidden = torch.nn.functional.gelu(apply(parts.up, x, routes)) if tokens else x.new_zeros(0, 24)
        expected = apply(parts.down, hidden, routes) if tokens else x
        got = apply_ffn(x, routes, parts.up, parts.down, gelu, via=backend(name))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unknown_backend():
    with pytest.raises(UserError, match="dispatch backend 'warp' is not available here; expected one of loop"):
        backend("warp")


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"triton"}))
def test_gradients_reach_all_but_the_router(name):
    layer = random_layer()
    layer.backend = name
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    for part, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (part == "router"), part
    layer.router.requires_grad_(True)
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    assert layer.router.grad is not None and layer.router.grad.abs().sum() > 0


def test_channels_first():
    layer = random_layer()
    x = torch.randn(2, 16, 3, 3)
    expected = layer(x.movedim(1, -1)).movedim(-1, 1)
    layer.channels_first = True
    torch.testing.assert_close(layer(x), expected)
    assert layer.routes(x).shape == (18, 1)


def test_scores_combine_as_documented():
    raw = [LayerScore(0.1, 0.0, 0.5, 8), LayerScore(0.3, 0.2, 0.1, 8), LayerScore(0.2, 0.1, 0.3, 8)]
    assert [s.score for s in combine(raw)] == pytest.approx([0, 1, 0.5])
    assert sum(WEIGHTS) == 1
    assert near_zero_share(torch.tensor([[0.0, 1.0], [1e-4, -1.0]])) == 0.5


def starved(tokens, seed=2):
    """Decomposed hidden activations [N, 20] and the dense layer's outputs [N, 12] on a few tokens, of two experts."""
    ffn = tiny_ffn()
    x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    hidden = activate(torch.addmm(ffn.b_up, x, ffn.w_up.T), "gelu")
    cut = activate(torch.addmm(ffn.b_up, x[:, :6], ffn.w_up[:, :6].T), "gelu")
    return ffn, cut, hidden @ ffn.w_down.T, torch.arange(tokens) % 2


@pytest.mark.parametrize("tokens", [4, 8, 15])
def test_a_down_map_refitted_on_few_tokens_says_so_and_stays_unless_it_helps(tokens):
    ffn, hidden, target, routes = starved(tokens)
    weight, facts = refit_down(ffn, hidden, target, routes, 2, ridge=0.01)
    assert f"{tokens} tokens for 20 neurons" in facts.note and facts.tokens == tokens
    assert torch.equal(weight, ffn.w_down) == (facts.ridge is None)
    if tokens == 4:  # nothing can be held out
        assert facts.note.startswith("refit skipped")


def test_a_down_map_with_tokens_enough_has_nothing_to_say():
    weight, facts = refit_down(*starved(400), 2, ridge=0.01)
    assert facts.ridge == 0.01 and facts.note == "" and not torch.equal(weight, tiny_ffn().w_down)


def test_a_tiny_lambda_for_a_singular_down_map_is_raised():
    ffn, hidden, target, routes = starved(400)
    hidden[:, 10:] = hidden[:, :10]  # half of the neurons say what the other half says
    weight, facts = refit_down(ffn, hidden, target, routes, 2, ridge=1e-14)
    assert torch.isfinite(weight).all() and facts.ridge > 1e-14 and "lambda 1e-14 raised" in facts.note
