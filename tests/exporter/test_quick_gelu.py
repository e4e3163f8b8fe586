"""A tower with OpenAI's QuickGELU, routed, plain and dense MLPs in one model, in a type too coarse for its slope of 1.702."""

import torch

from exporter.graph.export import export
from exporter.parity import check_parity
from moee.artifacts.model import MoeeModel
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, load_model, replace_module
from tests.conftest import TINY, extract, tiny_images


def test_bfloat16_keeps_the_slope(tmp_path):
    name = "vit_base_patch16_clip_quickgelu_224"
    spec = ModelSpec(name=name, timm_name=name, kwargs={**TINY, "depth": 3}, random_seed=0)
    data, models = tiny_images(classes=10), []
    for clustering, options in (("kmeans", {"clusters": 3, "cluster_tokens": 500}), ("none", {})):
        models.append(load_model(spec))
        config = method_options(clustering=clustering, exclude=("blocks.2",), **options)
        extract(models[-1], data, config)
    model, plain = models
    replace_module(model, "blocks.1.mlp", plain.blocks[1].mlp)
    assert {layer.activation for layer in routed_layers(model).values()} == {"quick_gelu"}
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "tiny")
    torch.manual_seed(0)
    export(moee, tmp_path / "export", precision="bf16")
    result = check_parity(tmp_path / "export", moee, data, sizes=(1, 4))
    assert result.passed, (result.first_deviation, result.weight_problems, result.batches)
    assert [layer.kind for layer in result.layers] == ["moee", "plain"]
