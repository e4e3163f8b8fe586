"""A canary pickle in the place of every file that any command takes."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from exporter import cli
from exporter.clear_ablation import Grid, cell_name
from moee.store.artifact import sha256_file, write_json
from tests.exporter.engines import write_engine
from tests.untrusted.test_pickles import Canary
from tests.untrusted.test_pickles import canary as canary  # noqa: PLC0414  (a fixture)

# Options that name something to write; `tests/reliability/test_places.py` has a row for each.
WRITTEN = {
    "bench --out", "bench-dispatch --out", "plugin build --out", "plugin bundle --out", "report --out", "demo --out",
    "export --out", "build --out", "build --timing-cache", "bundle --out", "plots --out", "verify --out", "extract --out",
    "plan --out", "finetune --out", "ablate --out", "ablate-clear --out", "ablate-clear --table", "compress --out",
    "shrink --out",
}  # fmt: skip
# Options that take text, and not a path of something that is read. An option that stands in neither list fails the test below.
TEXT = WRITTEN | {
    "--provider", "--precision", "--min-shapes", "--opt-shapes", "--max-shapes", "--backend", "--sm", "--layer", "--preset",
    "--exclude", "--clustering", "--criterion", "--allocation", "--objective", "--statistics", "--compensation", "--routing",
    "--router", "--method", "--split", "--selector", "--distil", "--tables", "--keep", "--design", "--device",
    "--torch-device", "--methods", "--allocations", "--model-kwargs", "--amp", "finetune --train", "--attention-heads",
    "--targets", "plan --attention-macs", "--one-expert", "--emit", "compress --attention-macs", "demo --data",
    "extract --metric", "--print-completion", "--neurons", "--mac-time", "--refit-target", "--corp-attention",
    "plan --token-macs", "compress --token-macs", "ablate what",
    "--scratch",  # a folder in which one of its own is made, and nothing read
    # a function's name, of an artifact whose model comes from one
    *(
        f"{command} --model"
        for command in ("finetune", "shrink", "export", "bench", "bench-dispatch", "bundle", "plots", "inspect")
    ),
}  # fmt: skip
SMALL = ("vit_tiny_patch16_224", "--img-size", "32")
BUDGET = ("--target-macs", "0.7")
DRAWN = ("--random-weights", "0")  # without weights a command would end before it comes to the path
# For each path: a command line in which PICKLE stands in its place, as a file and as a folder that holds nothing else.
PATHS = {
    "compress model": ("compress", "PICKLE", "--data", "digits", "--out", "OUT"),
    "compress --data": ("compress", *SMALL, *DRAWN, "--data", "PICKLE", "--out", "OUT"),
    "compress --checkpoint": ("compress", *SMALL, "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "compress --class-map": ("compress", *SMALL, *DRAWN, "--data", "digits", "--class-map", "PICKLE", "--out", "OUT"),
    "compress --confirm": ("compress", *SMALL, *DRAWN, "--data", "digits", "--confirm", "PICKLE", "--out", "OUT"),
    "compress --out": ("compress", *SMALL, *DRAWN, "--data", "digits", "--out", "PICKLE"),
    "plan model": ("plan", "PICKLE", "--data", "digits", "--target-macs", "0.7", "--out", "OUT"),
    "plan --data": ("plan", *SMALL, *DRAWN, "--data", "PICKLE", "--target-macs", "0.7", "--out", "OUT"),
    "plan --checkpoint": ("plan", *SMALL, "--data", "digits", "--checkpoint", "PICKLE", "--target-macs", "0.7", "--out", "OUT"),
    "plan --class-map": ("plan", *SMALL, *DRAWN, "--data", "digits", "--class-map", "PICKLE", *BUDGET, "--out", "OUT"),
    "plan --measured": ("plan", *SMALL, *DRAWN, "--data", "digits", *BUDGET, "--measured", "PICKLE", "--out", "OUT"),
    "plan --out": ("plan", *SMALL, *DRAWN, "--data", "digits", "--target-macs", "0.7", "--out", "PICKLE"),
    "extract model": ("extract", "PICKLE", "--data", "digits", "--out", "OUT"),
    "extract --data": ("extract", *SMALL, *DRAWN, "--data", "PICKLE", "--out", "OUT"),
    "extract --checkpoint": ("extract", *SMALL, "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "extract --class-map": ("extract", *SMALL, *DRAWN, "--data", "digits", "--class-map", "PICKLE", "--out", "OUT"),
    "extract --plan": ("extract", *SMALL, *DRAWN, "--data", "digits", "--plan", "PICKLE", "--out", "OUT"),
    "extract --recipe": ("extract", *SMALL, *DRAWN, "--data", "digits", "--recipe", "PICKLE", "--out", "OUT"),
    "finetune --recipe": ("finetune", "MODEL", "--data", "digits", "--recipe", "PICKLE", "--out", "OUT"),
    "finetune path": ("finetune", "PICKLE", "--data", "digits", "--out", "OUT"),
    "finetune --data": ("finetune", "MODEL", "--data", "PICKLE", "--out", "OUT"),
    "finetune --out": ("finetune", "MODEL", "--data", "digits", "--out", "PICKLE"),
    "shrink path": ("shrink", "PICKLE", "--specialise", "--data", "digits", "--out", "OUT"),
    "shrink --data": ("shrink", "MODEL", "--specialise", "--data", "PICKLE", "--out", "OUT"),
    "shrink --checkpoint": (
        "shrink", "FROM_FILE", "--specialise", "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"
    ),
    "shrink --out": ("shrink", "MODEL", "--specialise", "--data", "digits", "--out", "PICKLE"),
    "export path": ("export", "PICKLE", "--out", "OUT"),
    "export --data": ("export", "MODEL", "--precision", "int8", "--data", "PICKLE", "--out", "OUT"),
    "verify path": ("verify", "PICKLE", "--model", "MODEL", "--data", "digits"),
    "verify more": ("verify", "--quick", "MODEL", "PICKLE"),
    "verify --engine": ("verify", "EXPORT", "--model", "MODEL", "--data", "digits", "--engine", "PICKLE"),
    "verify --model": ("verify", "EXPORT", "--model", "PICKLE", "--data", "digits"),
    "verify --data": ("verify", "EXPORT", "--model", "MODEL", "--data", "PICKLE"),
    "bench path": ("bench", "PICKLE", "--runs", "1"),
    "bench --data": ("bench", "EXPORT", "--data", "PICKLE", "--runs", "1"),
    "bench --beside": ("bench", "EXPORT", "--beside", "PICKLE", "--runs", "1"),
    "bench --engine": ("bench", "EXPORT", "--engine", "PICKLE"),
    "bench-dispatch path": ("bench-dispatch", "PICKLE"),
    "build path": ("build", "PICKLE", "--out", "OUT"),
    "build --plugin": ("build", "EXPORT", "--plugin", "PICKLE", "--out", "OUT"),
    "build --timing-cache": ("build", "EXPORT", "--plugin", "PICKLE", "--timing-cache", "PICKLE", "--out", "OUT"),
    "bundle path": ("bundle", "PICKLE", "--sm", "87", "--out", "OUT"),
    "inspect --checkpoint": ("inspect", *SMALL, "--checkpoint", "PICKLE"),
    "finetune --checkpoint": ("finetune", "FROM_FILE", "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "export --checkpoint": ("export", "FROM_FILE", "--checkpoint", "PICKLE", "--out", "OUT"),
    "plots --checkpoint": ("plots", "FROM_FILE", "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "inspect model": ("inspect", "PICKLE"),
    "plots path": ("plots", "PICKLE", "--data", "digits", "--out", "OUT"),
    "plots --data": ("plots", "MODEL", "--data", "PICKLE", "--out", "OUT"),
    "report paths": ("report", "PICKLE", "--out", "OUT"),
    "ablate --model": ("ablate", "--model", "PICKLE", "--data", "digits", "--out", "OUT"),
    "ablate --data": ("ablate", "--model", *SMALL, *DRAWN, "--data", "PICKLE", "--out", "OUT"),
    "ablate --checkpoint": ("ablate", "--model", *SMALL, "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "ablate --class-map": ("ablate", "--model", *SMALL, *DRAWN, "--data", "digits", "--class-map", "PICKLE", "--out", "OUT"),
    "ablate --out": ("ablate", "--model", *SMALL, *DRAWN, "--data", "digits", "--out", "PICKLE"),
    "ablate-clear model": ("ablate-clear", "PICKLE", "--data", "digits", "--out", "OUT"),
    "ablate-clear --data": ("ablate-clear", *SMALL, *DRAWN, "--data", "PICKLE", "--out", "OUT"),
    "ablate-clear --checkpoint": ("ablate-clear", *SMALL, "--data", "digits", "--checkpoint", "PICKLE", "--out", "OUT"),
    "ablate-clear --class-map": ("ablate-clear", *SMALL, *DRAWN, "--data", "digits", "--class-map", "PICKLE", "--out", "OUT"),
    "ablate-clear --out": ("ablate-clear", *SMALL, *DRAWN, "--data", "digits", "--out", "PICKLE"),
}  # fmt: skip
NAMES = (
    "moee.json", "export.json", "engine.json", "plan.json", "parity.json", "latency.json", "summary.json", "setup.json",
    "kernels.json", "identity.json", "state.json", "model.safetensors", "probe.safetensors", "state-1.safetensors", "dense.onnx",
    "portable.onnx", "tensorrt.onnx", "moee.data", "dense.plan", "moee.plan", "libmoee_plugin.so", "a.png", "b.jpg", "c.pkl",
    "d.pth", "cells/x.json",
)  # fmt: skip


def options():
    """(command, option, type) of everything that takes a value."""

    def walk(parser, name):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for key, inner in action.choices.items():
                    yield from walk(inner, f"{name} {key}".strip())
            elif action.nargs != 0:
                yield name, (action.option_strings or [action.dest])[0], action.type

    return list(walk(cli.build_parser(), ""))


def test_every_option_is_known_here():
    texts = [(c, o) for c, o, kind in options() if kind in (None, str, Path)]
    unknown = [f"{c} {o}" for c, o in texts if not {o, f"{c} {o}"} & (TEXT | PATHS.keys())]
    assert not unknown, "a path that is read goes into PATHS, anything else into TEXT"
    assert PATHS.keys() <= {f"{c} {o}" for c, o in texts}


@pytest.fixture
def spread(tmp_path, canary, made, monkeypatch):
    """(folder of pickles, the folder that appears if one is opened); `run` puts either form into a command line."""
    data, opened = canary
    monkeypatch.setenv("MOEE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pickles"
    (folder / "cells").mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(data)
    for setting in Grid().settings("star"):
        (folder / f"{cell_name(setting, 0)}.json").write_bytes(data)
    shutil.copytree(folder, tmp_path / "pickles.resume")  # beside an output folder of that name
    file = tmp_path / "pickle.safetensors"
    file.write_bytes(data)

    def run(words, pickle):
        places = {
            "PICKLE": pickle, "OUT": tmp_path / "out", "MODEL": made / "model", "EXPORT": made / "export",
            "FROM_FILE": from_file(made, tmp_path),
        }  # fmt: skip
        return cli.main([str(places.get(word, word)) for word in words])

    return folder, file, opened, run


def from_file(made, tmp_path):
    """An artifact whose dense model came from a file that is gone."""
    folder = tmp_path / "from_file"
    if not folder.is_dir():
        shutil.copytree(made / "model", folder)
        body = json.loads((folder / "moee.json").read_text())
        body["model"] |= {"random_seed": None, "weights": str(tmp_path / "gone.safetensors")}
        (folder / "moee.json").write_text(json.dumps(body))
    return folder


def checkpoints(data, opened, folder):
    """The canary as people save it: a bare pickle, torch's archive, torch's older format, inside a dictionary of weights."""
    canary = Canary(opened)
    for name in ("bare.pth", "bare.pt", "bare.bin", "bare.ckpt", "bare.pth.tar"):
        (folder / name).write_bytes(data)
        yield folder / name
    inside = {"state_dict": {"head.weight": torch.zeros(2)}, "args": canary}
    for name, body in (("whole.pth", canary), ("inside.pth.tar", inside)):
        torch.save(body, folder / name)
        yield folder / name
        torch.save(body, folder / f"old-{name}", _use_new_zipfile_serialization=False)
        yield folder / f"old-{name}"


@pytest.mark.parametrize("path", PATHS)
def test_a_pickle_in_the_place_of_any_path(spread, path, capsys, tmp_path):
    folder, file, opened, run = spread
    forms = [file, folder]
    if path in ("finetune --out", "plan --out"):  # what is read there is the state beside a folder that does not exist yet
        shutil.rmtree(folder)
        forms = [folder]
    if path.endswith("--checkpoint"):  # the one flag behind which a file by torch.save is read
        (tmp_path / "saved").mkdir()
        forms += checkpoints(file.read_bytes(), opened, tmp_path / "saved")
    for form in forms:
        code = run(PATHS[path], form)
        error = capsys.readouterr().err
        missing = code == 3 and "install" in error and importlib.util.find_spec("tensorrt_rtx") is None
        assert code == 2 or missing, (form, code, error)
        assert "Traceback" not in error
        assert not opened.exists(), "a pickle was opened"


def test_pickles_with_a_manifest_that_vouches_for_them(spread, made, tmp_path, capsys):
    """Right hashes: who can write a pickle can write its hash."""
    folder, file, opened, run = spread
    engine = write_engine(tmp_path / "engine", made / "export")
    body = json.loads((engine / "engine.json").read_text())
    for name, entry in (("libmoee_plugin.so", body["plugin"]), ("moee.plan", body["engines"]["moee"])):
        shutil.copy(file, engine / name)
        entry["sha256"] = sha256_file(engine / name)
    (engine / "engine.json").write_text(json.dumps(body))
    assert run(("verify", "EXPORT", "--model", "MODEL", "--data", "digits", "--engine", "PICKLE"), engine) in (2, 3)
    resume = tmp_path / "out.resume"
    resume.mkdir()
    shutil.copy(file, resume / "state-1.safetensors")
    state = {
        "schema": "moee.finetune/3", "epoch": 1, "identity": {}, "file": "state-1.safetensors", "sha256": sha256_file(file),
        "step": 1.0, "train_loss": [1.0], "validation_loss": [1.0, 1.0], "best_epoch": 1,
    }  # fmt: skip
    write_json(resume / "state.json", state)
    assert run(("finetune", "MODEL", "--data", "digits", "--out", "OUT"), file) == 2
    assert not opened.exists(), "a pickle was opened"
