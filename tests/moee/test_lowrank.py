"""Low-rank maps: the layer against nested loops, the decomposition against SVD-LLM's, budgets, save and load, what is refused."""

import copy
import math

import pytest
import torch

from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.errors import OutOfReach, UserError
from moee.layers.low_rank import LowRankFFN, LowRankWeights, weight_shapes
from moee.layers.routed import routed_layers
from moee.measure.metrics import model_cost
from moee.methods.clear_moe.build import build_layer
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.lowrank.convert import _with_rank, low_rank_of, rank_for
from moee.methods.recipe import Recipe, method_options
from moee.mlps.find import find_ffns
from tests.conftest import extract, tiny_images, tiny_spec


def layer(dim=6, hidden=9, ranks=(3, 2), **kwargs):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(dim, hidden, ranks).items()}
    return LowRankFFN(LowRankWeights(**weights), "gelu", **kwargs).eval()


@torch.no_grad()
def test_the_layer_is_what_nested_loops_compute():
    made = layer()
    x = torch.randn(2, 3, 6)
    up_in, up_out, up_bias, down_in, down_out, down_bias = (p.tolist() for p in made.parameters())
    for b in range(2):
        for t in range(3):
            token = x[b, t].tolist()
            first = [sum(row[i] * token[i] for i in range(6)) for row in up_in]
            before = [up_bias[j] + sum(first[r] * up_out[r][j] for r in range(3)) for j in range(9)]
            hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in before]
            second = [sum(row[j] * hidden[j] for j in range(9)) for row in down_in]
            y = [down_bias[i] + sum(second[r] * down_out[r][i] for r in range(2)) for i in range(6)]
            torch.testing.assert_close(made(x)[b, t], torch.tensor(y), rtol=1e-4, atol=1e-5)
    assert made.macs_per_token() == (3 + 2) * (6 + 9) and made.stored_numbers() == 75 + 9 + 6
    pixels = torch.randn(2, 6, 3, 4)
    mixed = layer(channels_first=True)
    torch.testing.assert_close(mixed(pixels), made(pixels.movedim(1, -1)).movedim(-1, 1))
    assert mixed.routes(pixels).shape == (24, 1) and not mixed.routes(pixels).any()


@torch.no_grad()
def test_maps_are_the_truncated_svd_whitened_by_the_cholesky_factor(tiny_model):
    """SVD-LLM's construction, on centred tokens since a bias holds the mean; first the up map, then the down map behind it."""
    (ffn, *_), rank = find_ffns(tiny_model).ffns, 7
    tokens = torch.randn(500, ffn.dim) @ torch.randn(ffn.dim, ffn.dim) + 1
    options = ClearOptions(experts=1, residual_rank=0, rank=rank, metric="plain", compensation="mean")
    made = low_rank_of(build_layer(_with_rank(ffn, rank), tokens, options).layer)
    hidden = ffn.activations(tokens)
    for weight, bias, inputs, inward, outward, shift in (
        (ffn.w_up, ffn.b_up, tokens, made.up_in, made.up_out, made.up_bias),
        (ffn.w_down, ffn.b_down, torch.nn.functional.gelu(tokens @ made.up_in.T @ made.up_out + made.up_bias), *[
            getattr(made, f"down_{part}") for part in ("in", "out", "bias")
        ]),
    ):  # fmt: skip
        centred = (inputs - inputs.mean(0)).double()
        noise = 1e-9 * torch.eye(inputs.shape[1], dtype=torch.float64)  # hidden activations of a cut map are nearly singular
        whitener = torch.linalg.cholesky(centred.T @ centred + noise * centred.square().sum())
        u, s, v = torch.linalg.svd(weight.double() @ whitener, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank] @ torch.linalg.inv(whitener)
        missed = (centred @ (weight.double() - best).T).square().sum()
        torch.testing.assert_close(missed, s[rank:].square().sum(), rtol=1e-3, atol=1e-6)
        found = inputs @ inward.T @ outward + shift
        wanted = (hidden if weight is ffn.w_down else inputs) @ weight.T + bias
        assert found.mean(0) == pytest.approx(wanted.mean(0).numpy(), abs=1e-3), "no mean is lost"
        spread = (found - found.mean(0)) - centred.float() @ weight.T
        assert float(spread.square().sum()) == pytest.approx(float(missed), rel=1e-2), "no map of this rank misses less"


def test_cost_is_what_was_asked_and_an_artifact_is_the_same_again(tiny_model, tmp_path):
    dense, data = copy.deepcopy(tiny_model), tiny_images(48)
    reports = extract(tiny_model, data, options := method_options("lowrank", target_macs=0.7))
    layers = routed_layers(tiny_model)
    cost = model_cost(dense, tiny_model, dict.fromkeys(layers, [1.0]), (3, 32, 32))
    assert 0.66 < cost["moee"]["macs"] / cost["dense"]["macs"] <= 0.7
    assert [(r.status, r.low_ranks, r.union) for r in reports] == [("routed", m.ranks, m.union) for m in layers.values()]
    moee = MoeeModel(tiny_model.eval(), tiny_spec(), Recipe.of(options), "tiny")
    checkpoint.save(moee, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded.model(data.images), tiny_model(data.images))
    assert [m.ranks for m in routed_layers(loaded.model).values()] == [m.ranks for m in layers.values()]


def test_plain_errors_give_every_mlp_one_share(tiny_model):
    dense, data = copy.deepcopy(tiny_model), tiny_images(32)
    extract(tiny_model, data, method_options("lowrank", target_macs=0.7, metric="plain"))
    layers = routed_layers(tiny_model)
    cost = model_cost(dense, tiny_model, dict.fromkeys(layers, [1.0]), (3, 32, 32))
    assert len({m.ranks for m in layers.values()}) == 1 and 0.66 < cost["moee"]["macs"] / cost["dense"]["macs"] <= 0.7


def test_more_rank_misses_less_and_no_rank_is_refused(tiny_model):
    data, missed = tiny_images(32), []
    (ffn, *_) = find_ffns(tiny_model).ffns
    assert rank_for(ffn, 0.5) == 12 and 2 * 12 * (ffn.dim + ffn.hidden) <= 0.5 * ffn.macs
    for keep in (0.2, 0.5, 0.9):
        extract(model := copy.deepcopy(tiny_model), data, method_options("lowrank", keep=keep))
        with torch.no_grad():
            missed.append(float((model(data.images) - tiny_model(data.images)).norm()))
    assert missed[0] > missed[1] > missed[2] > 0
    with pytest.raises(OutOfReach, match=r"--keep 0.01 leaves `blocks.0.mlp` no rank; give a larger share, or leave it dense"):
        extract(copy.deepcopy(tiny_model), data, method_options("lowrank", keep=0.01))
    with pytest.raises(UserError, match=r"up_out should have shape \[3, 9\], came \[2, 9\]"):
        parts = {name: torch.zeros(shape) for name, shape in weight_shapes(6, 9, (3, 2)).items()}
        LowRankFFN(LowRankWeights(**{**parts, "up_out": torch.zeros(2, 9)}), "gelu")
