"""MLPs whose parts lie among others go the whole way: every method, saved and read again, exported, compared, timed alone."""

import copy
import json

import pytest
import torch

from exporter.graph.export import export
from exporter.parity import check_parity
from exporter.timing.ffn_bench import ffn_speeds
from moee.artifacts.checkpoint import MANIFEST, load, save
from moee.artifacts.inspection import inspect_artifact
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.layers.routed import routed_layers
from moee.methods.clear_moe.convert import convert
from moee.methods.clear_moe.options import ClearOptions
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, load_model
from moee.train.finetuning import finetune
from tests.conftest import extract, tiny_images

# its MLPs are a norm, fc1, act and fc2 in one module
TINY_VIT = ModelSpec(
    name="tiny_vit", timm_name="tiny_vit_5m_224", random_seed=0, input_size=(64, 64),
    kwargs=dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_sizes=(4, 4, 2, 2),
                num_classes=10),
)  # fmt: skip
# its MLPs are a depthwise convolution and two 1x1 convolutions on a map
FASTVIT = ModelSpec(
    name="fastvit", timm_name="fastvit_t8", random_seed=0, input_size=(64, 64),
    kwargs=dict(layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 16), num_classes=10),
)  # fmt: skip
EXPERTS = dict(clustering="kmeans", clusters=3, components=8, cluster_tokens=300, tokens=900)
METHODS = {
    "experts": method_options(**EXPERTS, criterion="sensitivity"),
    "static": method_options(clustering="none", tokens=900),
    "eliminated": method_options(
        **EXPERTS, criterion="sensitivity", target_macs=0.9, neurons="eliminated", refit_target="stream"
    ),
    "moefication": method_options(method="moefication", experts=4, top_k=2, compensation="mean", tokens=900),
    "clear-moe": ClearOptions(experts=2, rank=3, residual_rank=1, tokens=900),
}


def made(spec: ModelSpec, config) -> tuple[MoeeModel, object]:
    model, data = load_model(spec), tiny_images(36, size=64, classes=3)
    (convert if isinstance(config, ClearOptions) else extract)(model, data, config)
    return MoeeModel(model.eval(), spec, Recipe.of(config), "tiny"), data


@pytest.mark.parametrize("spec", [TINY_VIT, FASTVIT], ids=lambda spec: spec.name)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_replaces_them_and_their_artifact_loads(spec, method, tmp_path):
    moee, data = made(spec, METHODS[method])
    layers = routed_layers(moee.model)
    assert len(layers) == {"tiny_vit": 3, "fastvit": 4}[spec.name]
    for name, layer in layers.items():
        for path in layer.bypassed:
            assert isinstance(moee.model.get_submodule(path), torch.nn.Identity)
        assert name.endswith(".fc1") and [p.rpartition(".")[2] for p in layer.bypassed] == ["act", "fc2"]
    save(moee, tmp_path / "artifact")
    again = load(tmp_path / "artifact")
    with torch.no_grad():
        assert torch.equal(again.model(data.images[:4]), moee.model(data.images[:4]))
    assert {f.name for f in inspect_artifact(again).layers if f.experts} == set(layers)


@pytest.mark.parametrize("spec", [TINY_VIT, pytest.param(FASTVIT, marks=pytest.mark.slow)], ids=lambda spec: spec.name)
def test_graphs_agree_with_the_model(spec, tmp_path):
    moee, data = made(spec, METHODS["experts"])
    export(moee, tmp_path / "export")
    result = check_parity(tmp_path / "export", moee, data, sizes=(1, 4))
    assert result.passed, result
    assert len(result.layers) == len(routed_layers(moee.model))


def test_fine_tuning_trains_them(tmp_path):
    moee, data = made(TINY_VIT, METHODS["experts"])
    for layer in routed_layers(moee.model).values():
        layer.b_out.data += torch.linspace(-1, 1, layer.b_out.shape[1])  # something to learn
    dense, before = moee.dense(), copy.deepcopy(moee.model.state_dict())
    result = finetune(moee.model, dense, data, FinetuneConfig(epochs=2, batch_size=12, lr=1e-3, masked=True))
    (name, *_) = routed_layers(moee.model)
    assert result.best_epoch > 0 and result.validation_loss[-1] < result.validation_loss[0]
    assert not torch.equal(moee.model.state_dict()[f"{name}.w_up"], before[f"{name}.w_up"])


def test_each_layer_is_timed_against_its_three_parts(monkeypatch):
    moee, data = made(TINY_VIT, METHODS["experts"])
    timed = []
    monkeypatch.setattr("exporter.timing.ffn_bench._speeds", lambda name, dense, own, *_: timed.append((name, dense, *own)) or [])
    ffn_speeds([moee], data, tokens=64)
    assert [name for name, _, _ in timed] == list(routed_layers(moee.model))
    for name, dense, layer in timed:
        assert dense.up.in_features == layer.w_up.shape[1] == dense.down.out_features, name


@pytest.mark.parametrize(
    ("bypassed", "message"),
    [
        (["stages.1.blocks.0.mlp.act"], "expected the paths of an activation and a down map"),
        (["stages.1.blocks.0.mlp.act", "stages.9"], "names layer stages.9, which TinyVit does not have"),
        (["stages.1.blocks.0.mlp.act", "stages.1.blocks.0.mlp.norm"], "no plain MLP"),
        (["stages.1.blocks.0.mlp.norm", "stages.1.blocks.0.mlp.fc2"], "uses LayerNorm"),
        (["stages.1.blocks.0.mlp.act", "stages.1.blocks.0.mlp.fc1"], "no plain MLP"),
    ],
)
def test_a_manifest_with_other_parts_is_refused(bypassed, message, tmp_path):
    moee, _ = made(TINY_VIT, METHODS["static"])
    save(moee, tmp_path / "artifact")
    manifest = json.loads((tmp_path / "artifact" / MANIFEST).read_text())
    manifest["layers"][0]["bypassed"] = bypassed
    (tmp_path / "artifact" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "artifact")
