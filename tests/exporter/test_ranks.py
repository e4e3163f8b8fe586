"""The command line under torchrun."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file

from exporter.cli import main
from moee.data.sources import load_data
from moee.data.transform import model_transform
from moee.errors import UserError
from moee.measure.evaluation import run
from moee.natural_order import natural_key

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 30  # a killed rank: the others are gone after this, torchrun included; docs/scale.md states 10 without its start-up


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def torchrun(world: int, arguments: list[str], cache: Path, module: str = "exporter.cli") -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MOEE_CACHE": str(cache)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "-m", module]
    return subprocess.Popen(
        launcher + arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def extraction(weights: Path, out: Path, *more: str) -> list[str]:
    command = ["extract", "test_vit", "--weights", str(weights), "--img-size", "32", "--data", "digits", "--out", str(out)]
    return [*command, "--tokens", "1500", "--refit-tokens", "1500", *more]


def folder_of(tiny_export, root: Path) -> Path:
    """The export's images as files, in folders of the class that its dense model gives them: it is right on all."""
    transform = model_transform(tiny_export.moee.model)
    (root / "train" / "0").mkdir(parents=True)
    for index, image in enumerate(tiny_export.data.images):
        transform.picture(image).save(root / "train" / "0" / f"{index}.png")
    shutil.copytree(root / "train", root / "val")
    answers = run(tiny_export.moee.dense(), load_data(str(root), transform, "val")).features.argmax(1)
    for path, answer in zip(sorted((root / "val" / "0").iterdir(), key=lambda p: natural_key(p.name)), answers, strict=True):
        for split in ("train", "val"):
            folder = root / "labelled" / split / str(int(answer))
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{split}-{path.name}")
    return root / "labelled"


@pytest.mark.slow
def test_extract_and_verify_under_torchrun_give_what_one_process_gives(weights, tiny_export, tmp_path):
    pictures = folder_of(tiny_export, tmp_path / "pictures")

    def verification(name):
        out = ["--out", str(tmp_path / name), "--threads", "1", "--images", "40", "--max-shapes", "8", "--max-drop", "50"]
        out += ["--data", str(pictures)]
        return ["verify", str(tiny_export.folder()), "--model", str(tiny_export.root / "model"), *out]

    many = [[free_port(), extraction(weights, tmp_path / "extracted-2")], [free_port(), verification("verified-2")]]
    running = torchrun(2, [json.dumps(many)], tmp_path / "cache", "tests.exporter.several_commands")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for one in (extraction(weights, tmp_path / "extracted-1", "--threads", "1"), verification("verified-1")):
            assert main(one) == 0
    finally:
        torch.set_num_threads(threads)
    text, _ = running.communicate(timeout=300)
    assert running.returncode == 0, text
    assert text.count("written to") == 1 and text.count("calibrate: done") == 1, "rank 0 alone reports"

    one, two = (tmp_path / f"extracted-{n}" / "model.safetensors" for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()
    assert json.loads((two.parent / "moee.json").read_text())["info"]["ranks"]["world"] == 2

    figures = [json.loads((tmp_path / f"verified-{n}" / "parity.json").read_text()) for n in (1, 2)]
    for body in figures:
        del body["seconds"], body["files"]
    assert figures[0] == figures[1] and figures[0]["accuracy"]["images"] == 40


@pytest.mark.slow
def test_a_place_that_must_not_be_written_is_refused_by_all_ranks_in_one_sentence(weights, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "photo.jpg").write_bytes(b"mine")
    command = [str(data) if word == "digits" else word for word in extraction(weights, data, "--force")]
    running = torchrun(2, command, tmp_path / "cache")
    text, _ = running.communicate(timeout=120)
    assert running.returncode != 0 and text.count("moee: --out") == 1 and "is the input" in text, text
    assert [path.name for path in data.iterdir()] == ["photo.jpg"]


def test_other_commands_and_half_an_environment_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # main sets them; this takes it back
    assert main(["doctor"]) == 2
    assert "doctor runs in one process; start it without torchrun" in capsys.readouterr().err
    from moee.parallel.joining import joined

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="start the ranks with torchrun"), joined():
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ranks_of(launcher: subprocess.Popen, world: int) -> list[psutil.Process]:
    for _ in range(600):
        children = [p for p in psutil.Process(launcher.pid).children() if "exporter.cli" in " ".join(p.cmdline())]
        if len(children) == world:
            return sorted(children, key=lambda p: int(p.environ()["RANK"]))
        time.sleep(0.1)
    raise AssertionError("torchrun started no ranks")


# what rank 0 says before the kill: at the start of clustering, before the refit, before the last measurements
STEPS = {
    "extract": ("calibrate: done", "MLPs analysed: done", "refit: done"),
    "finetune": ("dense on training images: done", "dense on training images: done", "finetune: done"),
}


def told_until(launcher: subprocess.Popen, step: str) -> str:
    """What the ranks print up to the line that starts with `step`."""
    assert launcher.stdout is not None
    said = ""
    for line in launcher.stdout:
        said += line
        if line.startswith(step):
            break
    return said


@pytest.mark.slow
@pytest.mark.parametrize(("command", "victim"), [("extract", 0), ("extract", 1), ("finetune", 1)])
def test_a_killed_rank_stops_the_others_and_a_rerun_gives_the_same_bytes(weights, tmp_path, command, victim):
    assert main(extraction(weights, tmp_path / "one", "--threads", "1")) == 0

    def arguments(out):
        tuning = ["finetune", str(tmp_path / "one"), "--epochs", "6", "--lr", "1e-4", "--out", str(out)]
        return extraction(weights, out) if command == "extract" else tuning

    undisturbed = torchrun(2, arguments(tmp_path / "whole"), tmp_path / "cache")
    text, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, text
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    if command == "extract":
        assert whole == (tmp_path / "one" / "model.safetensors").read_bytes()
    killed = 0
    pauses = random.Random(victim)
    for attempt, step in enumerate(STEPS[command]):
        out, cache = tmp_path / f"out-{attempt}", tmp_path / f"cache-{attempt}"
        running = torchrun(2, arguments(out), cache)
        ranks = ranks_of(running, 2)
        said = told_until(running, step)
        time.sleep(pauses.uniform(0, 1))
        if ranks[victim].is_running() and running.poll() is None:
            ranks[victim].send_signal(signal.SIGKILL)
        text = said + running.communicate(timeout=STOP_S)[0]
        if running.returncode == 0:
            assert (out / "model.safetensors").read_bytes() == whole
            continue
        killed += 1
        assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
        told = re.findall(r"^moee: .*", text, re.M)
        assert len(told) <= 1 and all("killed or failed" in line or "SIGTERM" in line for line in told), text
        ours = text.split("torch/distributed/elastic")[0]
        assert "Traceback" not in ours, ours
        if out.exists():  # killed behind the rename
            assert (out / "model.safetensors").read_bytes() == whole
            continue
        again = torchrun(2, arguments(out), cache)
        text, _ = again.communicate(timeout=200)
        assert again.returncode == 0, text
        assert (out / "model.safetensors").read_bytes() == whole
    assert killed, "no rank was killed in time; shorten the wait"
