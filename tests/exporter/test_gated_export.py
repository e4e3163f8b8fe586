"""Pruned gated MLPs from extraction to a verified export: plain products, no plugin, checked layer by layer."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from exporter.engines.build import needs_plugin
from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity
from exporter.passes.gated import STORED_AT, lower_gated
from exporter.ship.deployment import write_deployment
from exporter.timing.device import dense_facts, modelled
from exporter.timing.ffn_bench import ffn_speeds
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.layers.routed import routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.mlps.gated import GATES, GatedFFN, GatedWeights, weight_shapes
from moee.models.model import ModelSpec, load_model
from plugins.contract import DOMAIN
from plugins.devices import PROFILES
from tests.conftest import extract, tiny_images
from tests.exporter import damage
from tests.exporter.command import run
from tests.exporter.conftest import rehash

KW = dict(img_size=56, depth=2, embed_dim=48, num_heads=2, num_classes=10)
NAMES = {"eva02": "eva02_tiny_patch14_224", "dinov2-g": "vit_giant_patch14_dinov2"}
LAYERS = ["blocks.0.mlp", "blocks.1.mlp"]
FLAGS = ("--random-weights", 0, "--model-kwargs", "depth=2", "embed_dim=48", "num_heads=2", "--img-size", 56)
STATIC = ("--preset", "static", "--target-macs", 0.75, "--tokens", 2000, "--refit-tokens", 2000)


def never():
    raise AssertionError("no kernel is needed")


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """A model whose only cut layers are gated, its images, its artifact and its float32 export."""
    spec = ModelSpec(name=NAMES[request.param], timm_name=NAMES[request.param], kwargs=KW, random_seed=0)
    data, model, root = tiny_images(48, 56, classes=10), load_model(spec), tmp_path_factory.mktemp(request.param)
    config = method_options("static", target_macs=0.75, refit_tokens=2000)
    extract(model, data, config)
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "digits")
    checkpoint.save(moee, root / "model")
    export(moee, root / "fp32", source=root / "model")
    return moee, data, root


def check(folder, moee, data):
    return check_parity(folder, moee, data, sizes=(1, 4))


def judged(result):
    assert result.passed, result
    assert [(layer.name, layer.kind, layer.experts) for layer in result.layers] == [(name, "plain", 1) for name in LAYERS]
    assert all(layer.local.count and layer.probe.count and layer.wrong_routes == 0 for layer in result.layers)
    assert result.route_agreement == {} and result.batches


def test_parity_of_outputs_and_of_each_layer(made):
    moee, data, root = made
    judged(check(root / "fp32", moee, data))


def test_parity_in_half_precision(made, tmp_path):
    moee, data, _ = made
    export(moee, tmp_path / "export", precision="fp16")
    judged(check(tmp_path / "export", moee, data))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-fp32"])
def test_parity_in_other_precisions(made, tmp_path, precision):
    moee, data, _ = made
    if moee.spec.name != NAMES["eva02"]:
        pytest.skip("one model suffices")
    export(moee, tmp_path / "export", precision=precision, calibration=data, calibration_images=8)
    judged(check(tmp_path / "export", moee, data))


def test_graphs_hold_the_dense_graphs_operators_and_no_other(made):
    moee, _, root = made
    dense = {n.op_type for n in onnx.load(root / "fp32" / "dense.onnx").graph.node}
    for file in ("portable.onnx", "tensorrt.onnx"):
        model = onnx.load(root / "fp32" / file)
        onnx.checker.check_model(model)
        assert all(o.domain != DOMAIN for o in model.opset_import)
        assert {n.op_type for n in model.graph.node} <= dense | {"MatMul", "Add", "Mul", "Sigmoid"}
        for name, layer in routed_layers(moee.model).items():
            kinds = sorted(n.op_type for n in model.graph.node if n.name.startswith(f"{name}/"))
            assert kinds == sorted(["MatMul"] * 3 + ["Add"] * 3 + ["Mul", "Mul", "Sigmoid"])
            stored = {i.name: tuple(i.dims) for i in model.graph.initializer}
            assert stored[f"{name}/w_gate"] == stored[f"{name}/w_up"] == (48, layer.union)
    manifest = json.loads((root / "fp32" / "export.json").read_text())
    assert manifest["routed_layers"] == LAYERS and manifest["plugin_nodes"] == 0 and not needs_plugin(root / "fp32")


@pytest.mark.parametrize("part", STORED_AT)
@pytest.mark.parametrize("file", ["portable.onnx", "tensorrt.onnx"])
def test_a_damaged_weight_is_found(made, tmp_path, part, file):
    moee, data, root = made
    if (moee.spec.name == NAMES["eva02"]) != (file == "portable.onnx"):
        pytest.skip("each file once")
    folder = tmp_path / "export"
    shutil.copytree(root / "fp32", folder)
    damage.change_weight(folder, file, f"blocks.1.mlp/{part}")
    result = check(folder, moee, data)
    assert not result.passed
    assert result.first_deviation is None or result.first_deviation.layer == "blocks.1.mlp"
    named = {p.layer for p in result.weight_problems} | {layer.name for layer in result.layers if not layer.passed}
    assert named == {"blocks.1.mlp"}


def test_gate_and_up_swapped_are_found(made, tmp_path):
    """The shapes are the same, and so are all the weights together."""
    moee, data, root = made
    folder = tmp_path / "export"
    shutil.copytree(root / "fp32", folder)
    for file in ("portable.onnx", "tensorrt.onnx"):
        model = onnx.load(folder / file)
        for node in model.graph.node:
            for a, b in (("w_gate", "w_up"), ("b_gate", "b_up")):
                pair = {f"blocks.0.mlp/{a}": f"blocks.0.mlp/{b}", f"blocks.0.mlp/{b}": f"blocks.0.mlp/{a}"}
                if len(node.input) > 1 and node.input[1] in pair:
                    node.input[1] = pair[node.input[1]]
        onnx.save(model, folder / file)
    rehash(folder)
    result = check(folder, moee, data)
    assert not result.passed and not result.layers[0].passed and {p.layer for p in result.weight_problems} == {"blocks.0.mlp"}


class OneLayer(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.mlp = layer

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize(("activation", "channels_first"), [*((name, False) for name in GATES), ("silu", True)])
def test_every_gate_activation_has_its_form(tmp_path, activation, channels_first):
    generator = torch.Generator().manual_seed(0)
    shapes = weight_shapes(8, 5)
    weights = GatedWeights(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    layer = GatedFFN(weights, activation, channels_first).eval()
    x = torch.randn((2, 8, 3, 3) if channels_first else (2, 9, 8), generator=generator)
    graph = to_onnx(OneLayer(layer), x)
    assert len(lower_gated(graph)) == 1
    ir.save(graph, tmp_path / "layer.onnx")
    (got,) = ort.InferenceSession(tmp_path / "layer.onnx").run(None, {"input": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, layer(x).numpy(), rtol=1e-4, atol=1e-4)


def test_modelled_latency_and_single_layers_are_timed(made):
    moee, data, _ = made
    dense = load_model(moee.spec)
    device = next(iter(PROFILES.values()))
    result = modelled(device, dense, moee.model, dense_facts(dense, (3, 56, 56)), 4096)
    assert result["moee_ms"] < result["dense_ms"] and result["kind"] == "modelled"
    if moee.spec.name == NAMES["dinov2-g"]:
        return  # one model suffices for what follows
    rows = ffn_speeds([moee], data, 64, runs=2, threads=1)
    assert [row.name for row in rows] == LAYERS
    widths = [layer.union for layer in routed_layers(moee.model).values()]
    assert [row.ideal for row in rows] == pytest.approx([128 / width for width in widths])


@pytest.mark.slow
def test_commands_from_extract_to_bundle(tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "export"
    assert run("extract", NAMES["eva02"], *FLAGS, "--data", "digits", *STATIC, "--out", model) == 0
    shown = capsys.readouterr().out
    assert "blocks.1.mlp" in shown and "pruned" in shown and "routed" not in shown
    assert run("inspect", model, "--json") == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(layer["name"], layer["gated"], layer["experts"]) for layer in layers] == [(name, True, 1) for name in LAYERS]
    assert all(layer["macs"] * 128 == layer["dense_macs"] * layer["union"] for layer in layers)
    assert run("export", model, "--out", folder, "--precision", "fp16") == 0
    assert run("verify", folder, "--out", tmp_path / "checked") == 0
    parity = json.loads((tmp_path / "checked" / "parity.json").read_text())
    assert parity["passed"] and [layer["kind"] for layer in parity["layers"]] == ["plain", "plain"]
    assert run("verify", folder, "--min-route-agreement", 0.9, "--out", tmp_path / "routes") == 2
    assert "no layer has more than one expert" in " ".join(capsys.readouterr().err.split())
    write_deployment(folder, tmp_path / "bundle", 87, never, (1, 4, 16))
    deployment = json.loads((tmp_path / "bundle" / "deployment.json").read_text())
    assert deployment["plugin_nodes"] == 0 and not (tmp_path / "bundle" / "plugin").exists()
    assert isinstance(checkpoint.load(model).model.blocks[0].mlp, GatedFFN)
    assert run("report", model, folder, tmp_path / "checked", "--out", tmp_path / "report.html") == 0
    assert "blocks.1.mlp" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("method", [
    (), ("--preset", "moefication", "--experts", 8, "--top-k", 4), ("--method", "clear-moe"),
    ("--clustering", "kmeans", "--clusters", 4),
])  # fmt: skip
def test_other_methods_refuse_a_model_of_gated_mlps_before_any_work(tmp_path, capsys, method):
    assert run("extract", NAMES["eva02"], *FLAGS, "--data", "digits", *method, "--out", tmp_path / "model") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "`blocks.0.mlp`, `blocks.1.mlp` (gated: only --preset static and --method corp cut it); use --preset static" in said
    assert not (tmp_path / "model").exists() and "calibrate" not in said


def test_inspect_says_what_a_dense_model_allows(capsys):
    assert run("inspect", NAMES["eva02"], *FLAGS[2:]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gated, which only --preset static and --method corp cut: `blocks.0.mlp`, `blocks.1.mlp`" in shown


def test_plan_tries_static_pruning_alone(tmp_path, capsys, caplog):
    options = ("--tokens", 1000, "--refit-tokens", 1000, "--target-macs", 0.8)
    assert run("plan", NAMES["eva02"], *FLAGS, "--data", "digits", *options, "--out", tmp_path / "plan") == 0
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert {p["method"] for p in plan["points"]} == {"static", "dense"} and plan["winner"]["method"] == "static"
    assert plan["winner"]["macs"] <= 0.8 and [layer["status"] for layer in plan["layers"]] == ["routed", "routed"]
    said = " ".join((capsys.readouterr().err + caplog.text).split())
    assert "are gated: of the methods, only static pruning is tried" in said
    applied = ("--data", "digits", "--plan", tmp_path / "plan", "--out", tmp_path / "model")
    assert run("extract", NAMES["eva02"], *FLAGS, *applied) == 0
    others = ("--data", "digits", "--methods", "hdbscan", *options, "--out", tmp_path / "other")
    assert run("plan", NAMES["eva02"], *FLAGS, *others) == 2
    assert "try --methods static" in " ".join(capsys.readouterr().err.split())
