"""Writing whole or not at all, where names can be exchanged and where not; leftovers of the dead and files of the living."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys

import pytest

from exporter.terminal.failures import explain
from moee.errors import UserError
from moee.store import exchange
from moee.store.artifact import read_manifest, write_json, write_manifest
from moee.store.atomic import atomic_file, atomic_folder, remove_folder
from moee.store.scratch import temporary_folder
from tests.reliability import faults
from tests.reliability.commands import COMMANDS, copy, prepare
from tests.reliability.runner import tree
from tests.reliability.test_kill import under, uninterrupted


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture(params=["exchange", "two renames"])
def names(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(exchange, "libc_renameat2", lambda: None)


def test_replacing_a_folder(tmp_path, names):
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "out", force=True) as folder:
            (folder / "file").write_text(text)
            assert not (tmp_path / "out").exists() or (tmp_path / "out" / "file").read_text() == "first"
    assert (tmp_path / "out" / "file").read_text() == "second" and hidden(tmp_path) == []


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path, names):
    with pytest.raises(UserError, match="appeared while this ran"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("theirs")
    assert (tmp_path / "out" / "file").read_text() == "theirs" and hidden(tmp_path) == []


def test_a_failure_leaves_the_former_content(tmp_path, names):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.json").read_text() == "1\n" and hidden(tmp_path) == []


DIE = """
import os, signal, sys
from moee.store.atomic import atomic_folder
from moee.store.scratch import temporary_folder
with atomic_folder(sys.argv[1]) as folder, temporary_folder(sys.argv[2]) as scratch:
    (folder / "half").write_text("x")
    (scratch / "tokens").write_text("x")
    print("ready", flush=True)
    if sys.argv[3] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


@pytest.mark.parametrize("fate", ["die", "live"])
def test_only_the_dead_are_swept(tmp_path, fate):
    """The next writer of the same name removes a killed one's folders, and leaves those of one that still writes."""
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", DIE, str(out), str(scratch), fate], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    if fate == "die":
        assert other.wait() == -signal.SIGKILL
    left = hidden(tmp_path)
    assert len(left) == 1 and len(list(scratch.iterdir())) == 1
    with atomic_folder(out) as folder, temporary_folder(scratch):
        (folder / "whole").write_text("x")
    assert hidden(tmp_path) == ([] if fate == "die" else left)
    assert len(list(scratch.iterdir())) == (0 if fate == "die" else 1)
    other.communicate()
    assert [p.name for p in out.iterdir()] == ["whole"]


def test_other_names_are_never_swept(tmp_path):
    """Not another output's folder, not a user's file, not a link."""
    for name in (".other.0123abcd.tmp", ".out.0123abc.tmp", ".out.0123abcd.tmp.txt", ".out.zzzzzzzz.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "keep").mkdir()
    (tmp_path / ".out.0123abcd.tmp").symlink_to(tmp_path / "keep")
    (tmp_path / ".out.0123abce.tmp").write_text("a file")
    before = hidden(tmp_path)
    with atomic_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == before and (tmp_path / "keep").is_dir()


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    (tmp_path / ".out.0123abcd.tmp").mkdir()

    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == [".out.0123abcd.tmp"] and (tmp_path / "out").is_dir()


def test_a_kill_between_two_renames_is_mended(tmp_path):
    """What `_publish` has moved aside comes back when the artifact is read, or when it is written again."""
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("former")
        write_manifest(folder, "m.json", "moee.model/1", {})
    os.rename(tmp_path / "out", tmp_path / ".out.0123abcd.old")
    assert read_manifest(tmp_path / "out", "m.json", "moee.model/1")
    os.rename(tmp_path / "out", tmp_path / ".out.0123abcd.old")
    with pytest.raises(UserError, match="exists"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "former" and hidden(tmp_path) == []


def test_a_reader_does_not_take_what_a_living_writer_has_moved_aside(tmp_path, monkeypatch):
    """Between the two renames the place is empty; a reader then waits for nothing and changes nothing."""
    monkeypatch.setattr(exchange, "libc_renameat2", lambda: None)
    with atomic_folder(tmp_path / "out") as folder:
        write_manifest(folder, "m.json", "moee.model/1", {"text": "former"})
    seen = []

    def accept(path):
        seen.append(path.name)
        if path != tmp_path / "out":
            with pytest.raises(UserError, match="is not a folder"):
                read_manifest(tmp_path / "out", "m.json", "moee.model/1")
            assert path.is_dir()

    with atomic_folder(tmp_path / "out", force=True, accept=accept) as folder:
        write_manifest(folder, "m.json", "moee.model/1", {"text": "new"})
    assert read_manifest(tmp_path / "out", "m.json", "moee.model/1")["text"] == "new"
    assert len(seen) == 2 and seen[1].endswith(".old") and hidden(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOSPC, errno.EIO])
def test_a_finished_folder_is_kept_whatever_the_system_says(tmp_path, names, number):
    (tmp_path / "out").mkdir()

    def accept(path):
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=f"{os.strerror(number)}; the result is kept as") as raised:
        with atomic_folder(tmp_path / "out", force=True, accept=accept) as folder:
            (folder / "file").write_text("hours")
    kept = next(path for path in tmp_path.iterdir() if path.name != "out")
    assert (kept / "file").read_text() == "hours" and list((tmp_path / "out").iterdir()) == []
    assert explain(raised.value)[0] == (2 if number == errno.ENOENT else 3)


def test_a_nested_file_of_the_manifests_name_is_listed(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "m.json").write_text("{}")
        write_manifest(folder, "m.json", "moee.model/1", {})
    assert list(read_manifest(tmp_path / "out", "m.json", "moee.model/1")["files"]) == ["part/m.json"]
    (tmp_path / "out" / "part" / "m.json").write_text("changed")
    with pytest.raises(UserError, match="does not match"):
        read_manifest(tmp_path / "out", "m.json", "moee.model/1")


def test_remove_folder(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_text("x")
    remove_folder(tmp_path / "state")
    remove_folder(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_where_names_cannot_be_exchanged(zygote, place):
    """Every one of the last changes of an extraction that replaces another, on a file system without RENAME_EXCHANGE."""
    command = COMMANDS["extract"]
    work = prepare(zygote, place, command)
    before = under(tree(work), "extracted")
    reference, _, _ = uninterrupted(zygote, command, work, place, command.forced())
    run = copy(work, place / "point")
    changes = zygote.run(command.forced(), run, no_renameat2=True).changes
    assert tree(run) == reference
    aside = 0
    for at in range(changes - 8, changes + 1):
        run = copy(work, place / "point")
        outcome = zygote.run(command.forced(), run, mode=faults.KILL, at=at, no_renameat2=True)
        assert outcome.killed
        output = under(tree(run), "extracted")
        if not output:
            aside += 1
            assert zygote.run(["finetune", "extracted", "--epochs", "1", "--out", "tuned"], run).code == 0  # a reader mends it
            shutil.rmtree(run / "tuned")
            output = under(tree(run), "extracted")
        assert output in (before, under(reference, "extracted"))
        again = zygote.run(command.forced(), run, no_renameat2=True)
        assert again.code == 0, again.text
        assert tree(run) == reference
    assert aside == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), 3, "/a/b: No space left on device; free some space"),
        (OSError("2048 requested and 0 written"), 3, "is the disk full?"),
        (PermissionError(errno.EACCES, "x", "/a/b"), 2, "/a/b: Permission denied; change its permissions"),
        (FileNotFoundError(errno.ENOENT, "x", "/a/b"), 2, "/a/b: No such file or directory; it was removed"),
        (MemoryError(), 3, "out of memory"),
        (KeyError("a\nb"), 1, "unexpected KeyError"),
        (UserError("say it"), 2, "say it"),
    ],
)
def test_sentences(error, code, said):
    given, sentence = explain(error)
    assert given == code and said in sentence and "\n" not in sentence
