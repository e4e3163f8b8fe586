"""Low-rank maps from extraction to a verified export: plain products, no plugin, checked layer by layer."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.cli import main
from exporter.engines.build import needs_plugin
from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity
from exporter.passes.low_rank import STORED_AT, lower_low_rank
from exporter.timing.device import dense_facts, modelled
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model
from moee.stages.extract import run_extract
from moee.stages.session import Session
from plugins.contract import DOMAIN
from plugins.devices import PROFILES
from tests.conftest import tiny_images, tiny_spec
from tests.exporter import damage
from tests.moee.test_lowrank import layer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with two low-rank MLPs as `extract` writes it, its images, its export."""
    data, root = tiny_images(), tmp_path_factory.mktemp("lowrank")
    recipe = Recipe.of(method_options("lowrank", keep=0.5, exclude=("blocks.2",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moee.stages.session.load_splits", lambda *args, **kwargs: (data, tiny_images(16)))
        moee = run_extract(tiny_spec(), "tiny", recipe, root / "model", session=Session(tiny_spec(), "tiny"))
    export(moee, root / "fp32", source=root / "model")
    return moee, data, root


def check(folder, moee, data):
    return check_parity(folder, moee, data, sizes=(1, 4))


def test_parity_of_outputs_and_of_each_layer(made):
    moee, data, root = made
    result = check(root / "fp32", moee, data)
    assert result.passed and result.batches and result.route_agreement == {}
    assert [(of.name, of.kind, of.experts) for of in result.layers] == [(f"blocks.{i}.mlp", "lowrank", 1) for i in (0, 1)]
    assert all(of.local.count and of.probe.count for of in result.layers)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_parity_in_other_precisions(made, tmp_path, precision):
    moee, data, _ = made
    export(moee, tmp_path / "export", precision=precision, calibration=data, calibration_images=8)
    assert check(tmp_path / "export", moee, data).passed


def test_graphs_hold_four_products_a_layer_and_no_plugin(made):
    moee, _, root = made
    for file in ("portable.onnx", "tensorrt.onnx"):
        model = onnx.load(root / "fp32" / file)
        onnx.checker.check_model(model)
        assert all(o.domain != DOMAIN for o in model.opset_import)
        for name, of in routed_layers(moee.model).items():
            kinds = [n.op_type for n in model.graph.node if n.name.startswith(f"{name}/")]
            assert kinds.count("MatMul") == 4 and set(kinds) <= {"MatMul", "Add", "Gelu"}
            stored = {i.name: tuple(i.dims) for i in model.graph.initializer}
            assert stored[f"{name}/up_in"] == (of.dim, of.ranks[0]) and stored[f"{name}/down_out"] == (of.ranks[1], of.dim)
    manifest = json.loads((root / "fp32" / "export.json").read_text())
    assert manifest["plugin_nodes"] == 0 and not needs_plugin(root / "fp32")
    device, dense = next(iter(PROFILES.values())), load_model(moee.spec)
    assert modelled(device, dense, moee.model, dense_facts(dense, (3, 32, 32)), 4096)["kind"] == "modelled"


@pytest.mark.parametrize(("file", "part"), [("portable.onnx", "up_out"), ("tensorrt.onnx", "down_bias")])
def test_a_damaged_weight_is_found(made, tmp_path, file, part):
    assert part in STORED_AT
    moee, data, root = made
    folder = tmp_path / "export"
    shutil.copytree(root / "fp32", folder)
    damage.change_weight(folder, file, f"blocks.1.mlp/{part}")
    result = check(folder, moee, data)
    named = {p.layer for p in result.weight_problems} | {of.name for of in result.layers if not of.passed}
    assert not result.passed and named == {"blocks.1.mlp"}


class OneLayer(torch.nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


def test_channels_first_has_its_form(tmp_path):
    x = torch.randn(2, 6, 3, 3)
    mlp = layer(channels_first=True)
    graph = to_onnx(OneLayer(mlp), x)
    assert len(lower_low_rank(graph)) == 1
    ir.save(graph, tmp_path / "layer.onnx")
    (got,) = ort.InferenceSession(tmp_path / "layer.onnx").run(None, {"input": x.numpy()})
    np.testing.assert_allclose(got, mlp(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_report_has_the_layers_and_shrink_refuses_them(made, tmp_path, capsys):
    *_, root = made
    assert main(["report", str(root / "model"), str(root / "fp32"), "--out", str(tmp_path / "report.html")]) == 0
    assert "blocks.1.mlp" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    assert main(["inspect", str(root / "model"), "--json"]) == 0
    shown = {of["name"]: of for of in json.loads(capsys.readouterr().out)["layers"]}
    assert shown["blocks.1.mlp"]["experts"] == 1 and shown["blocks.1.mlp"]["macs"] < shown["blocks.1.mlp"]["dense_macs"]
    assert main(["shrink", str(root / "model"), "--experts", "1", "--out", str(tmp_path / "fewer")]) == 2
    assert "Traceback" not in capsys.readouterr().err
