"""Every command that takes a folder, given each other kind of folder that we write: one sentence, which says what to run."""

import json

import pytest

from exporter import cli
from exporter.manifests import read_engine
from moee.errors import UserError
from moee.store.result_kinds import COMPRESSION, ENGINE, EXPORT, FINETUNE_STATE, FOLDER_KINDS, MODEL, PLAN, PLAN_STATE

DENSE = ("test_vit", "--random-weights", "0", "--data")
COMMANDS = {  # what it needs, and its words; FOLDER is given, OUT written
    "finetune": (MODEL, ("finetune", "FOLDER", "--out", "OUT")),
    "export": (MODEL, ("export", "FOLDER", "--out", "OUT")),
    "plots": (MODEL, ("plots", "FOLDER", "--out", "OUT")),
    "inspect": (MODEL, ("inspect", "FOLDER")),
    "bench-dispatch": (MODEL, ("bench-dispatch", "FOLDER")),
    "verify": (EXPORT, ("verify", "FOLDER", "--out", "OUT")),
    "bench": (EXPORT, ("bench", "FOLDER", "--out", "OUT")),
    "build": (EXPORT, ("build", "FOLDER", "--out", "OUT")),
    "bundle": (EXPORT, ("bundle", "FOLDER", "--sm", "orin", "--out", "OUT")),
    "extract --plan": (PLAN, ("extract", *DENSE, "digits", "--plan", "FOLDER", "--out", "OUT")),
    "extract": (None, ("extract", "FOLDER", "--data", "digits", "--out", "OUT")),
    "plan": (None, ("plan", "FOLDER", "--data", "digits", "--target-macs", "0.7", "--out", "OUT")),
    "ablate": (None, ("ablate", "--model", "FOLDER", "--out", "OUT")),
    "ablate-clear": (None, ("ablate-clear", "FOLDER", "--data", "digits", "--out", "OUT")),
}
UNFINISHED = (FINETUNE_STATE, PLAN_STATE)
CURES = {  # of what is needed and what was given
    (EXPORT, MODEL): "run `moee export {} --out export` first",
    (EXPORT, PLAN): "run `moee extract MODEL --data DATA --plan {} --out extracted`, then `moee export extracted --out export`",
    (MODEL, PLAN): "run `moee extract MODEL --data DATA --plan {} --out extracted` first",
    (MODEL, EXPORT): "give a folder that moee extract or finetune wrote",
    (EXPORT, ENGINE): "give a folder that moee export wrote",
    (MODEL, COMPRESSION): "give {}/extracted",
    (EXPORT, COMPRESSION): "give {}/export",
    (MODEL, FINETUNE_STATE): "run the same moee finetune again",
    (EXPORT, PLAN_STATE): "run the same moee plan again",
    (PLAN, MODEL): "give a folder that moee plan wrote",
}


def folder_of(kind, place, **body):
    place.mkdir()
    (place / kind.manifest).write_text(json.dumps({"schema": f"{kind.schema}/1", "files": {}, **body}))
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_folder_is_named_with_what_to_run(tmp_path, capsys, command):
    wanted, words = COMMANDS[command]
    also = {"plots": [PLAN]}.get(command, [])  # whose front is drawn
    for number, kind in enumerate(kind for kind in FOLDER_KINDS if kind not in (wanted, *also)):
        folder, out = folder_of(kind, tmp_path / f"o {number}"), tmp_path / "out"
        given = {"FOLDER": str(folder), "OUT": str(out)}
        assert cli.main([given.get(word, word) for word in words]) == 2, kind
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moee: ")]
        assert len(said) == 1 and f"{folder} holds {kind.what}, and " in said[0], (kind, said)
        cure = CURES.get((wanted, kind)) or ("run the same moee" if wanted and kind in UNFINISHED else "give ")
        assert cure.format(f"'{folder}'" if cure.startswith("run `") else folder) in said[0], (kind, said)
        assert not [p for p in (out, tmp_path / "out.resume") if p.exists() and not (p / "junit.xml").exists()]


def test_engines_and_images_are_told_from_others(tmp_path, capsys):
    export, model = folder_of(EXPORT, tmp_path / "export"), folder_of(MODEL, tmp_path / "model")
    with pytest.raises(UserError, match="an export, and an engine folder is needed: run `moee build .* --out engine` first$"):
        read_engine(export)
    with pytest.raises(UserError, match="run `moee export .*/model --out export`, then `moee build export --out engine` first$"):
        read_engine(model)
    assert cli.main(["extract", *DENSE, str(model), "--out", str(tmp_path / "out")]) == 2
    assert f"no images found in {model} ({model} holds a model of moee extract" in capsys.readouterr().err
    assert cli.main(["report", str(folder_of(PLAN_STATE, tmp_path / "state")), "--out", str(tmp_path / "r.html")]) == 2
    assert "holds an interrupted plan, which a report does not show" in capsys.readouterr().err


def test_an_export_names_the_model_that_it_was_made_from(tmp_path, capsys):
    folder_of(MODEL, tmp_path / "tuned")
    export = folder_of(EXPORT, tmp_path / "export", source="../tuned")
    assert cli.main(["finetune", str(export), "--out", str(tmp_path / "out")]) == 2
    assert f"give {tmp_path / 'tuned'}, which it was exported from" in capsys.readouterr().err
