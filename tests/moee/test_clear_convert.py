"""CLEAR-MoE on a tiny model: exactness, budgets, what stays untouched, bad input."""

import copy

import pytest
import torch

from moee.config import validated
from moee.data.image_set import TensorSet
from moee.errors import UserError
from moee.layers.clear import ClearFFN
from moee.layers.routed import routed_layers
from moee.measure.evaluation import run
from moee.measure.metrics import dense_macs, model_cost
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.recipe import method_options
from tests.conftest import tiny_images


def converted(model, data=None, **kwargs):
    data = data or tiny_images()
    config = ClearOptions(**{"calibration_images": 40, "experts": 3, "score": False, **kwargs})
    changed = copy.deepcopy(model)
    return changed, data, convert(changed, data, config)


@pytest.mark.parametrize("router", ["linear", "mlp", "centroid", "random"])
def test_full_rank_reproduces_the_dense_model(tiny_model, router):
    for metric in ("output", "plain"):
        model, data, reports = converted(tiny_model, rank=32, residual_rank=0, router=router, metric=metric)
        assert all(r.status == "routed" for r in reports)
        with torch.no_grad():
            torch.testing.assert_close(model(data.images), tiny_model(data.images), rtol=1e-5, atol=1e-5)


def test_shared_and_residual_rank_make_up_full_rank_too(tiny_model):
    model, data, _ = converted(tiny_model, rank=24, residual_rank=8)
    with torch.no_grad():
        torch.testing.assert_close(model(data.images), tiny_model(data.images), rtol=1e-4, atol=1e-4)


def test_more_rank_is_closer(tiny_model):
    errors = []
    for rank in (4, 12, 24):
        model, data, _ = converted(tiny_model, rank=rank, residual_rank=0)
        with torch.no_grad():
            errors.append(float((model(data.images) - tiny_model(data.images)).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_refit_and_experts_help(tiny_model):
    def error(**kwargs):
        model, data, _ = converted(tiny_model, **{"rank": 8, "residual_rank": 4, "router": "centroid", **kwargs})
        with torch.no_grad():
            return float((model(data.images) - tiny_model(data.images)).norm())

    best = error()
    assert best < error(compensation="mean")
    assert best < error(experts=1)
    assert best < error(router="random")


def test_weights_outside_the_selected_layers_keep_their_bits(tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    model, _, reports = converted(tiny_model, rank=8, residual_rank=2, layers=2, score=True)
    replaced = [r.name for r in reports if r.status == "routed"]
    assert len(replaced) == 2 and replaced == list(routed_layers(model))
    after = model.state_dict()
    for name, tensor in before.items():
        if not name.startswith(tuple(f"{r}." for r in replaced)):
            assert torch.equal(tensor, after[name]), name
    for name, tensor in before.items():
        assert torch.equal(tensor, tiny_model.state_dict()[name]), "the dense original was changed"


def test_scores_select_the_best_layers(tiny_model):
    _, _, reports = converted(tiny_model, rank=8, residual_rank=2, layers=1, score=True)
    scores = {r.name: r.scores.score for r in reports}
    chosen = [r.name for r in reports if r.status == "routed"]
    assert chosen == [max(scores, key=scores.get)]
    assert all(r.status == "dense: not selected" for r in reports if r.name not in chosen)
    for r in reports:
        assert 0 <= r.scores.score <= 1 and r.scores.sensitivity > 0 and r.scores.rank == 8


@pytest.mark.parametrize("target", [0.8, 0.6])
def test_target_macs_is_met_and_used(tiny_model, target):
    model, data, _ = converted(tiny_model, target_macs=target)
    cost = model_cost(tiny_model, model, run(model, data).shares, (3, 32, 32))
    share = cost["moee"]["macs"] / cost["dense"]["macs"]
    assert share <= target + 1e-6
    assert share > target - 0.06, "the budget is not used"
    assert cost["dense"]["macs"] == dense_macs(tiny_model, (3, 32, 32))


def test_rank_with_target_macs_selects_layers(tiny_model):
    model, data, reports = converted(tiny_model, rank=6, residual_rank=2, target_macs=0.85, score=True)
    names = [r.name for r in reports if r.status == "routed"]
    assert 0 < len(names) < 3
    cost = model_cost(tiny_model, model, run(model, data).shares, (3, 32, 32))
    assert cost["moee"]["macs"] <= 0.85 * cost["dense"]["macs"]


def test_energy_chooses_ranks_layer_by_layer(tiny_model):
    low = converted(tiny_model, energy=0.7)[2]
    high = converted(tiny_model, energy=0.9)[2]
    pairs = [(a.ranks, b.ranks) for a, b in zip(low, high, strict=True) if a.ranks and b.ranks]
    assert pairs and all(sum(a) <= sum(b) for a, b in pairs)


def test_same_seed_gives_the_same_bits(tiny_model):
    first, second = (converted(tiny_model, rank=8, residual_rank=2)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_are_what_evaluation_expects(tiny_model):
    model, data, reports = converted(tiny_model, rank=8, residual_rank=2)
    outputs = run(model, data)
    assert reports
    for report in reports:
        layer = routed_layers(model)[report.name]
        assert isinstance(layer, ClearFFN)
        assert sum(outputs.shares[report.name]) == pytest.approx(1) and len(outputs.shares[report.name]) == 3
        assert layer.macs_per_token(outputs.shares[report.name]) == 3 * 32 + 2 * 10 * (32 + 128)
        assert layer.stored_numbers() == 3 * 32 + 3 + 2 * (8 + 3 * 2) * (32 + 128) + 3 * (32 + 128)


BAD = {
    "rank above full rank": (dict(rank=30, residual_rank=8), "full rank 32; shared rank 30 plus residual rank 8 is above it"),
    "too many layers": (dict(rank=8, residual_rank=0, layers=9, score=True), "--layers 9 is more than the 3 MLPs"),
    "unreachable budget": (dict(target_macs=0.2), "the smallest ranks need"),
    "unreachable budget by hand": (
        dict(rank=24, residual_rank=0, target_macs=0.3, score=True), "lower --rank or raise the target",
    ),
    "nothing gets cheaper": (dict(energy=1.0), "no layer gets cheaper"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(tiny_model, case):
    kwargs, message = BAD[case]
    before = copy.deepcopy(tiny_model.state_dict())
    config = ClearOptions(**{"calibration_images": 40, "experts": 3, "score": False, **kwargs})
    with pytest.raises(UserError, match=message):
        convert(tiny_model, tiny_images(), config)
    after = tiny_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_errors_of_unlike_units_divide_no_budget():
    with pytest.raises(UserError, match="--metric plain leaves them in unlike units; use --metric output"):
        method_options(method="clear-moe", metric="plain", target_macs=0.7)
    assert method_options(method="clear-moe", metric="plain", target_macs=0.7, rank=8, residual_rank=0).rank == 8


def test_more_experts_than_clusters(tiny_model):
    one = tiny_images().images[:1]
    same = TensorSet("same", one.repeat(20, 1, 1, 1), [0] * 20, 1)  # 17 distinct tokens in all
    with pytest.raises(UserError, match="k-means found 17 distinct clusters for 18 experts"):
        converted(tiny_model, same, rank=8, residual_rank=0, experts=18, calibration_images=20)


def test_singular_layer(tiny_model):
    with torch.no_grad():
        tiny_model.blocks[1].mlp.fc1.weight[4:] = 0
    with pytest.raises(UserError, match=r"`blocks.1.mlp` is singular: its map has \d independent directions"):
        converted(tiny_model, rank=16, residual_rank=0)


def test_calibration_smaller_than_the_experts(tiny_model):
    with pytest.raises(UserError, match="--calibration-images 4 is smaller than the 8 experts"):
        validated(ClearOptions, {"experts": 8, "calibration_images": 4})
    with pytest.raises(UserError, match="5 calibration images are fewer than the 8 experts"):
        converted(tiny_model, tiny_images(5), rank=8, residual_rank=0, experts=8)


@pytest.mark.parametrize("values", [
    dict(rank=8), dict(rank=8, residual_rank=0, energy=0.9), dict(residual_rank=4), dict(energy=0.9, target_macs=0.5),
    dict(rank=8, residual_rank=0, target_macs=0.5, layers=2), dict(layers=2, score=False), dict(experts=0),
])  # fmt: skip
def test_contradictory_configurations(values):
    with pytest.raises(UserError):
        validated(ClearOptions, values)
