"""Merged tokens in artifacts and graphs: read again, exported in several precisions, verified, refused where they differ."""

import json
import shutil

import onnx
import pytest
import torch

from exporter.graph.export import export
from exporter.parity import check_parity
from exporter.timing.device import dense_facts, modelled
from exporter.timing.form_table import Forms, FormTable
from moee.artifacts import checkpoint
from moee.artifacts.inspection import inspect_artifact
from moee.artifacts.manifest import Manifest
from moee.artifacts.model import MoeeModel
from moee.errors import UserError
from moee.kinds.merging_records import check_merging_record
from moee.methods.recipe import Recipe, method_options
from moee.methods.tokens import TokensOptions
from moee.models.model import load_model
from moee.tokens.block import install_merging, merged_tokens, token_merges
from plugins.devices import PROFILES
from tests.conftest import extract, tiny_images, tiny_spec
from tests.exporter.conftest import rehash


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model of experts that merges tokens, its images, and its artifact."""
    torch.manual_seed(0)
    model, data = load_model(tiny_spec()), tiny_images(classes=10)
    install_merging(model, [5, *[3] * (len(model.blocks) - 1)])
    config = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
    extract(model, data, config)
    moee = MoeeModel(model.eval(), tiny_spec(), Recipe((TokensOptions(merge_tokens=3), config)), "digits")
    path = tmp_path_factory.mktemp("tokens") / "model"
    checkpoint.save(moee, path)
    return moee, data, path


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    return _exported(made, tmp_path_factory.mktemp("tokens"))


def _exported(made, folder, precision="fp32"):
    moee, data, path = made
    torch.manual_seed(0)  # the dense model has no weight file: it is drawn again
    export(moee, folder / "export", source=path, precision=precision, calibration=data, calibration_images=8)
    return folder / "export"


def test_an_artifact_is_read_again(made):
    moee, data, path = made
    again = checkpoint.load(path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model(images), moee.model(images)) and merged_tokens(again.model) == merged_tokens(moee.model)
    figures = inspect_artifact(again)
    assert [layer.tokens + layer.merged for layer in figures.layers] == [figures.layers[0].tokens + 5] * len(figures.layers)
    assert figures.layers[-1].merged == sum(figures.merged_tokens) == 5 + 3 * (len(figures.layers) - 1)
    assert figures.to_json()["merged_tokens"] == merged_tokens(moee.model)


@pytest.mark.parametrize("merged, said", [([60, 0], "60 of [0-9]+ patches in block 0"), ([1], "in 1 blocks"), ([0, 0], "no to")])
def test_a_damaged_manifest_is_refused(made, tmp_path, merged, said):
    _, _, path = made
    body = json.loads((path / "moee.json").read_text())
    blocks = len(body["merging"]["merged"])
    body["merging"]["merged"] = (merged * blocks)[: blocks if len(merged) > 1 else 1]
    record = Manifest.model_validate({key: body[key] for key in Manifest.model_fields if key in body}).merging
    with pytest.raises(UserError, match=said):
        check_merging_record(load_model(tiny_spec()), record, tmp_path)


def test_parity(made, exported):
    moee, data, _ = made
    result = check_parity(exported, moee, data)
    assert result.passed, result
    assert {merge.name for merge in result.merges} == set(token_merges(moee.model))
    assert all(merge.matched > 100 and merge.wrong == 0 for merge in result.merges)
    for name in ("tensorrt.onnx", "portable.onnx"):
        kinds = {node.op_type for node in onnx.load(exported / name, load_external_data=False).graph.node}
        assert not kinds & {"NonZero", "Unique", "Compress", "Loop", "NonMaxSuppression"}, "sizes that depend on data"
    assert not any("merge" in node.name for node in onnx.load(exported / "dense.onnx", load_external_data=False).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-fp32"])
def test_parity_in_other_precisions(made, tmp_path, precision):
    moee, data, _ = made
    result = check_parity(_exported(made, tmp_path, precision), moee, data)
    assert result.passed, result


def test_other_matchings_and_other_models_fail(made, exported, tmp_path):
    moee, data, _ = made
    body = json.loads((exported / "export.json").read_text())
    graph = onnx.load(exported / "portable.onnx")
    name = list(token_merges(moee.model))[1]
    product = next(n for n in graph.graph.node if n.output[0] == f"{name}/merge_keys")
    weight = next(i for i in graph.graph.initializer if i.name == product.input[1])
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[: len(changed) // 2] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    onnx.save(graph, folder / "portable.onnx")
    rehash(folder)
    result = check_parity(folder, moee, data)
    assert not result.passed and result.first_deviation.layer == name and result.first_deviation.where == "merges"
    body["merged_tokens"][name] += 1
    (folder / "export.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="tokens are merged there"):
        check_parity(folder, moee, data)


def test_modelled_and_predicted_times_know_the_tokens(made):
    moee, _, _ = made
    dense = load_model(tiny_spec())
    facts = dense_facts(dense, (3, 32, 32))
    merged = load_model(tiny_spec())
    install_merging(merged, merged_tokens(moee.model))
    same, fewer = (modelled(PROFILES["orin-agx"], dense, model, facts, 64) for model in (dense, merged))
    assert fewer["dense_ms"] == same["dense_ms"] == same["moee_ms"] != fewer["moee_ms"]
    names = list(facts.ffns)
    forms = Forms(4.0, {0.5: 2.0, 1.0: 4.0}, {})
    every = dict.fromkeys(names, forms)
    table = FormTable(8, dict.fromkeys(names, 100), dict.fromkeys(names, 1e3), every, {}, facts.tokens)
    left = [facts.tokens[names[0]] - sum(merged_tokens(moee.model)[: at + 1]) for at in range(len(names))]
    assert table.predict(merged, 100.0) == pytest.approx(100 - sum(4 * (1 - n / facts.tokens[names[0]]) for n in left))
    assert table.predict(dense, 100.0) == 100.0
