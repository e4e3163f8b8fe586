"""HEAPr's importance: against nested loops over tokens, where it is the others', and through extraction."""

import pytest
import torch

from moee.calibrate.sensitivity import RoutedStats, _Accumulator
from moee.layers.routed import routed_layers
from moee.layers.routing import route
from moee.methods.recipe import method_options
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images


def summed(ffn, x, gradients, mean, factored):
    """Errors [2, H] of two experts of `ffn` on tokens x and their gradients, in two batches."""
    router = torch.randn(2, ffn.dim, generator=torch.Generator().manual_seed(1))
    layer = _Accumulator(ffn, RoutedStats(router, torch.zeros(2), mean), 1, factored)
    for some, upstream in zip(x.split(5), gradients.split(5), strict=True):
        layer.see(some[None])
        layer.add(upstream[None], 0)
    layer.put(layer.take())
    return layer.error(0), route(x, router, torch.zeros(2))[:, 0]


@torch.no_grad()
def test_it_is_the_quadratic_form_of_the_gradients_second_moment(tiny_model):
    ffn = find_ffns(tiny_model).ffns[0]
    x, gradients, zero = torch.randn(9, ffn.dim), torch.randn(9, ffn.dim), torch.zeros(2, ffn.hidden).double()
    found, experts = summed(ffn, x, gradients, zero, factored=True)
    a = ffn.activations(x).double()
    for e in range(2):
        tokens = [t for t in range(9) if int(experts[t]) == e]
        assert len(tokens) > 1
        second = sum(torch.outer(gradients[t].double(), gradients[t].double()) for t in tokens) / len(tokens)
        for j in (0, 3, ffn.hidden - 1):
            w = ffn.w_down[:, j].double()
            wanted = sum(float((a[t, j] * w) @ second @ (a[t, j] * w)) for t in tokens)
            assert float(found[e, j]) == pytest.approx(wanted, rel=1e-4)
    taylor, _ = summed(ffn, x, gradients, zero, factored=False)
    assert not torch.allclose(taylor, found, rtol=0.05), "a neuron's activation and its gradient vary together"


@torch.no_grad()
def test_where_it_is_taylor_and_sensitivity(tiny_model):
    ffn = find_ffns(tiny_model).ffns[0]
    x, zero = torch.randn(9, ffn.dim), torch.zeros(2, ffn.hidden).double()
    same_gradient = torch.randn(1, ffn.dim).expand(9, -1)
    atomic, experts = summed(ffn, x, same_gradient, zero, factored=True)
    taylor, _ = summed(ffn, x, same_gradient, zero, factored=False)
    torch.testing.assert_close(atomic, taylor, rtol=1e-4, atol=1e-9)
    same_token = torch.randn(1, ffn.dim).expand(9, -1)
    pair = [summed(ffn, same_token, torch.randn(9, ffn.dim, generator=torch.Generator().manual_seed(2)), zero, f) for f in (0, 1)]
    torch.testing.assert_close(pair[0][0], pair[1][0], rtol=1e-4, atol=1e-9)
    mean = torch.stack([ffn.activations(x[experts == e]).mean(0) for e in range(2)]).double()
    sensitivity, _ = summed(ffn, x, same_gradient, mean, factored=False)
    assert bool((sensitivity <= taylor * (1 + 1e-4)).all()) and float(sensitivity.sum()) < 0.9 * float(taylor.sum())


def test_it_spends_the_budget_of_a_whole_model(tiny_model):
    options = method_options("static", criterion="atomic", allocation="model", target_macs=0.6, compensation="mean")
    extract(tiny_model, tiny_images(), options)
    widths = [layer.union for layer in routed_layers(tiny_model).values()]
    assert len(widths) == 3 and len(set(widths)) > 1
