"""Models and images of extreme numbers: what is cut from them stays finite, and within a stated bound of the dense model.

The bound: with refit and 70 % of the MACs left, a class cosine of 0.9 to the dense model on the calibration images, and a layer
misses no more of its target after the refit than before it.
"""

import copy

import pytest
import torch

from exporter.graph.export import export
from exporter.parity.check import check_parity
from moee.artifacts.model import MoeeModel
from moee.data.image_set import TensorSet
from moee.errors import NothingRouted, UserError
from moee.layers.routed import routed_layers
from moee.methods.recipe import make_recipe
from moee.models.model import load_model
from moee.store.artifact import sha256_file as sha256
from moee.store.tensor_file import write_tensors
from tests.conftest import extract, tiny_images, tiny_spec

LEAST_COSINE, MORE = 0.9, 1.001
EXPERTS = {"clustering": "kmeans", "clusters": 4, "cluster_tokens": 300}
METHODS = {  # and whether it is held to the bound
    "static": ("static", {"target_macs": 0.7}, True),
    "static by sensitivity": ("static", {"target_macs": 0.7, "criterion": "sensitivity", "allocation": "model"}, True),
    "experts": ("experts", {**EXPERTS, "target_macs": 0.7}, True),
    "HDBSCAN": ("experts", {"clustering": "hdbscan", "cluster_tokens": 300}, True),
    "as compress": (
        "experts",
        {**EXPERTS, "target_macs": 0.7, "criterion": "sensitivity", "allocation": "model", "neurons": "eliminated",
         "refit_target": "stream"},
        True,
    ),
    "MoEfication": ("moefication", {"experts": 4, "top_k": 2}, False),  # half of the neurons, and no refit
    "CLEAR-MoE": ("clear-moe", {"target_macs": 0.7}, True),
    "CORP": ("corp", {"target_macs": 0.7}, True),
    "tokens": ("tokens", {"token_macs": 0.8}, True),
}  # fmt: skip
USUAL = "as compress"


def norms(model, factor):
    for block in model.blocks:
        block.norm2.weight.mul_(factor)
        block.norm2.bias.mul_(factor)


def first_maps(model, factor):
    for block in model.blocks:
        block.mlp.fc1.weight.mul_(factor)
        block.mlp.fc1.bias.mul_(factor)


def second_maps(model, factor):
    for block in model.blocks:
        block.mlp.fc2.weight.mul_(factor)
        block.mlp.fc2.bias.mul_(factor)


def stream(model, factor):
    model.patch_embed.proj.weight.mul_(factor)
    model.pos_embed.mul_(factor)


def never_active(model):
    model.blocks[1].mlp.fc1.weight.zero_()
    model.blocks[1].mlp.fc1.bias.fill_(-30)


def without_output(model):
    model.blocks[1].mlp.fc2.weight.zero_()


def massive(model, value=3000.0):
    """One feature of every token is far beyond the others from the first block on, as in DINOv2 without registers."""
    model.blocks[0].mlp.fc2.bias[3] = value


MODELS = {
    **{
        f"{part.__name__.replace('_', ' ')} times {factor:g}": (lambda model, p=part, f=factor: p(model, f))
        for part in (norms, first_maps, second_maps, stream) for factor in (1e-4, 1e4)
    },
    "a layer that is never active": never_active, "a layer without an output": without_output,
    "a massive feature": massive,
}  # fmt: skip
IMAGES = {
    "constant images": torch.ones_like, "black images": torch.zeros_like,
    "one image, 64 times": lambda x: x[:1].repeat(64, 1, 1, 1),
    "images times 10,000": lambda x: x * 1e4, "images times 0.0001": lambda x: x * 1e-4, "one image": lambda x: x[:1],
    "two images": lambda x: x[:2],
}  # fmt: skip
REFUSED = {  # what the sentence says
    ("a layer that is never active", "CLEAR-MoE"): "is singular", ("a layer without an output", "CLEAR-MoE"): "is singular",
    ("one image", "CLEAR-MoE"): "fewer than the 4 experts", ("two images", "CLEAR-MoE"): "fewer than the 4 experts",
    ("one image", "HDBSCAN"): "no layer showed two clusters",
}  # fmt: skip


def cases():
    for kind in (*MODELS, *IMAGES):
        for method in METHODS:
            yield pytest.param(kind, method, marks=[] if method == USUAL else pytest.mark.slow)


@torch.no_grad()
def made(kind):
    """The model and the images of a kind."""
    torch.manual_seed(0)
    model, data = load_model(tiny_spec()).eval(), tiny_images(64)
    if kind in MODELS:
        MODELS[kind](model)
        return model, data
    images = IMAGES[kind](data.images)
    return model, TensorSet("tiny", images, data.labels[: len(images)], data.num_classes)


@pytest.mark.parametrize(("kind", "method"), cases())
def test_a_cut_model_is_finite_and_within_the_bound(kind, method, tried):
    model, data = made(kind)
    dense = copy.deepcopy(model)
    name, values, bounded = METHODS[method]
    if said := REFUSED.get((kind, method)):
        with pytest.raises((UserError, NothingRouted), match=said):
            extract(model, data, make_recipe(name, None, values).cut)
        return tried("numerics", kind, "refused")
    reports = extract(model, data, make_recipe(name, None, values).cut)
    with torch.no_grad():
        ours, right = model(data.images), dense(data.images)
    assert right.isfinite().all() and ours.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    if bounded:
        assert torch.nn.functional.cosine_similarity(ours, right, dim=1).min() >= LEAST_COSINE
        refits = [report.refit for report in reports if report.refit is not None and report.refit.error_after is not None]
        assert all(refit.error_after <= refit.error_before * MORE for refit in refits)
    tried("numerics", kind, "finite, within the bound" if bounded else "finite")


@torch.no_grad()
def test_all_tokens_of_one_expert_and_none_of_the_others(tiny_moee, tried):
    """Routers that send everything to the last expert: its own output, whatever the others hold."""
    model, dense, data, *_ = tiny_moee
    for layer in routed_layers(model).values():
        layer.router_bias.fill_(-1e9)
        layer.router_bias[-1] = 1e9
        layer.b_out[:-1] = 1e30
    assert model(data.images).isfinite().all()
    tried("numerics", "all tokens to one expert", "finite")


@torch.no_grad()
def test_one_token(tiny_moee, tried):
    model, dense, data, *_ = tiny_moee
    for layer in routed_layers(model).values():
        x = torch.randn(1, 1, layer.w_up.shape[1])
        torch.testing.assert_close(layer(x), layer(x.expand(5, 1, -1))[:1], rtol=1e-5, atol=1e-6)
    tried("numerics", "one token", "finite")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_of_a_massive_feature_is_held_to_float64(precision, tmp_path, tried):
    """Layer by layer against a float64 run of the rounded weights. That norms and softmax are float32, test_precision.py
    holds."""
    model, data = made("a massive feature")
    weights = tmp_path / "dense.safetensors"
    write_tensors(model.state_dict(), weights)
    spec = tiny_spec().model_copy(update={"weights": str(weights), "weights_sha256": sha256(weights), "random_seed": None})
    recipe = make_recipe("experts", None, {**EXPERTS, "target_macs": 0.7})
    extract(model, data, recipe.cut)
    moee = MoeeModel(model.eval(), spec, recipe, "digits")
    export(moee, tmp_path / "export", precision=precision)
    result = check_parity(tmp_path / "export", moee, data)
    assert result.passed, result.first_deviation
    tried("numerics", f"a massive feature in {precision}", "parity passed")
