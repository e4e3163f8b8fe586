"""Files from someone else, behind right hashes: each is refused in one sentence that says what is wrong, before it is used."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from exporter import cli
from exporter.onnx_safety import check_onnx
from moee.artifacts import checkpoint
from moee.errors import UserError
from moee.store.artifact import sha256_file
from tests.hostile.damage import GRAPHS, MANIFESTS, WEIGHTS, changed_manifest


@pytest.fixture
def model(made, tmp_path, monkeypatch):
    """A copy of a small artifact, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


def refused(capsys, said: str, *words: str) -> None:
    """The line is refused by one sentence that holds `said`."""
    assert cli.main(list(words)) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1 and text.replace("\n", "").isprintable(), text


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_lies_is_refused_when_it_is_read(model, kind, capsys, tried):
    change, said = MANIFESTS[kind]
    changed_manifest(model, change)
    refused(capsys, said, "inspect", "model")
    tried("manifests from others", kind, "refused")


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_no_model_has_are_refused_when_they_are_read(model, kind, capsys, tried):
    """Nothing that is computed with them would be a number."""
    name, change, said = WEIGHTS[kind]
    state = load_file(model / "model.safetensors")
    state[name] = change(state[name].clone()).contiguous()
    save_file(state, model / "model.safetensors")
    changed_manifest(model, lambda body: body["files"].update({"model.safetensors": sha256_file(model / "model.safetensors")}))
    refused(capsys, said, "inspect", "model")
    tried("weights from others", kind, "refused")


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_that_breaks_the_contract_is_refused(made, tmp_path, kind, tried):
    """By the check that stands before every reader: ONNX Runtime, the parsers of TensorRT and our own passes."""
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    graph = onnx.load(folder / "tensorrt.onnx")
    check_onnx(folder / "tensorrt.onnx")
    change, said = GRAPHS[kind]
    change(graph)
    onnx.save(graph, folder / "tensorrt.onnx")
    with pytest.raises(UserError, match=said):
        check_onnx(folder / "tensorrt.onnx")
    tried("graphs from others", kind, "refused")


def test_a_stage_without_figures_is_shown_as_not_known(model, tried):
    """A later command put its own stage beside it, and failed after the training at a figure that was not there."""
    cost = {"macs": 2.0, "params": 1.0}
    stage = {"retention": {}, "cost": {"dense": cost, "moee": cost}, "data": "digits"}
    changed_manifest(model, lambda body: body["info"].update({"stages": {"extracted": stage}}))
    from exporter.terminal.ui import plain_console, stage_table

    info = checkpoint.load(model).info
    assert info["stages"]["extracted"]["retention"]["class_cosine"] is None
    console = plain_console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(stage_table(info, "m"))
    assert console.export_text().count("–") >= 5
    tried("manifests from others", "no figures", "taken")


PLACES = [
    ("extract", "vit_tiny_patch16_224", "--data", "digits", "--out", "o", "--checkpoint", "PIPE"),
    ("extract", "vit_tiny_patch16_224", "--random-weights", "0", "--data", "digits", "--out", "o", "--class-map", "PIPE"),
    ("extract", "vit_tiny_patch16_224", "--random-weights", "0", "--data", "digits", "--out", "o", "--recipe", "PIPE"),
    ("extract", "vit_tiny_patch16_224", "--random-weights", "0", "--data", "digits", "--out", "o", "--plan", "PIPE"),
    ("extract", "vit_tiny_patch16_224", "--random-weights", "0", "--data", "PIPE", "--out", "o"),
    ("inspect", "PIPE"), ("finetune", "PIPE", "--out", "o"), ("finetune", "model", "--recipe", "PIPE", "--out", "o"),
    ("finetune", "model", "--checkpoint", "PIPE", "--out", "o"), ("export", "PIPE", "--out", "o"), ("verify", "PIPE"),
    ("bench", "PIPE"), ("build", "PIPE", "--out", "o"), ("bundle", "PIPE", "--sm", "cpu", "--out", "o"),
    ("plots", "PIPE", "--out", "o"), ("report", "PIPE", "--out", "o.html"), ("bench-dispatch", "PIPE"),
    ("report", "model", "--out", "PIPE"), ("export", "model", "--out", "PIPE"),
]  # fmt: skip


@pytest.mark.parametrize("words", PLACES, ids=" ".join)
def test_a_pipe_in_the_place_of_any_file_is_not_waited_for(model, words, capsys, tried):
    os.mkfifo("PIPE")
    started = time.perf_counter()
    code = cli.main(list(words))
    text = capsys.readouterr().err
    assert code == 2 and "PIPE" in text and "unexpected" not in text and time.perf_counter() - started < 20, text
    tried("pipes", " ".join(words[:1] + words[-2:]), "refused")


def test_a_hash_is_wanted_of_the_weights_that_a_manifest_names(model, capsys, tried):
    changed_manifest(model, lambda body: body["model"].update(random_seed=None, weights="/w.safetensors", weights_sha256=None))
    refused(capsys, "has no hash of the weights", "inspect", "model")
    tried("manifests from others", "weights without a hash", "refused")


def test_the_offsets_of_a_graph_do_not_wrap_round(made, tmp_path, tried):
    """Differences of int32 do: 2147483647 to -2 would rise by 2147483647."""
    offsets = np.array([0, 2**31 - 1, -2, 7], np.int32)
    assert (np.diff(offsets) >= 0).sum() == 3, "as they were computed once"
    folder = Path(shutil.copytree(made / "export", tmp_path / "export"))
    graph = onnx.load(folder / "tensorrt.onnx")
    node = next(n for n in graph.graph.node if n.op_type == "MoeeFfn")
    tensor = next(t for t in graph.graph.initializer if t.name == node.input[8])
    values = numpy_helper.to_array(tensor).copy()
    values[1:3] = 2**31 - 1, -2
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, folder / "tensorrt.onnx")
    with pytest.raises(UserError, match="offsets do not rise"):
        check_onnx(folder / "tensorrt.onnx")
    tried("graphs from others", "offsets that wrap round", "refused")


def test_complex_weights_do_not_lose_a_part(tmp_path, monkeypatch, capsys, tried):
    from moee.models.model import load_model
    from tests.conftest import tiny_spec

    state = load_model(tiny_spec(depth=1)).state_dict()
    state = {name: value.to(torch.complex64) if name.endswith("qkv.weight") else value for name, value in state.items()}
    monkeypatch.chdir(tmp_path)
    save_file(state, "w.safetensors")
    with pytest.raises(UserError, match="complex64"):
        load_model(tiny_spec(depth=1).model_copy(update={"random_seed": None, "weights": "w.safetensors"}))
    tried("weights from others", "complex", "refused")


def test_long_thin_pictures_are_left_out_before_they_are_resized(tmp_path, tried):
    """1 x 20,000 pixels become 32 x 640,000."""
    from PIL import Image

    from moee.data.transform import Transform, decoded

    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    config = {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    transform, started = Transform((3, 224, 224), (0.5,) * 3, (0.5,) * 3, config), time.perf_counter()
    with pytest.raises(ValueError, match="would be resized to"):
        decoded(str(tmp_path / "thin.png"), transform)
    assert time.perf_counter() - started < 1
    tried("pictures", "1 x 20,000 pixels", "refused")


def test_figures_that_json_has_no_word_for_are_null(tmp_path, tried):
    from moee.store.artifact import write_json

    write_json(tmp_path / "x.json", {"a": math.inf, "b": [math.nan]})
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == {"a": None, "b": [None]}
    tried("numbers", "Infinity in JSON", "null")
