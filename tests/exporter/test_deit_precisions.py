"""DeiT-S at its real shapes, random weights, in each precision: verified on ONNX Runtime, engines built on the CPU."""

import importlib.util

import pytest
import torch

from exporter.engines.build import build_engines
from exporter.graph.export import export
from exporter.parity import check_parity
from moee.artifacts.model import MoeeModel
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, load_model
from tests.conftest import extract, tiny_images
from tests.plugins import built


@pytest.fixture(scope="module")
def deit():
    torch.manual_seed(0)
    spec = ModelSpec(name="deit_small_patch16_224", timm_name="deit_small_patch16_224", random_seed=0)
    model, data = load_model(spec), tiny_images(count=12, size=224)
    config = method_options(
        clustering="kmeans", clusters=4, cluster_tokens=1000, tokens=2000, keep=0.8, compensation="mean"
    )
    extract(model, data, config)
    return MoeeModel(model.eval(), spec, Recipe.of(config), "tiny"), data


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_deit_small(deit, tmp_path, precision):
    moee, data = deit
    export(moee, tmp_path / "export", precision=precision)
    result = check_parity(tmp_path / "export", moee, data, sizes=(1, 4))
    assert result, result.first_deviation
    assert len(result.layers) == 12 and result.precision == precision
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        report = build_engines(tmp_path / "export", tmp_path / "engine", plugin=built.plugin(), batch=(1, 4, 8))
        assert report.plugin_layers == 12
