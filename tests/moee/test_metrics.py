"""MACs and parameters against the paper's tables, and against a count by hand."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moee.layers.routed import routed_layers
from moee.measure.metrics import dense_macs, dense_params, model_cost
from moee.methods.recipe import method_options
from moee.models.model import ModelSpec, load_model
from tests.conftest import extract, tiny_images


@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    [("deit_tiny", 1.26, 5.72), ("deit_small", 4.61, 22.05), ("deit_base", 17.58, 86.57)],
)
def test_dense_figures_equal_the_papers_table_1(name, gmacs, mparams):
    timm_name = f"{name}_patch16_224"
    with torch.device("meta"):
        model = load_model(ModelSpec(name=timm_name, timm_name=timm_name, random_seed=0))
    assert dense_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert dense_params(model) / 1e6 == pytest.approx(mparams, rel=0.01)


def test_routed_cost_by_hand(tiny_moee):
    model, dense, _, _, _ = tiny_moee
    layers = routed_layers(model)
    shares = {name: [0.4, 0.3, 0.2, 0.1] for name in layers}
    cost = model_cost(dense, model, shares, (3, 32, 32))
    macs, params = cost["dense"]["macs"], cost["dense"]["params"]
    for layer in layers.values():
        width = sum(w * s for w, s in zip(layer.widths, (0.4, 0.3, 0.2, 0.1), strict=True))
        macs += 17 * (4 * 32 + 2 * 32 * width - 2 * 32 * 128)  # 17 tokens, 4 experts, D 32, H 128
        params += layer.union * (2 * 32 + 1) + 4 * (32 + 32 + 1) - (2 * 32 * 128 + 128 + 32)
    assert cost["moee"] == {"macs": round(macs), "params": params}


def test_one_expert_has_no_router_to_pay_for(tiny_model):
    """As its exported graph, which is MatMul, activation, MatMul."""
    dense = copy.deepcopy(tiny_model)
    extract(tiny_model, tiny_images(), method_options("static", keep=0.8, compensation="mean"))
    layers = routed_layers(tiny_model)
    cost = model_cost(dense, tiny_model, {name: [1.0] for name in layers}, (3, 32, 32))
    fewer = sum(17 * 2 * 32 * (128 - layer.union) for layer in layers.values())  # 17 tokens, D 32, H 128
    assert len(layers) == 3 and fewer > 0 and cost["moee"]["macs"] == cost["dense"]["macs"] - fewer


def test_dense_macs_do_not_depend_on_fused_attention(tiny_model):
    unfused = dense_macs(tiny_model, (3, 32, 32))
    for block in tiny_model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_model(torch.zeros(1, 3, 32, 32))
    assert unfused == counter.get_total_flops() // 2


def test_bad_input_is_quoted_without_control_characters():
    from moee.errors import NothingRouted, UserError

    assert str(UserError("data '\x1b[2J\x00': expected\nan image folder – ok")) == "data '?': expected an image folder – ok"
    assert str(NothingRouted("a\tb")) == "a?b"
