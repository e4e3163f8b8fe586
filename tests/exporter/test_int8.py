"""int8 exports: arithmetic, calibration and its rule, what stands in the graphs, and that verify finds what is planted."""

import copy
import importlib.util
import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from exporter import cli
from exporter.bundle import write_deployment
from exporter.engine import build_engines
from exporter.onnx_export import export
from exporter.quantization import QuantConv2d, QuantLinear, calibrate, quantizable, quantized
from exporter.quantization.calibrate import Histogram, sqnr_db
from exporter.quantization.ops import dequantize, quantize_dequantize
from exporter.report import write_report
from exporter.verify import verify
from exporter.verify.suite import run_engine
from moee.artifact import read_manifest, write_json
from moee.errors import UserError
from moee.layer import routed_layers
from moee.models import replace_module
from plugins.contract import OP_TYPE
from tests.conftest import tiny_images
from tests.exporter.conftest import rehash
from tests.exporter.test_clear_export import random_layer
from tests.plugins import built

TYPES = {"int8": onnx.TensorProto.FLOAT16, "int8-fp32": onnx.TensorProto.FLOAT}
DENSE = ["patch_embed.proj", *(f"blocks.{i}.attn.{part}" for i in range(3) for part in ("qkv", "proj")), "head"]
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


# arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_steps_are_those_of_onnx_runtime(dtype):
    """Ties go to the even step, values beyond the range are clipped, zero stays zero."""
    scale = torch.tensor(0.25, dtype=dtype)
    x = torch.cat([torch.arange(-40, 40) * 0.125, torch.tensor([1e4, -1e4, 31.8, -32.2, 0.0]), torch.randn(500) * 20]).to(dtype)
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, kind, [None]) for n in "xy"]
    stored = [numpy_helper.from_array(scale.numpy(), "s"), numpy_helper.from_array(np.array(0, np.int8), "z")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.numpy()})[0]
    assert np.array_equal(quantize_dequantize(x, scale).numpy(), expected)
    assert quantize_dequantize(torch.tensor([0.125, 0.375]).to(dtype), scale).tolist() == [0.0, 0.5]


def test_weights_are_those_of_onnx_runtimes_quantiser():
    from onnxruntime.quantization.quant_utils import quantize_data

    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 5)
    made = QuantLinear(linear, 0.1, torch.float32)
    for channel, row in enumerate(linear.weight.detach().numpy()):
        _, scale, q = quantize_data(row, onnx.TensorProto.INT8, symmetric=True)
        assert np.isclose(float(made.scale[channel]), float(np.ravel(scale)[0]), rtol=1e-6)
        assert np.abs(made.q[:, channel].numpy().astype(int) - np.asarray(q).astype(int)).max() <= 1
    error = (dequantize(made.q, made.scale, 1).T - linear.weight).abs()
    assert bool((error <= made.scale[:, None] / 2 + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_dead_channel_and_a_dead_input_stay_finite(dtype):
    conv = torch.nn.Conv2d(3, 4, 2, stride=2)
    with torch.no_grad():
        conv.weight[1] = 0
        conv.weight[2] *= 1e-9
    made = QuantConv2d(conv, 0.0, dtype).to(dtype)
    assert bool((made.scale > 0).all()) and bool(made.input_scale > 0)
    y = made(torch.zeros(1, 3, 4, 4, dtype=dtype))
    assert torch.isfinite(y).all() and torch.allclose(y[0, :, 0, 0].float(), conv.bias.float(), atol=1e-2)


def test_closest_calls_move_one_value_an_image_by_one_step():
    layer = QuantLinear(torch.nn.Linear(6, 2), 1.0, torch.float32)
    x = torch.tensor([[[0.1, 2.4, 5.0, 7.45, -3.2, 0.0]], [[200.0, 1.0, -0.6, 3.0, 0.0, 127.49]]])
    layer.closest_calls = True
    moved, _ = layer.operands(x)
    layer.closest_calls = False
    plain, _ = layer.operands(x)
    assert (moved - plain).tolist() == [[[0, 0, 0, 1, 0, 0]], [[0, 0, 1, 0, 0, 0]]]


# calibration


def test_the_histogram_grows_without_losing_counts():
    histogram, random = Histogram(), np.random.default_rng(0)
    parts = [random.normal(0, s, 1000).astype(np.float32) for s in (0.1, 5.0, 0.3, 40.0)]
    for part in parts:
        histogram.add(torch.from_numpy(part))
    everything = np.abs(np.concatenate(parts))
    assert histogram.counts.sum() == 4000 and histogram.largest == everything.max() <= histogram.top
    expected, _ = np.histogram(everything, 16, (0, histogram.top))
    assert np.abs(histogram.counts.reshape(16, -1).sum(1) - expected).max() <= 2  # values on a border
    assert Histogram().step("mse") == 1.0


def test_mse_steps_clip_an_outlier_and_are_near_the_best():
    random = np.random.default_rng(0)
    values = np.append(random.normal(0, 1, 200_000), [60.0]).astype(np.float32)
    histogram = Histogram()
    histogram.add(torch.from_numpy(values))

    def error(step: float) -> float:
        return float(((values - np.clip(np.round(values / step), -128, 127) * step) ** 2).mean())

    largest, mse = histogram.step("largest"), histogram.step("mse")
    assert largest == pytest.approx(60 / 127) and mse < 0.8 * largest
    assert error(mse) <= 1.1 * min(error(s) for s in np.linspace(0.01, largest, 400))


class Fragile(torch.nn.Module):
    """Two layers; the second one's inputs span six orders of magnitude that all matter to the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.fragile = torch.nn.Linear(12, 12), torch.nn.Linear(12, 4, bias=False)
        self.unused, self.table = torch.nn.Linear(3, 3), torch.nn.Linear(2, 4)
        span = torch.logspace(-3, 3, 12)
        self.register_buffer("span", span)
        with torch.no_grad():
            self.fragile.weight.copy_(torch.randn(4, 12) / span)

    def forward(self, images):
        return self.fragile(self.fine(images[:, :1, :3, :4].flatten(1)) * self.span) + self.table(torch.zeros(6, 2)).mean()


def test_layers_that_lose_too_much_are_kept_and_named():
    data = tiny_images()
    model = Fragile().eval()
    result = calibrate(model, data, torch.float32, 32)
    assert set(result.input_scales) == {"fine"} and set(result.kept) == {"fragile", "unused", "table"}
    assert "dB" in result.kept["fragile"] and "never calls it" in result.kept["unused"]
    assert result.kept["table"] == "its input does not depend on the images"
    assert result.sqnr_db >= 20 and result.images == 32 and result.data == "tiny"
    everything = calibrate(model, data, torch.float32, 32, min_sqnr_db=-100)
    assert set(everything.input_scales) == {"fine", "fragile"} and everything.sqnr_db < 20
    nothing = calibrate(model, data, torch.float32, 32, min_sqnr_db=500)
    assert nothing.input_scales == {} and set(nothing.kept) == {"fine", "fragile", "unused", "table"}


def test_the_better_way_to_set_steps_is_taken(tiny_model):
    data = tiny_images()
    result = calibrate(tiny_model, data, torch.float32, 48)
    x = data.images[torch.randperm(48, generator=torch.Generator().manual_seed(0))[:32]]
    with torch.inference_mode():
        reached = sqnr_db(tiny_model(x), quantized(tiny_model, result.input_scales, torch.float32)(x))
    assert result.method in ("largest", "mse") and reached == pytest.approx(result.sqnr_db, abs=0.01) and reached > 20


def test_routed_layers_are_left_alone(tiny_moee):
    model = tiny_moee[0]
    assert list(quantizable(model)) == DENSE
    made = quantized(model, dict.fromkeys(DENSE, 0.1), torch.float16)
    for name, layer in routed_layers(made).items():
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), routed_layers(model)[name].buffers(), strict=True))
    assert sum(isinstance(m, (QuantLinear, QuantConv2d)) for m in made.modules()) == len(DENSE)
    with pytest.raises(UserError, match="quantises 'blocks.0.mlp', which is no dense layer"):
        quantized(model, {"blocks.0.mlp": 0.1}, torch.float16)


# graphs


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
    from exporter.onnx_export import read_quantization
    from exporter.runners import OnnxRunner

    folder = exports("int8-fp32")
    quantization = read_quantization(read_manifest(folder, "export.json", "moee.export/1"), "moee")
    with OnnxRunner(folder / "portable.onnx") as runner:
        given = (runner, tiny_export.moee, tiny_export.data, "int8-fp32", (1, 4))
        assert all(b.passed for b in run_engine(*given, quantization=quantization))
        assert not all(b.passed for b in run_engine(*given))


def test_the_command(tiny_export, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("moee.data.load_data", lambda source, *a, **k: asked.append(source) or tiny_export.data)
    model = str(tiny_export.root / "model")

    def run(*words):
        code = cli.main(["export", model, "--out", str(tmp_path / "out"), *words])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    code, text = run("--precision", "fp16", "--calibration-images", "8")
    assert code == 2 and "--precision fp16 is not calibrated" in text
    code, text = run("--precision", "int8", "--data", "x", "--calibration-images", "0")
    assert code == 2 and "--calibration-images 0: expected 1 or more" in text and not (tmp_path / "out").exists()
    code, text = run("--precision", "int8-fp32", "--data", "photos", "--calibration-images", "16")
    assert code == 0 and "moee: 8 dense layers in int8" in text and "on 16 images of tiny" in text and asked == ["x", "photos"]


def test_a_bundle_leaves_the_reference_out(exports, tmp_path):
    models = write_deployment(exports("int8"), tmp_path / "bundle", 87, built.kernels(), (1, 4, 16)) / "models"
    assert not list(models.glob("reference*"))
    manifest = read_manifest(models, "export.json", "moee.export/1")  # its files are there, with their hashes
    assert set(manifest["graphs"]) == {"dense", "portable", "tensorrt"} and manifest["precision"] == "int8"


def test_the_report_says_what_is_quantised(exports, tmp_path):
    text = write_report([exports("int8")], tmp_path / "report.html").read_text()
    assert "dense model: 14 dense layers in int8" in text and "MoEE model: 8 dense layers in int8" in text
    assert "moee export extracted --precision int8 --calibration-images 32 --out export" in text


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
    from moee.checkpoint import MoeeModel
    from moee.config import make_extract_config
    from moee.convert import extract
    from moee.data import load_data, model_transform
    from moee.models import load_model

    spec = resolve("dinov2-s", "digits")
    model = load_model(spec)
    train, val = (load_data("digits", model_transform(model), split) for split in ("train", "val"))
    config = make_extract_config(
        clustering="kmeans", clusters=8, cluster_tokens=1000, tokens=4000, keep=0.95, compensation="mean"
    )
    extract(model, train, config)
    moee = MoeeModel(model.eval(), spec, config, "digits")
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
