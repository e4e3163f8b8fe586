"""int8 exports: what stands in the graphs, that verify finds what is planted, the command, engines and reports."""

import copy
import importlib.util
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporter import cli
from exporter.engines.build import build_engines
from exporter.graph.export import export
from exporter.report import write_report
from exporter.ship.deployment import write_deployment
from exporter.verification import verify
from exporter.verification.engine import run_engine
from moee.errors import UserError
from moee.models.model import replace_module
from moee.store.artifact import read_manifest, write_json
from plugins.contract import OP_TYPE
from tests.exporter.conftest import rehash
from tests.exporter.test_clear_export import random_layer
from tests.exporter.test_quantization import DENSE
from tests.plugins import built

TYPES = {"int8": onnx.TensorProto.FLOAT16, "int8-fp32": onnx.TensorProto.FLOAT}
MLPS = [f"blocks.{i}.mlp.{part}" for i in range(3) for part in ("fc1", "fc2")]


@pytest.fixture(scope="module")
def exports(tiny_export, tmp_path_factory):
    """Folder by precision, calibrated on the tiny images."""
    root, made = tmp_path_factory.mktemp("int8"), {}

    def folder(precision: str):
        if precision not in made:
            made[precision] = root / precision
            torch.manual_seed(0)
            export(
                tiny_export.moee, made[precision], precision=precision, calibration=tiny_export.data, calibration_images=32,
                source=tiny_export.root / "model",
            )  # fmt: skip
        return made[precision]

    return folder


@pytest.mark.parametrize("precision", TYPES)
def test_what_stands_in_the_graphs(exports, tiny_export, precision):
    folder, kind = exports(precision), TYPES[precision]
    for name, expected in (("dense", DENSE + MLPS), ("portable", DENSE), ("tensorrt", DENSE)):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=name != "tensorrt")
        model = onnx.load(folder / f"{name}.onnx")
        stored = {t.name: t for t in model.graph.initializer}
        makers = {v: n for n in model.graph.node for v in n.output}
        found = set()
        for node in model.graph.node:
            owner = node.name.rpartition("/")[0]
            if node.op_type == "QuantizeLinear":
                scale, zero = stored[node.input[1]], stored[node.input[2]]
                assert scale.data_type == kind and not scale.dims
                assert zero.data_type == onnx.TensorProto.INT8 and numpy_helper.to_array(zero) == 0
                found.add(owner)
            elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
                weight, scale = stored[node.input[0]], stored[node.input[1]]
                axis = next(a.i for a in node.attribute if a.name == "axis")
                assert weight.data_type == onnx.TensorProto.INT8 and scale.data_type == kind
                assert scale.dims == [weight.dims[axis]] and np.abs(numpy_helper.to_array(weight).astype(int)).max() == 127
            elif owner in expected and node.op_type in ("MatMul", "Gemm", "Conv"):
                assert [makers[v].op_type for v in node.input[:2]] == ["DequantizeLinear"] * 2, node.name
        assert found == set(expected)
        assert (OP_TYPE in {node.op_type for node in model.graph.node}) == (name == "tensorrt")
        for node in model.graph.node:
            if node.op_type == OP_TYPE:
                assert {stored[v].data_type for v in node.input[3:7]} == {kind}
    reference = onnx.load(folder / "reference.onnx")
    assert not [n for n in reference.graph.node if "Quantize" in n.op_type]
    stored = read_manifest(folder, "export.json", "moee.export/1")
    assert stored["precision"] == precision and set(stored["quantization"]) == {"dense", "moee"}
    assert (folder / "dense.data").stat().st_size < 0.4 * (tiny_export.folder() / "dense.data").stat().st_size


@pytest.mark.parametrize("precision", TYPES)
def test_verify_passes_and_holds_accuracy_against_float32(exports, tiny_export, precision):
    result = verify(exports(precision), tiny_export.moee, tiny_export.data, sizes=(1, 4, 16))
    assert result and result.parity.first_deviation is None, [c for c in result.cases() if c.failure]
    assert result.parity.arithmetic == f"int8 and {'float16' if precision == 'int8' else 'float32'}"
    assert result.parity.to_json()["tolerance"]["rule"].startswith("3 times")
    plain = verify(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=(1,))
    assert result.accuracy.dense_top1 == plain.accuracy.dense_top1
    assert result.accuracy.kl != plain.accuracy.kl


def change_int8(folder, layer: str, part: int, change, graphs=("portable.onnx", "tensorrt.onnx")) -> None:
    """Change an input of the nodes that quantise `layer`: part 0 the weight, 1 the scale of its input."""
    for name in graphs:
        model = onnx.load(folder / name)
        stored = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.name.startswith(f"{layer}/") and (
                part == 0 and node.op_type == "DequantizeLinear" and node.input[0] in stored
                or part == 1 and node.op_type == "QuantizeLinear"
            ):  # fmt: skip
                tensor = stored[node.input[part]]
                changed = np.asarray(change(numpy_helper.to_array(tensor).copy()))
                tensor.CopyFrom(numpy_helper.from_array(changed.astype(numpy_helper.to_array(tensor).dtype), tensor.name))
        onnx.save(model, folder / name)
    rehash(folder)


def one_bit(q):
    q.flat[7] ^= 1
    return q


@pytest.mark.parametrize(
    ("layer", "part", "change", "graphs"),
    [
        ("blocks.1.attn.qkv", 0, one_bit, ("portable.onnx", "tensorrt.onnx")),
        ("patch_embed.proj", 0, one_bit, ("tensorrt.onnx",)),
        ("blocks.2.attn.proj", 1, lambda s: s * 1.01, ("portable.onnx",)),
        ("head", 1, lambda s: s * 2, ("tensorrt.onnx",)),
    ],
    ids=["weight", "weight of the engine's graph", "scale", "scale of the engine's graph"],
)
def test_planted_damage_is_caught_and_named(exports, tiny_export, tmp_path, layer, part, change, graphs):
    folder = shutil.copytree(exports("int8"), tmp_path / "export")
    change_int8(folder, layer, part, change, graphs)
    result = verify(folder, tiny_export.moee, tiny_export.data, sizes=(2,), images=0)
    assert not result
    failed = [c for c in result.cases() if c.failure and c.group == "weights"]
    assert [c.name for c in failed] == [layer] and graphs[0] in failed[0].failure or graphs[-1] in failed[0].failure


def test_a_manifest_without_its_scales_is_refused(exports, tiny_export, tmp_path):
    folder = shutil.copytree(exports("int8"), tmp_path / "export")
    manifest = json.loads((folder / "export.json").read_text())
    negative = json.loads(json.dumps(manifest["quantization"]))
    negative["moee"]["input_scales"]["head"] = -1.0
    cases = ((None, "does not say how its int8 graphs are quantised"), ({}, "does not say how"), (negative, "head"))
    for nonsense, said in cases:
        write_json(folder / "export.json", {**manifest, "quantization": nonsense})
        with pytest.raises(UserError, match=said):
            verify(folder, tiny_export.moee, tiny_export.data, sizes=(2,), images=0)
    other = json.loads(json.dumps(manifest["quantization"]))
    other["moee"]["input_scales"]["blocks.9.attn.qkv"] = 0.1
    write_json(folder / "export.json", {**manifest, "quantization": other})
    with pytest.raises(UserError, match="blocks.9.attn.qkv"):
        verify(folder, tiny_export.moee, tiny_export.data, sizes=(2,), images=0)


def test_an_engine_is_held_against_the_quantised_model(exports, tiny_export):
    """ONNX Runtime in the place of the engine; without the scales the yardstick is another model."""
    from exporter.graph.export import read_quantization
    from exporter.runners import OnnxRunner

    folder = exports("int8-fp32")
    quantization = read_quantization(read_manifest(folder, "export.json", "moee.export/1"), "moee")
    with OnnxRunner(folder / "portable.onnx") as runner:
        given = (runner, tiny_export.moee, tiny_export.data, "int8-fp32", (1, 4))
        assert all(b.passed for b in run_engine(*given, quantization=quantization))
        assert not all(b.passed for b in run_engine(*given))


def test_the_command(tiny_export, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("moee.data.sources.load_data", lambda source, *a, **k: asked.append(source) or tiny_export.data)
    model = str(tiny_export.root / "model")

    def run(*words):
        code = cli.main(["export", model, "--out", str(tmp_path / "out"), *words])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    code, text = run("--precision", "fp16", "--calibration-images", "8")
    assert code == 2 and "--precision fp16 is not calibrated" in text
    with pytest.raises(SystemExit, match="2"):
        run("--precision", "int8", "--data", "x", "--calibration-images", "0")
    assert "--calibration-images: expected a whole number from 1" in capsys.readouterr().err and not (tmp_path / "out").exists()
    code, text = run("--precision", "int8-fp32", "--data", "photos", "--calibration-images", "16")
    assert code == 0 and "moee: 8 dense layers in int8" in text and "on 16 images of tiny" in text and asked == ["photos"]


def test_a_bundle_leaves_the_reference_out(exports, tmp_path):
    models = write_deployment(exports("int8"), tmp_path / "bundle", 87, built.kernels, (1, 4, 16)) / "models"
    assert not list(models.glob("reference*"))
    manifest = read_manifest(models, "export.json", "moee.export/1")  # its files are there, with their hashes
    assert set(manifest["graphs"]) == {"dense", "portable", "tensorrt"} and manifest["precision"] == "int8"


def test_the_report_says_what_is_quantised(exports, tmp_path):
    text = write_report([exports("int8")], tmp_path / "report.html").read_text()
    assert "dense model: 14 dense layers in int8" in text and "MoEE model: 8 dense layers in int8" in text
    assert "moee export extracted --precision int8 --calibration-images 32 --data tiny --out export" in text


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra rtx")
@pytest.mark.parametrize("precision", TYPES)
def test_engines_build_on_the_cpu(exports, tmp_path, precision):
    log = tmp_path / "log.txt"
    report = build_engines(exports(precision), tmp_path / "engine", plugin=built.plugin(), batch=(1, 4, 8), log=log)
    assert report.plugin_layers == 3
    assert "blocks.1.attn.qkv/node_QuantizeLinear" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("precision", TYPES)
def test_dinov2_small(tmp_path, precision):
    """The real backbone with its weights: exported, verified, accurate, and built on the CPU."""
    from exporter.pretrained import resolve
    from moee.artifacts.model import MoeeModel
    from moee.data.sources import load_data
    from moee.data.transform import model_transform
    from moee.methods.recipe import Recipe, method_options
    from moee.models.model import load_model
    from tests.conftest import extract

    spec = resolve("dinov2-s", "digits")
    model = load_model(spec)
    train, val = (load_data("digits", model_transform(model), split) for split in ("train", "val"))
    config = method_options(
        clustering="kmeans", clusters=8, cluster_tokens=1000, tokens=4000, keep=0.95, compensation="mean"
    )
    extract(model, train, config)
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "digits")
    export(moee, tmp_path / "export", precision=precision)
    result = verify(tmp_path / "export", moee, val, sizes=(1, 4), images=0)
    assert result, [c for c in result.cases() if c.failure]
    found = read_manifest(tmp_path / "export", "export.json", "moee.export/1")["quantization"]
    assert not found["moee"]["kept"] and found["moee"]["sqnr_db"] > 25 and found["dense"]["sqnr_db"] > 20
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        report = build_engines(tmp_path / "export", tmp_path / "engine", plugin=built.plugin(), batch=(1, 4, 8))
        assert report.plugin_layers == 12




@pytest.mark.slow
def test_beside_clear_moe_layers(tiny_export, tmp_path):
    """Factors and routers of a CLEAR-MoE layer stay as they are, in both of its forms."""
    moee = copy.deepcopy(tiny_export.moee)
    replace_module(moee.model, "blocks.1.mlp", random_layer(experts=3, ranks=(6, 2, 5, 3), dim=32, hidden=128, width=9, seed=1))
    torch.manual_seed(0)
    export(moee, tmp_path / "export", precision="int8", calibration=tiny_export.data, calibration_images=16)
    result = verify(tmp_path / "export", moee, tiny_export.data, sizes=(1, 4), images=0)
    assert result, [c for c in result.cases() if c.failure]
    assert [layer.kind for layer in result.parity.layers] == ["moee", "clear-moe", "moee"]
    found = read_manifest(tmp_path / "export", "export.json", "moee.export/1")["quantization"]["moee"]
    assert sorted(found["input_scales"]) == sorted(DENSE)
