"""Near ties between experts: no error where either expert is right, an error where one is wrong or something else differs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from exporter.graph.export import export
from exporter.parity import check, check_parity
from exporter.parity.outputs import batch_error
from exporter.parity.taps import hooked
from exporter.parity.ties import dictated, excuse_ties
from exporter.parity.yardsticks import yardsticks
from exporter.verification import verify
from moee.artifacts.model import MoeeModel
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe
from tests.conftest import tiny_spec

LAYER = 1
SIZES = (1, 8)


@pytest.fixture
def tied(tiny_moee):
    """A model in whose second block experts 0 and 1 score the same on every token: the first of the two is taken."""
    model, _, data, config, _ = tiny_moee
    layer = list(routed_layers(model).values())[LAYER]
    layer.router.data[1] = layer.router.data[0]
    layer.router_bias[1] = layer.router_bias[0]
    return MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny"), data


def turn(monkeypatch, by=1e-12, damage=lambda model: None):
    """Make parity's float64 model put expert 1 ahead of expert 0, by default by less than float32 can tell."""
    real = check.yardsticks

    def turned(model, *args):
        model = copy.deepcopy(model)
        damage(model)
        yard = real(model, *args)
        list(routed_layers(yard.exact).values())[LAYER].router_bias[0] -= by
        return yard

    monkeypatch.setattr(check, "yardsticks", turned)


@pytest.fixture
def seen(tied):
    """Float64 model, images, its output, and output and taps of a run that takes expert 1 of the tie where float64 takes 0."""
    moee, data = tied
    exact = yardsticks(moee.model, "fp32").exact
    x = data.images[:4]
    with torch.inference_mode():
        with hooked(exact) as taps:
            reference = exact(x).numpy()
            routes = [tap.route.clone() for tap in taps.values()]
        token = int((routes[LAYER][:, 0] == 0).nonzero()[0])
        routes[LAYER][token] = 1
        with dictated(exact, routes), hooked(exact) as taps:
            got = exact(x).numpy()
            theirs = {name: replace(tap, route=route) for (name, tap), route in zip(taps.items(), routes, strict=True)}
    error = batch_error(4, got, reference, 1e-7, 1e-7, dtype=torch.float32)
    assert not error.passed, "the other expert changes the output"
    return exact, x, reference, got, theirs, error


@torch.inference_mode()
def test_an_image_with_a_tie_is_held_against_the_same_experts(seen):
    exact, x, reference, got, taps, error = seen
    excused = excuse_ties(error, got, reference, exact, x, taps=taps)
    assert excused.passed and excused.tie_images == 1
    assert excused.tolerance_abs == error.tolerance_abs and excused.torch_max_abs_error == error.torch_max_abs_error


@torch.inference_mode()
def test_a_tie_excuses_nothing_else(seen):
    """Damage in the image with the tie, and in another one."""
    exact, x, reference, got, taps, error = seen
    tie = int(np.abs(got - reference).max(1).argmax())
    for image in (tie, (tie + 1) % len(x)):
        damaged = got.copy()
        damaged[image, 0] += 0.01
        assert not excuse_ties(error, damaged, reference, exact, x, taps=taps).passed


@torch.inference_mode()
def test_a_wrong_expert_is_no_tie(seen):
    exact, x, reference, got, taps, error = seen
    name = list(taps)[LAYER]
    scores = list(routed_layers(exact).values())[LAYER]
    worst = (taps[name].tokens[0] @ scores.router.T + scores.router_bias).argmin()
    route = taps[name].route.clone()
    route[0] = worst
    assert excuse_ties(error, got, reference, exact, x, taps={**taps, name: replace(taps[name], route=route)}) is error


def test_verify_passes_where_float64_breaks_ties_otherwise(tied, tmp_path, monkeypatch):
    """ONNX Runtime and float64 take different experts for every token of the tie; all else is equal."""
    moee, data = tied
    export(moee, tmp_path / "export")
    assert check_parity(tmp_path / "export", moee, data, sizes=SIZES).only_ties is False, "no flips, no ties"
    turn(monkeypatch)
    result = verify(tmp_path / "export", moee, data, sizes=SIZES)
    layer = result.parity.layers[LAYER]
    assert layer.flips > 0 and layer.agreement < 0.9999 and layer.flip_margin_max < 1e-6 and layer.wrong_routes == 0
    assert result.parity.passed and result.parity.only_ties and result.parity.first_deviation is None
    assert result.parity.batches[1].tie_images > 0 and result.parity.to_json()["only_ties"] is True
    assert any("near ties" in case.detail for case in result.cases() if case.group == "routes")
    assert not [case for case in result.cases() if case.failure]
    assert not check_parity(tmp_path / "export", moee, data, sizes=SIZES, min_route_agreement=0.9999).passed, "who asks is told"


def test_ties_do_not_hide_damage(tied, tmp_path, monkeypatch):
    moee, data = tied
    export(moee, tmp_path / "export")
    turn(monkeypatch, damage=lambda model: list(routed_layers(model).values())[2].w_down.data.mul_(1.01))
    result = check_parity(tmp_path / "export", moee, data, sizes=SIZES)
    assert not result.passed and result.first_deviation.layer == "blocks.2.mlp"


def test_a_gap_that_float32_can_tell_is_no_tie(tied, tmp_path, monkeypatch):
    moee, data = tied
    export(moee, tmp_path / "export")
    turn(monkeypatch, by=1e-2)
    result = check_parity(tmp_path / "export", moee, data, sizes=SIZES)
    assert not result.passed and not result.only_ties and result.layers[LAYER].wrong_routes > 0
