"""Where results go: every command, every option that names something to write, and every place that must not be written.

A new command or option fails here until it declares what it writes (`add_outputs`) and has a row in the tables below.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from exporter import cli
from exporter.engines.build import build_engines
from exporter.plots import write_plots
from exporter.report import write_report
from exporter.terminal.flags import check_outputs
from moee.artifacts import checkpoint
from moee.artifacts.model import MoeeModel
from moee.config import FinetuneConfig
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.models.model import ModelSpec, build_model
from moee.places import paths, placement
from moee.places.inputs import source_paths
from moee.places.output_file import OutputFile
from moee.places.output_folder import OutputFolder
from moee.stages.extract import run_extract
from moee.stages.finetune import run_finetune
from moee.store import exchange, leftovers, result_kinds
from moee.store.artifact import read_manifest
from moee.store.atomic import atomic_file, atomic_folder
from plugins.aot.build import build_kernels
from tests.conftest import tiny_spec
from tests.untrusted.test_pickle_commands import PATHS, TEXT, WRITTEN, options

READS_ONLY = {"inspect", "doctor"}
# Each command's line without what it writes. Capitals are inputs in the workspace.
LINES = {
    "compress": ["test_vit", "--checkpoint", "WEIGHTS", "--data", "DATA", "--class-map", "CLASSES"],
    "plan": ["test_vit", "--checkpoint", "WEIGHTS", "--data", "DATA", "--target-macs", "0.7", "--class-map", "CLASSES"],
    "extract": ["test_vit", "--checkpoint", "WEIGHTS", "--data", "DATA", "--plan", "PLAN", "--class-map", "CLASSES"],
    "finetune": ["MODEL", "--data", "DATA", "--checkpoint", "WEIGHTS"],
    "shrink": ["MODEL", "--specialise", "--data", "DATA", "--checkpoint", "WEIGHTS"],
    "export": ["MODEL", "--data", "DATA", "--precision", "int8", "--checkpoint", "WEIGHTS"],
    "verify": ["EXPORT", "--engine", "ENGINE", "--model", "MODEL", "--data", "DATA"],
    "bench": ["EXPORT", "--engine", "ENGINE", "--data", "DATA"],
    "bench-dispatch": ["MODEL"],
    "build": ["EXPORT", "--plugin", "LIBRARY"],
    "bundle": ["EXPORT", "--sm", "87"],
    "plugin build": [],
    "plugin bundle": ["--sm", "87"],
    "plots": ["MODEL", "--data", "DATA", "--checkpoint", "WEIGHTS"],
    "report": ["MODEL", "EXPORT"],
    "ablate": ["--model", "test_vit", "--checkpoint", "WEIGHTS", "--data", "DATA"],
    "ablate-clear": ["test_vit", "--checkpoint", "WEIGHTS", "--data", "DATA"],
    "demo": [],
}
FOLDER, FILE = "folder", "file"
STAGED = ("demo --out", "compress --out")  # folders in which every part is an output of its own
# Option: what it names, and what else the line needs.
WRITERS = {
    "plan --out": (FOLDER, []), "extract --out": (FOLDER, []), "finetune --out": (FOLDER, []), "export --out": (FOLDER, []),
    "verify --out": (FOLDER, []), "bench --out": (FILE, []), "bench-dispatch --out": (FILE, []), "build --out": (FOLDER, []),
    "build --timing-cache": (FILE, ["--out", "NEW"]), "bundle --out": (FOLDER, []), "plugin build --out": (FILE, []),
    "plugin bundle --out": (FOLDER, []), "plots --out": (FOLDER, []), "report --out": (FILE, []), "ablate --out": (FOLDER, []),
    "ablate-clear --out": (FOLDER, []), "ablate-clear --table": (FILE, ["--out", "NEW"]), "demo --out": (FOLDER, []),
    "compress --out": (FOLDER, []), "shrink --out": (FOLDER, []),
}  # fmt: skip
INPUTS = {"WEIGHTS": "w.safetensors", "DATA": "images", "PLAN": "plan/plan.json", "MODEL": "model", "EXPORT": "export",
          "ENGINE": "engine", "LIBRARY": "plugin.so", "NEW": "new", "CLASSES": "classes.txt"}  # fmt: skip
OWN = {  # what the command wrote before, and may replace
    "plan --out": "plan", "extract --out": "model", "finetune --out": "model", "export --out": "export", "verify --out": "verify",
    "bench --out": "latency.json", "bench-dispatch --out": "dispatch.json", "build --out": "engine",
    "build --timing-cache": "timing.cache", "bundle --out": "deployment", "plugin build --out": "plugin.so",
    "plugin bundle --out": "bundle", "plots --out": "plots", "report --out": "report.html", "ablate --out": "ablation",
    "ablate-clear --out": "clear", "ablate-clear --table": "table.md", "demo --out": "demo", "compress --out": "demo",
    "shrink --out": "model",
}  # fmt: skip
GROWS = {"ablate --out", "ablate-clear --out"}  # gone on from without --force


def artifact(folder: Path, kind: result_kinds.FolderKind, *files: str) -> Path:
    """A folder as a command leaves it, as far as its name, its manifest and its files go."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    listed = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    (folder / kind.manifest).write_text(json.dumps({"schema": f"{kind.schema}/1", "files": listed}))
    return folder


def earlier_results(root: Path) -> None:
    """One of everything that a command writes, and one of every input."""
    artifact(root / "model", result_kinds.MODEL, "model.safetensors")
    artifact(root / "export", result_kinds.EXPORT, "dense.onnx", "moee.data")
    artifact(root / "engine", result_kinds.ENGINE, "dense.plan", "moee.plan")
    artifact(root / "plan", result_kinds.PLAN)
    artifact(root / "verify", result_kinds.VERIFY, "junit.xml", "summary.md")
    artifact(root / "deployment", result_kinds.DEPLOYMENT, "models/dense.onnx")
    artifact(root / "bundle", result_kinds.PLUGIN_BUNDLE, "csrc/a.cpp")
    (root / "plots").mkdir()
    (root / "plots" / "routing.json").write_text('{"schema": "moee.plot-routing/1", "layers": []}')
    (root / "plots" / "routing.svg").write_text("<svg/>")
    for name, kind in (("ablation", result_kinds.ABLATION), ("clear", result_kinds.CLEAR_ABLATION)):
        (root / name).mkdir()
        (root / name / "setup.json").write_text(json.dumps({"schema": f"{kind.schema}/1"}))
    (root / "latency.json").write_text('{"schema": "moee.latency/1"}')
    (root / "dispatch.json").write_text('{"schema": "moee.dispatch/1"}')
    (root / "parity.json").write_text('{"schema": "moee.parity/1"}')
    (root / "timing.cache").write_bytes(b"ptrtd\0\0\0")
    (root / "plugin.so").write_bytes(b"\x7fELF" + bytes(9000) + b"moee-plugin-headers=10.14")
    (root / "report.html").write_text("<!doctype html>\n<html><head><title>MoEE report: x</title>")
    (root / "table.md").write_text("| router | rank | experts | images | seeds | MACs | accuracy % |\n")
    (root / "w.safetensors").write_bytes(b"weights")
    (root / "classes.txt").write_text("cat\n")
    for part in ("train/cat", "val/cat"):
        (root / "images" / part).mkdir(parents=True)
        (root / "images" / part / "1.png").write_bytes(b"png")
    (root / "demo").mkdir()
    (root / "demo" / "summary.json").write_text('{"schema": "moee.summary/1"}')
    artifact(root / "demo" / "extracted", result_kinds.MODEL, "model.safetensors")


def snapshot(root: Path) -> dict[str, tuple]:
    """Kind, links' targets and content of everything below `root`; names alone do not tell what was replaced by its like."""
    found = {}
    for base, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(base, name)
            mode, inode = path.lstat().st_mode, path.lstat().st_ino
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if stat.S_ISREG(mode) else b""
            found[str(path.relative_to(root))] = (mode, inode, content)
    return found


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A workspace with inputs and earlier results, a user's own things, and places that are no places; the process is in it."""
    root = tmp_path / "work"
    root.mkdir()
    earlier_results(root)
    (root / "photos").mkdir()
    (root / "photos" / "wedding.jpg").write_bytes(b"jpg")
    (root / "notes.txt").write_text("notes")
    (root / "notes.json").write_text('{"schema": "mine/1"}')
    (root / "empty").mkdir()
    (root / "to_folder").symlink_to("photos")
    (root / "to_artifact").symlink_to("model")
    (root / "to_file").symlink_to("notes.txt")
    (root / "to_nothing").symlink_to("absent")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(root)
        server.bind("socket")
    (root / "above" / "link").mkdir(parents=True)
    (root / "here").mkdir()
    monkeypatch.chdir(root / "here")
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "check_outputs", check_and_stop)
    return root


def check_and_stop(args):
    """What the command line calls before a command; no command runs here."""
    check_outputs(args)
    raise UserError("the place was accepted")


def line(root: Path, writer: str, place: str, *more: str) -> list[str]:
    command, _, option = writer.rpartition(" ")
    words = [*command.split(), *LINES[command], *WRITERS[writer][1], *more]
    return [str(root / INPUTS[word]) if word in INPUTS else word for word in words] + [f"{option}={place}"]


def takes_force(writer: str) -> bool:
    return f"{writer.rpartition(' ')[0]} --force" in {f"{c} {o}" for c, o in flags()}


def flags():
    def walk(parser, name):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for key, inner in action.choices.items():
                    yield from walk(inner, f"{name} {key}".strip())
            else:
                yield name, (action.option_strings or [action.dest])[0]

    return walk(cli.build_parser(), "")


def forms(writer: str, *always: str) -> list[list[str]]:
    return [[*always], [*always, "--force"]] if takes_force(writer) else [[*always]]


def refused(root: Path, capsys, writer: str, place: str, *more: str) -> str:
    """The one sentence of a refusal, which names the option; nothing may have changed."""
    before = snapshot(root)
    code = cli.main(line(root, writer, place, *more))
    said = capsys.readouterr().err
    where = f"{writer} {place} {more}: {code}: {said}"
    assert code == 2 and said.startswith("moee: ") and said.count("\n") == 1, where
    option = writer.rpartition(" ")[2]
    assert option in said or "output folder" in said or "cannot write to" in said, where
    assert snapshot(root) == before, where
    return said


def test_every_command_and_option_is_known_here():
    known = [parser for parser, _ in flags()]
    commands = {name for name in known if name} - READS_ONLY - {"plugin"}
    assert commands == LINES.keys(), "a new command gets a row in LINES and WRITERS, or stands in READS_ONLY"
    texts = {f"{c} {o}" for c, o, kind in options() if kind in (None, str, Path)}
    assert WRITERS.keys() <= texts and WRITERS.keys() == OWN.keys()
    assert WRITTEN == WRITERS.keys(), "an option that names something to write goes into WRITTEN and WRITERS"
    assert WRITTEN - PATHS.keys() <= TEXT


@pytest.mark.parametrize("writer", WRITERS)
def test_the_option_is_declared(work, writer):
    """What the parser says of a command line is what is checked before it runs."""
    args = cli.build_parser().parse_args(line(work, writer, str(work / "fresh")))
    declared = {Path(output.path) for output in args.outputs(args)}
    assert work / "fresh" in declared


BAD = (
    "", ".", "..", "/", "/..", "~/../..", "photos/..", "/dev/null", "/dev/null/x", "/dev/full", "/proc/x", "/proc/self/x",
    "/sys/x", "/proc/sys/kernel/x", "notes.txt/x", "to_folder", "to_folder/", "to_artifact", "to_file",
    "to_nothing", "pipe", "socket", "n" * 300, "n" * 250, "absent/" + "n" * 250,
)  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_places_that_are_none(work, writer, capsys):
    """With --force and without: a link, a device, what cannot be written, what has no name."""
    for place in BAD:
        local = place if place.startswith(("/", "~")) or place in ("", ".", "..") else str(work / place)
        for more in forms(writer):
            refused(work, capsys, writer, local, *more)
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_not_ours_is_never_replaced_as_a_folder(work, writer, capsys):
    kind = WRITERS[writer][0]
    folders = ("photos", "photos/../photos", "above", "here/..", "images/train", "images/train/cat")
    for place in folders:
        for more in forms(writer):
            refused(work, capsys, writer, str(work / place), *more)
    if kind == FOLDER:
        for more in forms(writer):
            refused(work, capsys, writer, str(work / "notes.txt"), *more)


@pytest.mark.parametrize("writer", WRITERS)
def test_inputs_are_never_replaced(work, writer, capsys):
    """Neither an input, under whatever name, nor what holds it, nor what lies in it."""
    command = writer.rpartition(" ")[0]
    given = [work / INPUTS[word] for word in LINES[command] if word in INPUTS]
    (work / "alias").symlink_to(work)
    os.link(work / "w.safetensors", work / "hard_link")
    for path in [*given, *[work / "alias" / p.relative_to(work) for p in given], *[Path(f"{p}/../{p.name}") for p in given]]:
        for more in forms(writer):
            said = refused(work, capsys, writer, str(path), *more)
            assert "Traceback" not in said
    refused(work, capsys, writer, str(work), *forms(writer)[-1])
    if any(word == "WEIGHTS" for word in LINES[command]):
        for more in forms(writer):
            refused(work, capsys, writer, str(work / "hard_link"), *more)
    for folder in (path for path in given if path.is_dir()):
        for inner in sorted(p for p in folder.rglob("*")):
            for more in forms(writer):
                refused(work, capsys, writer, str(inner), *more)
        (folder / "nothing").mkdir()
        for more in forms(writer):
            refused(work, capsys, writer, str(folder / "nothing"), *more)
        (folder / "nothing").rmdir()


@pytest.mark.parametrize("writer", [*(w for w, (kind, _) in WRITERS.items() if kind == FILE), "verify --out"])
def test_parts_of_any_artifact_are_never_overwritten(work, writer, capsys):
    """Not those of an artifact that this command does not read either."""
    if writer == "verify --out":  # a file, if its name ends so
        places = ["plan/plan.json", "verify/parity.json", "model/moee.json", "export/export.json", "export/engine.json"]
    else:
        places = ["model/moee.json", "model/model.safetensors", "export/moee.data", "engine/moee.plan", "engine/engine.json",
                  "verify/junit.xml", "verify/parity.json", "deployment/models/dense.onnx", "bundle/csrc/a.cpp",
                  "export/moee.json", "model/export.json", "engine/plan.json"]  # fmt: skip
    for place in places:
        for more in forms(writer):
            refused(work, capsys, writer, str(work / place), *more)


@pytest.mark.parametrize("writer", [w for w, (kind, _) in WRITERS.items() if kind == FOLDER])
def test_another_kind_of_artifact_is_not_replaced(work, writer, capsys):
    own = OWN[writer]
    others = {"model", "export", "engine", "plan", "verify", "deployment", "bundle", "plots", "ablation", "clear", "demo"} - {own}
    for other in others:
        for more in forms(writer):
            said = refused(work, capsys, writer, str(work / other), *more)
            assert not more or "choose another place" in said or writer in GROWS, said


@pytest.mark.parametrize("writer", [w for w, (kind, _) in WRITERS.items() if kind == FOLDER])
def test_a_file_of_the_user_in_an_earlier_result_is_named(work, writer, capsys):
    """The earlier result lies elsewhere, so that it is no input."""
    place = shutil.copytree(work / OWN[writer], work / "earlier" / "result")
    if writer in STAGED:  # which replaces its parts alone
        (place / "notes.txt").write_text("mine")
        assert accepted(work, writer, str(place), "--force")
        place = place / "extracted"
        (place / "notes.txt").write_text("mine")
        assert "notes.txt" in refused(work, capsys, writer, str(place.parent), "--force")
        return

    def named() -> str:
        if writer != "ablate-clear --out":
            return refused(work, capsys, writer, str(place), "--force")
        assert accepted(work, writer, str(place), "--force")  # which keeps the folder whatever the flags, and so what is in it
        with pytest.raises(UserError) as raised:
            OutputFolder(place, result_kinds.CLEAR_ABLATION, force=True, grows=True).check()
        return str(raised.value)

    like_ours = ("sub/x-s1.json", "sub/fig1.svg", "sub/table.svg", "sub/a.cubin", "sub/a.ptx", "cells/sub/x.json", "x/build/y")
    for name in ("notes.txt", "sub/model.pth", ".hidden", *like_ours):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("mine")
        assert name in named()
        (place / name).unlink()
    (place / "link").symlink_to(work / "photos")
    assert "link" in named()


def accepted(root: Path, writer: str, place: str, *more: str) -> bool:
    """Whether the check lets a place pass and leaves nothing behind."""
    before = snapshot(root)
    args = cli.build_parser().parse_args(line(root, writer, place, *more))
    check_outputs(args)
    return snapshot(root) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_good_places(work, writer, capsys):
    kind, option = WRITERS[writer][0], writer.rpartition(" ")[2]
    for place in ("fresh", "a/b/fresh", "absent/../fresh", "to_folder/fresh", "to_nothing/fresh", "has space", "-dash", "ü"):
        assert accepted(work, writer, str(work / place))
    assert accepted(work, writer, "relative")
    (work / "earlier").mkdir()
    own = work / "earlier" / OWN[writer]
    (shutil.copytree if kind == FOLDER else shutil.copy)(work / OWN[writer], own)
    if kind == FILE and writer != "report --out":
        assert accepted(work, writer, str(own))  # the same command wrote it
        (work / "nothing").touch()
        assert accepted(work, writer, str(work / "nothing"))
    elif writer in GROWS:
        assert accepted(work, writer, str(own)) and accepted(work, writer, str(work / "empty"))
    else:
        assert "--force" in refused(work, capsys, writer, str(own))
    if takes_force(writer):
        assert accepted(work, writer, str(own), "--force")
    if takes_force(writer) and kind == FOLDER:
        (own / ".DS_Store").touch()
        (own / ".model.0123abcd.tmp").mkdir()
        (own / ".model.0123abcd.tmp" / "half").touch()
        assert accepted(work, writer, str(own), "--force") and accepted(work, writer, str(work / "empty"), "--force")
    if kind == FILE:
        for name in ("notes.txt", "notes.json"):
            said = refused(work, capsys, writer, str(work / name))
            if takes_force(writer) and option != "--timing-cache":
                assert "--force" in said and accepted(work, writer, str(work / name), "--force")
            else:
                assert "timing cache" in refused(work, capsys, writer, str(work / name), "--force")


def test_files_that_our_own_commands_leave_in_a_result_do_not_bar_it(work):
    for name in ("plugin.log", "runner.log", "plugin/build/CMakeCache.txt", "engines/moee.plan", "engines/moee.log",
                 "timing.cache", "triton/model_repository/moee/1/model.plan"):  # fmt: skip
        (work / "deployment" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "deployment" / name).touch()
    assert accepted(work, "bundle --out", str(work / "deployment"), "--force")
    (work / "broken").mkdir()
    (work / "broken" / "junit.xml").write_text('<?xml version="1.0"?>\n<testsuites name="moee verify" tests="1">')
    assert accepted(work, "verify --out", str(work / "broken"), "--force")
    (work / "broken" / "junit.xml").write_text('<testsuites name="mine">')
    with pytest.raises(UserError, match="junit.xml"):
        accepted(work, "verify --out", str(work / "broken"), "--force")


REFUSED = '<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="moee verify" tests="1" failures="0" errors="1" '


def test_the_report_of_a_refusal_alone_is_replaced_without_force(work, capsys):
    folder = work / "refused"
    folder.mkdir()
    (folder / "junit.xml").write_text(REFUSED)
    assert accepted(work, "verify --out", str(folder))
    for other, text in (("junit.xml", REFUSED.replace('errors="1"', 'errors="0"')), ("notes.txt", "mine")):
        (folder / other).write_text(text)
        assert "pass --force" in refused(work, capsys, "verify --out", str(folder))
        (folder / "junit.xml").write_text(REFUSED)


def test_what_comes_beside_the_report_of_a_refusal_in_the_meantime_is_kept(tmp_path):
    folder = tmp_path / "refused"
    folder.mkdir()
    (folder / "junit.xml").write_text(REFUSED)
    output = OutputFolder(folder, result_kinds.VERIFY)
    with pytest.raises(UserError, match="pass --force"), output.write():
        (folder / "parity.json").write_text('{"schema": "moee.parity/1"}')
    assert (folder / "parity.json").exists() and (folder / "junit.xml").read_text() == REFUSED


@pytest.mark.parametrize("writer", ["finetune --out", "plan --out"])
def test_the_state_of_an_interrupted_run_is_a_place_too(work, writer, capsys):
    """It is removed when the run is done."""
    state = work / "new.resume"
    state.mkdir()
    assert accepted(work, writer, str(work / "new"))
    (state / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(work, capsys, writer, str(work / "new"))
    schema = result_kinds.FINETUNE_STATE if writer.startswith("finetune") else result_kinds.PLAN_STATE
    (state / schema.manifest).write_text(json.dumps({"schema": f"{schema.schema}/1"}))
    assert "notes.txt" in refused(work, capsys, writer, str(work / "new"))
    (state / "notes.txt").unlink()
    assert accepted(work, writer, str(work / "new"))
    shutil.rmtree(state)
    state.symlink_to(work / "photos")
    refused(work, capsys, writer, str(work / "new"))


def test_places_of_one_command_do_not_lie_in_one_another(work, capsys):
    inside = str(work / "new" / "timing.cache")
    assert "lies in --out" in refused(work, capsys, "build --timing-cache", inside)
    assert "lies in" in refused(work, capsys, "ablate-clear --table", str(work / "x.svg"))  # the plot's name too
    assert accepted(work, "ablate-clear --table", str(work / "new" / "table.md"))


def test_what_an_input_was_made_from_is_an_input(work, capsys):
    """An export names its model, that its weights and data."""
    for folder, more in (("model", {"model": {"weights": "WEIGHTS"}, "data": "DATA"}), ("export", {"source": "../model"})):
        path = work / folder / ("moee.json" if folder == "model" else "export.json")
        text = json.dumps({**json.loads(path.read_text()), **more})
        path.write_text(text.replace("WEIGHTS", str(work / "w.safetensors")).replace("DATA", str(work / "images")))
    for writer in ("bench --out", "report --out"):
        assert "is the input" in refused(work, capsys, writer, str(work / "w.safetensors"), "--force")
        assert "lies in the input" in refused(work, capsys, writer, str(work / "images" / "train" / "cat" / "1.png"), "--force")
    (work / "images" / "empty").mkdir()
    assert "lies in the input" in refused(work, capsys, "bundle --out", str(work / "images" / "empty"), "--force")


def test_an_artifact_under_the_name_of_built_in_data_is_an_input(work, capsys, monkeypatch):
    """The name means the data for `--data` alone."""
    monkeypatch.chdir(work)
    os.rename(work / "photos", work / "wedding")
    shutil.copytree(work / "model", work / "photos")
    shutil.copy(work / "w.safetensors", work / "digits")
    with pytest.raises(UserError, match="is the input photos"):
        check_outputs(cli.build_parser().parse_args(["finetune", "photos", "--out", "photos", "--force"]))
    with pytest.raises(UserError, match="is the input digits"):
        OutputFile("digits", result_kinds.LATENCY, True, source_paths("digits")).check()


def test_built_in_data_is_no_folder_that_lies_around_under_its_name(work, monkeypatch):
    """Neither as a flag's value nor as what a manifest says."""
    monkeypatch.chdir(work)
    assert source_paths("photos", "photos:5") == ()
    body = json.loads((work / "model" / "moee.json").read_text())
    (work / "model" / "moee.json").write_text(json.dumps({**body, "data": "digits"}))
    artifact(work / "digits", result_kinds.MODEL)
    assert source_paths("model") == (Path("model"),)


def test_artifacts_that_name_each_other_are_walked_once(work):
    for name, other in (("export", "../engine"), ("engine", "../export")):
        path = work / name / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "source": other}))
    found = source_paths(work / "export")
    assert sorted(os.path.realpath(path) for path in found) == [str(work / "engine"), str(work / "export")]
    assert len(found) == 2


def test_a_foreign_file_is_told_by_its_head(work, monkeypatch):
    """And one of ours in blocks: a file of many gigabytes is never read into memory."""
    monkeypatch.setattr(result_kinds, "BLOCK_BYTES", 16)
    plugin = work / "plugin.so"
    for shift in range(40):  # the mark lies across the blocks in every way
        plugin.write_bytes(b"\x7fELF" + bytes(5000 + shift) + b"moee-plugin-headers=10.14")
        assert result_kinds.PLUGIN.wrote(plugin)
    plugin.write_bytes(b"\x7fELF" + bytes(9000))
    assert not result_kinds.PLUGIN.wrote(plugin)
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(result_kinds, "open", Counted, raising=False)
    (work / "film.mkv").write_bytes(bytes(1 << 16))
    assert not result_kinds.PLUGIN.wrote(work / "film.mkv") and read == [result_kinds.HEAD_BYTES]


def test_a_place_without_its_rules_cannot_be_made(work):
    with pytest.raises(TypeError, match="abstract"):
        placement.Output(work / "new", result_kinds.MODEL)  # type: ignore[abstract]


def test_earlier_results_below_a_data_folder_may_be_replaced(work, monkeypatch, capsys):
    """`--data . --out runs/x` is no danger to the data."""
    earlier = shutil.copytree(work / "model", work / "images" / "runs" / "x")
    assert accepted(work, "extract --out", str(earlier), "--force")
    assert accepted(work, "extract --out", str(work / "images" / "runs" / "y"))
    assert accepted(work, "bench --out", str(work / "images" / "latency"))
    assert "lies in the input" in refused(work, capsys, "bench --out", str(work / "export" / "reference.onnx"))


def test_the_folder_that_one_is_in_is_not_replaced(work, capsys, monkeypatch):
    monkeypatch.chdir(work / "empty")
    assert "runs in" in refused(work, capsys, "extract --out", "../empty", "--force")


def test_a_mount_point_cannot_be_replaced(work, capsys, monkeypatch, tmp_path):
    """The kernel would refuse the exchange, after the work."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"36 35 98:0 / {work / 'empty'} rw,noatime shared:1 - ext4 /dev/root rw\n")
    monkeypatch.setattr(paths, "MOUNTS", mounts)
    assert "mount point" in refused(work, capsys, "extract --out", str(work / "empty"), "--force")


def test_a_read_only_file_system(work, capsys):
    fixed = work / "fixed"
    fixed.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(fixed)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for writer in WRITERS:
            for place in ("x", "a/b/x"):
                assert "Read-only file system" in refused(work, capsys, writer, str(fixed / place))
    finally:
        subprocess.run(["umount", str(fixed)], check=True)


SPEC = ModelSpec(name="test_vit", timm_name="test_vit", weights="WEIGHTS")


def weights_in(path):
    return SPEC.model_copy(update={"weights": str(path), "random_seed": None})


@pytest.mark.parametrize(
    "function",
    [
        lambda w: run_extract(SPEC, str(w / "images"), method_options(), w / "images", force=True),
        lambda w: run_extract(weights_in(w / "model/model.safetensors"), "digits", method_options(), w / "model", force=True),
        lambda w: run_finetune(w / "model", FinetuneConfig(), w / "model", force=True),
        lambda w: run_finetune(w / "model", FinetuneConfig(), w / "photos", force=True),
        lambda w: build_engines(w / "export", w / "export", plugin=None, force=True),
        lambda w: build_engines(w / "export", w / "new", plugin=None, timing_cache=w / "notes.txt"),
        lambda w: write_report([w / "model"], w / "model" / "moee.json", force=True),
        lambda w: write_plots(None, None, None, w / "photos", force=True),  # type: ignore[arg-type]
        lambda w: build_kernels(w / "photos", [87]),
    ],
    ids=["extract data", "extract weights", "finetune", "finetune photos", "build", "timing cache", "report", "plots", "kernels"],
)  # fmt: skip
def test_python_functions_refuse_too(work, function, monkeypatch):
    monkeypatch.setattr("exporter.engines.build.require_backend", lambda backend: None)
    before = snapshot(work)
    with pytest.raises(UserError, match="choose another"):
        function(work)
    assert snapshot(work) == before


@pytest.fixture(params=["exchange", "two renames"])
def names(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(exchange, "libc_renameat2", lambda: None)


def beside(folder: Path, stem: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(f"{stem}-")]


def test_what_appears_meanwhile_is_put_back_and_the_result_kept(work, names):
    """The look before the work is no use for what comes during it: a user's folder is exchanged back, and the result not lost."""
    with pytest.raises(UserError, match="wedding.jpg.*the result is kept as .*/new-"):
        with OutputFolder(work / "new", result_kinds.MODEL, force=True).write() as folder:
            (folder / "moee.json").write_text("result")
            os.rename(work / "photos", work / "new")
    assert [p.name for p in (work / "new").iterdir()] == ["wedding.jpg"]
    (kept,) = beside(work, "new")
    assert (kept / "moee.json").read_text() == "result" and not [p for p in work.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(errno.EACCES, "Permission denied"), RuntimeError("bug")])
@pytest.mark.parametrize("folder", [True, False])
def test_what_was_taken_away_is_put_back_whatever_happens(work, names, error, folder):
    """Not for a refusal alone: it would be deleted with what is temporary."""
    place = work / ("photos" if folder else "notes.txt")
    before = {name: content for name, (*_, content) in snapshot(work).items()}

    def accept(path):
        if path != place:
            raise error

    def write():
        if folder:
            with atomic_folder(place, force=True, accept=accept) as temporary:
                (temporary / "moee.json").write_text("result")
        else:
            with atomic_file(place, accept) as temporary:
                temporary.write_text("result")

    if not folder and exchange.libc_renameat2() is None:
        return write()  # never taken away there
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as raised:
        write()
    kept = beside(work, place.stem)
    after = {name: content for name, (*_, content) in snapshot(work).items() if not any(name.startswith(k.name) for k in kept)}
    assert after == before
    if isinstance(error, OSError):
        assert str(raised.value) == f"{place} cannot be written: Permission denied; the result is kept as {kept[0]}"
        assert (kept[0] / "moee.json" if folder else kept[0]).read_text() == "result"
    else:
        assert not kept


def test_what_was_taken_away_is_never_swept(work):
    """Another writer of the same place sweeps while ours looks at what it took."""

    def accept(path):
        leftovers.sweep(work / "photos")
        if path != work / "photos":
            raise UserError("not ours")

    with pytest.raises(UserError, match="not ours; the result is kept"), atomic_folder(work / "photos", True, accept):
        pass
    assert (work / "photos" / "wedding.jpg").read_bytes() == b"jpg"


def test_what_cannot_be_put_back_gets_a_free_name(work, names):
    """Its name was taken meanwhile, and under a temporary one it would be deleted."""

    def accept(path):
        if path == work / "photos":
            return
        if (work / "photos").exists():
            os.rename(work / "photos", work / "elsewhere")
        (work / "photos").mkdir()
        raise UserError("not ours")

    with pytest.raises(UserError, match="what was there before is now .*/photos-"):
        with atomic_folder(work / "photos", True, accept) as folder:
            (folder / "moee.json").write_text("result")
    names_of = [sorted(p.name for p in path.iterdir()) for path in beside(work, "photos")]
    assert ["wedding.jpg"] in names_of and list((work / "photos").iterdir()) == []
    assert ["moee.json"] in names_of or (work / "elsewhere" / "moee.json").exists()


def late_model():
    return MoeeModel(build_model(tiny_spec()), tiny_spec(), Recipe.of(method_options()), "tiny")


@pytest.mark.parametrize("force", [False, True])
def test_a_model_is_written_beside_a_place_that_appears_during_the_work(work, force):
    """`check` came hours before: what refuses the place at the end must not cost the model."""
    OutputFolder(work / "new", result_kinds.MODEL, force).check()
    os.rename(work / "photos", work / "new")
    with pytest.raises(UserError, match="new.*; the result is kept as .*/new-"):
        checkpoint.save(late_model(), work / "new", force)
    assert [p.name for p in (work / "new").iterdir()] == ["wedding.jpg"]
    (kept,) = beside(work, "new")
    assert read_manifest(kept, "moee.json", "moee.model/2")["data"] == "tiny"
    assert not [p for p in work.iterdir() if p.name.startswith(".")]


def test_a_measurement_is_written_beside_a_place_that_refuses(work):
    output = OutputFile(work / "new.json", result_kinds.LATENCY)
    output.check()
    (work / "new.json").symlink_to(work / "notes.txt")
    with pytest.raises(UserError, match="is a link.*; the result is kept as .*/new-.*json"):
        output.write_json({"schema": "moee.latency/1"})
    assert json.loads(beside(work, "new")[0].read_text()) == {"schema": "moee.latency/1"}
    assert (work / "notes.txt").read_text() == "notes"
    with pytest.raises(UserError, match="is a link"):
        output.write_text("cheap")
    assert len(beside(work, "new")) == 1


@pytest.mark.parametrize("existed", [True, False])
def test_a_file_that_appears_meanwhile_is_left(work, names, existed):
    place = work / ("latency.json" if existed else "fresh.json")
    with pytest.raises(UserError, match="the result is kept as"):
        with OutputFile(place, result_kinds.LATENCY).write() as temporary:
            temporary.write_text("result")
            place.write_text("mine")
    assert place.read_text() == "mine"
    (kept,) = beside(work, place.stem)
    assert kept.read_text() == "result" and kept.suffix == ".json"


def test_without_force_a_folder_that_appears_is_left_and_the_result_kept(work, names):
    with pytest.raises(UserError, match="appeared while this ran.*kept as"), atomic_folder(work / "new") as folder:
        (folder / "file").write_text("ours")
        (work / "new").mkdir()
    assert not list((work / "new").iterdir()) and (beside(work, "new")[0] / "file").read_text() == "ours"


def test_a_file_of_ours_is_replaced(work, names):
    OutputFile(work / "latency.json", result_kinds.LATENCY).write_json({"schema": "moee.latency/1", "new": True})
    assert json.loads((work / "latency.json").read_text())["new"] and not [p for p in work.iterdir() if p.name.startswith(".")]
    with atomic_file(work / "fresh.json", lambda path: None) as temporary:
        temporary.write_text("x")
    assert (work / "fresh.json").read_text() == "x"


def fake_worker(spec, progress):
    """As a worker of TensorRT: a plan, and more in the timing cache than was in it."""
    Path(spec["plan"]).write_bytes(b"ftrt")
    cache = Path(spec["timing_cache"])
    cache.write_bytes((cache.read_bytes() if cache.exists() else b"ptrt") + b"+")
    return {"version": "0", "build_s": 0.0, "plugin_layers": 0, "layers": 1, "gpus": 0}


@pytest.mark.parametrize("fails", [False, True])
def test_the_timing_cache_grows_and_outlives_a_failed_build(work, monkeypatch, fails):
    def worker(spec, progress):
        if fails and Path(spec["plan"]).name == "moee.plan":
            raise UserError("the graph cannot be built")
        return fake_worker(spec, progress)

    export = {"plugin_nodes": 0, "model": {"name": "tiny", "timm_name": "tiny"}, "data": "digits"}
    monkeypatch.setattr("exporter.engines.build.require_backend", lambda backend: None)
    monkeypatch.setattr("exporter.engines.build.read_export", lambda folder: export)
    monkeypatch.setattr("exporter.engines.build._graph", lambda folder, export, key: folder / "dense.onnx")
    monkeypatch.setattr("exporter.engines.build.count_plugin_nodes", lambda graph: 0)
    monkeypatch.setattr("exporter.engines.build.run_worker", worker)
    for place, before in ((work / "timing.cache", b"ptrtd\0\0\0"), (work / "new.cache", b"ptrt")):
        shutil.rmtree(work / "engines", ignore_errors=True)
        if fails:
            with pytest.raises(UserError, match="cannot be built"):
                build_engines(work / "export", work / "engines", plugin=None, timing_cache=place)
        else:
            build_engines(work / "export", work / "engines", plugin=None, timing_cache=place)
        assert place.read_bytes() == before + (b"+" if fails else b"++")
        assert (work / "engines").exists() != fails


def test_kinds_agree_with_what_is_written():
    """The tables name schemas that the writers write."""
    from exporter import clear_ablation, demo, manifests
    from exporter.ship import deployment
    from exporter.timing import dispatch_bench
    from moee.ablation import cells
    from moee.artifacts import checkpoint
    from moee.planning import plan
    from moee.train import resume
    from moee.train import state as finetune_state
    from plugins.aot import manifest
    from plugins.library import bundle as plugin_bundle

    written = {
        result_kinds.MODEL: (checkpoint.MANIFEST, checkpoint.SCHEMA),
        result_kinds.EXPORT: (manifests.EXPORT, manifests.EXPORT_SCHEMA),
        result_kinds.ENGINE: (manifests.ENGINE, manifests.ENGINE_SCHEMA), result_kinds.PLAN: (plan.PLAN, plan.SCHEMA),
        result_kinds.DEPLOYMENT: ("deployment.json", deployment.DEPLOYMENT_SCHEMA),
        result_kinds.PLUGIN_BUNDLE: ("bundle.json", plugin_bundle.SCHEMA),
        result_kinds.KERNELS: (manifest.FILE_NAME, manifest.SCHEMA), result_kinds.ABLATION: (cells.SETUP, cells.SETUP_SCHEMA),
        result_kinds.CLEAR_ABLATION: (clear_ablation.SETUP, clear_ablation.SETUP_SCHEMA),
        result_kinds.FINETUNE_STATE: (resume.STATE, finetune_state.SCHEMA),
        result_kinds.PLAN_STATE: ("identity.json", plan.STORE_SCHEMA),
    }  # fmt: skip
    for kind, (name, schema) in written.items():
        assert (kind.manifest, kind.schema) == (name, schema.partition("/")[0])
    assert result_kinds.SUMMARY.schema == demo.SCHEMA.partition("/")[0]
    assert result_kinds.DISPATCH.schema == dispatch_bench.SCHEMA.partition("/")[0]
    state = resume.TENSORS.format(epoch=12)
    assert result_kinds.matches(state, result_kinds.FINETUNE_STATE.beside)
