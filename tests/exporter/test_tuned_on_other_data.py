"""`finetune --data OTHER`: what is recorded, titled, and taken by the commands that follow."""

import json
import shutil

import pytest

from exporter.graph.export import _calibration_data
from moee.artifacts import checkpoint
from moee.data.image_set import TensorSet
from moee.data.sources import same_data
from moee.data.transform import model_transform
from moee.store.artifact import read_json, write_json
from tests.exporter.command import run


def sets(tiny_export):
    """Image sets by the name they have on the command line: the export's own, half of it, and one of two classes."""
    own = tiny_export.data
    half = TensorSet("half", own.images[::2], own.labels[::2], 10)
    two = TensorSet("two", own.images, [0, 1] * 24, 2)
    return {"digits": own, "half": half, "two": two}


@pytest.fixture
def world(tiny_export, monkeypatch):
    known = sets(tiny_export)
    monkeypatch.setattr("moee.data.sources.load_data", lambda source, *args, **kwargs: known[source])
    monkeypatch.setattr("moee.stages.session.load_splits", lambda source, *args, **kwargs: (known[source], known[source]))


@pytest.fixture
def artifact(tiny_export, world, tmp_path):
    """The export's model as `extract` leaves it, with a stage."""
    shutil.copytree(tiny_export.root / "model", tmp_path / "extracted")
    kept = {"images": 48, "dense_accuracy": 1.0, "accuracy": 0.9, "top1_agreement": 0.9, "class_cosine": 0.9, "token_cosine": 0.9}
    cost = {"dense": {"macs": 2e6, "params": 2e5}, "moee": {"macs": 1e6, "params": 1e5}}
    manifest = read_json(tmp_path / "extracted" / "moee.json")
    manifest["info"]["stages"] = {"extracted": {"retention": kept, "cost": cost, "shares": {}}}
    write_json(tmp_path / "extracted" / "moee.json", manifest)
    return tmp_path / "extracted"


def test_the_data_it_was_tuned_on_is_recorded_titled_and_taken_by_what_follows(artifact, tmp_path, capsys):
    tuned, exported = tmp_path / "tuned", tmp_path / "export"
    tune = ["finetune", artifact, "--epochs", 1, "--lr", 1e-6]
    assert run(*tune, "--data", "half", "--out", tuned) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "tiny on half (extracted on digits)" in text and "dense, same images 100.00% 100.00%" in text
    manifest = read_json(tuned / "moee.json")
    stages = manifest["info"]["stages"]
    assert manifest["data"] == stages["tuned"]["data"] == "half" and stages["extracted"]["data"] == "digits"
    assert stages["tuned"]["retention"]["labelled"] == 24 and manifest["info"]["data_read"]["train"]["images"] == 24

    moee = checkpoint.load(tuned)
    assert _calibration_data(moee, model_transform(moee.model)).name == "half", "of int8"
    assert run("export", tuned, "--out", exported) == 0 and read_json(exported / "export.json")["data"] == "half"
    assert run("verify", exported, "--maxShapes", 2, "--optShapes", 2, "--max-drop", 60, "--out", tmp_path / "v.json") == 0
    assert json.loads((tmp_path / "v.json").read_text())["accuracy"]["images"] == 24
    once = ["--batch", 1, "--runs", 1, "--duration", 0, "--throughput", 0]
    assert run("bench", exported, *once, "--out", tmp_path / "l.json") == 0
    assert read_json(tmp_path / "l.json")["images"] == "half"

    # and back again: what it was extracted on is still known
    assert run("finetune", tuned, "--epochs", 1, "--data", "digits", "--out", tmp_path / "again") == 0
    again = read_json(tmp_path / "again" / "moee.json")
    assert again["data"] == "digits" and again["info"]["stages"]["extracted"]["data"] == "digits"
    assert "tiny on digits (" not in capsys.readouterr().out.replace("\n", " ").partition("finetune")[2]


def test_without_data_nothing_changes(artifact, tmp_path, capsys):
    assert run("finetune", artifact, "--epochs", 1, "--lr", 1e-6, "--out", tmp_path / "tuned") == 0
    text = capsys.readouterr().out
    assert "tiny on digits" in text and "(extracted on" not in text and "same images" not in text
    assert read_json(tmp_path / "tuned" / "moee.json")["data"] == "digits"


def test_a_gate_on_data_of_another_head_is_refused_from_the_manifests_alone(artifact, tmp_path, monkeypatch, capsys):
    tuned = tmp_path / "tuned"
    assert run("finetune", artifact, "--epochs", 1, "--lr", 1e-6, "--data", "two", "--out", tuned) == 0
    assert "the model tells 10 classes apart, two has 2" in " ".join(capsys.readouterr().out.split())
    assert run("export", tuned, "--out", tmp_path / "export") == 0
    monkeypatch.setattr("exporter.verification.graph_accuracy.opened", lambda *a: pytest.fail("a graph was run"))
    monkeypatch.setattr("exporter.verification.suite.check_parity", lambda *a, **k: pytest.fail("parity was checked"))
    assert run("verify", tmp_path / "export", "--max-drop", 0.5) == 2
    said = capsys.readouterr().err
    assert "--max-drop cannot be checked: the model tells 10 classes apart, two has 2; extract" in said
    assert "--num-classes 0" in said and "leave --max-drop out" in said


def test_a_probe_goes_with_its_data_however_they_are_spelled(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    assert same_data(str(folder), f"{tmp_path}/./photos/") and same_data("digits", "digits")
    assert not same_data(str(folder), "digits") and not same_data("a", "b")
