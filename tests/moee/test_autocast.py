"""Training under autocast: routed once, in float32, from the tokens as they come, and the backward pass has the same experts."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moee.layers import ops
from moee.layers.activations import activate
from moee.layers.routed import Experts, RoutedFFN
from moee.layers.routing import exact_arithmetic, scores
from tests.exporter.test_clear_export import random_layer
from tests.moee.reference import random_problem

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS = 600
NAMES = ("w_up", "b_up", "w_down", "b_out")


def many_experts(top_k=1):
    """32 experts whose scores lie close together, as those of trained models do, and tokens."""
    p = random_problem(TOKENS, 32, 64, [16] * 32, top_k=top_k)
    p["router_bias"] *= 0.1
    layer = RoutedFFN(Experts(**{k: v for k, v in p.items() if k != "x"}))
    return layer, p["x"] + 4 * torch.randn(32, generator=torch.Generator().manual_seed(1))


def watched(monkeypatch):
    """Routes that the forward and the backward pass of `moee::experts` are given, in order."""
    found = []
    real = ops._groups
    monkeypatch.setattr(ops, "_groups", lambda chosen, experts: found.append(chosen.clone()) or real(chosen, experts))
    return found


def reference_gradients(layer, x, routes, upstream, dtype):
    """Autograd's gradients in float64 of the layer with these routes; weights and tokens rounded to `dtype`."""
    stores = {n: getattr(layer, n).detach().to(dtype).double().requires_grad_() for n in NAMES}
    tokens = x.detach().to(dtype).double().requires_grad_()
    bounds = layer.offsets.tolist()
    y = 0
    for choice in routes.unbind(1):
        rows = []
        for token, e in zip(tokens, choice.tolist(), strict=True):
            kept = layer.neurons[bounds[e] : bounds[e + 1]].long()
            hidden = activate(stores["w_up"][kept] @ token + stores["b_up"][kept], layer.activation)
            rows.append(hidden @ stores["w_down"][kept] + stores["b_out"][e])
        y = y + torch.stack(rows)
    y.backward(upstream.double())
    return {"x": tokens.grad, **{n: store.grad for n, store in stores.items()}}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", TYPES)
def test_routes_and_gradients_under_autocast(monkeypatch, name, top_k, masked):
    dtype = TYPES[name]
    layer, x = many_experts(top_k)
    layer.masked = masked
    expected = layer.routes(x)
    rounded = layer.routes(x.to(dtype))
    assert (expected != rounded).any(), "the tokens must be such that rounding them would change routes"
    passes, x = watched(monkeypatch), x.requires_grad_()
    routed = []
    monkeypatch.setattr(RoutedFFN, "_masked", _noting(RoutedFFN._masked, routed))
    monkeypatch.setattr(RoutedFFN, "_grouped", _noting(RoutedFFN._grouped, routed))
    upstream = torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        y.backward(upstream.to(y.dtype))  # inside: the engine must not round what the operator computes
    assert len(routed) == 1 and len(passes) == (0 if masked else 2)
    assert all(torch.equal(chosen, expected) for chosen in (*routed, *passes))
    got = {"x": x.grad, **{n: getattr(layer, n).grad for n in NAMES}}
    wanted = reference_gradients(layer, x, expected, upstream, dtype)
    for part, gradient in wanted.items():
        error = (got[part].double() - gradient).norm() / gradient.norm()
        assert error < 2 * torch.finfo(dtype).eps, (part, float(error))


def _noting(real, seen):
    return lambda self, x, chosen: seen.append(chosen.clone()) or real(self, x, chosen)


@pytest.mark.parametrize("name", TYPES)
def test_checkpointing_routes_again_the_same_way(monkeypatch, name):
    layer, x = many_experts()
    passes = watched(monkeypatch)
    with torch.autocast("cpu", TYPES[name]):
        y = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    y.float().square().sum().backward()
    assert len(passes) == 3 and all(torch.equal(chosen, layer.routes(x)) for chosen in passes)


@pytest.mark.parametrize("name", TYPES)
def test_compiled_training_under_autocast(name):
    layer, x = many_experts()
    found = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        tokens = x.clone().requires_grad_()
        with torch.autocast("cpu", TYPES[name]):
            y = run(tokens)
        y.float().square().sum().backward()
        found.append((y.detach(), tokens.grad, *(getattr(layer, n).grad.clone() for n in NAMES)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("name", TYPES)
def test_nothing_is_rounded_within_the_operators(name):
    """What is given in float32 is computed in float32, whatever autocast is on; exported graphs have the same contract."""
    layer, x = many_experts()
    stores = [getattr(layer, n) for n in (*NAMES, "neurons", "offsets")]
    router, rest = (layer.router, layer.router_bias), (layer.activation, layer.top_k, layer.max_width, list(layer.load))
    chosen = layer.routes(x)

    def results():
        return ops.experts(x, chosen, *stores, layer.activation), ops.ffn(x, *router, *stores, *rest), scores(x, *router)

    plain = results()
    with torch.autocast("cpu", TYPES[name]):
        found = results()
        assert (x @ layer.router.T).dtype == TYPES[name]
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.mark.parametrize("width", [0, 7])
@pytest.mark.parametrize("name", TYPES)
def test_clear_moe_routes_in_float32_too(name, width):
    layer = random_layer(experts=32, ranks=(6, 1, 6, 1), width=width)
    x = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(3)) + 2
    expected, gates = layer.routes(x), layer.parts().router.scores(x)
    with torch.autocast("cpu", TYPES[name]):
        assert torch.equal(layer.routes(x), expected) and torch.equal(layer.parts().router.scores(x), gates)


@pytest.mark.parametrize("name", TYPES)
def test_a_trained_router_weighs_the_experts_that_were_chosen(name):
    layer, x = many_experts(top_k=2)
    layer.router.requires_grad_()
    chosen = layer.routes(x)
    found = []
    for context in (exact_arithmetic(x.device), torch.autocast("cpu", TYPES[name])):
        layer.zero_grad()
        with context:
            ones = layer._straight_through(x, chosen)
        ones.sum().backward()
        found.append(layer.router.grad.clone())
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])
