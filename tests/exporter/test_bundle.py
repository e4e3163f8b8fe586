"""What `moee bundle` writes: files and hashes, configurations that parse, graphs that agree; and that it compiles."""

import configparser
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from exporter import cli
from exporter.engines import plugin_cache
from exporter.graph.export import SCHEMA, export
from exporter.manifests import exported_model, read_export
from exporter.passes.raw_pixels import take_raw_pixels
from exporter.ship import bundle_configs, contents, selftest_layers
from exporter.ship.contents import Preprocessing, Tensor, ends_in_classes, make_preprocessing, read_contents, read_head
from exporter.ship.cpu_bundle import write_cpu_bundle
from exporter.ship.deployment import DEPLOYMENT_SCHEMA, write_deployment
from moee.artifacts import checkpoint
from moee.artifacts.checkpoint import laid_out
from moee.artifacts.model import MoeeModel
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.measure.probe import Probe
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, load_model
from moee.store.artifact import read_manifest, sha256_file, write_manifest
from moee.store.result_kinds import CARD
from moee.store.tensor_file import write_tensors
from plugins.library.build import select_headers
from plugins.library.selftest import read_selftest
from tests.conftest import extract, tiny_images, tiny_spec
from tests.exporter.textproto import parse
from tests.plugins import built, selftest_double

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One export and one bundle for the tests that only read."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_CACHE", str(folder / "cache"))
        model = load_model(tiny_spec())
        config = method_options(clustering="kmeans", clusters=4, cluster_tokens=500)
        extract(model, tiny_images(), config)
    export(MoeeModel(model.eval(), tiny_spec(), Recipe.of(config), "tiny"), folder / "export")
    write_deployment(folder / "export", folder / "bundle", 87, built.kernels, (1, 4, 16))
    return folder


@pytest.fixture
def written(shared):
    return shared / "bundle"


@pytest.fixture
def exported(shared, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(shared / "export", tmp_path / "export")


def facts(**changes) -> bundle_configs.Facts:
    given = Tensor("input", "float32", (3, 32, 32))
    recipe = Preprocessing((32, 32), (35, 35), "center", "bicubic", MEAN, STD)
    values = dict(given=given, output=Tensor("output", "float32", (10,)), recipe=recipe,
                  batch=(1, 4, 16), classes=10, classifies=True, sm=87, model="tiny")  # fmt: skip
    return bundle_configs.Facts(**{**values, **changes})


def test_files_and_hashes(written):
    manifest = read_manifest(written, "deployment.json", DEPLOYMENT_SCHEMA)
    assert manifest["sm"] == 87 and manifest["batch"] == {"min": 1, "opt": 4, "max": 16} and manifest["classes"] == 10
    names = {p.relative_to(written).as_posix() for p in written.rglob("*") if p.is_file()}
    assert names - {"deployment.json"} == set(manifest["files"])
    sums = dict(reversed(line.split("  ", 1)) for line in (written / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == names - {"deployment.json", "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((written / name).read_bytes()).hexdigest() == digest, name
    for name in ("build.sh", "triton/start.sh"):
        assert os.access(written / name, os.X_OK)
        assert subprocess.run(["sh", "-n", str(written / name)]).returncode == 0
    assert {"models/tensorrt.onnx", "models/portable.onnx", "models/dense.onnx", "models/moee.data", "models/dense.data",
            "plugin/CMakeLists.txt", "runner/CMakeLists.txt", "runner/compat/cuda_runtime_api.h", "selftest/CMakeLists.txt",
            "selftest/main.cpp", "selftest/cases.bin"} <= names  # fmt: skip
    assert not [n for n in names if n.endswith((".pyc", ".py")) or "__pycache__" in n]


def test_the_bundle_has_the_card_of_its_export(shared, written, exported, tmp_path):
    text = (shared / "export" / CARD).read_text()
    assert (written / CARD).read_text() == text and "Precision: `fp32`" in text and "| `blocks.0.mlp` | experts | 4 |" in text
    assert CARD in read_export(exported)["files"] and "MODEL_CARD.md" in (written / "README.md").read_text()
    body = read_manifest(exported, "export.json", SCHEMA)
    del body["files"][CARD]
    (exported / "export.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=f"no hash of {CARD}"):
        read_export(exported)
    (exported / CARD).unlink()
    write_cpu_bundle(exported, tmp_path / "bundle")
    later = (tmp_path / "bundle" / CARD).read_text()
    assert "Layer by layer: not known" in later and "portable.onnx nothing: 3" in later
    assert CARD in (tmp_path / "bundle" / "SHA256SUMS").read_text()


@pytest.mark.parametrize("name", ["moee", "dense", "moee_onnx"])
def test_triton_configuration(written, name):
    config = parse((written / "triton" / "model_repository" / name / "config.pbtxt").read_text())
    assert config["name"] == [name] and config["max_batch_size"] == [16]
    assert config["platform"] == ["onnxruntime_onnx" if name == "moee_onnx" else "tensorrt_plan"]
    assert config["input"] == [{"name": ["input"], "data_type": ["TYPE_FP32"], "dims": [3, 32, 32]}]
    assert config["output"] == [{"name": ["output"], "data_type": ["TYPE_FP32"], "dims": [10]}]
    assert config["dynamic_batching"] == [{"preferred_batch_size": [4, 16], "max_queue_delay_microseconds": [1000]}]
    assert ("model_warmup" in config) == (name != "moee_onnx")


@pytest.mark.parametrize("bad", ["name moee", "name: [ 1", 'name: "x" }', 'name: "open', "x: { y: 1", "= 3"])
def test_the_parser_refuses_what_is_no_text_format(bad):
    with pytest.raises((ValueError, IndexError)):
        parse(bad)


@pytest.fixture(scope="module")
def triton_schema():
    """The server's own protobuf schema, from its client package. Loaded by its path: the package around it wants gRPC."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the extra dev")
    path = Path(spec.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    loaded = importlib.util.spec_from_file_location("model_config_pb2", path)
    schema = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(schema)
    return schema


@pytest.mark.parametrize("name", ["moee", "dense", "moee_onnx"])
def test_triton_configuration_with_the_vendors_schema(written, triton_schema, name):
    from google.protobuf import text_format

    text = (written / "triton" / "model_repository" / name / "config.pbtxt").read_text()
    config = text_format.Parse(text, triton_schema.ModelConfig())
    assert config.name == name and config.max_batch_size == 16 and config.input[0].data_type == triton_schema.TYPE_FP32
    kinds = triton_schema.ModelInstanceGroup
    assert config.instance_group[0].kind == (kinds.KIND_AUTO if name == "moee_onnx" else kinds.KIND_GPU)
    assert [w.batch_size for w in config.model_warmup] == ([] if name == "moee_onnx" else [16])
    for broken in (text.replace("max_batch_size", "max_batch"), text.replace("TYPE_FP32", "TYPE_FLOAT")):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(broken, triton_schema.ModelConfig())


def test_strange_names_with_the_vendors_schema(triton_schema):
    from google.protobuf import text_format

    schema = triton_schema
    strange = facts(given=Tensor('in"\\\n#é', "float16", (3, 8, 8)), batch=(2, 4, 4))
    for platform in ("tensorrt_plan", "onnxruntime_onnx"):
        config = text_format.Parse(bundle_configs.triton(strange, "moee", platform), schema.ModelConfig())
        assert config.input[0].name == 'in"\\\n#é' and config.input[0].data_type == schema.TYPE_FP16
        assert list(config.dynamic_batching.preferred_batch_size) == [4]


def test_strange_names_survive_every_format(tmp_path):
    name = "in put'\"\\$(touch x)\n#é"
    texts = bundle_configs.files(facts(given=Tensor(name, "float16", (3, 8, 8))))
    assert parse(texts["triton/model_repository/moee/config.pbtxt"])["input"][0]["name"] == [name]
    assert parse(texts["triton/model_repository/moee/config.pbtxt"])["input"][0]["data_type"] == ["TYPE_FP16"]
    (tmp_path / "bundle.env").write_text(texts["bundle.env"])
    script = '. ./bundle.env; printf %s "$INPUT|$SHAPE|$MIN_BATCH"'
    shown = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout == f"{name}|3x8x8|1" and not (tmp_path / "x").exists()


def test_class_names_are_in_every_format(triton_schema):
    """As they are, but for the semicolon that separates nvinfer's labels."""
    from google.protobuf import text_format

    names = ("cat; dog", 'qu"o\\te', "日本 [x]", "$(touch x)")
    texts = bundle_configs.files(facts(names=names, classes=4, output=Tensor("output", "float32", (4,))))
    for name in ("moee", "dense", "moee_onnx"):
        folder = f"triton/model_repository/{name}"
        config = text_format.Parse(texts[f"{folder}/config.pbtxt"], triton_schema.ModelConfig())
        assert texts[f"{folder}/{config.output[0].label_filename}"].splitlines() == list(names)
    assert texts["models/labels.txt"].splitlines() == list(names)
    assert texts["deepstream/labels.txt"] == 'cat, dog;qu"o\\te;日本 [x];$(touch x)\n'
    unknown = bundle_configs.files(facts(classes=2))
    assert unknown["deepstream/labels.txt"] == "class 0;class 1\n" and "models/labels.txt" not in unknown
    assert "label_filename" not in unknown["triton/model_repository/moee/config.pbtxt"]
    features = bundle_configs.files(facts(names=names, classes=4, classifies=False))
    assert "models/labels.txt" in features and "label_filename" not in features["triton/model_repository/moee/config.pbtxt"]
    assert "models/labels.txt" in features["README.md"] and "--output" not in features["README.md"]
    bare = bundle_configs.files(facts(names=(), classes=None, classifies=False))
    assert "--images ppm --output features" in bare["README.md"]


@pytest.mark.parametrize("classes", [10, None])
def test_the_script_says_classes_where_their_names_are_not_known(classes, exported, tmp_path, capsys):
    """As after `compress` by images without class folders; a backbone without a classifier has features."""
    body = json.loads((exported / "export.json").read_text())
    kept = {key: value for key, value in body.items() if key not in ("schema", "files", "tools", "classes")}
    write_manifest(exported, "export.json", SCHEMA, kept)
    bundle = write_cpu_bundle(exported, tmp_path / "bundle")
    assert not (bundle / "models" / "labels.txt").exists()
    manifest = bundle / "deployment.json"
    deployed = json.loads(manifest.read_text())
    assert deployed["classes"] == 10
    manifest.write_text(json.dumps({**deployed, "classes": classes}))
    Image.new("RGB", (40, 40), (200, 90, 10)).save(tmp_path / "image.png")
    script = importlib.util.module_from_spec(importlib.util.spec_from_file_location("run", bundle / "run.py"))
    script.__spec__.loader.exec_module(script)
    assert script.main([str(tmp_path / "image.png")]) == 0
    said = capsys.readouterr().out
    expected = r"image\.png: class \d \(\d+\.\d%\)" if classes else r"image\.png: features \[10\], length \d+\.\d+"
    assert re.search(expected, said), said


def test_names_travel_from_the_export_and_must_fit(exported, tmp_path):
    body = json.loads((exported / "export.json").read_text())
    kept = {key: value for key, value in body.items() if key not in ("schema", "files", "tools")}
    names = [f"class of {i}" for i in range(10)]
    write_manifest(exported, "export.json", SCHEMA, {**kept, "classes": names})
    out = write_deployment(exported, tmp_path / "bundle", 87, built.kernels)
    assert (out / "models" / "labels.txt").read_text().splitlines() == names
    assert read_manifest(out, "deployment.json", DEPLOYMENT_SCHEMA)["class_names"] == names
    write_manifest(exported, "export.json", SCHEMA, {**kept, "classes": names[:9]})
    with pytest.raises(UserError, match="names 9 classes, the model tells 10 apart"):
        write_deployment(exported, tmp_path / "other", 87, built.kernels)
    write_manifest(exported, "export.json", SCHEMA, {**kept, "classes": [*names[:9], "a\nb"]})
    with pytest.raises(UserError, match="control characters"):
        write_deployment(exported, tmp_path / "other", 87, built.kernels)


# Keys of nvinfer's group [property] as DeepStream's manual lists them (Gst-nvinfer, "File Configuration Specifications"), those
# of Caffe and UFF models left out, with the form of the values of those that are written here.
NVINFER_KEYS = """
    auto-inc-mem batch-size class-attrs-all classifier-async-mode classifier-threshold classifier-type cluster-mode
    custom-lib-path custom-network-config disable-output-host-copy enable-dbscan enable-dla engine-create-func-name
    filter-out-class-ids force-implicit-batch-dim gie-unique-id gpu-id infer-dims input-object-max-height input-object-max-width
    input-object-min-height input-object-min-width input-tensor-from-meta int8-calib-file interval labelfile-path
    layer-device-precision maintain-aspect-ratio max-gpu-mem-per mean-file model-color-format model-engine-file net-scale-factor
    network-input-order network-mode network-type num-detected-classes offsets onnx-file operate-on-class-ids operate-on-gie-id
    output-blob-names output-instance-mask output-io-formats output-tensor-meta parse-bbox-func-name
    parse-bbox-instance-mask-func-name parse-classifier-func-name process-mode scaling-compute-hw scaling-filter
    secondary-reinfer-interval segmentation-output-order segmentation-threshold symmetric-padding tensor-meta-pool-size
    tlt-encoded-model tlt-model-key use-dla-core workspace-size
""".split()
NVINFER_FORMS = {
    **dict.fromkeys(("gpu-id", "gie-unique-id", "batch-size"), r"\d+"),
    **dict.fromkeys(("net-scale-factor", "classifier-threshold"), r"\d+\.\d+"),
    **dict.fromkeys(("maintain-aspect-ratio", "output-tensor-meta"), "[01]"),
    **dict.fromkeys(("onnx-file", "model-engine-file", "custom-lib-path", "labelfile-path"), r"[\w./-]+"),
    "process-mode": "[12]", "model-color-format": "[012]", "network-mode": "[012]", "network-type": "[0123]|100",
    "infer-dims": r"\d+;\d+;\d+", "offsets": r"[\d.]+;[\d.]+;[\d.]+", "output-blob-names": ".+",
}  # fmt: skip


def nvinfer_problems(text: str) -> list[str]:
    """What nvinfer would not know or take, read as GLib reads a key file: one group, comments on lines of their own."""
    config = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), strict=True)
    config.read_string(text)
    problems = [f"group {name}" for name in config.sections() if name != "property"]
    for key, value in config["property"].items():
        if key not in NVINFER_KEYS:
            problems.append(f"unknown key {key}")
        elif not re.fullmatch(NVINFER_FORMS[key], value):
            problems.append(f"{key}={value}")
    return problems


@pytest.mark.parametrize("type_", ["float32", "float16"])
@pytest.mark.parametrize("classifies", [True, False])
def test_deepstream_keys_are_those_of_the_manual(classifies, type_):
    made = facts(classifies=classifies, given=Tensor("input", type_, (3, 32, 32)))
    text = bundle_configs.files(made)["deepstream/config_infer_moee.txt"]
    assert nvinfer_problems(text) == []
    assert nvinfer_problems(text.replace("onnx-file=", "onnx=")) == ["unknown key onnx"]
    assert nvinfer_problems(text.replace("offsets=0;0;0", "offsets=0,0,0")) == ["offsets=0,0,0"]
    assert nvinfer_problems(text.replace("process-mode=1", "process-mode=3")) == ["process-mode=3"]


@pytest.mark.parametrize("classifies", [True, False])
def test_deepstream_configuration(classifies):
    texts = bundle_configs.files(facts(classifies=classifies))
    config = configparser.ConfigParser()
    config.read_string(texts["deepstream/config_infer_moee.txt"])
    values = config["property"]
    assert values["infer-dims"] == "3;32;32" and values["batch-size"] == "4" and values["net-scale-factor"] == "1.0"
    assert (values["network-type"] == "1") == classifies == ("deepstream/labels.txt" in texts)
    assert ("output-tensor-meta" in values) != classifies


def session(path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("softmax", [False, True])
def test_the_graph_on_raw_pixels_agrees(exported, softmax):
    """tensorrt.onnx needs the plugin, so the same pass is checked on the portable graph."""
    take_raw_pixels(exported / "portable.onnx", exported / "pixels.onnx", MEAN, STD, softmax)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.float32)
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (MEAN, STD))
    (expected,) = session(exported / "portable.onnx").run(None, {"input": (pixels / 255 - mean) / std})
    (got,) = session(exported / "pixels.onnx").run(None, {"input": pixels})
    if softmax:
        expected = torch.from_numpy(expected).softmax(1).numpy()
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert (exported / "pixels.onnx").stat().st_size < 300_000, "weights stay in the shared file"


@pytest.mark.parametrize("size", [None, [96, 64]])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "deit_tiny_patch16_224"])
def test_the_recipe_is_that_of_timm(name, size):
    config = resolve_model_data_config(timm.create_model(name))
    size = size or config["input_size"][-1]
    config["input_size"] = (3, *size) if isinstance(size, list) else (3, size, size)
    spec = ModelSpec(name=name, timm_name=name, kwargs={"img_size": size})
    recipe = make_preprocessing(model_transform(laid_out(spec, Path("export.json"))), name)
    steps = create_transform(**config, is_training=False).transforms
    assert recipe.resize == ((steps[0].size,) * 2 if isinstance(steps[0].size, int) else steps[0].size)
    assert recipe.size == tuple(steps[1].size) and recipe.filter == steps[0].interpolation.value == config["interpolation"]
    assert np.allclose(recipe.mean, steps[3].mean) and np.allclose(recipe.std, steps[3].std)


def test_the_head_travels_with_a_backbone(tmp_path):
    spec = tiny_spec(num_classes=0, depth=1)
    model = load_model(spec)
    config = method_options(clustering="kmeans", clusters=2, cluster_tokens=300)
    extract(model, tiny_images(), config)
    probe = Probe(torch.randn(7, 32), torch.randn(7))
    moee = MoeeModel(model.eval(), spec, Recipe.of(config), "tiny", probe, {})
    checkpoint.save(moee, tmp_path / "model")
    export(moee, tmp_path / "export", source=tmp_path / "model")
    out = write_deployment(tmp_path / "export", tmp_path / "bundle", 87, built.kernels)
    data = (out / "models" / "head.bin").read_bytes()
    assert struct.unpack("<ii", data[:8]) == (7, 32)
    values = np.frombuffer(data[8:], "<f4")
    np.testing.assert_array_equal(values[: 7 * 32].reshape(7, 32), probe.weight.numpy())
    np.testing.assert_array_equal(values[7 * 32 :], probe.bias.numpy())
    assert "--head models/head.bin" in (out / "README.md").read_text()
    assert read_manifest(out, "deployment.json", DEPLOYMENT_SCHEMA)["classes"] == 7


def test_a_head_of_one_row_is_refused(tmp_path):
    """Probes of two classes had one row once: the runner would have said class 0 for every image."""
    write_tensors(Probe(torch.randn(1, 32), torch.randn(1)).state(), tmp_path / "probe.safetensors")
    with pytest.raises(UserError, match="has one row, by which every image is of class 0; extract the model again"):
        read_head(tmp_path, {"source": "."}, Tensor("output", "float32", (32,)))
    models = [timm.create_model("test_vit", num_classes=count) for count in (0, 1, 2)]
    assert [ends_in_classes(model) for model in models] == [False, False, True]


# What a model's own files say, where timm's table says center, 0.875 or 0.95 and bicubic of test_vit.
OWN = {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture
def own_export(exported):
    """The export of a model whose own files say how its images are prepared."""

    def write(**changes):
        manifest = json.loads((exported / "export.json").read_text())
        own = {**OWN, **changes}
        manifest["model"]["input"] = own
        manifest["input"] |= {"mean": own["mean"], "std": own["std"]}
        (exported / "export.json").write_text(json.dumps(manifest))
        return exported

    return write


def test_the_bundle_prepares_images_as_the_models_own_files_say(own_export, tmp_path):
    folder = own_export()
    preprocess = json.loads((write_deployment(folder, tmp_path / "bundle", 87, built.kernels) / "deployment.json").read_text())
    recipe = preprocess["preprocess"]
    assert (recipe["crop"], recipe["filter"], recipe["resize"]) == ("squash", "bilinear", [32, 32])
    assert (recipe["mean"], recipe["std"]) == ([0.5] * 3, [0.25] * 3)
    text = (tmp_path / "bundle" / "models" / "preprocess.txt").read_text()
    assert "crop squash" in text and "filter bilinear" in text
    spec = ModelSpec(**json.loads((folder / "export.json").read_text())["model"])
    measured = model_transform(load_model(spec))  # what verify measures with
    transform = exported_model(read_export(folder), folder)[1]
    assert transform == measured and transform.config == measured.config


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"crop_mode": "border"}, "crop mode border"), ({"interpolation": "lanczos"}, "lanczos resizing")],
)
def test_what_the_runner_cannot_do_is_refused_before_the_kernels(own_export, tmp_path, monkeypatch, capsys, changes, said):
    folder = own_export(**changes)

    def never(sms, report):
        raise AssertionError("minutes of compiling")

    monkeypatch.setattr(plugin_cache, "ensure_kernels", never)
    assert cli.main(["bundle", str(folder), "--sm", "87", "--out", str(tmp_path / "bundle")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "bundle").exists()


def test_everything_is_refused_before_the_kernels_and_hashed_once(exported, tmp_path, monkeypatch):
    def never():
        raise AssertionError("minutes of compiling")

    def refused(match):
        with pytest.raises(UserError, match=match):
            write_deployment(exported, tmp_path / "bundle", 87, never)

    manifest = json.loads((exported / "export.json").read_text())
    for change, said in (
        ({"classes": ["ant", "bee"]}, "names 2 classes, the model tells 10 apart"),
        ({"plugin_nodes": 0}, "has 3 plugin nodes, its manifest says 0"),
        ({"input": {**manifest["input"], "mean": [0.1] * 3}}, "says mean .*, its model is prepared with"),
    ):
        (exported / "export.json").write_text(json.dumps({**manifest, **change}))
        refused(said)
    (exported / "export.json").write_text(json.dumps(manifest))
    hashed = []
    monkeypatch.setattr("moee.store.artifact.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    monkeypatch.setattr(plugin_cache, "ensure_kernels", lambda sms, report: built.kernels())
    assert cli.main(["bundle", str(exported), "--sm", "87", "--out", str(tmp_path / "bundle")]) == 0
    assert hashed.count(exported / "moee.data") == 1


def test_bad_input_is_refused_and_leaves_nothing(exported, tmp_path, monkeypatch):
    def refused(**changes):
        given = {"export_dir": exported, "out": tmp_path / "x", "sm": 87, "kernels": built.kernels, **changes}
        with pytest.raises(UserError) as error:
            write_deployment(**given)
        assert not (tmp_path / "x").exists()
        return str(error.value)

    assert "min <= opt <= max" in refused(batch=(4, 2, 8))
    assert "expected" in refused(sm=75) or "75" in refused(sm=75)
    other = Preprocessing((64, 64), (64, 64), "center", "bicubic", MEAN, STD)
    monkeypatch.setattr(contents, "make_preprocessing", lambda transform, name: other)
    assert "its manifest says size 64 x 64" in refused()
    monkeypatch.undo()
    (exported / "moee.data").write_bytes(b"changed")
    assert "does not match the hash" in refused()


def test_the_command(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plugin_cache, "ensure_kernels", lambda sms, report: built.kernels())
    out = tmp_path / "bundle"
    assert cli.main(["bundle", str(exported), "--sm", "87", "--maxShapes", "8", "--out", str(out)]) == 0
    assert "run build.sh" in capsys.readouterr().out
    assert json.loads((out / "deployment.json").read_text())["batch"] == {"min": 1, "opt": 8, "max": 8}
    assert cli.main(["bundle", str(exported), "--sm", "87", "--out", str(out)]) == 2
    assert cli.main(["bundle", str(exported), "--sm", "all", "--out", str(tmp_path / "y")]) == 2


def fake_trtexec(folder: Path) -> Path:
    """A trtexec that writes its arguments as the engine."""
    folder.mkdir()
    script = folder / "trtexec"
    script.write_text(
        '#!/bin/sh\ncase "$1" in --help) echo "  --stronglyTyped"; exit 0;; esac\n'
        'for a in "$@"; do case "$a" in --saveEngine=*) echo "$@" > "${a#--saveEngine=}";; esac; done\n'
    )
    script.chmod(0o755)
    return script


@pytest.mark.slow
def test_a_bundle_compiles_in_an_empty_folder_and_builds(written, tmp_path):
    """Copied elsewhere, with a bare environment: only a compiler, cmake and TensorRT's headers."""
    place = tmp_path / "device"
    shutil.copytree(written, place)
    tools = fake_trtexec(tmp_path / "bin").parent
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "TENSORRT_ROOT": str(select_headers().include), "JOBS": "2"}
    done = subprocess.run(["./build.sh", "--deepstream"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (place / "plugin" / "build" / "libmoee_plugin.so").is_file() and (place / "runner" / "build" / "moee_run").is_file()
    repository = place / "triton" / "model_repository"
    command = (repository / "moee" / "1" / "model.plan").read_text()
    for flag in ("--onnx=models/tensorrt.onnx", f"--dynamicPlugins={place}/plugin/build/libmoee_plugin.so", "--stronglyTyped",
                 "--minShapes=input:1x3x32x32", "--optShapes=input:4x3x32x32", "--maxShapes=input:16x3x32x32"):  # fmt: skip
        assert flag in command, flag
    assert "dynamicPlugins" not in (repository / "dense" / "1" / "model.plan").read_text()
    assert "tensorrt_pixels.onnx" in (place / "engines" / "pixels.plan").read_text()
    (got,) = session(repository / "moee_onnx" / "1" / "model.onnx").run(None, {"input": np.zeros((1, 3, 32, 32), np.float32)})
    assert got.shape == (1, 10)
    help_text = subprocess.run([place / "runner" / "build" / "moee_run"], capture_output=True, text=True)
    assert help_text.returncode == 2 and "usage: moee_run" in help_text.stderr
    # The self-test finds the bundle's plugin and cases by itself.
    environment = {"LD_LIBRARY_PATH": str(selftest_double.driver()), "MOEE_FAKE_SM": "87"}
    checked = subprocess.run(
        ["selftest/build/selftest", "--check-only"], cwd=place, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout[-2000:] + checked.stderr
    assert read_selftest(place / "selftest.json").cases[0]["name"] == "blocks.0.mlp (noise)"


@pytest.mark.slow
def test_the_selftest_runs_the_exports_layers(shared, tmp_path):
    """Their tokens are of noise, since this model's images lie in no file, and their names say so."""
    done = selftest_double.run(tmp_path / "out.json", "--check-only", cases_=shared / "bundle" / "selftest" / "cases.bin")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    layers = [case for case in read_selftest(tmp_path / "out.json").cases if case["layer"]]
    assert [layer["name"] for layer in layers] == [f"blocks.{i}.mlp (noise)" for i in range(3)]
    for layer in layers:
        assert (layer["dim"], layer["dense_width"], layer["experts"]) == (32, 128, 4) and 20 < layer["tokens"] <= 34


def test_tokens_are_those_of_the_models_own_images(exported, monkeypatch):
    """The graph's tokens of the layer are those that the model in PyTorch gives on the same images."""
    images = tiny_images()
    monkeypatch.setattr(selftest_layers, "image_record", lambda *_: SimpleNamespace(images=lambda split: images))
    cases = selftest_layers.layer_cases(exported, read_contents(exported))
    assert [case.name for case in cases] == [f"blocks.{i}.mlp" for i in range(3)]
    model = load_model(tiny_spec())
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images.images[: selftest_layers.IMAGES]))
        block = model.blocks[0]
        want = block.norm2(x + block.attn(block.norm1(x)))
    torch.testing.assert_close(cases[0].inputs["x"], want.reshape(-1, 32), rtol=1e-4, atol=1e-4)
    assert cases[0].per_image == 17 and cases[0].timed == ("float32", "float16")


def test_build_sh_stops_at_a_changed_file(shared, tmp_path):
    written = shutil.copytree(shared / "bundle", tmp_path / "bundle")
    (written / "models" / "preprocess.txt").write_text("size 1\n")
    done = subprocess.run(["./build.sh", "--compile-only"], cwd=written, capture_output=True, text=True)
    assert done.returncode == 2 and "changed or cut short" in done.stderr and not (written / "plugin" / "build").exists()
    done = subprocess.run(["./build.sh", "--colour"], cwd=written, capture_output=True, text=True)
    assert done.returncode == 2 and "--compile-only" in done.stderr
