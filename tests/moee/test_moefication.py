"""MoEfication: balanced disjoint experts, top-k, and exactness when nothing is dropped."""

import copy

import pytest
import torch

from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods.moefication.split import balanced_groups
from moee.methods.recipe import Recipe, method_options
from tests.conftest import extract, tiny_images


def config(**changes):
    return method_options("moefication", **{"experts": 8, "top_k": 4, **changes})


@pytest.mark.parametrize(("count", "groups"), [(12, 4), (13, 4), (9, 9), (7, 1)])
def test_groups_are_balanced(count, groups):
    found = balanced_groups(torch.randn(count, 5, generator=torch.Generator().manual_seed(0)), groups, seed=0)
    sizes = torch.bincount(found, minlength=groups)
    assert sizes.max() - sizes.min() <= 1 and sizes.sum() == count


def test_clear_clusters_are_found():
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(5, 0) * 10
    rows += torch.randn(20, 6, generator=torch.Generator().manual_seed(1)) * 0.01
    found = balanced_groups(rows, 4, seed=0).reshape(4, 5)
    assert (found == found[:, :1]).all() and len(found[:, 0].unique()) == 4


@pytest.mark.parametrize("split", ["weights", "coactivation"])
@pytest.mark.parametrize("selector", ["centre", "router"])
@pytest.mark.parametrize("compensation", ["none", "mean"])
def test_all_experts_reproduce_the_dense_model(tiny_model, split, selector, compensation):
    dense, data = copy.deepcopy(tiny_model), tiny_images()
    extract(tiny_model, data, config(top_k=8, split=split, selector=selector, compensation=compensation))
    assert routed_layers(tiny_model)
    for layer in routed_layers(tiny_model).values():
        assert sorted(layer.neurons.tolist()) == list(range(128)) and set(layer.widths) == {16}
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(data.images), dense(data.images), rtol=1e-3, atol=1e-4)


def test_mean_compensation_and_more_experts_help(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images(64)
    errors = {}
    for top_k, compensation in [(2, "none"), (2, "mean"), (6, "mean")]:
        model = copy.deepcopy(dense)
        extract(model, data, config(top_k=top_k, compensation=compensation))
        with torch.no_grad():
            errors[top_k, compensation] = float((model(data.images) - dense(data.images)).square().mean())
    assert errors[6, "mean"] < errors[2, "mean"] < errors[2, "none"]


def test_contradictions_are_refused(tiny_model):
    for bad, said in ((dict(top_k=9), "within --experts"), (dict(compensation="refit"), "expected one of none, mean")):
        with pytest.raises(UserError, match=said):
            config(**bad)
    with pytest.raises(UserError, match="--experts is needed"):
        method_options("moefication")
    with pytest.raises(UserError, match="--top-k is for method moefication"):
        method_options(top_k=2)
    with pytest.raises(UserError, match="cannot split 128 neurons into 500"):
        extract(tiny_model, tiny_images(), config(experts=500))


@pytest.mark.parametrize(("split", "selector", "top_k"), [("weights", "centre", 4), ("coactivation", "router", 3)])
def test_parity_of_the_exported_graph(tiny_model, tmp_path, split, selector, top_k):
    from exporter.graph.export import export
    from exporter.parity import check_parity
    from moee.artifacts.model import MoeeModel
    from tests.conftest import tiny_spec

    data = tiny_images()
    chosen = config(split=split, selector=selector, top_k=top_k)
    extract(tiny_model, data, chosen)
    assert {layer.top_k for layer in routed_layers(tiny_model).values()} == {top_k}
    moee = MoeeModel(tiny_model.eval(), tiny_spec(), Recipe.of(chosen), "tiny")
    export(moee, tmp_path / "export")
    result = check_parity(tmp_path / "export", moee, data)
    assert result and min(result.route_agreement.values()) == 1.0
    assert result.max_abs_error <= 1e-4
