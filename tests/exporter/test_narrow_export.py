"""Narrowed attention in the exported graphs: what they hold, their numbers in every precision, and their costs elsewhere."""

import copy
import json

import onnx
import pytest
import torch

from exporter.cli import main
from exporter.graph.export import export
from exporter.graph.trace import to_onnx
from exporter.parity import check_parity
from exporter.timing.device import dense_facts, modelled
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.methods.heads.method import HeadsOptions
from moee.methods.heads.narrowing import narrow
from moee.methods.recipe import Recipe, method_options
from moee.mlps.attention import narrow_attentions
from moee.models.model import load_model
from plugins.devices import PROFILES
from tests.conftest import extract, tiny_images, tiny_spec
from tests.exporter.conftest import rehash


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A narrowed model with experts, its images, and its artifact."""
    torch.manual_seed(0)
    model, data = load_model(tiny_spec()), tiny_images(classes=10)
    narrow(model, data, (3, 32, 32), 0.7)
    config = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, data, config)
    moee = MoeeModel(model.eval(), tiny_spec(), Recipe((HeadsOptions(attention_macs=0.7), config)), "digits")
    path = tmp_path_factory.mktemp("narrow") / "model"
    checkpoint.save(moee, path)
    return moee, data, path


def exported(made, tmp_path, precision="fp32"):
    moee, data, path = made
    torch.manual_seed(0)  # the dense model has no weight file: it is drawn again
    export(moee, tmp_path / "export", source=path, precision=precision, calibration=data, calibration_images=8)
    return tmp_path / "export"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "int8-fp32")]


@pytest.mark.parametrize("precision", ["fp32", "fp16", *SLOW])
def test_parity(made, tmp_path, precision):
    moee, data, _ = made
    result = check_parity(exported(made, tmp_path, precision), moee, data)
    assert result.passed, result


@pytest.mark.slow
def test_a_shared_input_scale_is_compared_for_every_layer_that_reads_it(made, tmp_path):
    """Query, key and values read one quantised input."""
    moee, data, _ = made
    folder = exported(made, tmp_path, "int8-fp32")
    name = next(iter(narrow_attentions(moee.model)))
    model = onnx.load(folder / "portable.onnx")
    firsts = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    first = next(n for n in firsts if n.name.startswith(f"{name}.q/"))
    assert not any(n.name.startswith((f"{name}.k/", f"{name}.v/")) for n in firsts)
    scale = next(i for i in model.graph.initializer if i.name == first.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.001, scale.name))
    onnx.save(model, folder / "portable.onnx")
    rehash(folder)
    problems = check_parity(folder, moee, data).weight_problems
    assert {(p.layer, p.what) for p in problems} >= {(f"{name}.{part}", "input_scale") for part in "qkv"}


def test_a_damaged_attention_weight_fails_parity(made, tmp_path):
    moee, data, _ = made
    folder = exported(made, tmp_path)
    model = onnx.load(folder / "portable.onnx")
    name = next(iter(narrow_attentions(moee.model)))
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.name.startswith(f"{name}.q/"))
    weight = next(i for i in model.graph.initializer if i.name == node.input[1])
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[:, 0] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, folder / "portable.onnx")
    rehash(folder)
    assert not check_parity(folder, moee, data).passed


def test_graph_has_the_four_products_and_no_others(made):
    """No scaling and no copies: narrower heads must not cost more kernels than the dense ones."""
    moee, _, _ = made
    graph = to_onnx(moee.model, (3, 32, 32))
    assert narrow_attentions(moee.model)
    for name in narrow_attentions(moee.model):
        nodes = [n for n in graph.graph if n.name.startswith((f"{name}/", f"{name}."))]
        kinds = [n.op_type for n in nodes]
        assert kinds.count("MatMul") == 6 and kinds.count("Softmax") == 1 and kinds.count("Transpose") == 4
        assert set(kinds) == {"MatMul", "Add", "Reshape", "Transpose", "Softmax"} and kinds.count("Add") == 3


def test_modelled_latency_counts_the_narrower_heads(made):
    moee, _, _ = made
    dense = load_model(tiny_spec())
    device = next(iter(PROFILES.values()))
    cut = copy.deepcopy(dense)
    narrow(cut, tiny_images(24), (3, 32, 32), 0.7)
    result = modelled(device, dense, cut, dense_facts(dense, (3, 32, 32)), 4096)
    assert result["moee_ms"] < result["dense_ms"]


def test_inspect_shows_the_heads(made, capsys):
    moee, _, path = made
    assert main(["inspect", str(path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["attention"]
    assert {a["name"]: (a["qk"], a["v"]) for a in listed} == {
        name: (layer.widths.qk, layer.widths.v) for name, layer in narrow_attentions(moee.model).items()
    }
    assert all(a["macs"] < a["dense_macs"] for a in listed)
    assert main(["inspect", str(path)]) == 0
    assert "narrowed attention" in capsys.readouterr().out
