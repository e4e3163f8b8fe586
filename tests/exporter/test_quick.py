"""`moee verify --quick`: what passes, what fails, what it refuses, and that it says what it leaves out."""

import shutil

import numpy as np
import onnx
import pytest
import torch

import exporter
from exporter import cli
from exporter.ship.cpu_bundle import write_cpu_bundle
from exporter.verification.quick import quick_check
from moee.errors import UserError
from moee.store.artifact import read_json, write_json, write_manifest
from tests.exporter.conftest import rehash
from tests.exporter.engines import write_engine


@pytest.fixture
def copies(tiny_export, tmp_path, monkeypatch):
    """The model and its fp32 export, where a test may damage them."""
    shutil.copytree(tiny_export.root / "model", tmp_path / "model")
    tiny_export.copy(tmp_path / "fp32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_an_export_and_a_bundle_pass(copies, capsys):
    write_cpu_bundle(copies / "fp32", copies / "bundle")
    assert cli.main(["verify", "--quick", "model", "fp32", "fp32/portable.onnx", "model/moee.json", "bundle/run.py"]) == 0
    text = capsys.readouterr().out
    assert text.count(": passed") == 3, "each artifact once"
    for words in ("parity with PyTorch on random images, batches 1 and 2: largest error", "3 layers alone",
                  "3 MoeeFfn nodes in tensorrt.onnx", "one random image through portable.onnx: 10 finite numbers",
                  "not checked: accuracy", "not checked: parity: a bundle holds no PyTorch model"):  # fmt: skip
        assert words in text, words
    assert text.rstrip().endswith("quick check passed")


def _change_tensor(graph, part):
    """Write other numbers over the tensor of a graph whose name holds `part`."""
    model = onnx.load(str(graph), load_external_data=False)
    stored = next(t for t in model.graph.initializer if part in t.name and t.external_data)
    place = {entry.key: entry.value for entry in stored.external_data}
    with open(graph.parent / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.linspace(-1, 1, int(place["length"]) // 4, dtype=np.float32).tobytes())


def test_a_graph_of_other_weights_fails(copies, capsys):
    """Its hashes are right, as a wrong exporter would have written them."""
    _change_tensor(copies / "fp32" / "portable.onnx", "patch_embed.proj.weight")
    rehash(copies / "fp32")
    assert cli.main(["verify", "--quick", "fp32"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: parity, batch 1: largest error" in text and text.rstrip().endswith("quick check FAILED")
    assert not exporter.quick_check("fp32")


def test_another_number_of_plugin_nodes_fails(copies):
    body = read_json(copies / "fp32" / "export.json")
    write_json(copies / "fp32" / "export.json", {**body, "plugin_nodes": 2})
    result = quick_check(copies / "fp32")
    assert not result and result.failures == ["tensorrt.onnx has 3 MoeeFfn nodes, the manifest says 2"]


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/MODEL_CARD.md", "fp32/moee.data", "fp32/tensorrt.onnx"])
def test_a_changed_file_is_bad_input(copies, name, capsys):
    with open(copies / name, "r+b") as file:
        file.seek(100)
        file.write(b"\x00\x01\x02")
    assert cli.main(["verify", "--quick", name.partition("/")[0]]) == 2
    assert f"{name} does not match the hash" in capsys.readouterr().err


def test_an_export_without_its_model_is_not_passed(copies, capsys):
    shutil.move(copies / "model", copies / "moved")
    assert cli.main(["verify", "--quick", "fp32"]) == 2 and "passed" not in capsys.readouterr().out
    assert cli.main(["verify", "--quick", "fp32", "--model", "moved"]) == 0


def test_a_model_without_an_answer_fails(copies, monkeypatch):
    monkeypatch.setattr("exporter.verification.quick.run_model", lambda model, images: (torch.full((1, 10), torch.nan), None))
    result = quick_check(copies / "model")
    assert not result and result.failures == ["one random image through PyTorch: the output is not finite"]


def test_engines_are_held_against_their_hashes_and_never_loaded(copies):
    folder = write_engine(copies / "engine", copies / "fp32")
    result = quick_check(folder)
    assert result and result.done == ["manifest and hashes of 3 engines and libraries"] and "they are code" in result.not_done[0]
    (folder / "moee.plan").write_bytes(b"other")
    with pytest.raises(UserError, match="does not match the hash|not the file that engine.json names"):
        quick_check(folder)


@pytest.mark.parametrize("words, said", [
    (["--quick", "model", "--max-drop", "1"], "--quick does not take --max-drop"),
    (["--quick", "model", "--data", "digits"], "--quick does not take --data"),
    (["--quick", "model", "--out", "v"], "--quick does not take --out"),
    (["--quick", "model", "fp32", "--model", "model"], "--model is of one export"),
    (["fp32", "model"], "expected one export, came 2"),
    (["--quick", "nowhere"], "nowhere not found"),
    (["--quick", "."], "no artifact that --quick checks"),
    (["--quick", "plots"], "no artifact that --quick checks"),
    (["--quick", "stray.onnx"], "no artifact that --quick checks"),
])  # fmt: skip
def test_what_it_refuses(copies, words, said, capsys):
    (copies / "stray.onnx").write_bytes(b"")
    (copies / "plots").mkdir()
    write_manifest(copies / "plots", "routing.json", "moee.plot-routing/1", {})
    assert cli.main(["verify", *words]) == 2
    out, err = capsys.readouterr()
    assert said in err and "passed" not in out
