"""A full disk, a folder that cannot be written, input that disappears or cannot be read: one sentence, exit code 2 or 3, and
earlier results stay.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from tests.plugins import built
from tests.reliability import faults
from tests.reliability.commands import COMMANDS, copy, prepare
from tests.reliability.runner import tree
from tests.reliability.test_kill import compiled, spread, under, uninterrupted

# points a command: a full disk from the n-th change on, one failed change, a read-only file system from the n-th change on
POINTS = {
    "extract": 10, "extract clear-moe": 4, "finetune": 10, "export": 2, "verify": 4, "bench": 3, "build": 3, "bundle": 2,
    "plan": 4, "ablate": 4, "ablate-clear": 4, "report": 4, "plots": 3,
}  # fmt: skip
QUICK = {"extract": 1, "finetune": 1}
KINDS = {
    "full": (faults.FAIL_FROM, errno.ENOSPC), "one failure": (faults.FAIL_ONCE, errno.ENOSPC),
    "read-only": (faults.FAIL_FROM, errno.EROFS),
}  # fmt: skip


def sentence(outcome, codes=(2, 3)):
    """The one sentence of a refusal."""
    assert outcome.code in codes, f"exit {outcome.code}: {outcome.text}"
    assert "Traceback" not in outcome.text, outcome.text
    lines = [line for line in outcome.text.strip().splitlines() if line.startswith("moee: ")]
    assert lines, outcome.text
    assert "unexpected" not in lines[-1], lines[-1]
    return lines[-1]


def whole(run, command, before, reference):
    """The output is the former one, the new one, or (where a run resumes) a part of the new one."""
    output = under(tree(run), command.out)
    if command.resumes:
        parts = {k: v for k, v in output.items() if not k.endswith("/") and "/." not in k and k in reference}
        return {k: reference[k] for k in parts} == parts
    return output in (before, under(reference, command.out))


def remove_kept(said, run, command, reference):
    """A finished result that its place refused lies beside it, whole."""
    kept = re.search(r"the result is kept as (\S+?)(;|$)", said)
    if kept is None:
        return
    path = run / kept[1]
    files = {command.out + name.removeprefix(path.name): text for name, text in under(tree(run), path.name).items()}
    assert files == under(reference, command.out), said
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def fail_at_points(zygote, name, count, place, record=None):
    command = COMMANDS[name]
    work = prepare(zygote, place, command, built.plugin() if name == "build" else None, compiled(name))
    before = under(tree(work), command.out)
    reference, changes, _ = uninterrupted(zygote, command, work, place, command.forced())
    tally = {"points": 0, "refused": 0, "went on": 0}
    for kind, (mode, number) in KINDS.items():
        for at in spread(count, changes, seed=number):
            run = copy(work, place / "point")
            outcome = zygote.run(command.forced(), run, mode=mode, at=at, error=number)
            where = f"{name}, {kind} at {at} of {changes}: {outcome.text}"
            tally["points"] += 1
            if outcome.code == 0:  # what failed was the label cache, or clearing up after the work was done
                assert under(tree(run), command.out) == under(reference, command.out), where
                tally["went on"] += 1
            else:
                said = sentence(outcome)
                assert os.strerror(number) in said or "disk full" in said, where
                tally["refused"] += 1
                remove_kept(said, run, command, reference)
            assert whole(run, command, before, reference), where
            again = zygote.run(command.forced(), run)
            assert again.code == 0 and tree(run) == reference, f"{where}\nthen: {again.text}"
    if record:
        record(f"disk {name}", {"command": name, "changes": changes, **tally})
    return tally


@pytest.mark.parametrize("name", list(QUICK))
def test_disk_that_fails(name, zygote, place):
    assert fail_at_points(zygote, name, QUICK[name], place)["refused"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(POINTS))
def test_disk_that_fails_at_many_points(name, tracing_zygote, place, record):
    assert fail_at_points(tracing_zygote, name, POINTS[name], place, record)["refused"] > POINTS[name]


@contextmanager
def mounted(target, *options):
    """A mount for the length of a test; skips where this process may not."""
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(target)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("size_kib", [4, pytest.param(64, marks=pytest.mark.slow), 128])
def test_output_on_a_small_file_system(size_kib, zygote, place):
    work = prepare(zygote, place, COMMANDS["extract"])
    argv = [*COMMANDS["extract"].argv[:-1]]
    with mounted(work / "small", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs") as small:
        outcome = zygote.run([*argv, "small/out"], work)
        assert "No space left on device" in sentence(outcome, (3,))
        assert list(small.iterdir()) == []


def test_scratch_on_a_small_file_system(zygote, place):
    """What the calibration's tokens take is said before the work."""
    work = prepare(zygote, place, COMMANDS["extract"])
    with mounted(work / "small", "-t", "tmpfs", "-o", "size=16k", "tmpfs") as small:
        outcome = zygote.run(COMMANDS["extract"].forced(), work, env={"TMPDIR": str(small)})
        assert "16 KiB are free there" in sentence(outcome, (3,))
        assert list(small.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 40_000])
def test_file_size_limit(limit, zygote, place):
    work = prepare(zygote, place, COMMANDS["extract"])
    before = under(tree(work), "extracted")
    outcome = zygote.run(COMMANDS["extract"].forced(), work, limits={"RLIMIT_FSIZE": limit})
    assert "File too large" in sentence(outcome, (3,))
    assert under(tree(work), "extracted") == before


def test_few_file_handles(zygote, place):
    work = prepare(zygote, place, COMMANDS["extract"])
    outcome = zygote.run(COMMANDS["extract"].forced(), work, limits={"RLIMIT_NOFILE": 8})
    assert sentence(outcome)


def test_read_only_mount(zygote, place):
    work = prepare(zygote, place, COMMANDS["finetune"])
    with mounted(work / "fixed", "--bind", "-o", "ro", str(work)) as fixed:
        before = tree(fixed, raw=True)
        env = {"MOEE_CACHE": str(work / "cache"), "TMPDIR": str(work / "tmp")}
        for name in ("extract", "finetune"):
            outcome = zygote.run(COMMANDS[name].forced(), fixed, root=work, env=env)
            assert "Read-only file system" in sentence(outcome, (2,))
        env = {"MOEE_CACHE": str(fixed / "cache"), "TMPDIR": str(work / "tmp")}
        argv = [*COMMANDS["extract"].argv[:-1], str(work / "elsewhere")]
        assert zygote.run(argv, fixed, root=work, env=env).code == 0  # a cache that cannot be written is no error
        assert tree(fixed, raw=True).items() >= before.items()


def test_folder_without_permission(zygote, place):
    """Root may write anywhere, so the command runs as nobody."""
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    work = prepare(zygote, place, COMMANDS["finetune"])
    subprocess.run(["chmod", "-R", "a+rX", str(work)], check=True)
    (work / "tmp").chmod(0o777)
    before = tree(work, raw=True)
    for name in ("extract", "finetune"):
        outcome = zygote.run(COMMANDS[name].forced(), work, unprivileged=True)
        assert "Permission denied" in sentence(outcome, (2,))
    assert tree(work, raw=True) == before


UNREADABLE = {
    "extract": ["w.safetensors"],
    "finetune": ["extracted/model.safetensors", "extracted/moee.json", "extracted/probe.safetensors"],
    "verify": ["export/export.json", "export/portable.onnx", "export/moee.data", "extracted/moee.json"],
    "report": ["extracted/moee.json"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(UNREADABLE))
def test_unreadable_input(name, tracing_zygote, place):
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    command = COMMANDS[name]
    work = prepare(tracing_zygote, place, command)
    subprocess.run(["chmod", "-R", "a+rwX", str(work)], check=True)
    before = tree(work, raw=True)
    for victim in UNREADABLE[name]:
        (work / victim).chmod(0)
        outcome = tracing_zygote.run(command.forced(), work, unprivileged=True)
        (work / victim).chmod(0o666)
        said = sentence(outcome, (2,))
        assert victim.rpartition("/")[2] in said, said
        assert tree(work, raw=True) == before


def test_unreadable_images_are_skipped_and_named(zygote, place):
    if os.getuid() != 0:
        pytest.skip("needs root to become another user")
    command = COMMANDS["extract"]
    work = prepare(zygote, place, command)
    subprocess.run(["chmod", "-R", "a+rwX", str(work)], check=True)
    (work / "images/train/class0/0.png").chmod(0)
    outcome = zygote.run(command.forced(), work, unprivileged=True)
    assert outcome.code == 0 and "skipped unreadable image" in outcome.text and "class0/0.png" in outcome.text
    for image in (work / "images/train").rglob("*.png"):
        image.chmod(0)
    before = under(tree(work), "extracted")
    assert "could be read" in sentence(zygote.run(command.forced(), work, unprivileged=True), (2,))
    assert under(tree(work), "extracted") == before


POINTS_GONE = 2  # an input
# what disappears while the command runs
GONE = {
    "extract": ["images", "w.safetensors"],
    "finetune": ["images", "extracted"],
    "export": ["extracted"],
    "verify": ["export", "extracted", "images"],
    "bench": ["export"],
    "build": ["export", "plugin.so"],
    "bundle": ["export"],
    "plan": ["images"],
    "ablate": ["images"],
    "report": ["extracted"],
}


def take_away(zygote, name, points, place):
    command = COMMANDS[name]
    work = prepare(zygote, place, command, built.plugin() if name == "build" else None, compiled(name))
    before = under(tree(work), command.out)
    _, changes, _ = uninterrupted(zygote, command, work, place, command.forced())
    refused = 0
    for victim in GONE[name]:
        for at in spread(points, changes, seed=len(victim)):
            run = copy(work, place / "point")
            outcome = zygote.run(command.forced(), run, mode=faults.MOVE, at=at, victim=run / victim)
            assert (run / f"{victim}.gone").exists()
            if outcome.code != 0:
                sentence(outcome)
                refused += 1
                if not command.resumes:
                    assert under(tree(run), command.out) == before
            os.rename(run / f"{victim}.gone", run / victim)
            shutil.rmtree(run / f"{command.out}.resume", ignore_errors=True)
            again = zygote.run(command.forced(), run)
            assert again.code == 0, again.text
    return refused


@pytest.mark.slow
def test_input_that_disappears(zygote, place):
    assert take_away(zygote, "finetune", 1, place) >= 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", list(GONE))
def test_input_that_disappears_at_many_points(name, tracing_zygote, place, record):
    refused = take_away(tracing_zygote, name, POINTS_GONE, place)
    record(f"gone {name}", {"command": name, "points": POINTS_GONE * len(GONE[name]), "refused": refused})
