"""ssh to a stand-in device: what is refused, and that whatever ends a conversation leaves nothing there."""

import shutil
import subprocess
import tarfile
import time

import pytest

from exporter.deploy import DEPLOY
from exporter.targets import remote
from exporter.targets.registry import target_of
from exporter.targets.remote import checked_host, converse, new_mark, tar_blocks, tar_size
from exporter.targets.ssh import MEASURE
from moee.errors import MissingDependency, StepFailed, UserError
from tests.exporter.device_double import path_with, write_device


@pytest.fixture
def device(tmp_path, monkeypatch):
    reach = write_device(tmp_path / "device")
    monkeypatch.setenv("PATH", path_with(reach)["PATH"])
    return tmp_path / "device"


@pytest.mark.parametrize("host", ["jetson", "nvidia@192.168.55.1", "a_b.example.com"])
def test_hosts(host):
    assert checked_host(host) == host


@pytest.mark.parametrize(
    "host",
    ["", "-oProxyCommand=touch x", "user@-oProxyCommand=x", "a b", "a;b", "a$(b)", "a\nb", "@a", "a@", "a@b@c", "jetson:22", "ä",
     "a" * 256],
)  # fmt: skip
def test_what_ssh_or_a_shell_might_read_otherwise_is_refused_before_ssh_runs(host, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("ssh was run"))
    with pytest.raises(UserError, match="expected ssh:HOST"):
        target_of(f"ssh:{host}")
    with pytest.raises(UserError, match="expected ssh:HOST"):
        converse(host, "true", mark="m")


def test_root_is_refused():
    with pytest.raises(UserError, match="nothing is run as root"):
        target_of("ssh:root@jetson")


def test_a_script_gets_its_input_and_gives_its_answer(device):
    heard = []
    answer = converse("jetson", "cat; echo; echo m; echo done", [b"x" * 70000, b"\ny"], mark="m", line=heard.append)
    assert (answer.code, answer.text, answer.complaint) == (0, "done\n", "") and heard == ["x" * 200, "y"]
    answer = converse("jetson", "echo one >&2; echo two >&2; exit 7", mark="m")
    assert (answer.code, answer.text, answer.complaint) == (7, None, "two")
    answer = converse("jetson", "exit 0", [b"x" * 10_000_000], mark="m")
    assert (answer.code, answer.text) == (0, None), "an end that does not read is no error of ours"


def test_a_device_that_says_nothing_or_too_much_is_given_up(device, monkeypatch):
    monkeypatch.setattr(remote, "GRACE_S", 0.2)
    with pytest.raises(MissingDependency, match="jetson has answered nothing for 0.3 s"):
        converse("jetson", "sleep 60", mark="m", silence_s=0.3)
    with pytest.raises(StepFailed, match="more than 1 MiB"):
        converse("jetson", "echo m; cat /dev/zero", mark="m")
    with pytest.raises(StepFailed, match="more than 1 MiB"):
        converse("jetson", "cat /dev/zero", mark="m")


def test_without_ssh_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="apt-get install openssh-client"):
        converse("jetson", "true", mark="m")


def test_a_folder_as_a_stream(tmp_path):
    folder = tmp_path / "folder"
    long = "candidates/" + "a" * 64 + "/" + "b" * 80
    (folder / long).mkdir(parents=True)
    sizes = {"empty": 0, "small": 1, "block": 512, "large": 200_000}
    for name, size in sizes.items():
        (folder / long / name).write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    archive, sent = tmp_path / "archive.tar", []
    archive.write_bytes(b"".join(tar_blocks(folder, sent.append)))
    assert archive.stat().st_size == tar_size(folder) >= sent[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    for name in sizes:
        assert (tmp_path / "out" / long / name).read_bytes() == (folder / long / name).read_bytes()
    assert (tmp_path / "out" / "run.sh").stat().st_mode & 0o111


@pytest.fixture
def endless(tmp_path):
    """A folder whose measure.sh takes a minute, and says so first."""
    folder = tmp_path / "endless"
    folder.mkdir()
    trap = "trap 'kill $child; echo ended > \"$HOME/ended\"; exit 143' TERM"
    (folder / "measure.sh").write_text(f"#!/bin/sh\nset -eu\nsleep 60 & child=$!\n{trap}\necho begun\nwait\n")
    (folder / "measure.sh").chmod(0o755)
    shutil.copy2(DEPLOY / "remote.sh", folder)
    return folder


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("shell", [shell for shell in ("dash", "bash") if shutil.which(shell)] or ["sh"])
def test_an_interrupt_ends_the_script_there_and_leaves_nothing(tmp_path, monkeypatch, endless, shell):
    reach = write_device(tmp_path / "device", shell=shell)
    monkeypatch.setenv("PATH", path_with(reach)["PATH"])

    def interrupt(line):
        assert line == "begun" and list((tmp_path / "device" / "tmp").iterdir())
        raise KeyboardInterrupt

    script = MEASURE.format(size=tar_size(endless), rounds=2, mark=new_mark())
    with pytest.raises(KeyboardInterrupt):
        converse("jetson", script, tar_blocks(endless), hold=True, mark="m", line=interrupt)
    wait_for(lambda: not list((tmp_path / "device" / "tmp").iterdir()))
    assert (tmp_path / "device" / "home" / "ended").read_text() == "ended\n"


def test_a_connection_that_breaks_while_sending_leaves_nothing(device, endless):
    def broken():
        yield next(tar_blocks(endless))
        raise KeyboardInterrupt

    script = MEASURE.format(size=tar_size(endless), rounds=2, mark="m")
    with pytest.raises(KeyboardInterrupt):
        converse("jetson", script, broken(), hold=True, mark="m")
    wait_for(lambda: not list((device / "tmp").iterdir()))
    assert not (device / "home" / "ended").exists(), "half a folder is not run"


def test_the_scripts_suit_any_login_shell():
    """A line in single quotes: csh and fish take it as sh does."""
    script = MEASURE.format(size=1, rounds=1, mark="m")
    assert not set("'\\!\n") & set(script)
    for name in ("measure.sh", "device.sh", "remote.sh"):
        text = (DEPLOY / name).read_text()
        for word in ("sudo", "python", "[[ ", "local ", "function "):
            assert word not in text, f"{name} has {word}"
