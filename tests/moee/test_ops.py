"""The torch operator against a nested loop in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moee.layers import ops
from moee.layers.activations import ACTIVATIONS
from moee.layers.routed import Experts, RoutedFFN
from moee.layers.routing import route
from tests.moee.reference import random_problem, routed_ffn

STORES = ("w_up", "b_up", "w_down", "b_out", "neurons", "offsets", "activation")


def call(p, **changes):
    p = {**p, **changes}
    return ops.ffn(*p.values(), max_width=int(p["offsets"].diff().max()), load=[])


def routes_of(p):
    return route(p["x"].reshape(-1, p["x"].shape[-1]), p["router"], p["router_bias"], p["top_k"])


def call_experts(p, **changes):
    """The operator that is given its routes; those of p, whatever changes."""
    return ops.experts(changes.get("x", p["x"]), routes_of(p), *({**p, **changes}[n] for n in STORES))


CASES = {
    "one expert": dict(tokens=9, dim=16, union=24, widths=[20]),
    "one token": dict(tokens=1, dim=16, union=24, widths=[5, 20, 9]),
    "uneven widths": dict(tokens=40, dim=32, union=50, widths=[1, 50, 17, 8]),
    "an expert without neurons gives its bias": dict(tokens=30, dim=16, union=10, widths=[0, 10, 3]),
    "many experts, most of them idle": dict(tokens=7, dim=16, union=64, widths=[8] * 64),
    "odd sizes": dict(tokens=13, dim=19, union=23, widths=[7, 11]),
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_matches_nested_loops(case, top_k):
    top_k = min(top_k, len(CASES[case]["widths"]))
    p = random_problem(**CASES[case], top_k=top_k)
    expected, routes = routed_ffn(*p.values())
    assert route(p["x"], p["router"], p["router_bias"], top_k).tolist() == routes
    torch.testing.assert_close(call(p).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(call_experts(p), call(p))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    p = random_problem(20, 16, 32, [10, 20], activation=activation)
    torch.testing.assert_close(call(p).double(), routed_ffn(*p.values())[0], rtol=1e-4, atol=1e-5)


def test_all_tokens_to_one_expert():
    p = random_problem(25, 16, 32, [10, 20, 5])
    p["router_bias"] = torch.tensor([-1e3, 1e3, -1e3])
    assert set(route(p["x"], p["router"], p["router_bias"]).flatten().tolist()) == {1}
    torch.testing.assert_close(call(p).double(), routed_ffn(*p.values())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2])
def test_ties_go_to_the_lowest_expert(top_k):
    p = random_problem(12, 16, 32, [10, 20, 5], top_k=top_k)
    p["router"] = p["router"][:1].repeat(3, 1)
    p["router_bias"] = torch.zeros(3)
    assert route(p["x"], p["router"], p["router_bias"], top_k).tolist() == [list(range(top_k))] * 12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_tokens_go_to_expert_zero_and_leave_others_alone(value):
    p = random_problem(10, 16, 32, [10, 20, 5])
    clean = call(p)
    p["x"][3, 5] = value
    assert int(route(p["x"], p["router"], p["router_bias"])[3]) == 0
    dirty = call(p)
    others = [i for i in range(10) if i != 3]
    assert torch.equal(clean[others], dirty[others])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20), dim=st.integers(1, 12), union=st.integers(1, 20), seed=st.integers(0, 1000), data=st.data()
)
def test_any_shape(tokens, dim, union, seed, data):
    widths = data.draw(st.lists(st.integers(0, union), min_size=1, max_size=6).filter(lambda w: max(w) > 0))
    p = random_problem(tokens, dim, union, widths, seed, top_k=data.draw(st.integers(1, len(widths))))
    torch.testing.assert_close(call(p).double(), routed_ffn(*p.values())[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_by_finite_differences(top_k):
    p = random_problem(6, 5, 8, [3, 8, 4], top_k=top_k, activation="gelu_tanh")
    p = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in p.items()}
    names = ("x", "w_up", "b_up", "w_down", "b_out")
    inputs = [p[n].clone().requires_grad_() for n in names]
    # top_k > 1 sums in float32 by contract, so its differences are coarse
    loose = dict(eps=1e-2, atol=2e-2, rtol=2e-2) if top_k > 1 else {}
    assert torch.autograd.gradcheck(lambda *a: call_experts(p, **dict(zip(names, a, strict=True))), inputs, **loose)


def test_opcheck_covers_schema_fake_and_autograd():
    p = random_problem(10, 16, 32, [10, 20, 5])
    p["w_up"].requires_grad_()
    torch.library.opcheck(ops.experts, (p["x"], routes_of(p), *(p[n] for n in STORES)))
    torch.library.opcheck(ops.ffn, tuple(p.values()), dict(max_width=20, load=[]), test_utils=("test_schema", "test_faketensor"))


def layer_of(p):
    return RoutedFFN(Experts(**{k: v for k, v in p.items() if k != "x"}))


def test_compile_and_export_keep_the_operator():
    p = random_problem(10, 16, 32, [10, 20, 5])
    layer = layer_of(p).eval()
    x = p["x"].reshape(2, 5, 16)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any(n.target is torch.ops.moee.ffn.default for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_layouts_give_the_same_tokens():
    p = random_problem(24, 16, 32, [10, 20, 5])
    expected = layer_of(p)(p["x"])
    channels_last = layer_of(p)(p["x"].reshape(2, 3, 4, 16))
    first = RoutedFFN(Experts(**{k: v for k, v in p.items() if k != "x"}), channels_first=True)
    channels_first = first(p["x"].reshape(2, 3, 4, 16).movedim(-1, 1))
    assert torch.equal(channels_last.reshape(24, 16), expected)
    torch.testing.assert_close(channels_first.movedim(1, -1).reshape(24, 16), expected)


def test_a_trainable_router_gets_a_gradient_and_does_not_change_the_output():
    p = random_problem(24, 16, 32, [10, 20, 5])
    layer = layer_of(p)
    frozen = layer(p["x"]).detach()
    layer.router.requires_grad_()
    y = layer(p["x"])
    torch.testing.assert_close(y.detach(), frozen)
    y.square().sum().backward()
    assert layer.router.grad is not None and layer.router.grad.abs().sum() > 0


def test_wrong_shapes_are_named():
    p = random_problem(10, 16, 32, [10, 20, 5])
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 16\]"):
        call(p, x=torch.zeros(4, 15))
    with pytest.raises(ValueError, match="top_k in 1..3"):
        call(p, top_k=4)
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 16\], routes \[10, top_k\]"):
        ops.experts(p["x"], torch.zeros(9, 1, dtype=torch.int64), *(p[n] for n in STORES))


def test_operator_agrees_with_the_contract():
    from plugins import contract

    names = [a.name for a in torch.ops.moee.ffn.default._schema.arguments]
    attributes = [a.name for a in contract.ATTRIBUTES if not a.name.startswith("plugin_")]
    assert names == [*contract.INPUT_NAMES, *attributes]


@pytest.mark.gpu
def test_cuda_matches_cpu():
    p = random_problem(500, 64, 200, [50, 200, 7, 90])
    on_gpu = {k: v.cuda() if torch.is_tensor(v) else v for k, v in p.items()}
    torch.testing.assert_close(call(on_gpu).cpu(), call(p), rtol=1e-4, atol=1e-4)


def trained_both_ways(p, channels_first=False):
    """(output, gradients) of the grouped and of the masked computation, float64."""
    found = []
    for way in ("_grouped", "_masked"):
        layer = RoutedFFN(Experts(**{k: v for k, v in p.items() if k != "x"}), channels_first).double()
        x = p["x"].double().requires_grad_()
        y = getattr(layer, way)(x, layer.routes(x))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).double()
        (y * upstream).sum().backward()
        found.append((y, {"x": x.grad, **{name: q.grad for name, q in layer.named_parameters() if q.requires_grad}}))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_training_under_a_mask_is_the_same_function(case, top_k):
    p = random_problem(**CASES[case], top_k=min(top_k, len(CASES[case]["widths"])))
    (grouped, wanted), (masked, got) = trained_both_ways(p)
    # top_k > 1 sums in float32 by contract
    close = dict(rtol=1e-5, atol=1e-5) if top_k > 1 else dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masked, grouped, **close)
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_mask_hides_overflow_in_neurons_that_no_expert_keeps(activation):
    p = random_problem(12, 16, 32, [10, 20], activation=activation)
    dropped = sorted(set(range(32)) - set(p["neurons"].tolist()))
    assert dropped
    p["b_up"][dropped] = float("inf")
    layer = layer_of(p)
    chosen = layer.routes(p["x"])
    y = layer._masked(p["x"].requires_grad_(), chosen)
    y.sum().backward()
    torch.testing.assert_close(y, layer._grouped(p["x"], chosen), rtol=1e-4, atol=1e-5)
    assert all(q.grad is None or q.grad.isfinite().all() for q in layer.parameters()) and p["x"].grad.isfinite().all()


def test_the_mask_is_for_training_with_few_tokens_an_expert(monkeypatch):
    p = random_problem(24, 16, 32, [10, 20, 5])
    layer, masked = layer_of(p), []
    real = RoutedFFN._masked
    monkeypatch.setattr(RoutedFFN, "_masked", lambda self, *args: masked.append(1) or real(self, *args))
    layer.masked = False
    layer(p["x"])
    layer.masked = True
    with torch.no_grad():
        layer(p["x"])
    with torch.inference_mode():
        layer(p["x"])
    torch.jit.trace(layer, (p["x"],), check_trace=False)
    assert not masked
    layer(p["x"])
    assert len(masked) == 1
    many = p["x"].repeat(17, 1)  # 408 tokens, more than 128 for each of 3 experts
    layer(many)
    assert len(masked) == 1
