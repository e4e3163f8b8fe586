"""A layer of one expert is a plain MLP in every graph: no plugin node, no routing; and everything that reads exports takes it."""

import configparser
import copy
import json
import shutil
import subprocess

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import exporter
from exporter.engines.build import needs_plugin
from exporter.graph import export as onnx_export
from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity, check_weights
from exporter.passes.name_routes import name_routed_nodes
from exporter.passes.plain import lower_single_experts
from exporter.precision import typed
from exporter.ship.deployment import write_deployment
from exporter.verification import verify
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.layers.activations import ACTIVATIONS
from moee.layers.routed import RoutedFFN, routed_layers
from moee.methods.recipe import Recipe, method_options
from moee.models.model import load_model, replace_module
from plugins.contract import DOMAIN
from tests.conftest import extract, tiny_images, tiny_spec
from tests.exporter import one_layer
from tests.exporter.command import run
from tests.exporter.conftest import rehash
from tests.moee.reference import random_problem
from tests.moee.test_ops import layer_of

LAYERS = [f"blocks.{i}.mlp" for i in range(2)]
SPEC = tiny_spec(depth=2)
STATIC = "blocks.1.mlp"  # the one layer of one expert in a mixed model


def made(root, clusterings):
    """A model whose i-th MLP has experts by the i-th of `clusterings` (none: one expert), its artifact and its exports."""
    torch.manual_seed(0)
    data, parts = tiny_images(classes=10), {}
    for clustering in set(clusterings):
        torch.manual_seed(0)
        parts[clustering] = load_model(SPEC)
        clusters = {} if clustering == "none" else {"clusters": 4, "cluster_tokens": 500}
        config = method_options(clustering=clustering, keep=0.9, **clusters)
        extract(parts[clustering], data, config)
    model = parts[clusterings[0]]
    for name, clustering in zip(list(routed_layers(model)), clusterings, strict=True):
        replace_module(model, name, parts[clustering].get_submodule(name))
    moee = MoeeModel(model.eval(), SPEC, Recipe.of(method_options(clustering="none")), "digits")
    checkpoint.save(moee, root / "model")
    return moee, data, root


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    return made(tmp_path_factory.mktemp("static"), ["none"] * 2)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return made(tmp_path_factory.mktemp("mixed"), ["kmeans", "none"])


def exported(case, precision="fp32"):
    moee, data, root = case
    folder = root / precision
    if not folder.exists():
        torch.manual_seed(0)  # the dense model has no weight file: it is drawn again
        export(moee, folder, source=root / "model", precision=precision, calibration=data, calibration_images=8)
    return folder


def nodes(path):
    return onnx.load(path, load_external_data=False).graph.node


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.slow), "int8"])
def test_static_exports_hold_plain_products_and_pass(static, precision):
    moee, data, _ = static
    folder = exported(static, precision)
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["plugin_nodes"] == 0 and not needs_plugin(folder) and manifest["routed_layers"] == LAYERS
    for name in ("portable", "tensorrt"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert not [n for n in graph.graph.node if n.domain] and not [o for o in graph.opset_import if o.domain == DOMAIN]
        kinds = [n.op_type for n in graph.graph.node if n.name.startswith("blocks.0.mlp/")]
        assert kinds == ["MatMul", "Add", "Gelu", "MatMul", "Add"], kinds
    result = check_parity(folder, moee, data, sizes=(1, 4))
    assert result.passed, (result.first_deviation, result.weight_problems)
    assert {layer.kind for layer in result.layers} == {"plain"}
    assert result.route_agreement == {} and result.mean_route_agreement is None, "one expert leaves no route to compare"
    assert result.images == len(data), "images that repeat are counted once"
    with pytest.raises(UserError, match="--min-route-agreement has nothing to check"):
        check_parity(folder, moee, data, sizes=(1, 4), min_route_agreement=0.9)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_models(mixed, precision):
    moee, data, _ = mixed
    folder = exported(mixed, precision)
    assert json.loads((folder / "export.json").read_text())["plugin_nodes"] == 1 and needs_plugin(folder)
    assert [n.name for n in nodes(folder / "tensorrt.onnx") if n.op_type == "MoeeFfn"] == ["blocks.0.mlp"]
    result = check_parity(folder, moee, data, sizes=(1, 4))
    assert result.passed, (result.first_deviation, result.weight_problems)
    assert [layer.kind for layer in result.layers] == ["moee", "plain"] and list(result.route_agreement) == ["blocks.0.mlp"]


def edited(case, tmp_path, name, change):
    """A copy of the export with one graph changed, as a wrong exporter would have written it."""
    folder = shutil.copytree(exported(case), tmp_path / "export")
    model = onnx.load(folder / name, load_external_data=False)
    change(model.graph)
    onnx.save(model, folder / name)
    rehash(folder)
    return folder


def _another_activation(graph):
    next(n for n in graph.node if n.op_type == "Gelu" and n.name.startswith(STATIC)).op_type = "Relu"
    del next(n for n in graph.node if n.op_type == "Relu").attribute[:]


def _no_node(graph):
    node = next(n for n in graph.node if n.name == f"{STATIC}/up")
    reader = next(n for n in graph.node if node.output[0] in n.input)
    node.output[0] = "renamed"
    reader.input[0] = "renamed"


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (_another_activation, "tensorrt.onnx", "the layer alone is off"),
        (_another_activation, "portable.onnx", "the layer alone is off"),
        (_no_node, "tensorrt.onnx", "no MoeeFfn node"),
    ],
)
def test_planted_damage_is_caught_and_its_layer_named(static, tmp_path, damage, name, message):
    moee, data, _ = static
    folder = edited(static, tmp_path, name, damage)
    result = check_parity(folder, moee, data)
    assert not result.passed and result.first_deviation.layer == STATIC and message in result.first_deviation.message


def test_changed_weights_are_caught(static):
    moee, *_ = static
    damaged = copy.deepcopy(moee)
    with torch.no_grad():
        damaged.model.blocks[1].mlp.b_up[0] += 0.5
    found = check_weights(exported(static) / "tensorrt.onnx", routed_layers(damaged.model), torch.float32)
    assert [(p.layer, p.what) for p in found] == [(STATIC, "b_up")]


def test_exports_of_older_versions_are_read(static, tmp_path, monkeypatch):
    """They hold MoeeFfn nodes of one expert, and portable graphs with a route."""
    moee, data, root = static
    monkeypatch.setattr(onnx_export, "lower_single_experts", lambda graph: [])
    torch.manual_seed(0)
    export(moee, tmp_path / "old", source=root / "model")
    assert needs_plugin(tmp_path / "old")
    assert [n.name for n in nodes(tmp_path / "old" / "tensorrt.onnx") if n.op_type == "MoeeFfn"] == LAYERS
    result = check_parity(tmp_path / "old", moee, data)
    assert result.passed and {layer.kind for layer in result.layers} == {"moee"}


def test_routes_that_a_static_model_does_not_choose_are_refused_before_any_graph_runs(static, monkeypatch):
    monkeypatch.setattr("exporter.verification.graph_accuracy.opened", lambda *a: pytest.fail("a graph was run"))
    moee, data, _ = static
    with pytest.raises(UserError, match="--min-route-agreement has nothing to check"):
        verify(exported(static), moee, data, sizes=(2,), min_route_agreement=0.9)


def test_commands_take_a_static_export(static, tmp_path, monkeypatch):
    monkeypatch.setattr("moee.data.sources.load_data", lambda *args, **kwargs: static[1])
    folder = exported(static)
    times = ["--runs", 3, "--duration", 0.1, "--throughput", 0, "--batch", 2, "--profile", "--out", tmp_path / "latency.json"]
    assert run("bench", folder, *times) == 0
    profile = json.loads((tmp_path / "latency.json").read_text())["layers"]
    assert [layer["name"] for layer in profile["layers"]] == LAYERS and all(layer["moee_ms"] > 0 for layer in profile["layers"])
    assert run("verify", folder, "--max-shapes", 4, "--out", tmp_path / "verify") == 0
    cases = (tmp_path / "verify" / "junit.xml").read_text()
    assert "blocks.1.mlp" in cases and "holds the model&apos;s weights and computes the layer" in cases.replace("'", "&apos;")
    assert run("report", folder, tmp_path / "verify", tmp_path / "latency.json", "--out", tmp_path / "report.html") == 0


@pytest.mark.parametrize("case", ["static", "mixed"])
def test_bundles_have_a_plugin_only_where_it_is_needed(case, request, tmp_path):
    from tests.plugins import built

    folder = exported(request.getfixturevalue(case))
    plugin = case == "mixed"

    def never():
        raise AssertionError("kernels are compiled for nothing")

    out = write_deployment(folder, tmp_path / "bundle", 87, built.kernels if plugin else never, (1, 4, 16))
    assert (out / "plugin").exists() == plugin
    texts = {name: (out / name).read_text() for name in ("triton/start.sh", "deepstream/config_infer_moee.txt", "README.md",
             "triton/model_repository/moee/config.pbtxt")}  # fmt: skip
    for name, text in texts.items():
        assert ("libmoee_plugin.so" in text) == plugin, name
    parser = configparser.ConfigParser()
    parser.read_string(texts["deepstream/config_infer_moee.txt"])
    assert ("custom-lib-path" in parser["property"]) == plugin
    assert f"PLUGIN={'yes' if plugin else 'no'}" in (out / "bundle.env").read_text()
    assert subprocess.run(["sh", "-n", str(out / "triton" / "start.sh")]).returncode == 0


@pytest.mark.parametrize("sm", ["0", "999", "=-1", "70"])
def test_an_unknown_sm_is_refused_though_no_kernel_is_needed(static, tmp_path, capsys, sm):
    flag = [f"--sm{sm}"] if sm.startswith("=") else ["--sm", sm]
    for command in ("bundle", "build"):
        assert run(command, exported(static), *flag, "--out", tmp_path / command) == 2
        assert f"unknown SM {sm.removeprefix('=')}; expected some of 75" in capsys.readouterr().err
        assert not (tmp_path / command).exists()
    with pytest.raises(UserError, match="unknown SM|sm"):
        exporter.bundle(exported(static), tmp_path / "bundle", sm=int(sm.removeprefix("=")))
    with pytest.raises(UserError, match="unknown SM"):
        exporter.build(exported(static), tmp_path / "build", sms=[int(sm.removeprefix("="))])


def test_engines_need_no_plugin(static, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx to build engines on the CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.engines.plugin_cache.ensure_plugin", None)  # it is not asked for
        assert run("build", exported(static), "--max-shapes", 4, "--out", tmp_path / "engines") == 0
    engine = json.loads((tmp_path / "engines" / "engine.json").read_text())
    assert engine["plugin"]["file"] == "" and engine["plugin_layers"] == 0


@pytest.mark.parametrize(
    ("activation", "dtype"), [*((a, torch.float32) for a in ACTIVATIONS), ("quick_gelu", torch.float16)]
)
def test_the_plain_form_computes_the_operator(activation, dtype):
    """Of the stored neurons only those that the expert keeps are left; the form with several experts stays as it is."""
    layer = layer_of(random_problem(tokens=9, dim=16, union=24, widths=[20], activation=activation)).eval()
    graph = to_onnx(typed(one_layer.OneLayer(layer, 16), dtype), (3, 4, 4))
    name_routed_nodes(graph, ["layer"])
    assert lower_single_experts(graph) == ["layer"]
    assert [tuple(v.shape) for n, v in graph.graph.initializers.items() if n == "layer/w_up"] == [(16, 20)]
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 4, 4)
    (got,) = session.run(None, {"input": x.numpy()})
    wanted = layer(x.reshape(5, 3, 16)).detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.01)


def test_the_pass_leaves_several_experts_and_refuses_weights_that_are_not_constant():
    layer = layer_of(random_problem(tokens=9, dim=16, union=24, widths=[5, 20])).eval()
    graph = one_layer.traced(layer, 16)
    assert lower_single_experts(graph) == [] and [n.op_type for n in graph.graph if n.domain == DOMAIN] == ["MoeeFfn"]
    graph = one_layer.traced(layer_of(random_problem(9, 16, 24, [20])).eval(), 16)
    node = next(n for n in graph.graph if n.domain == DOMAIN)
    node.inputs[3].const_value = None
    with pytest.raises(ValueError, match="`layer`: w_up must be an initialiser"):
        lower_single_experts(graph)


def test_channels_first_layers():
    p = random_problem(24, 16, 32, [20])
    del p["x"]
    from moee.layers.routed import Experts

    layer = RoutedFFN(Experts(**p), channels_first=True).eval()
    graph = to_onnx(layer, torch.zeros(2, 16, 3, 4))
    name_routed_nodes(graph, ["layer"])
    assert lower_single_experts(graph) == ["layer"]
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 16, 3, 4)
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)
