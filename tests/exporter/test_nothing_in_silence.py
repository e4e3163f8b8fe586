"""Empty names, names that mean two things, maps that fit nothing, and places that would cost a file: refused or said."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter import cli
from exporter.commands.models import extract as extract_command
from moee.data.sources import load_data
from moee.errors import UserError
from moee.methods.recipe import make_recipe
from moee.places.inputs import source_paths
from moee.places.output_folder import OutputFolder
from moee.planning.plan import planned_on
from moee.stages.planned import Planned
from moee.stages.session import Session
from moee.store.artifact import write_manifest
from moee.store.result_kinds import EXPORT, MODEL, PLAN
from tests.conftest import tiny_spec
from tests.moee.test_folders import NAMES, SMALL, tree

DENSE = ["vit_tiny_patch16_224", "--random-weights", "0"]
EXTRACT = ["extract", *DENSE, "--out", "out"]


def refusal(capsys, *argv):
    assert cli.main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moee: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        ([*EXTRACT, "--data", ""], "--data"), ([*EXTRACT, "--data", "  "], "--data"),
        (["verify", "x", "--model", ""], "--model"), ([*EXTRACT, "--data", "digits", "--plan", ""], "--plan"),
        ([*EXTRACT, "--data", "digits", "--class-map", ""], "--class-map"),
        (["extract", "vit", "--data", "digits", "--checkpoint", "", "--out", "out"], "--checkpoint"),
        (["extract", "", "--data", "digits", "--out", "out"], "MODEL"), (["finetune", "", "--out", "out"], "PATH"),
        (["finetune", "x", "--data", "", "--out", "out"], "--data"), (["plots", "", "--out", "out"], "PATH"),
        (["export", "x", "--checkpoint", "", "--out", "out"], "--checkpoint"), (["verify", "x", "--engine", ""], "--engine"),
        (["verify", "x", "--out", ""], "--out"), (["report", "", "--out", "r.html"], "PATH"), (["inspect", ""], "MODEL"),
        (["bench", "x", "--data", ""], "--data"), (["ablate", "--model", "", "--out", "out"], "--model"),
        (["build", "x", "--out", ""], "--out"), ([*EXTRACT, "--data", "digits", "--exclude", ""], "--exclude"),
    ],
)  # fmt: skip
def test_an_empty_value_is_refused_and_reads_no_folder(tmp_path, monkeypatch, capsys, argv, option):
    monkeypatch.chdir(tmp_path)
    assert f"{option} is empty" in refusal(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_name_of_data_is_refused_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path / "d"))
    with pytest.raises(UserError, match="the name of the data is empty"):
        load_data("", SMALL)


@pytest.mark.parametrize("name", ["digits", "photos", "photo-crops"])
def test_built_in_data_beside_a_folder_of_that_name_is_said(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert load_data(name, SMALL, "val").notes == ()
    tree(tmp_path / name)
    note = f"these are the built-in {name}; give ./{name} for your folder"
    assert note in load_data(name, SMALL, "val").notes
    assert note not in load_data(f"./{name}", SMALL, "val").notes


def test_a_class_map_that_names_no_class_of_the_images_is_refused(tmp_path):
    root, wrong = str(tree(tmp_path / "d")), ("rose", "daisy", "tulip", "lily")
    session = Session(tiny_spec(num_classes=4), root, classes=wrong)
    with pytest.raises(UserError, match="'rose'.* are none of .*/d, whose classes are called 'ant'"):
        session.check_names(wrong)
    some = ("ant", "bee", "tulip", "lily")
    Session(tiny_spec(num_classes=4), root, classes=some).check_names(some)
    for split in ("train", "val"):
        for name in NAMES:
            for path in list((tmp_path / "d" / split / name).iterdir()):
                path.rename(tmp_path / "d" / split / f"{name}-{path.name}")
            (tmp_path / "d" / split / name).rmdir()
    Session(tiny_spec(num_classes=4), root, classes=wrong).check_names(wrong)  # images without classes: names of the outputs


@pytest.mark.parametrize("given", [["--preset", "static"], ["--seed", "1"], ["--method", "clear-moe"], ["--exclude", "blocks.0"]])
def test_a_plan_takes_no_other_option_of_the_method(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    assert f"leave {given[0]} out" in refusal(capsys, *EXTRACT, "--data", "digits", "--plan", "plan", *given)


def test_clear_moe_takes_no_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method = ["--method", "clear-moe", "--preset", "static"]
    assert "--preset static is of method static, and not of clear-moe" in refusal(capsys, *EXTRACT, "--data", "digits", *method)


def test_a_plan_of_an_earlier_version_and_of_other_data_is_said(tmp_path, monkeypatch, caplog):
    """Its winner holds for its own data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan").mkdir()
    write_manifest(tmp_path / "plan", "plan.json", "moee.plan/1", {"data": "photos"})
    assert planned_on("plan") == planned_on("plan/plan.json") == Planned("photos")
    monkeypatch.setattr("moee.planning.plan.read_plan", lambda *a: make_recipe())
    monkeypatch.setattr(extract_command, "_shared_spec", lambda *a: tiny_spec())

    def stopped(spec, source, *args, planned, **kwargs):
        assert planned.among(SimpleNamespace(source=source)) == 0
        raise UserError("stopped")

    monkeypatch.setattr("moee.stages.extract.run_extract", stopped)
    for data, said in (("digits", True), ("photos", False)):
        assert cli.main([*EXTRACT, "--data", data, "--plan", "plan"]) == 2
        assert ("the plan was made on photos, and on digits another method may win" in caplog.text) == said
        caplog.clear()


@pytest.mark.parametrize("out", ["d/train/out", "d/val/ant/out", "new/../d/train/x/out", "model/out"])
@pytest.mark.parametrize("kind", [MODEL, PLAN, EXPORT])
def test_no_new_folder_lies_in_the_images(tmp_path, monkeypatch, out, kind):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "d")
    (tmp_path / "new").mkdir()
    (tmp_path / "model").mkdir()
    write_manifest(tmp_path / "model", "moee.json", "moee.model/1", {})
    with pytest.raises(UserError, match="lies in the input (d|model); choose another place"):
        OutputFolder(out, kind, inputs=source_paths("d", "model")).check()
    for free in ("out", "new/out", "d/runs/out"):
        OutputFolder(free, kind, inputs=source_paths("d", "model")).check()


def test_extract_writes_nothing_into_its_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "d")
    said = refusal(capsys, "extract", *DENSE, "--data", "d", "--out", "d/train/out")
    assert "lies in the input d" in said and not (tmp_path / "d" / "train" / "out").exists()


def test_force_replaces_no_file_that_moee_did_not_write(tmp_path):
    """A file under the name of ours whose hash is another's is somebody's own."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "model.safetensors").write_bytes(b"ours")
    write_manifest(place, "moee.json", "moee.model/1", {})
    OutputFolder(place, MODEL, force=True).check()
    (place / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(UserError, match="its model.safetensors is not the file that moee wrote; move it away"):
        OutputFolder(place, MODEL, force=True).check()
    (place / "model.safetensors").unlink()
    OutputFolder(place, MODEL, force=True).check()
    assert json.loads((place / "moee.json").read_text())["files"]


@pytest.mark.parametrize("out", ["~/x", "~"])
def test_a_quoted_home_folder_is_no_place(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    said = refusal(capsys, "extract", *DENSE, "--data", "digits", "--out", out)
    assert "~ is the home folder only where a shell sees it" in said
    assert not Path("~").exists()
    OutputFolder("./~", MODEL).check()
