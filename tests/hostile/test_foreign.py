"""Files from someone else through the commands that open them: no JSON, weights that lie, archives, files of another model."""

from __future__ import annotations

import collections
import datetime
import json
import os
import resource
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import cli
from exporter.engines.build import read_engines
from exporter.targets.result import read_result, timed
from moee.errors import UserError
from moee.methods.recipe import Recipe, method_options
from moee.planning.emitted import Sending, Sent
from moee.store.artifact import sha256_file, write_manifest
from tests.conftest import tiny_spec
from tests.exporter.engines import write_engine
from tests.hostile.damage import GRAPHS, changed_manifest
from tests.reliability.tiny_vit import NAME
from tests.untrusted.test_pickles import Canary
from tests.untrusted.test_weights import HEADERS, entry, header_of

DIGITS = ("--data", "digits")
DENSE = ("extract", NAME, *DIGITS, "--out", "o", "--no-trial-export")
LINES = {  # the commands that open a JSON file first of all
    "model/moee.json": [
        ("inspect", "model"), ("finetune", "model", *DIGITS, "--out", "o"), ("export", "model", "--out", "o"),
        ("shrink", "model", "--experts", "2", *DIGITS, "--out", "o"), ("plots", "model", *DIGITS, "--out", "o"),
        ("verify", "export", "--model", "model", *DIGITS), ("verify", "--quick", "model"),
    ],
    "export/export.json": [
        ("verify", "export", "--model", "model", *DIGITS), ("verify", "--quick", "export"), ("bench", "export", "--runs", "1"),
        ("build", "export", "--out", "o"), ("bundle", "export", "--sm", "cpu", "--out", "o"),
        ("bundle", "export", "--sm", "orin", "--out", "o"), ("inspect", "export"),
    ],
    "engine/engine.json": [
        ("verify", "export", "--model", "model", *DIGITS, "--engine", "engine"),
        ("bench", "export", "--engine", "engine", "--runs", "1"),
    ],
    "plan/plan.json": [(*DENSE, "--random-weights", "0", "--plan", "plan")],
}  # fmt: skip


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(40 << 20)


def replaced(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        change(path)

    return apply


NO_JSON: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""), "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a list": lambda path: path.write_text("[]"), "null": lambda path: path.write_text("null"),
    "100,000 levels deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "100,000 lists deep": lambda path: path.write_bytes(b"[" * 100_000),
    "40 MiB": sparse, "a key twice": lambda path: path.write_text(path.read_text().replace("{", '{"schema": "x", ', 1)),
    "a key of a layer twice": lambda path: path.write_text('{"schema": "x", "files": {"a": 1, "a": 2}}'),
    "another encoding": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00\x80"), "a pickle": lambda path: path.write_bytes(b"\x80\x04N."),
    "a pipe": replaced(os.mkfifo), "a folder": replaced(os.mkdir),
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a broken link": replaced(lambda path: path.symlink_to("nowhere")), "not there": lambda path: path.unlink(),
}  # fmt: skip


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A folder with one of every file that commands read, in which the test runs."""
    for name in ("model", "export"):
        shutil.copytree(made / name, tmp_path / name)
    write_engine(tmp_path / "engine", tmp_path / "export")
    (tmp_path / "plan").mkdir()
    winner = {"method": "kmeans", "allocation": "share", "macs": 0.7, "recipe": Recipe.of(method_options()).to_json()}
    body = {"model": tiny_spec().model_dump(mode="json"), "data": "digits", "winner": winner, "points": [winner]}
    write_manifest(tmp_path / "plan", "plan.json", "moee.plan/2", body)
    (tmp_path / "RESULT.json").write_text(json.dumps({"schema": "moee.measured/1"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: tuple[str, ...], capsys, said: str = "", codes: tuple[int, ...] = (2,)) -> str:
    """The line ends with one of the codes, in one sentence that holds `said`, and has written nothing."""
    before = sorted(path.name for path in Path().iterdir())
    code = cli.main(list(words))
    text = capsys.readouterr().err.strip()
    sentence = text.splitlines()[-1] if text else ""
    assert code in codes and sentence.startswith("moee: ") and sentence.isprintable(), (words, code, text)
    assert said in sentence and "unexpected " not in text.replace("unexpected (", "") and "Traceback" not in text, (words, text)
    assert sorted(path.name for path in Path().iterdir()) == before, words
    return sentence


FEW = {"100,000 levels deep", "a key twice", "a terabyte declared", "overlapping", "runs a command", "a compressed archive",
    "four terabytes of one number"}  # fmt: skip


def kinds(table: Mapping[str, object]) -> list:
    """Those of a table, few of them in the default suite."""
    return [each if each in FEW else pytest.param(each, marks=pytest.mark.slow) for each in table]


@pytest.mark.parametrize("file", LINES)
@pytest.mark.parametrize("kind", kinds(NO_JSON))
def test_what_is_no_manifest_is_refused_by_every_command_that_opens_it(place, file, kind, capsys, tried):
    NO_JSON[kind](place / file)
    for words in LINES[file]:
        sentence = refused(words, capsys)
        assert Path(file).name in sentence or Path(file).parts[0] in sentence, sentence
        tried("manifests through commands", f"{file}: {kind}", "refused")


SAFETENSORS = {
    **HEADERS, "a terabyte declared": header_of({"a": entry(shape=(2**20, 2**18), offsets=(0, 2**40))}),
    **{f"{kind} of no bytes": header_of({"a": entry(dtype=kind, shape=(0,), offsets=(0, 0))}, b"")
       for kind in ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16",
                    "I32", "U32", "F64", "I64", "U64", "C64")},
}  # fmt: skip


@pytest.mark.parametrize("kind", kinds(SAFETENSORS))
def test_weights_that_lie_are_refused_by_every_command_that_opens_them(place, kind, capsys, tried):
    """As weights of a dense model, and as those of an artifact, behind a right hash."""
    Path("w.safetensors").write_bytes(SAFETENSORS[kind])
    Path("model/model.safetensors").write_bytes(SAFETENSORS[kind])
    changed_manifest(place / "model", lambda body: body["files"].update(
        {"model.safetensors": sha256_file("model/model.safetensors")}))  # fmt: skip
    for words in [(*DENSE, "--checkpoint", "w.safetensors"), ("inspect", "model"), ("export", "model", "--out", "o")]:
        refused(words, capsys)
        tried("weights through commands", kind, "refused")


def nested(levels: int) -> list:
    found: list = []
    for _ in range(levels):
        found = [found]
    return found


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(64 << 20))


def lying(path: Path) -> None:
    """A member that says it is larger than the whole file."""
    torch.save({"w": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(data)


def saved(value) -> Callable[[Path], None]:
    return lambda path: torch.save(value(path) if callable(value) else value, path)


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


PICKLED: dict[str, tuple[Callable[[Path], None], str]] = {
    "runs a command": (saved(lambda path: {"w": torch.zeros(1), "x": Canary(path.parent / "opened")}), "wants "),
    "a module": (saved(lambda path: torch.nn.Linear(2, 2)), "wants "),
    "a date": (saved({"at": datetime.date(2024, 1, 1)}), "wants "),
    "a path": (saved({"at": Path("/x")}), "wants "), "a counter of another": (saved({"c": collections.deque([1])}), "wants "),
    "a function": (saved({"f": print}), "wants "), "a list": (saved([torch.zeros(1)]), "holds a list"),
    "a tensor": (saved(torch.zeros(1)), "holds a Tensor"), "a number": (saved(3), "holds a int"),
    "no tensors": (saved({"a": 1}), "holds no tensors"),
    "200 levels": (saved({"a": nested(200)}), "holds no tensors"),
    "four terabytes of one number": (saved({"w": torch.zeros(1).expand(2**20, 2**20)}), "claims tensors of"),
    "a sparse tensor": (saved({"w": torch.eye(2).to_sparse()}), ""), "a compressed archive": (bomb, "compressed archive"),
    "an archive that lies": (lying, ""), "TorchScript": (scripted, "TorchScript"),
    "cut short": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), ""),
    "empty": (lambda path: path.write_bytes(b""), "is empty"), "text": (lambda path: path.write_text("import os"), ""),
    "100,000 marks": (lambda path: path.write_bytes(b"\x80\x02" + b"(" * 100_000 + b"."), ""),
    "memory without end": (lambda path: path.write_bytes(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little")), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", kinds(PICKLED))
def test_checkpoints_that_want_more_than_tensors(place, kind, capsys, tried):
    """Nothing of them is run, and no memory is taken for what they say."""
    make, said = PICKLED[kind]
    make(place / "w.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = ("--checkpoint", "w.pth")
    for words in [(*DENSE, *weights), ("inspect", NAME, *weights), ("compress", NAME, *DIGITS, "--out", "o", *weights)]:
        assert "w.pth" in refused(words, capsys, said)
        tried("checkpoints through commands", kind, "refused")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KiB"
    assert not (place / "opened").exists()


def other_export(place: Path) -> None:
    graph = onnx.load(place / "export" / "tensorrt.onnx", load_external_data=False)
    graph.producer_name = "another"
    (place / "export" / "tensorrt.onnx").write_bytes(graph.SerializeToString())
    rehash(place)


def rehash(place: Path) -> None:
    path = place / "export" / "export.json"
    body = json.loads(path.read_text())
    body["files"] = {name: sha256_file(place / "export" / name) for name in body["files"]}
    path.write_text(json.dumps(body))


def other_result(place: Path) -> None:
    state = {"power_mode": None, "clocks": [], "temperatures": []}
    body = {
        "schema": "moee.measured/1", "emit": "e" * 64, "device": {"model": "x", "gpu": None}, "tensorrt": "10.3.0",
        "batch": 8, "precision": "fp16", "rounds": 1, "environment": [state, state],
        "dense": {"id": "d" * 64, "gpu_ms": [1.0], "host_ms": [1.0]},
        "candidates": [{"id": "b" * 64, "gpu_ms": [1.0], "host_ms": [1.0]}],
    }  # fmt: skip
    (place / "RESULT.json").write_text(json.dumps(body))


OTHERS = {
    "a plan": (lambda place: None, (*DENSE, "--random-weights", "0", "--plan", "plan"), "was made for tiny"),
    "weights": (lambda place: torch.save({"a.w": torch.zeros(2)}, place / "w.pth"),
                ("export", "model", "--checkpoint", "w.pth", "--out", "o"), "w.pth"),
    "an engine": (other_export, ("bench", "export", "--engine", "engine", "--runs", "1"), "export"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_another_model_are_refused(place, kind, capsys, tried):
    change, words, said = OTHERS[kind]
    change(place)
    refused(words, capsys, said)
    tried("files of another model", kind, "refused")


def test_the_gate_of_an_export_beside_another_model_does_not_pass(place, capsys, tried):
    state = load_file("model/model.safetensors")
    state["blocks.0.mlp.b_out"] += 1
    save_file(state, "model/model.safetensors")
    changed_manifest(place / "model", lambda body: body["files"].update(
        {"model.safetensors": sha256_file("model/model.safetensors")}))  # fmt: skip
    assert cli.main(["verify", "export", *DIGITS]) == 1
    assert "unexpected" not in capsys.readouterr().err
    tried("files of another model", "a model, verified", "failed its gate")


@pytest.mark.parametrize("kind", kinds(NO_JSON))
def test_what_is_no_result_of_a_device_is_refused(place, kind, tried):
    NO_JSON[kind](place / "RESULT.json")
    with pytest.raises(UserError, match="RESULT.json"):
        read_result("RESULT.json")
    tried("manifests through commands", f"RESULT.json: {kind}", "refused")


def test_a_result_of_other_candidates_is_refused(place, tried):
    other_result(place)
    sending = Sending(emit="a" * 64, dense="d" * 64, batch=8, precision="fp16", candidates=[Sent(id="b" * 64)])
    with pytest.raises(UserError, match="is of other candidates"):
        timed(read_result("RESULT.json"), sending, "RESULT.json")
    tried("files of another model", "a result of other candidates", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in LINES["export/export.json"][:6] if words[0] != "bench"], ids=" ".join)
def test_a_graph_that_breaks_the_contract_is_refused_by_every_command_that_opens_it(place, words, capsys, tried):
    """Behind right hashes. `bench` opens the other graphs."""
    whole = (place / "export" / "tensorrt.onnx").read_bytes()
    for kind, (change, _) in GRAPHS.items():
        graph = onnx.load(place / "export" / "tensorrt.onnx")
        change(graph)
        onnx.save(graph, place / "export" / "tensorrt.onnx")
        rehash(place)
        refused(words, capsys, codes=(2, 3))
        (place / "export" / "tensorrt.onnx").write_bytes(whole)
        tried("graphs through commands", kind, "refused")
    assert read_engines(place / "engine")
