"""`moee verify`: an intact export passes; every planted damage fails, with its layer named; exit codes and files."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from exporter.parity import check_parity
from exporter.verification import compare_accuracy, verify
from exporter.verification.suite import verify_ranks
from moee.data.image_set import TensorSet
from moee.errors import MissingDependency, UserError
from moee.parallel.group import SOLO, Group, Parcel
from tests.exporter import damage
from tests.exporter.command import run
from tests.exporter.engines import write_engine

LAYER = "blocks.1.mlp"
OTHERS = ("blocks.0.mlp", "blocks.2.mlp")
SIZES = (1, 4, 16)


@pytest.fixture(autouse=True)
def data(tiny_export, monkeypatch):
    """`digits` on the command line are the tiny model's images."""
    monkeypatch.setattr("moee.data.sources.load_data", lambda *args, **kwargs: tiny_export.data)


def check(tiny_export, folder):
    return check_parity(folder, tiny_export.moee, tiny_export.data, sizes=SIZES)


def test_an_intact_export_passes(tiny_export):
    result = verify(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=SIZES)
    assert result and result.parity.first_deviation is None
    assert [b.batch for b in result.parity.batches] == list(SIZES)
    assert [layer.name for layer in result.parity.layers] == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    for layer in result.parity.layers:
        assert layer.tokens == 8 * 17 and layer.agreement == 1.0 and layer.flips == 0 and layer.flipped is None
        assert 0 < layer.local.max_abs_error <= layer.local_tolerance < 1e-4 * layer.local.rms
    assert result.accuracy.images == result.accuracy.of_images == len(tiny_export.data)
    assert result.to_json()["data"] == "tiny", "the images that the accuracy is of"
    assert result.accuracy.dense_top1.value > 0.9 and result.accuracy.agreement.value > 0.5
    assert not [c for c in result.cases() if c.failure or c.skipped]
    assert re.fullmatch(r"verify '.*' passed, [1-9]\d* checks", repr(result))


def flipped_weight(folder):
    damage.change_store(folder, LAYER, "w_down", damage.flip_largest)


def noise(folder):
    damage.change_store(
        folder, LAYER, "w_down", lambda w: w * (1 + 0.01 * np.random.default_rng(0).standard_normal(w.shape, np.float32))
    )


def router_bias_off_by_one(folder):
    damage.change_store(folder, LAYER, "router_bias", lambda b: np.roll(b, 1))


def swapped_expert(folder):
    def change(stored):
        a, b = f"{LAYER}/neurons_0", f"{LAYER}/neurons_1"
        stored[a], stored[b] = stored[b], stored[a]

    damage.change_constants(folder, change)


def wrong_offset(folder):
    """Expert 1 starts one neuron late, which expert 0 has instead."""

    def change(stored):
        first, second = (stored[f"{LAYER}/neurons_{e}"] for e in (0, 1))
        stored[f"{LAYER}/neurons_0"], stored[f"{LAYER}/neurons_1"] = np.append(first, second[0]), second[1:]

    damage.change_constants(folder, change)


DAMAGE = {
    flipped_weight: "weights",
    noise: "weights",
    router_bias_off_by_one: "weights",
    swapped_expert: "output",
    wrong_offset: "output",
}


@pytest.mark.parametrize("plant", DAMAGE)
def test_planted_damage_is_caught_and_its_layer_named(tiny_export, tmp_path, plant):
    folder = tiny_export.copy(tmp_path / "export")
    plant(folder)
    result = check(tiny_export, folder)
    assert not result
    deviation = result.first_deviation
    assert deviation.layer == LAYER and deviation.where == DAMAGE[plant]
    judged = {layer.name: layer for layer in result.layers}
    # the numbers alone name the layer too, and only that one: the others are right on the inputs that they got
    assert not judged[LAYER].passed and all(judged[name].passed for name in OTHERS)
    assert {p.layer for p in result.weight_problems} <= {LAYER}


def test_a_wrong_router_bias_is_a_routing_error(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    router_bias_off_by_one(folder)
    layer = check(tiny_export, folder).layers[1]
    assert layer.wrong_routes > 0 and layer.wrong_route_margin > 0 and layer.agreement < 1
    # the experts themselves are intact: with the routes taken, the layer's result is right
    assert layer.output_passed and layer.flipped is not None and layer.flip_margin_max > 0
    assert layer.flipped.mean_abs_error > 10 * layer.equal.mean_abs_error


def test_wrong_tables_of_the_plugin_node_are_caught(tiny_export, tmp_path):
    """The plugin's graph has no CPU runtime, so its stored inputs are compared."""
    folder = tiny_export.copy(tmp_path / "export")

    def another(neurons):
        gap = int(np.flatnonzero(np.diff(neurons) > 1)[0])
        neurons[gap] += 1  # still ascending: a legal table, of other neurons
        return neurons

    damage.change_store(folder, LAYER, "neurons", another)
    result = check(tiny_export, folder)
    assert not result and result.first_deviation.layer == LAYER
    assert "neurons: 1 of" in result.first_deviation.message


def test_impossible_tables_of_the_plugin_node_are_refused(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    damage.change_store(folder, LAYER, "offsets", lambda offsets: offsets + np.int32([0, 1, 0, 0, 0]))
    with pytest.raises(UserError, match="neuron ids do not ascend"):
        check(tiny_export, folder)


def scale_weight(folder, node_prefix, by):
    """Scale the weight that the first MatMul or Gemm of a module reads in the portable graph."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "portable.onnx")
    node = next(n for n in model.graph.node if n.name.startswith(node_prefix) and n.op_type in ("MatMul", "Gemm"))
    tensor = next(t for t in model.graph.initializer if t.name in node.input)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(by), tensor.name))
    onnx.save(model, folder / "portable.onnx")


def test_damage_outside_the_layers_is_placed_between_them(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    scale_weight(folder, "blocks.1.attn.proj/", 1.01)
    deviation = check(tiny_export, folder).first_deviation
    assert deviation.layer == LAYER and deviation.where == "input"
    assert "between blocks.0.mlp and blocks.1.mlp" in deviation.message


def test_a_damaged_head_is_placed_behind_the_layers(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    scale_weight(folder, "head/", 1.001)
    result = check(tiny_export, folder)
    assert not result and result.first_deviation.where == "head" and result.first_deviation.layer == "blocks.2.mlp"


def test_an_output_that_is_no_number_fails_and_stays_valid_json(tiny_export, tmp_path):
    folder = tiny_export.copy(tmp_path / "export")
    scale_weight(folder, "head/", float("nan"))
    result = check(tiny_export, folder)
    assert not result and result.first_deviation.where == "head"
    body = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert body["batches"][0]["max_abs_error"] is None and body["passed"] is False


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_typed_exports_pass_and_their_damage_is_caught(tiny_export, tmp_path, precision):
    folder = tiny_export.copy(tmp_path / "export", precision)
    result = check(tiny_export, folder)
    assert result, result.first_deviation
    assert result.precision == precision
    assert ("widened to float32" in result.runtime) == (precision == "bf16")
    noise(folder)
    damaged = check(tiny_export, folder)
    assert not damaged and damaged.first_deviation.layer == LAYER


def test_command_writes_the_files_and_exits_0_and_1(tiny_export, tmp_path, capsys):
    good, out = tiny_export.folder(), tmp_path / "verify"
    command = ["verify", good, "--maxShapes", 8, "--max-drop", 60]
    assert run(*command, "--bisect", "--out", out) == 0
    text = capsys.readouterr().out
    assert "verify passed" in text and "no layer deviates" in text and LAYER in text
    body = json.loads((out / "parity.json").read_text())
    assert body["schema"] == "moee.parity/1" and body["passed"] is True and body["accuracy"]["passed"] is True
    assert set(body["files"]) == {"junit.xml", "summary.md"} and len(body["layers"]) == 3
    assert "## moee verify: passed" in (out / "summary.md").read_text()
    assert run(*command, "--out", out) == 2 and "--force" in capsys.readouterr().err
    bad = tiny_export.copy(tmp_path / "bad")
    noise(bad)
    assert run("verify", bad, "--model", tiny_export.root / "model", "--maxShapes", 8, "--out", tmp_path / "r.json") == 1
    text = capsys.readouterr().out
    assert f"first deviation: {LAYER}" in text and "verify FAILED" in text
    assert json.loads((tmp_path / "r.json").read_text())["first_deviation"]["layer"] == LAYER


def test_accuracy_gate(tiny_export, capsys):
    """No model gains 100 points, so a gate of minus 100 cannot be met."""
    result = verify(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=(2,), max_drop_pp=-100)
    assert not result and any("at most -100 allowed" in (case.failure or "") for case in result.cases())
    assert re.match(r"verify '.*' failed, \d+ checks\naccuracy .* failed: .*at most -100 allowed", repr(result))
    for never in ("nan", "inf", "-100"):
        assert run("verify", tiny_export.folder(), "--max-drop", never) == 2
        assert "expected a number" in capsys.readouterr().err


def test_a_gate_that_has_nothing_to_check_is_refused_before_parity(tiny_export, tmp_path, monkeypatch, capsys):
    """It used to pass at "dense 0.00 %, MoEE 0.00 %", on ten images whose labels have nothing to do with the head."""
    images, labels = tiny_export.data.images[:10], [(label + 1) % 10 for label in tiny_export.data.labels[:10]]
    monkeypatch.setattr("moee.data.sources.load_data", lambda *a, **k: TensorSet("tiny", images, labels, 10))
    plain = ["verify", tiny_export.folder(), "--maxShapes", 2, "--optShapes", 2]
    assert run(*plain, "--out", tmp_path / "plain") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "accuracy: not measured, the dense model is right on 0 of 10 images in tiny, no better than a guess" in text
    body = json.loads((tmp_path / "plain" / "parity.json").read_text())
    assert body["accuracy"] is None and body["no_accuracy"].startswith("the dense model is right on 0 of 10 images")
    monkeypatch.setattr("exporter.verification.suite.check_parity", lambda *a, **k: pytest.fail("parity was checked first"))
    assert run(*plain, "--max-drop", 0.5, "--out", tmp_path / "gated") == 2
    assert "--max-drop cannot be checked: the dense model is right on 0 of 10 images" in capsys.readouterr().err
    (case,) = ET.parse(tmp_path / "gated" / "junit.xml").getroot().iter("testcase")
    assert case.find("error") is not None


def test_a_gate_that_could_fail_no_model_is_refused_before_parity(tiny_export, tmp_path, monkeypatch, capsys):
    """The dense model is always right, and the most frequent of the data's classes has a known share."""
    labels = torch.tensor(tiny_export.data.labels)
    limit = 100 - 100 * float(labels.bincount().max()) / len(labels)
    plain = ["verify", tiny_export.folder(), "--maxShapes", 2, "--optShapes", 2]
    assert run(*plain, "--max-drop", limit - 0.01, "--out", tmp_path / "tight") == 0
    monkeypatch.setattr("exporter.verification.suite.check_parity", lambda *a, **k: pytest.fail("parity was checked first"))
    for loose in (limit, 100):
        assert run(*plain, "--max-drop", loose, "--out", tmp_path / "loose") == 2
        assert "limits nothing: the dense model is right on 100.00% of 48 images" in capsys.readouterr().err


def test_a_head_of_another_size_is_refused_without_running_anything(tiny_export, monkeypatch, capsys):
    monkeypatch.setattr("moee.data.sources.load_data", lambda *a, **k: TensorSet("two", tiny_export.data.images, [0, 1] * 24, 2))
    monkeypatch.setattr("exporter.verification.graph_accuracy.opened", lambda *a: pytest.fail("a graph was run"))
    assert run("verify", tiny_export.folder(), "--max-drop", 0.5) == 2
    assert "the model tells 10 classes apart, two has 2" in capsys.readouterr().err


def test_only_labelled_images_count(tiny_export, capsys):
    labels = [label if i % 4 else -1 for i, label in enumerate(tiny_export.data.labels)]
    data = TensorSet("tiny", tiny_export.data.images, labels, 10)
    result = verify(tiny_export.folder(), tiny_export.moee, data, sizes=(2,), max_drop_pp=60.0)
    assert result and (result.accuracy.images, result.accuracy.of_images) == (36, 48)
    (case,) = [c for c in result.cases() if c.group == "accuracy"]
    assert "on 36 of 48 images that have a label" in case.detail


class Unreadable(TensorSet):
    """Labelled images that cannot be read, beside others that can and have no label."""

    def load(self, index):
        if self.labels[index] >= 0:
            raise OSError("cut short")
        return super().load(index)


class FirstOfTwo(Group):
    """Rank 0 of two ranks, of which the other has read nothing either."""

    def all_json(self, value):
        return [value]

    def gather(self, parcel, to=0):
        return [parcel, Parcel(None, {})]


@pytest.mark.parametrize("group", [SOLO, FirstOfTwo(rank=0, world=2)], ids=["one process", "two ranks"])
def test_labelled_images_that_cannot_be_read_are_one_sentence(tiny_export, group, monkeypatch):
    monkeypatch.setattr("exporter.verification.suite.check_parity", lambda *a, **k: pytest.fail("minutes of parity"))
    labels = [i % 10 if i < 20 else -1 for i in range(len(tiny_export.data))]
    data = Unreadable("broken", tiny_export.data.images, labels, 10)
    with pytest.raises(UserError, match=r"none of the 20 labelled images of broken that are looked at could be read \(first: "):
        verify_ranks(group, tiny_export.folder(), tiny_export.moee, data, sizes=(2,))


def test_logits_that_are_no_numbers_are_wrong():
    """argmax takes NaN for the largest: a broken model was right wherever the label is 0."""
    labels = torch.tensor([0, 1] * 20)
    good = torch.nn.functional.one_hot(labels, 6).float() * 9
    found = compare_accuracy(good, torch.full_like(good, float("nan")), labels, 60.0)
    assert not found.passed and found.moee_top1.value == found.moee_top5.value == found.agreement.value == 0
    assert found.drop_pp == 100 and found.dense_top1.value == 1


def test_unlabelled_data_cannot_have_an_accuracy_gate(tiny_export):
    plain = TensorSet("photos", tiny_export.data.images, [-1] * len(tiny_export.data), 0)
    with pytest.raises(UserError, match="--max-drop cannot be checked: photos has no labels"):
        verify(tiny_export.folder(), tiny_export.moee, plain, sizes=(2,), max_drop_pp=1.0)
    result = verify(tiny_export.folder(), tiny_export.moee, plain, sizes=(2,))
    assert result and [c.skipped for c in result.cases() if c.skipped] == ["photos has no labels of two classes or more"]


def test_a_stale_plugin_fails_and_names_the_layers(tiny_export, tmp_path, capsys):
    engine = write_engine(tmp_path / "engine", tiny_export.folder())
    library = engine / "libmoee_plugin.so"
    library.write_bytes(library.read_bytes() + b"!")
    code = run("verify", tiny_export.folder(), "--maxShapes", 2, "--optShapes", 2, "--engine", engine, "--out", tmp_path / "v")
    assert code == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "FAILED engine, plugin: libmoee_plugin.so is not the library that the engine was built with" in text
    assert "it runs blocks.0.mlp, blocks.1.mlp, blocks.2.mlp" in text
    suite = ET.parse(tmp_path / "v" / "junit.xml").getroot()[0]
    assert [c.get("name") for c in suite.iter("testcase") if c.find("failure") is not None] == ["plugin"]


def test_a_missing_plugin_or_gpu_exits_3(tiny_export, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("exporter.runners.tensorrt_engine.device_count", lambda: 0)
    monkeypatch.setattr("exporter.runners.tensorrt_engine.require_backend", lambda name: None)
    monkeypatch.setattr("exporter.runners.tensorrt_engine.importlib.import_module", lambda name: object())
    engine = write_engine(tmp_path / "engine", tiny_export.folder())
    assert run("verify", tiny_export.folder(), "--engine", engine) == 3
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    (engine / "libmoee_plugin.so").unlink()
    assert run("verify", tiny_export.folder(), "--engine", engine, "--out", tmp_path / "v") == 3
    assert "libmoee_plugin.so is missing" in capsys.readouterr().err
    (case,) = ET.parse(tmp_path / "v" / "junit.xml").getroot().iter("testcase")
    assert "libmoee_plugin.so is missing" in case.find("error").get("message")
    assert [p.name for p in (tmp_path / "v").iterdir()] == ["junit.xml"]


def test_a_refused_verification_does_not_bar_the_corrected_one(tiny_export, tmp_path, capsys):
    for _ in range(2):
        assert run("verify", tiny_export.folder(), "--minShapes", 3, "--maxShapes", 2, "--out", tmp_path / "v") == 2
        assert "exists; choose another --out" not in capsys.readouterr().err
    shapes = ("--maxShapes", 2, "--optShapes", 2)
    assert run("verify", tiny_export.folder(), *shapes, "--images", 0, "--out", tmp_path / "v") == 0
    assert (tmp_path / "v" / "parity.json").is_file()
    assert run("verify", tiny_export.folder(), *shapes, "--images", 0, "--out", tmp_path / "v") == 2


def test_an_absent_provider_is_never_replaced(tiny_export, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for provider in ("cuda", "tensorrt"):
        assert run("verify", tiny_export.folder(), "--provider", provider) == 3
        assert "provider does not work here; it needs" in capsys.readouterr().err
    with pytest.raises(MissingDependency):
        check_parity(tiny_export.folder(), tiny_export.moee, tiny_export.data, sizes=(1,), provider="cuda")
