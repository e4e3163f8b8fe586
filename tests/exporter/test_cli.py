"""The command line: a small run from end to end, exit codes, one sentence for bad input."""

import functools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter import cli, doctor
from exporter.doctor import _gpu
from exporter.terminal import interrupts
from exporter.terminal.loading import load
from moee.errors import UserError
from moee.models.model import load_model
from tests.conftest import tiny_spec
from tests.exporter.command import run

KMEANS = ["--clusters", "4", "--cluster-tokens", "400", "--tokens", "2000"]
MODEL = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    """Every model of the command line is the tiny ViT, and digits are a handful of its own images."""
    import exporter.pretrained
    import moee.stages.session
    from tests.conftest import tiny_images

    def resolve(name, data="", options=None, *others):
        if name != MODEL:
            return original(name, data, options, *others)
        update = {"weights": options.checkpoint, "random_seed": None}
        return tiny_spec().model_copy(update=update if options.checkpoint else {})

    original = exporter.pretrained.resolve
    monkeypatch.setattr(exporter.pretrained, "resolve", resolve)

    def tiny(real, made):
        return lambda source, *args, **kwargs: made() if source == "digits" else real(source, *args, **kwargs)

    images = functools.partial(tiny_images, 40, classes=10)
    monkeypatch.setattr(moee.stages.session, "load_splits", tiny(moee.data.sources.load_splits, lambda: (images(), images())))
    monkeypatch.setattr("moee.data.sources.load_data", tiny(moee.data.sources.load_data, images))


def test_whole_chain(tmp_path, capsys):
    out = {name: tmp_path / name for name in ("extracted", "tuned", "export")}
    assert run("extract", MODEL, "--data", "digits", *KMEANS, "--out", out["extracted"]) == 0
    assert run("finetune", out["extracted"], "--epochs", 1, "--out", out["tuned"]) == 0
    assert not (tmp_path / "tuned.resume").exists()
    assert run("export", out["tuned"], "--out", out["export"]) == 0
    assert run("verify", out["export"], "--out", tmp_path / "verify") == 0
    assert run("bench", out["export"], "--runs", 3, "--batch", 1, "--out", tmp_path / "latency.json") == 0
    said = capsys.readouterr()
    text = said.out
    assert "parity passed" in text and "speed-up" in text
    assert re.search(r"saves \d+% of the MACs", text)
    assert re.search(r"(nothing was learned|epoch 1 of 1 was best): .* moee export ", text)
    assert "x as fast as dense at batch 1, measured with onnxruntime" in text
    assert run("report", tmp_path, "--out", tmp_path / "r.html") == 0
    assert "is not shown" not in capsys.readouterr().err, "the extracted model is a stage of the tuned one"
    assert {p.name for p in (tmp_path / "verify").iterdir()} == {"parity.json", "junit.xml", "summary.md"}
    assert json.loads((tmp_path / "verify" / "parity.json").read_text())["passed"] is True
    manifest = json.loads((out["tuned"] / "moee.json").read_text())
    assert set(manifest["info"]["stages"]) == {"extracted", "tuned"}
    cost = manifest["info"]["stages"]["tuned"]["cost"]
    assert cost["moee"]["macs"] < cost["dense"]["macs"]


def test_verify_exits_1_when_parity_fails(tmp_path, capsys):
    assert run("extract", MODEL, "--data", "digits", *KMEANS, "--out", tmp_path / "a") == 0
    assert run("extract", MODEL, "--data", "digits", *KMEANS, "--keep", 0.7, "--out", tmp_path / "b") == 0
    assert run("export", tmp_path / "a", "--out", tmp_path / "export") == 0
    assert run("verify", tmp_path / "export", "--model", tmp_path / "b") == 1
    assert "parity FAILED" in capsys.readouterr().out


def test_verify_refuses_an_export_of_a_model_with_other_experts(tmp_path, capsys):
    assert run("extract", MODEL, "--data", "digits", *KMEANS, "--out", tmp_path / "a") == 0
    fewer = ["--clusters", "3", *KMEANS[2:]]
    assert run("extract", MODEL, "--data", "digits", *fewer, "--out", tmp_path / "b") == 0
    assert run("export", tmp_path / "a", "--out", tmp_path / "export") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "export", "--model", tmp_path / "b", "--out", tmp_path / "v.json") == 2
    error = capsys.readouterr().err
    assert "was not exported from the model it is held against: 'blocks.0.mlp' has 4 experts there, 3 here; give --model" in error
    assert error.count("\n") == 1 and not (tmp_path / "v.json").exists()


def refused(capsys, *argv):
    code = run(*argv)
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("moee: ")]
    assert len(lines) == 1, error
    return lines[0]


def test_bad_input_is_one_sentence_and_changes_nothing(tmp_path, capsys):
    extract = ["extract", MODEL, "--data", "digits", *KMEANS, "--out"]
    assert run(*extract, tmp_path / "done") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()}
    capsys.readouterr()
    assert "exists; choose another --out" in refused(capsys, *extract, tmp_path / "done")
    assert "unknown model" in refused(capsys, "extract", "vit_smal", "--data", "digits", "--out", tmp_path / "x")
    assert "matches no MLP" in refused(capsys, *extract, tmp_path / "x", "--exclude", "blocks.99")
    assert "--keep" in refused(capsys, *extract, tmp_path / "x", "--keep", "7")
    assert "unknown preset" in refused(capsys, *extract, tmp_path / "x", "--preset", "nice")
    assert "expected digits, photos" in refused(capsys, "extract", MODEL, "--data", "nowhere", "--out", tmp_path / "x")
    assert "is not a folder" in refused(capsys, "export", tmp_path / "absent", "--out", tmp_path / "x")
    assert "run `moee export " in refused(capsys, "verify", tmp_path / "done")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    foreign = refused(capsys, *extract, tmp_path / "x", "--checkpoint", tmp_path / "foreign.safetensors")
    assert "belongs to another model" in foreign
    torch.save(load_model(tiny_spec()), tmp_path / "whole.bin")
    whole = refused(capsys, *extract, tmp_path / "x", "--weights", tmp_path / "whole.bin")
    assert "wants timm.models.vision_transformer" in whole
    assert {p.name: p.read_bytes() for p in (tmp_path / "done").iterdir()} == before
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_usage_errors_exit_2():
    assert run("extract") == 2
    assert run("no-such-command") == 2


def test_interruption_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moee.artifacts.checkpoint.write_manifest", interrupt)
    assert run("extract", MODEL, "--data", "digits", *KMEANS, "--out", tmp_path / "x") == 130
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_program_is_read_is_no_traceback():
    """And one before its words are read."""
    code = """
import os, signal, sys
class Hook:
    def find_spec(self, name, path, target=None):
        if name == "exporter.commands":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hook())
from exporter.start import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (130, "moee: interrupted; nothing was begun\n", "")


def test_an_error_that_a_library_makes_of_an_interrupt_is_the_interrupt(monkeypatch, capsys):
    """safetensors says that the file is none, and the user would fetch good weights again."""
    def load(name):
        interrupts.ARRIVED.set()
        raise UserError("weights are not valid safetensors; fetch or convert them again")

    monkeypatch.setattr(cli, "load", load)
    try:
        assert run("extract", MODEL, "--data", "digits", "--out", "x") == 130
    finally:
        interrupts.ARRIVED.clear()
    assert capsys.readouterr().err == "moee: interrupted; earlier results are as they were\n"


def test_an_interrupt_before_the_words_are_read_is_a_sentence(monkeypatch, capsys):
    def interrupted(shown=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupted)
    assert run("doctor") == 130
    assert capsys.readouterr().err == "moee: interrupted; earlier results are as they were\n"


def test_doctor_lists_what_is_missing(capsys):
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert "ONNX Runtime" in text and "TensorRT" in text
    assert "run ONNX on CPU" in text and "run ONNX on CUDA" in text and "run tensorrt-rtx engines" in text


def test_doctor_says_where_the_operator_comes_from(monkeypatch):
    """A wheel brings it; else a compiler makes it; with neither it is missing."""

    def found(libraries, compiler):
        monkeypatch.setattr("plugins.cpu.build.prebuilt", lambda: libraries)
        monkeypatch.setattr("exporter.doctor.shutil.which", lambda name: compiler)
        (check,) = [c for c in doctor.checks() if c.name.startswith("operator")]
        return check.found

    monkeypatch.setattr(doctor, "_runners", list)
    assert found({platform.machine(): Path("x.so")}, None) == "came with moee"
    assert found({"riscv": Path("x.so")}, "/bin/g++") == "compiled by /bin/g++" and found({}, None) is None


@pytest.mark.parametrize(("capability", "words"), [((8, 7), "Board, sm_87"), ((7, 5), "Board, sm_75: unsupported by the routed")])
def test_doctor_says_which_gpu_the_kernels_support(monkeypatch, capability, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Board")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: capability)
    said = _gpu()
    assert said.startswith(words) and ("unsupported" in said) == (capability == (7, 5))


def test_imports_that_take_long_say_so_and_cheap_checks_come_first(monkeypatch, capsys, tmp_path):
    begun = []
    monkeypatch.setattr("exporter.terminal.loading.PATIENCE_S", 0.01)
    monkeypatch.setattr("importlib.import_module", lambda name: (begun.append(name), time.sleep(0.3)))
    load("torch")
    assert capsys.readouterr().err == "loading libraries (PyTorch, timm and others)\n" and begun == ["torch"]
    argv = ["compress", "test_vit", "--data", "digits", "--target-macs", "0.5", "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2 and "give --max-drop" in capsys.readouterr().err
    assert begun == ["torch"], "refused before anything was imported"


@pytest.mark.slow
def test_an_interrupt_in_a_destructor_is_not_lost():
    """Python prints it and goes on."""
    program = """
import os, signal, time
from exporter.terminal.interrupts import lose_none
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
lose_none()
try:
    late = Late()
    del late
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "interrupted\n" and ran.stderr == ""


def test_help_imports_nothing_that_takes_long():
    """docs/install.md has its time; NumPy alone adds a quarter, torch and timm several seconds."""
    code = """
import sys
from exporter.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "timm", "torchvision", "onnx", "onnxruntime", "numpy", "scipy", "sklearn", "matplotlib", "shtab", "PIL"}
sys.exit(" ".join(heavy & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "usage: moee" in done.stdout, done.stderr


def test_the_shells_of_completion_are_shtabs(capsys):
    import shtab

    assert list(cli.SHELLS) == shtab.SUPPORTED_SHELLS
    with pytest.raises(SystemExit) as ended:
        cli.main(["--print-completion", "bash"])
    assert ended.value.code == 0 and "--max-drop" in capsys.readouterr().out


@pytest.mark.parametrize("line, said", [
    ("compress M --data D --out O --maxdrop 1", "moee compress: unrecognized arguments: --maxdrop 1 (did you mean --max-drop?)"),
    ("plugin build --smm 87", "moee plugin build: unrecognized arguments: --smm 87 (did you mean --sm?)"),
    ("inspect a b", "moee inspect: unrecognized arguments: b; see moee inspect --help"),
])  # fmt: skip
def test_a_flag_that_a_command_does_not_have_is_answered_by_that_command(line, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err
