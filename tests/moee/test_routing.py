"""Routers by hand: their rows, which expert a token takes, and what a layer's indices must be."""

import pytest
import torch

from moee.errors import UserError
from moee.layers.routed import (
    LOAD_UNIT,
    MASKED_TOKENS,
    Experts,
    NeuronLayer,
    RoutedFFN,
    RoutedLayer,
    check_indices,
    mask_pays,
)
from moee.layers.routing import cosine_router, euclidean_router, hash_router, make_router, random_router, route, scores
from plugins import contract

TOKENS = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 2.0], [0.0, 4.0], [100.0, 100.0]])
LABELS = torch.tensor([0, 0, 1, 1, -1])


def test_means_are_those_of_the_clusters_and_noise_is_left_out():
    rows, bias = cosine_router(TOKENS, LABELS, 2)
    assert rows.tolist() == [[1, 0], [0, 1]] and bias.tolist() == [0, 0]
    rows, bias = euclidean_router(TOKENS, LABELS, 2)
    assert rows.tolist() == [[4, 0], [0, 3]] and bias.tolist() == [-8, -4.5]
    near = torch.tensor([[2.0, 1.4], [0.5, 1.0]])
    assert route(near, rows, bias)[:, 0].tolist() == torch.cdist(near, rows).argmin(1).tolist() == [0, 1]
    tilted = cosine_router(torch.tensor([[0.0, 3.0, 4.0], [0.0, 3.0, 4.0]]), torch.zeros(2, dtype=torch.int64), 1)[0]
    torch.testing.assert_close(tilted, torch.tensor([[0.0, 0.6, 0.8]]))


@pytest.mark.parametrize(("experts", "planes"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4)])
def test_a_hash_sends_a_token_to_its_sign_pattern(experts, planes):
    """Expert e answers to the signs that are the binary digits of e; the mean token scores nothing anywhere."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(400, 12, generator=generator) + 2
    rows, bias = hash_router(tokens, experts, seed=5)
    assert int(torch.linalg.matrix_rank(rows)) == planes
    drawn = torch.nn.functional.normalize(torch.randn(planes, 12, generator=torch.Generator().manual_seed(5)), dim=1)
    sides = (tokens - tokens.mean(0)) @ drawn.T  # [N, planes]
    digits = torch.tensor([[1 if e >> i & 1 else -1 for i in range(planes)] for e in range(experts)], dtype=torch.float32)
    torch.testing.assert_close(scores(tokens, rows, bias), sides @ digits.T, atol=1e-4, rtol=1e-4)
    if experts == 2**planes:
        number = ((sides > 0) * 2 ** torch.arange(planes)).sum(1)
        assert torch.equal(route(tokens, rows, bias)[:, 0], number)


def test_random_rows_are_units_about_the_mean_token():
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + 3
    rows, bias = random_router(tokens, 4, seed=1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(rows @ tokens.mean(0) + bias, torch.zeros(4), atol=1e-5, rtol=0)
    assert not torch.equal(rows, random_router(tokens, 4, seed=2)[0])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_best_come_first_and_ties_go_to_the_lower_expert(top_k):
    router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0], [float("nan"), 9.0], [float("inf"), 1.0]])
    expected = [[1, 3, 0], [0, 2, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert route(tokens, router, torch.zeros(4), top_k).tolist() == [row[:top_k] for row in expected]


@pytest.mark.parametrize(
    ("neurons", "offsets", "experts", "union", "message"),
    [
        ([0, 2, 1, 4], [0, 2, 4], 2, 5, None), ([0, 4], [0, 2, 2], 2, 5, None), ([], [0, 0], 1, 5, None),
        ([3, 0], [0, 1, 2], 2, 4, None), ([0, 2, 1, 4], [0, 2, 4], 1, 5, "do not rise from 0 to 4 in 1 steps"),
        ([0, 1], [0, 2], 2, 5, "do not rise"), ([0, 1], [1, 2], 1, 5, "do not rise"), ([0, 1, 2], [0, 2], 1, 5, "do not rise"),
        ([0, 1], [0, 3], 1, 5, "do not rise"), ([0, 1, 2], [0, 4, 3], 2, 5, "do not rise"),
        ([0, 5], [0, 2], 1, 5, r"outside 0\.\.4"), ([-1, 2], [0, 2], 1, 5, "outside"),
        ([1, 1], [0, 2], 1, 5, "do not ascend"), ([2, 1], [0, 2], 1, 5, "do not ascend"),
        ([0, 1, 3, 2], [0, 2, 4], 2, 5, "do not ascend"),
    ],
)  # fmt: skip
def test_indices_are_as_the_operator_needs_them(neurons, offsets, experts, union, message):
    given = torch.tensor(neurons, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32), experts, union
    if message is None:
        check_indices(*given)
    else:
        with pytest.raises(UserError, match=message):
            check_indices(*given)


def layer(top_k=1):
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(*size, generator=generator) for name, size in
             {"router": (3, 8), "router_bias": (3,), "w_up": (10, 8), "b_up": (10,), "w_down": (10, 8),
              "b_out": (3, 8)}.items()}  # fmt: skip
    neurons = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9], dtype=torch.int32)
    return RoutedFFN(Experts(**drawn, neurons=neurons, offsets=torch.tensor([0, 4, 6, 11]), activation="relu", top_k=top_k))


def by_hand(routed, x, chosen):
    """Token by token, expert by expert."""
    bounds, rows = routed.offsets.tolist(), []
    for token, experts in zip(x, chosen.tolist(), strict=True):
        total = torch.zeros(8)
        for e in experts:
            kept = routed.neurons[bounds[e] : bounds[e + 1]].long()
            total = total + (token @ routed.w_up[kept].T + routed.b_up[kept]).relu() @ routed.w_down[kept] + routed.b_out[e]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_and_the_gradient_of_its_router_by_hand(top_k, masked):
    routed, x = layer(top_k), torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    routed.masked = masked
    routed.router.requires_grad_()
    chosen = route(x.reshape(-1, 8), routed.router.detach(), routed.router_bias, top_k)
    assert torch.equal(routed.routes(x), chosen) and torch.equal(routed.routes(x[0]), chosen[:7])
    y = routed(x)
    expected = by_hand(routed, x.reshape(-1, 8), chosen).reshape(2, 7, 8)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad(y, routed.router, upstream)
    share = torch.softmax(x.reshape(-1, 8) @ routed.router.T + routed.router_bias, 1).gather(1, chosen).sum(1)
    weight = (upstream * expected).reshape(-1, 8).sum(1).detach()  # y is multiplied by share over itself
    (wanted,) = torch.autograd.grad((share / share.detach() * weight).sum(), routed.router)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_what_a_layer_says_of_itself():
    routed = layer(top_k=2)
    assert (routed.num_experts, routed.union, routed.widths, routed.max_width) == (3, 10, [4, 2, 5], 5)
    assert routed.stored_numbers() == 3 * 8 + 3 + 10 * 8 + 10 + 10 * 8 + 3 * 8
    assert routed.macs_per_token([0.5, 0.25, 0.25]) == 3 * 8 + 2 * 8 * (2 + 0.5 + 1.25) * 2
    parts = {name: getattr(routed, name).detach() for name in ("w_up", "b_up", "w_down")} | {"neurons": torch.arange(10)}
    for count, scored in ((2, 2 * 8), (1, 0)):
        own = {"router": routed.router[:count], "router_bias": routed.router_bias[:count], "b_out": routed.b_out[:count].detach()}
        bounds = [0, 4, 10] if count == 2 else [0, 10]
        few = RoutedFFN(Experts(**parts, **own, offsets=torch.tensor(bounds), activation="relu"))
        assert few.stored_numbers() == (2 * 8 + 2) * (count == 2) + 10 * 8 + 10 + 10 * 8 + count * 8
        assert few.top_k == 1 and few.macs_per_token([1 / count] * count) == scored + 2 * 8 * 10 / count
    assert "experts=3, union=10, widths=2..5, top_k=2" in repr(routed)
    assert not routed.router.requires_grad and routed.w_up.requires_grad


def test_what_every_routed_layer_must_say():
    assert RoutedLayer.__abstractmethods__ == {"num_experts", "routes", "macs_per_token", "widths", "union"}
    assert NeuronLayer.__abstractmethods__ == RoutedLayer.__abstractmethods__ | {"activations"}
    assert Experts.__dataclass_params__.frozen


def test_when_a_mask_pays():
    assert mask_pays("cpu", True, tokens=MASKED_TOKENS, share=0.1) and not mask_pays(
        "cpu", True, tokens=MASKED_TOKENS + 1, share=0.9
    )
    assert not mask_pays("cpu", False, tokens=1, share=1.0)
    assert mask_pays("cuda", False, tokens=10**6, share=0.5) and not mask_pays("cuda", True, tokens=1, share=0.49)


def test_training_takes_the_mask_where_it_pays(monkeypatch):
    """`tokens` an expert, and the groups' share of the masked multiplications; nothing of it without a gradient."""
    routed, asked = layer(top_k=2), []
    monkeypatch.setattr(
        "moee.layers.routed.mask_pays", lambda device, wanted, **facts: asked.append((device, wanted, facts)) or True
    )
    monkeypatch.setattr(RoutedFFN, "_masked", lambda self, x, chosen: x * 0 + 7)
    x = torch.randn(2, 6, 8)
    assert (routed(x) == 7).all() and asked == [("cpu", False, {"tokens": 4.0, "share": pytest.approx(2 * (11 / 3) / 10)})]
    with torch.no_grad():
        assert not (routed(x) == 7).any()
    for parameter in routed.parameters():
        parameter.requires_grad_(False)
    assert not (routed(x) == 7).any() and (routed(x.requires_grad_()) == 7).all() and len(asked) == 2


def test_maps_route_like_tokens():
    """[B, D, H, W] in, the same out; tokens in reading order."""
    routed, x = layer(), torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(3))
    maps = layer()
    maps.channels_first = True
    with torch.no_grad():
        assert torch.equal(maps.routes(x.movedim(-1, 1)), routed.routes(x))
        torch.testing.assert_close(maps(x.movedim(-1, 1)), routed(x).movedim(-1, 1))


def test_a_provided_layer_is_for_passes_without_gradients(monkeypatch):
    routed, x = layer(), torch.randn(4, 8)
    assert not routed._provided(x)
    monkeypatch.setattr("moee.layers.routed.ops.WHOLE", {"cpu"})
    assert not routed._provided(x), "its weights want gradients"
    for parameter in routed.parameters():
        parameter.requires_grad_(False)
    assert routed._provided(x) and not routed._provided(torch.randn(4, 8, requires_grad=True))
    routed.b_out.requires_grad_()
    assert not routed._provided(x)
    with torch.no_grad():
        assert routed._provided(x) and routed._provided(torch.randn(4, 8, requires_grad=True))


def test_routers_by_name_and_the_unit_of_loads():
    tokens, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    made = {"cosine": cosine_router(tokens, labels, 3), "euclidean": euclidean_router(tokens, labels, 3)}
    made |= {"hash": hash_router(tokens, 3, 0), "random": random_router(tokens, 3, 0)}
    for kind, (rows, bias) in made.items():
        assert all(torch.equal(a, b) for a, b in zip(make_router(kind, tokens, labels, 3), (rows, bias), strict=True))
    with pytest.raises(ValueError, match="unknown routing 'nearest'; expected cosine, euclidean, hash or random"):
        make_router("nearest", tokens, labels, 3)
    assert LOAD_UNIT == contract.LOAD_UNIT == 1_000_000
